"""Random weights through which signals pass.

With Ultralytics' own ones a deep network gives the same for every picture, and for weights that are all zero.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantrack.detector.load import Detector

FIXED = "dfl"  # in the name of a convolution whose weights are no weights


def weighted(model: nn.Module) -> dict[str, nn.Conv2d]:
    """A network's convolutions that have weights, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {name: module for name, module in found.items() if FIXED not in name}


@torch.no_grad()
def wake(model: nn.Module, size: int) -> None:
    """Give each convolution results of unit variance, and a random bias, for noise of this size."""
    generator = torch.Generator().manual_seed(0)

    def hook(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        module.weight.div_(output.std().clamp_min(1e-12))
        if module.bias is not None:
            module.bias.copy_(0.5 * torch.randn(module.bias.shape, generator=generator))
        return module._conv_forward(inputs[0], module.weight, module.bias)

    handles = [module.register_forward_hook(hook) for module in weighted(model).values()]
    model(torch.rand(1, 3, size, size, generator=generator))
    for handle in handles:
        handle.remove()


def woken(detector: Detector, size: int) -> Detector:
    """The detector with such weights; it is another one to the cache as well."""
    model = copy.deepcopy(detector.model)
    wake(model, size)
    return replace(detector, model=model, digest=detector.digest[::-1])


def error_shares(
    found: Tensor, expected: Tensor, model: nn.Module, images: Tensor, parts: Callable[[Tensor], tuple[Tensor, ...]]
) -> list[float]:
    """How far what was found is from what is expected, as a share of how far the model without its weights is.

    `parts` are the parts of an output that are judged each for itself.
    """
    lost = copy.deepcopy(model)
    for module in weighted(lost).values():
        nn.init.zeros_(module.weight)
    with torch.no_grad():
        without = lost(images)
    pairs = zip(parts(found), parts(expected), parts(without), strict=True)
    return [float((own - wanted).abs().mean() / (empty - wanted).abs().mean()) for own, wanted, empty in pairs]


def boxes_and_scores(output: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a one-to-many output [B, 4 + classes, anchors]."""
    return output[:, :4], output[:, 4:]
