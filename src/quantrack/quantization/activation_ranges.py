"""Steps: set the activation quantizers' ranges from the observed statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import UsageError
from quantrack.quantization.job import ActivationStatistics, QuantizationJob
from quantrack.quantization.layers import layer_plan, quantized_layers, set_activation_range
from quantrack.schemes import ACTIVATION_LEVELS

Range = tuple[float, float]


@dataclass(frozen=True)
class MinMaxActivationRanges:
    """Ranges that clip nothing seen during calibration, and little else.

    They are widened by `margin` over the number of pictures, at most doubled: the fewer were seen, the further others
    will reach, and where channels are equalized, any of them may be clipped. The first convolution's input has the
    range that pictures can have, 0 to 1, whatever was seen.
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UsageError(f"min_max_activation_ranges: margin={self.margin}: must not be negative")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        wider = 1 + min(1.0, self.margin / len(job.calibration.paths))
        roles = convolution_roles(job.model)

        def choose(name: str, seen: ActivationStatistics) -> Range:
            return (0.0, 1.0) if roles[name] is Role.FIRST else (wider * seen.minimum, wider * seen.maximum)

        return set_ranges(job, choose)


@dataclass(frozen=True)
class PercentileActivationRanges:
    """Ranges that clip the rarest values on either side: those beyond `percentile` (in percent)."""

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile={self.percentile}: must lie above 50 and at most at 100")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        return set_ranges(job, lambda name, seen: self.range(seen))

    def range(self, seen: ActivationStatistics) -> Range:
        """From the values drawn, so that one passing outlier of a picture does not stretch the grid."""
        ordered = seen.sample.sort().values
        outside = round((1 - self.percentile / 100) * (len(ordered) - 1))
        return float(ordered[outside]), float(ordered[len(ordered) - 1 - outside])


@dataclass(frozen=True)
class MseActivationRanges:
    """The range of least squared error (clipping and rounding) among shrunken ranges."""

    candidates: int = 50
    smallest_shrink: float = 0.3

    def __post_init__(self) -> None:
        if self.candidates < 2 or not 0 < self.smallest_shrink < 1:
            raise UsageError("mse activation ranges: candidates must be at least 2 and smallest_shrink in 0..1")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        kinds = {name: layer_plan(layer).activation for name, layer in quantized_layers(job.model).items()}
        return set_ranges(job, lambda name, seen: self.range(seen, kinds[name]))

    def range(self, seen: ActivationStatistics, activation: str | None) -> Range:
        """Both ends shrink together; they hold 0 in any case, and are equally far from it for a symmetric grid."""
        low, high, levels = min(seen.minimum, 0.0), max(seen.maximum, 0.0), ACTIVATION_LEVELS
        if activation == "symmetric":
            low, high, levels = -max(-low, high), max(-low, high), ACTIVATION_LEVELS - 1
        shrinks = torch.linspace(1.0, self.smallest_shrink, self.candidates).tolist()
        errors = [rounding_error(seen.sample, low * shrink, high * shrink, levels) for shrink in shrinks]
        best = shrinks[min(range(len(errors)), key=errors.__getitem__)]
        return low * best, high * best


def set_ranges(job: QuantizationJob, choose: Callable[[str, ActivationStatistics], Range]) -> Mapping[str, float]:
    """Give each activation quantizer the range chosen for it, by layer name; how much of the seen range that is."""
    kept = []
    for name, layer in quantized_layers(job.model).items():
        if layer.input_quant.is_quant_enabled:
            seen = job.statistics[name]
            low, high = choose(name, seen)
            set_activation_range(layer, low, high)
            kept.append((high - low) / max(seen.maximum - seen.minimum, 1e-12))
    return {"quantizers": float(len(kept))} | ({"range_kept_mean": sum(kept) / len(kept)} if kept else {})


def rounding_error(values: Tensor, low: float, high: float, levels: int) -> float:
    """Mean squared error of values on a grid of as many steps over [low, high]."""
    step = max(high - low, 1e-12) / levels
    rounded = torch.round(values.clamp(low, high) / step) * step
    return float((rounded - values).square().mean())
