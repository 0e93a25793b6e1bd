"""Step: watch every convolution's input in the float model over the calibration pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantrack.errors import QuantrackError
from quantrack.progress import track
from quantrack.quantization.job import ActivationStatistics, QuantizationJob


class _Watcher:
    """Running minimum, maximum and channel power of one layer's input; memory does not grow."""

    def __init__(self) -> None:
        self.minimum, self.maximum = float("inf"), float("-inf")
        self.power: Tensor | None = None
        self.images = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        low, high = torch.aminmax(x)
        self.minimum, self.maximum = min(self.minimum, float(low)), max(self.maximum, float(high))
        power = x.square().mean(dim=(2, 3)).sum(dim=0)
        self.power = power if self.power is None else self.power + power
        self.images += x.shape[0]

    def statistics(self, name: str) -> ActivationStatistics:
        if self.power is None:
            raise QuantrackError(f"{name}: this convolution never ran during calibration")
        if not torch.isfinite(self.power).all():
            raise QuantrackError(f"{name}: its input is not finite on the calibration pictures; check the weights")
        return ActivationStatistics(self.minimum, self.maximum, self.power / self.images)


@dataclass(frozen=True)
class ObserveActivations:
    """One streaming pass; the statistics stay in the job for later steps."""

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        watchers = {
            name: (_Watcher(), module)
            for name, module in job.float_model.named_modules()
            if isinstance(module, nn.Conv2d)
        }
        handles = [module.register_forward_pre_hook(watcher) for watcher, module in watchers.values()]
        try:
            with torch.no_grad():
                for batch in track(job.batches(), "calibrating", total=job.batch_count):
                    job.float_model(batch)
        finally:
            for handle in handles:
                handle.remove()
        job.statistics = {name: watcher.statistics(name) for name, (watcher, _) in watchers.items()}
        return {"images": float(len(job.calibration.paths))}
