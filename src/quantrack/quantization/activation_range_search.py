"""Step: shrink the activation ranges whose rounding the detector's outputs notice.

A range that clips nothing is right for nearly every layer, but where a few values lie far out, its
steps are too wide for all others (one input of YOLOv10n alone makes most of what 8-bit activations
cost). What clipping costs, neither the values nor their error tell, so it is measured: each range is
tried in a network that is float otherwise, against the float network's raw outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from quantrack.detector.heads import head_levels
from quantrack.errors import UsageError
from quantrack.progress import say
from quantrack.quantization.activation_ranges import Range
from quantrack.quantization.divergence import Divergence
from quantrack.quantization.job import QuantizationJob, first_pictures
from quantrack.quantization.layer_trials import trial_errors
from quantrack.quantization.layers import (
    QuantizedConvolution,
    activation_quantization,
    another_activation_range,
    layer_plan,
    quantized_input,
    quantized_layers,
    require_scales,
    set_activation_range,
)
from quantrack.quantization.step_cache import cached, step_keys
from quantrack.schemes import Scheme

INPUTS_ONLY = Scheme("inputs only", 8, 8)
Errors = Mapping[str, Mapping[float, float]]  # by layer and share of its range
LOOK = 2  # pictures that are enough to tell which layers cost most


@dataclass(frozen=True)
class ActivationRangeSearch:
    """Runs after a step that sets ranges. Layers whose range makes `least_share` or more of what all ranges
    cost, on a few pictures, try shrunken ones on the first `images` of the calibration pictures; the best is kept.

    The others keep theirs: what clipping costs on pictures that were not seen, the seen ones hide, so that a
    small gain there is a loss elsewhere (benchmarks/decisions.md). Where channels are not equalized, more of them
    gain (docs/accuracy.md).

    Time: a part of a pass over the few pictures for each layer, and of one over `images` for each range tried.
    """

    least_share: float = 0.1
    shrinks: tuple[float, ...] = (0.7, 0.5, 0.35, 0.25, 0.18)
    images: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.least_share < 1 or self.images < 1:
            raise UsageError("activation range search: least_share must lie in 0..1 and images be positive")
        if not self.shrinks or not all(0 < shrink < 1 for shrink in self.shrinks):
            raise UsageError("activation range search: shrinks must lie in 0..1, at least one")

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        if job.scheme.activation_bits is None:
            return {}
        require_scales(job.model, "activation_range_search")
        if not head_levels(job.model):
            say("activation range search: the model has no detection head that Quantrack knows; ranges stay")
            return {}
        ranges = {name: range_of(layer) for name, layer in quantized_layers(job.model).items()}
        return self.take_best(job, ranges, self.cached_errors(job, ranges))

    def cached_errors(self, job: QuantizationJob, ranges: Mapping[str, Range]) -> Errors:
        """As `errors`, measured once for the same model, pictures, ranges, settings and code.

        Weights do not enter it, so that w4a8 and w8a8 share what is cached, whatever the bit plan, unless channels
        were equalized, which goes by the bits.
        """
        layers = quantized_layers(job.model)
        how = [(name, *_equalized_and_kind(layers[name]), ends) for name, ends in sorted(ranges.items())]
        (key,) = step_keys(replace(job, scheme=INPUTS_ONLY, plan=None), [(self, how)])
        return cached(job, "ranges", key, lambda: self.errors(job, ranges), dict, _read)

    def errors(self, job: QuantizationJob, ranges: Mapping[str, Range]) -> Errors:
        """What the costliest layers cost at their range, and at smaller ones."""
        rounding = _Rounding(job)
        seen = {name: {1.0: rounding.trial(name, ends)} for name, ends in ranges.items()}
        few = first_pictures(job, min(self.images, LOOK))
        costs = trial_errors(few, rounding.probe, seen, outputs_and_features, "activation ranges: what each costs")
        least = self.least_share * sum(cost[1.0] for cost in costs.values())
        trials = {
            name: {shrink: rounding.trial(name, clipped(ranges[name], shrink)) for shrink in (1.0, *self.shrinks)}
            for name, cost in costs.items()
            if cost[1.0] >= least
        }
        if not trials:
            return {}
        pictures = first_pictures(job, self.images)
        return trial_errors(pictures, rounding.probe, trials, outputs_and_features, "activation ranges: smaller ones")

    def take_best(self, job: QuantizationJob, ranges: Mapping[str, Range], errors: Errors) -> Mapping[str, float]:
        """Set each layer's best range; how many shrank, and the sums of the errors before and after."""
        best = {name: min(tried, key=tried.__getitem__) for name, tried in errors.items()}
        layers = quantized_layers(job.model)
        for name, shrink in best.items():
            set_activation_range(layers[name], *clipped(ranges[name], shrink))
        return {
            "shrunken": float(sum(shrink < 1 for shrink in best.values())),
            "error_before": sum(tried[1.0] for tried in errors.values()),
            "error_after": sum(tried[best[name]] for name, tried in errors.items()),
        }


def _read(errors: Any) -> Errors:  # noqa: ANN401 - parsed JSON
    return {name: {float(shrink): float(error) for shrink, error in tried.items()} for name, tried in errors.items()}


def _equalized_and_kind(layer: QuantizedConvolution) -> tuple[list[float] | None, str | None]:
    """What beside its range decides how a layer's input is rounded."""
    divisors = None if layer.input_scale is None else layer.input_scale.tolist()
    return divisors, layer_plan(layer).activation


def outputs_and_features(apart: Divergence) -> Tensor:
    """Features as well, as they tell of all of a picture and outputs of its few objects."""
    return apart.total(feature_weight=1.0)


def range_of(layer: QuantizedConvolution) -> Range:
    """The range of a layer's input grid."""
    chosen = activation_quantization(layer)
    assert chosen is not None
    return chosen.range


def clipped(whole: Range, shrink: float) -> Range:
    """A range cut at a share of its larger side: SiLU's short negative side stays.

    >>> clipped((-0.25, 8.0), 0.5)
    (-0.25, 4.0)
    """
    low, high = whole
    limit = shrink * max(-low, high)
    return max(low, -limit), min(high, limit)


class _Rounding:
    """The float network as a probe, in which one convolution at a time rounds its input as the job's layer would."""

    def __init__(self, job: QuantizationJob) -> None:
        self.probe = job.float_model
        self._layers = quantized_layers(job.model)

    def trial(self, name: str, range_: Range) -> Callable[[], AbstractContextManager[None]]:
        """A layer's input rounded on a grid over this range while the context is open."""
        return partial(self._rounded, name, range_)

    @contextmanager
    def _rounded(self, name: str, range_: Range) -> Iterator[None]:
        layer, convolution = self._layers[name], self.probe.get_submodule(name)
        with (
            another_activation_range(layer, *range_),
            convolution.register_forward_pre_hook(lambda module, inputs: quantized_input(layer, inputs[0])),
        ):
            yield
