"""What a recipe works on: the float detector, the model becoming quantized, calibration batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from quantrack.datasets.calibration import CalibrationSet
from quantrack.detector.load import Detector
from quantrack.quantization.bit_plan import BitPlan
from quantrack.schemes import Scheme


@dataclass(frozen=True)
class ActivationStatistics:
    """One convolution's input over the calibration pictures: each channel's range [C], and values drawn from it.

    `sample` [N] are these values, `sample_channels` [N] the channels that they are of.
    """

    channel_minimum: Tensor
    channel_maximum: Tensor
    sample: Tensor
    sample_channels: Tensor

    @property
    def minimum(self) -> float:
        return float(self.channel_minimum.min())

    @property
    def maximum(self) -> float:
        return float(self.channel_maximum.max())

    @property
    def channel_variance(self) -> float:
        """The variance about each channel's own mean, averaged over the values drawn."""
        zeros = torch.zeros_like(self.channel_minimum)
        counts = zeros.index_add(0, self.sample_channels, torch.ones_like(self.sample)).clamp_min(1)
        means = zeros.index_add(0, self.sample_channels, self.sample) / counts
        return float((self.sample - means[self.sample_channels]).square().mean())

    def divided(self, divisors: Tensor) -> ActivationStatistics:
        """What would have been seen of the input with its channels divided by these [C]."""
        own = divisors.to(self.sample.device)
        return ActivationStatistics(
            self.channel_minimum / own,
            self.channel_maximum / own,
            self.sample / own[self.sample_channels],
            self.sample_channels,
        )


@dataclass
class CachedTime:
    """Seconds that earlier runs spent on results that this job reads from the cache, each counted once."""

    seconds: float = 0.0
    counted: set[str] = field(default_factory=set)

    def count(self, key: str, seconds: float) -> None:
        """Add the seconds of a cached result, unless this job has counted them or done the work itself."""
        if key not in self.counted:
            self.counted.add(key)
            self.seconds += seconds


@dataclass
class QuantizationJob:
    """The state that a recipe's steps hand on. `float_model` is never changed.

    `seed` is that of every random draw of the steps; `plan` gives each convolution's weight bits, where
    roles are not to decide them. Jobs that are made of one another share `cached_time`.
    """

    float_model: nn.Module
    model: nn.Module
    scheme: Scheme
    calibration: CalibrationSet
    imgsz: int
    device: torch.device
    model_digest: str = ""
    head: str = ""
    seed: int = 0
    plan: BitPlan | None = None
    batch: int = 8
    statistics: Mapping[str, ActivationStatistics] = field(default_factory=dict)
    cached_time: CachedTime = field(default_factory=CachedTime)

    def batches(self) -> Iterator[Tensor]:
        """Calibration inputs, shape [<=batch, 3, imgsz, imgsz], on the job's device."""
        for array in self.calibration.batches(self.imgsz, self.batch):
            yield torch.from_numpy(array).to(self.device, memory_format=memory_format(self.device))

    def pictures(self, indices: Sequence[int], batch: int) -> Iterator[Tensor]:
        """The calibration inputs of these indices, as `batches` gives all."""
        chosen = replace(self.calibration, paths=tuple(self.calibration.paths[index] for index in indices))
        for array in chosen.batches(self.imgsz, batch):
            yield torch.from_numpy(array).to(self.device, memory_format=memory_format(self.device))

    @property
    def batch_count(self) -> int:
        return -(-len(self.calibration.paths) // self.batch)


@dataclass(frozen=True)
class StepReport:
    """What a step did: its name, its time, and its figures by name; `cached` if an earlier run did it.

    The time is that of the whole step, as it took when each part of it was done.
    """

    step: str
    seconds: float
    figures: Mapping[str, float]
    cached: bool = False


class Step(Protocol):
    """One algorithm with its settings; `apply` changes `job.model` and returns its figures."""

    def apply(self, job: QuantizationJob) -> Mapping[str, float]: ...


def memory_format(device: torch.device) -> torch.memory_format:
    """How pictures and weights lie in memory: on a CPU channels last, as convolutions are a third faster so."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def new_job(
    detector: Detector, scheme: Scheme, calibration: CalibrationSet, imgsz: int, device: torch.device, seed: int
) -> QuantizationJob:
    """A job whose model is still the float one, ready for a recipe's first step."""
    float_model = copy.deepcopy(detector.model).to(device)  # the detector stays where it is
    float_model = float_model.to(memory_format=memory_format(device))  # type: ignore[call-overload]
    return QuantizationJob(
        float_model,
        copy.deepcopy(float_model),
        scheme,
        calibration,
        imgsz,
        device,
        model_digest=detector.digest,
        head=detector.head,
        seed=seed,
    )


def first_pictures(job: QuantizationJob, count: int) -> QuantizationJob:
    """The same job on its first calibration pictures only."""
    return replace(job, calibration=job.calibration.first(count))
