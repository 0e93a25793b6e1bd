"""Where in a picture an error of a layer reaches the detections: the positions that matter.

Nearly all positions of a picture are background, whose errors no detection shows. The importance of a
position is the squared gradient, there, of a random projection of the logits and boxes of the objects
that the detector expects: an estimate of the Gauss-Newton diagonal (Hutchinson's; Martens,
arXiv:1412.1193, section 8) of their squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from quantrack.detector.heads import RawOutputs, raw_outputs
from quantrack.quantization.divergence import BOX_SIDES, bins_of, highest_nearby

PARAMETERS_TIMES_PICTURES = 32_000_000  # YOLOv10m: 2 pictures, about 2 GB; YOLOv10n: more than a batch


@dataclass(frozen=True)
class OutputImportance:
    """Of one convolution's outputs, for one batch; every picture counts alike.

    `positions` [B, H, W] is each position's share of its picture's importance; `covariance` [O, O] that of
    the gradients of the output channels, summed over positions and pictures; None if it was not asked for.
    """

    positions: Tensor
    covariance: Tensor | None


def without_covariance(shares: Tensor) -> OutputImportance:
    """From one batch's gradients [B, O, H, W], each picture's divided by their norm."""
    return OutputImportance(shares.square().sum(dim=1), None)


def with_covariance(shares: Tensor) -> OutputImportance:
    """As `without_covariance`, and the covariance; on a CPU that takes a third more time."""
    flat = shares.flatten(2)
    return OutputImportance(shares.square().sum(dim=1), torch.einsum("bop,bqp->oq", flat, flat))


Summary = Callable[[Tensor], OutputImportance]


def output_importance(
    model: nn.Module, names: list[str], pictures: Tensor, generator: torch.Generator, summarize: Summary
) -> dict[str, OutputImportance]:
    """Of each named convolution, for one batch [B, 3, S, S]: `summarize` of the gradients of its outputs.

    A picture's gradients are divided by their norm: a few pictures have gradients a hundred times those
    of others, from a single output whose linear approximation goes much too far.
    """
    parts = [
        _importance_at_once(model, names, part, generator, summarize)
        for part in torch.split(pictures, pictures_of_a_backward_pass(model))
    ]
    return {name: _together([part[name] for part in parts]) for name in parts[0]}


def _together(parts: Sequence[OutputImportance]) -> OutputImportance:
    covariances = [part.covariance for part in parts if part.covariance is not None]
    return OutputImportance(
        torch.cat([part.positions for part in parts]),
        torch.stack(covariances).sum(dim=0) if covariances else None,
    )


def pictures_of_a_backward_pass(model: nn.Module) -> int:
    """How many pictures a backward pass takes at once; what it keeps of each grows with the network."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return max(1, PARAMETERS_TIMES_PICTURES // max(1, parameters))


def _importance_at_once(
    model: nn.Module, names: list[str], pictures: Tensor, generator: torch.Generator, summarize: Summary
) -> dict[str, OutputImportance]:
    found: dict[str, OutputImportance] = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(gradient: Tensor) -> None:
            norms = gradient.square().sum(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-30)
            found[name] = summarize(gradient / norms)

        def watch_output(module: nn.Module, inputs: object, output: Tensor) -> None:
            output.register_hook(keep)  # type: ignore[no-untyped-call]

        return watch_output

    with ExitStack() as hooks, torch.enable_grad(), raw_outputs(model) as tap:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(watch(name)))
        model(pictures.clone().requires_grad_())
        random_projection(tap.taken(), generator).backward()  # type: ignore[no-untyped-call]
    return found


def random_projection(outputs: RawOutputs, generator: torch.Generator) -> Tensor:
    """The sum of what decides the detections, each with a random sign and the weight of its error; a scalar.

    Of the classes that is the logit of each peak, with its neighbours (`logits_nearby`). What moves one object's logit
    before another's costs mAP, of sure objects as of others, so the squared error of a logit is weighed by its score
    alone: how many objects the detector expects there. So is that of the boxes, at all positions.
    """
    terms = []
    for boxes, classes in zip(outputs.boxes, outputs.classes, strict=True):
        logits = classes.detach()
        scores = logits.sigmoid()
        weight = (logits == highest_nearby(logits)) * scores.sqrt()
        terms.append((random_signs(classes, generator) * weight * logits_nearby(classes)).sum())
        weight = scores.amax(dim=1, keepdim=True).sqrt() * box_weight(boxes.detach())
        terms.append((random_signs(boxes, generator) * weight * boxes).sum())
    return torch.stack(terms).sum()


def logits_nearby(classes: Tensor) -> Tensor:
    """The logarithm of the sum of the exponentials of each logit [B, C, H, W] and of its neighbours'.

    Where two neighbours are nearly as good, rounding decides which of them a one-to-one head leaves an object to: the
    same detection, and the same sum, though both of its logits change.

    >>> object_here = torch.full((1, 1, 1, 5), -9.0)
    >>> object_here[..., 1] = 2.0
    >>> [round(float(logits_nearby(moved)[..., 2]), 3) for moved in (object_here, object_here.roll(1))]
    [2.0, 2.0]
    """
    rows, columns = classes.shape[2:]
    padded = pad(classes, (1, 1, 1, 1), value=-torch.inf)
    highest = highest_nearby(classes.detach())
    shifted = [padded[:, :, top : top + rows, left : left + columns] for top in range(3) for left in range(3)]
    return torch.stack([(one - highest).exp() for one in shifted]).sum(dim=0).log() + highest


def box_weight(boxes: Tensor) -> Tensor:
    """The root of how much each box output [B, 4 * bins, H, W] moves the divergence of its object."""
    if boxes.shape[1] == BOX_SIDES:
        return torch.ones_like(boxes)
    shares = bins_of(boxes).softmax(dim=2)
    return (shares * (1 - shares)).sqrt().reshape(boxes.shape)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 and 1, drawn on the CPU so that every device draws the same."""
    drawn = torch.randint(2, like.shape, generator=generator, dtype=torch.float32)
    return (2 * drawn - 1).to(like.device)
