"""Step: shift each bias so that quantizing the layer no longer moves its mean output.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv:1906.04721), section 4.2, in its empirical form. One walk over the calibration batches: each
layer is compared with its float twin on the input that truly reaches it, and corrected within the
pass, before the next layer sees it. Matching the float network's own means instead, errors of
earlier layers included, was tried and ruins a detector: nearly all anchors are background, and
their mean score decides the shift of the few that are objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantrack.progress import track
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import quantized_layers, require_scales, set_bias

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


@dataclass(frozen=True)
class BiasCorrection:
    """Runs last: whatever changes weights or scales afterwards undoes it."""

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        require_scales(job.model, "bias_correction")
        layers = quantized_layers(job.model)
        shifts = {name: torch.zeros(layer.out_channels, device=job.device) for name, layer in layers.items()}
        with ExitStack() as hooks, torch.no_grad():
            for name, layer in layers.items():
                corrector = _corrector(job.float_model.get_submodule(name), shifts[name])
                hooks.enter_context(layer.register_forward_hook(corrector))
            for batch in track(job.batches(), "correcting biases", total=job.batch_count):
                job.model(batch)
        images = len(job.calibration.paths)
        for name, layer in layers.items():
            shift = shifts[name] / images
            set_bias(layer, shift if layer.bias is None else layer.bias + shift)
        largest = max(float((shift / images).abs().max()) for shift in shifts.values())
        return {"largest_shift": largest}


def _corrector(float_layer: nn.Module, total: Tensor) -> Hook:
    """A hook that corrects this pass's output and adds the shift, per picture, to `total`."""

    def correct(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shift = (float_layer(inputs[0]) - output).mean(dim=(0, 2, 3))
        total.add_(shift * output.shape[0])
        corrected: Tensor = output + shift[None, :, None, None]
        return corrected

    return correct
