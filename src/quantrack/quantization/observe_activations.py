"""Step: watch every convolution's input in the float model over the calibration pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantrack.errors import QuantrackError, UsageError
from quantrack.progress import track
from quantrack.quantization.job import ActivationStatistics, QuantizationJob

MOST_VALUES = 1_000_000  # of a layer, from all batches together


class _Watcher:
    """Running minimum and maximum of each channel of one layer's input, and values drawn from each batch."""

    def __init__(self, values_per_picture: float, generator: torch.Generator) -> None:
        self.values_per_picture, self.generator = values_per_picture, generator
        self.lowest: list[Tensor] = []
        self.highest: list[Tensor] = []
        self.drawn: list[Tensor] = []
        self.channels: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].contiguous()
        self.lowest.append(x.amin(dim=(0, 2, 3)).cpu())
        self.highest.append(x.amax(dim=(0, 2, 3)).cpu())
        flat = x.flatten()
        count = max(1, min(round(self.values_per_picture * len(x)), len(flat)))  # fewer of a smaller last batch
        drawn = torch.randint(len(flat), (count,), generator=self.generator)
        self.drawn.append(flat[drawn.to(flat.device)].cpu())
        self.channels.append((drawn // x[0, 0].numel() % x.shape[1]).to(torch.int16))

    def statistics(self, name: str) -> ActivationStatistics:
        low, high = torch.stack(self.lowest).amin(dim=0), torch.stack(self.highest).amax(dim=0)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise QuantrackError(f"{name}: its input is not finite on the calibration pictures; check the weights")
        return ActivationStatistics(low, high, torch.cat(self.drawn), torch.cat(self.channels).int())


@dataclass(frozen=True)
class ObserveActivations:
    """One streaming pass; the statistics stay in the job for later steps.

    `values` are drawn from each full batch and layer, 8 bytes each, a million of a layer at most; the range is exact.
    """

    values: int = 8192

    def __post_init__(self) -> None:
        if self.values < 1:
            raise UsageError(f"observe_activations: values={self.values}: must be positive")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        generator = torch.Generator().manual_seed(job.seed)
        values = min(self.values, max(1, MOST_VALUES // job.batch_count))
        full_batch = min(job.batch, len(job.calibration.paths))
        watchers: dict[str, _Watcher] = {}
        with ExitStack() as hooks, torch.no_grad():
            for name, module in job.float_model.named_modules():
                if isinstance(module, nn.Conv2d):
                    watchers[name] = _Watcher(values / full_batch, generator)
                    hooks.enter_context(module.register_forward_pre_hook(watchers[name]))
            for batch in track(job.batches(), "calibrating", total=job.batch_count):
                job.float_model(batch)
        job.statistics = {name: watcher.statistics(name) for name, watcher in watchers.items()}
        return {"images": float(len(job.calibration.paths))}
