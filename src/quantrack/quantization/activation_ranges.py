"""Step: set the activation quantizers' ranges from the observed statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import quantized_layers, set_activation_range


@dataclass(frozen=True)
class MinMaxActivationRanges:
    """Ranges that clip nothing seen during calibration."""

    def apply(self, job: QuantizationJob) -> Mapping[str, float]:
        count = 0
        for name, layer in quantized_layers(job.model).items():
            if layer.input_quant.is_quant_enabled:
                seen = job.statistics[name]
                set_activation_range(layer, seen.minimum, seen.maximum)
                count += 1
        return {"quantizers": float(count)}
