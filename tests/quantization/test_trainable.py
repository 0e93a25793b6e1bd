"""Trainable twins: what one rate means for channels of different bits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from quantrack.quantization.layers import (
    LayerPlan,
    insert_quantizers,
    quantized_layers,
    set_activation_range,
    set_weight_scale,
)
from quantrack.quantization.trainable import (
    Rates,
    TrainableConvolution,
    parameter_groups,
    trainable_layers,
    trainable_twin,
)

CHANNEL_BITS = (3, 4, 7, 8)


def mixed_weight() -> Tensor:
    return (2 * torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)) - 1).expand(4, 2, 3, 3)


def mixed_layer() -> TrainableConvolution:
    """A convolution whose four channels have the same float weights up to 1, and bits of their own."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False)).eval().requires_grad_(False)
    net[0].weight.copy_(mixed_weight())
    float_net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False)).eval()
    float_net.load_state_dict(net.state_dict())
    insert_quantizers(net, {"0": LayerPlan(8, None, CHANNEL_BITS)})
    set_weight_scale(quantized_layers(net)["0"], torch.tensor([1 / (2 ** (bits - 1) - 1) for bits in CHANNEL_BITS]))
    (layer,) = trainable_layers(trainable_twin(net, float_net)).values()
    return layer


def test_bfloat16_keeps_to_the_grids_and_their_gradients() -> None:
    """Its values from 128 steps on are whole steps apart: dequantized ones would leave the grid, and so would x - x."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).eval().requires_grad_(False)
    net[0].weight.fill_(0.01)
    float_net = copy.deepcopy(net)
    insert_quantizers(net, {"0": LayerPlan(8, "asymmetric")})
    (quantized,) = quantized_layers(net).values()
    set_weight_scale(quantized, torch.tensor([0.01]))
    set_activation_range(quantized, -0.2784, 5.0)
    (layer,) = trainable_layers(trainable_twin(net, float_net)).values()
    x = nn.functional.silu(torch.linspace(-4, 4.9, 9600)).bfloat16().reshape(1, 1, 96, 100)
    found = []
    for mixed in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            output = layer(x if mixed else x.float())
        (output * torch.linspace(-1, 1, 100)).sum().backward()
        found.append((output.detach(), layer.input_log_change.grad.clone(), layer.log_change.grad.clone()))
    for plain, in_bfloat16 in zip(*found, strict=True):
        torch.testing.assert_close(in_bfloat16, plain, rtol=5e-3, atol=1e-6)


def test_channels_of_any_bits_move_alike() -> None:
    layer = mixed_layer()
    scale = layer.current_scale().detach()[:, None, None, None]
    before = (layer.units * scale).detach()
    (weights, *_) = parameter_groups(nn.Sequential(layer), Rates(0.01, 0.001, 0.001))
    optimizer = torch.optim.Adam(weights["params"], lr=weights["lr"])  # type: ignore[arg-type]
    layer(torch.rand(2, 2, 8, 8)).sum().backward()
    optimizer.step()
    moved = (layer.units * scale).detach() - before
    # a hundredth of a 4-bit step, 1 / 7 of the range, where no weight was cut
    inside = layer.common_steps.grad.abs() > 0
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(moved[inside].abs(), torch.full_like(moved[inside], 0.01 / 7), rtol=1e-3, atol=0)


def test_each_channel_is_rounded_to_its_own_grid() -> None:
    layer = mixed_layer()
    weight = mixed_weight()
    for rounded, wanted, bits in zip(layer.weight().detach(), weight, CHANNEL_BITS, strict=True):
        limit = 2 ** (bits - 1) - 1
        torch.testing.assert_close(rounded, (wanted * limit).round() / limit)
