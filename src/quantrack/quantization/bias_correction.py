"""Step: shift each bias so that the layer's mean output is the float one again.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv:1906.04721), section 4.2, in its empirical form. One walk over the calibration batches: each
layer's output is corrected within the pass, before the next layer sees it, so that later layers are
corrected for what truly reaches them without one pass per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantrack.progress import track
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import quantized_layers

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


@dataclass(frozen=True)
class BiasCorrection:
    """Runs last: whatever changes weights or scales afterwards undoes it."""

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        layers = quantized_layers(job.model)
        float_means: dict[str, Tensor] = {}
        shifts = {name: torch.zeros(layer.out_channels, device=job.device) for name, layer in layers.items()}
        handles = []
        for name, layer in layers.items():
            handles.append(job.float_model.get_submodule(name).register_forward_hook(_recorder(name, float_means)))
            handles.append(layer.register_forward_hook(_corrector(name, float_means, shifts)))
        try:
            with torch.no_grad():
                for batch in track(job.batches(), "correcting biases", total=job.batch_count):
                    job.float_model(batch)
                    job.model(batch)
        finally:
            for handle in handles:
                handle.remove()
        images = len(job.calibration.paths)
        for name, layer in layers.items():
            _add_to_bias(layer, shifts[name] / images)
        largest = max(float((shift / images).abs().max()) for shift in shifts.values())
        return {"largest_shift": largest}


def _recorder(name: str, means: dict[str, Tensor]) -> Hook:
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        means[name] = output.mean(dim=(0, 2, 3))

    return record


def _corrector(name: str, float_means: Mapping[str, Tensor], shifts: dict[str, Tensor]) -> Hook:
    def correct(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shift = float_means[name] - output.mean(dim=(0, 2, 3))
        shifts[name] += shift * output.shape[0]
        return output + shift[None, :, None, None]

    return correct


def _add_to_bias(layer: nn.Conv2d, shift: Tensor) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.clone(), requires_grad=False)
    else:
        layer.bias.data += shift
