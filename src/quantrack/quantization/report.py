"""What quantization did, as records for `calibration.json` and `layers.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from quantrack.datasets.pictures import PAD_VALUE
from quantrack.detector.roles import convolution_roles
from quantrack.quantization.job import QuantizationJob, StepReport
from quantrack.quantization.layers import (
    QuantizedConvolution,
    activation_quantization,
    bits_per_channel,
    quantized_layers,
    weight_bits,
    weight_scale,
)


def calibration_record(job: QuantizationJob, steps: Sequence[StepReport]) -> dict[str, object]:
    """Pictures, preprocessing and every activation quantizer's scale, zero point and range."""
    quantizers = {}
    for name, layer in quantized_layers(job.model).items():
        chosen = activation_quantization(layer)
        if chosen is not None:
            quantizers[name] = asdict(chosen) | {"minimum": chosen.minimum, "maximum": chosen.maximum}
            if layer.input_scale is not None:  # what the input's channels are multiplied by before
                quantizers[name]["channel_factors"] = layer.input_scale.flatten().tolist()
    return {
        "images": len(job.calibration.paths),
        "seed": job.seed,
        "list": job.calibration.source,
        "digest": job.calibration.digest,
        "pictures": [path.name for path in job.calibration.paths],
        "preprocessing": {"letterbox": job.imgsz, "pad": PAD_VALUE, "channels": "RGB", "range": [0, 1]},
        "steps": [asdict(step) for step in steps],
        "activation_quantizers": quantizers,
    }


def layer_records(job: QuantizationJob) -> list[dict[str, object]]:
    """One row per convolution: its role, weights, bits and kinds of scale."""
    quantized = quantized_layers(job.model)
    rows: list[dict[str, object]] = []
    for name, role in convolution_roles(job.float_model).items():
        layer = quantized.get(name)
        row: dict[str, object] = {"layer": name, "role": role.value}
        if layer is None:
            rows.append(row | {"weight_bits": "float", "activation_bits": "float"})
            continue
        activation = activation_quantization(layer)
        scales = weight_scale(layer)
        rows.append(
            row
            | {
                "weights": layer.weight.numel(),
                "weight_bits": weight_bits(layer),
                **_bits_of_channels(layer),
                "weight_scale": "per output channel, symmetric",
                "weight_scale_min": float(scales.min()),
                "weight_scale_max": float(scales.max()),
                "activation_bits": "float" if activation is None else 8,
                "activation_scale": "none" if activation is None else _kind(activation.signed),
                "channels_equalized": layer.input_scale is not None,
            }
        )
    return rows


def _bits_of_channels(layer: QuantizedConvolution) -> dict[str, object]:
    """How many output channels have how many bits, where they differ."""
    if layer.channel_bits is None:
        return {}
    counts = Counter(bits_per_channel(layer))
    return {"weight_bits_of_channels": {str(bits): counts[bits] for bits in sorted(counts)}}


def _kind(signed: bool) -> str:
    return "per tensor, symmetric" if signed else "per tensor, asymmetric"
