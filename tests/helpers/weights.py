"""Weights of quantized convolutions, for tests."""

from torch import Tensor

from quantrack.quantization.layers import QuantizedConvolution, of_weight_columns


def effective_weight(layer: QuantizedConvolution) -> Tensor:
    """The quantized weights as they meet the input before its channels are equalized, [O, I/g, kh, kw]."""
    weight: Tensor = layer.quant_weight().value.detach()
    return weight if layer.input_scale is None else weight * of_weight_columns(layer.input_scale.flatten(), layer)
