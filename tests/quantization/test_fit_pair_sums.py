"""Weights that fit in pairs: which are neighbours, what fitting costs, and who sees to it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quantrack.quantization.activation_ranges import MinMaxActivationRanges
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.coordinate_descent import channel_errors
from quantrack.quantization.curvature import Curvature
from quantrack.quantization.fit_pair_sums import FitPairSums, fit_pair_sums, is_depthwise, largest_pair
from quantrack.quantization.gptq import Gptq, grouped
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    LayerPlan,
    QuantizedConvolution,
    fake_quantize,
    insert_quantizers,
    quantized_layers,
    set_weight_scale,
    weight_scale,
)
from quantrack.quantization.observe_activations import ObserveActivations
from quantrack.quantization.qat import refit_pair_sums
from quantrack.quantization.recipe import Recipe, parse_recipe, recipe_for
from quantrack.quantization.trainable import take_over, trainable_layers, trainable_twin
from quantrack.quantization.weight_scales import MinMaxWeightScales, min_max_scale
from quantrack.schemes import MAX_PAIR_SUM, Variant

MakeJob = Callable[[str], QuantizationJob]
CHANNELS = 24


def convolution(bits: int = 8, channel_bits: tuple[int, ...] | None = None) -> QuantizedConvolution:
    """3x3, its scales by range, in which nearly every channel has neighbours that exceed the sum."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(CHANNELS, 16, 3)).requires_grad_(False)
    insert_quantizers(net, {"0": LayerPlan(bits, None, channel_bits)})
    layer = quantized_layers(net)["0"]
    set_weight_scale(layer, min_max_scale(layer.weight, bits))
    return layer


def integers(layer: QuantizedConvolution) -> Tensor:
    return torch.round(layer.quant_weight().value / weight_scale(layer).reshape(-1, 1, 1, 1))


def error(layer: QuantizedConvolution, weight: Tensor) -> float:
    return float((layer.quant_weight().value - weight).square().mean())


@pytest.mark.parametrize(
    ("weights", "largest"),
    [
        ([100, 20, 30, 90], 120),
        ([100, -60, -70, 90], 100),  # signs differ, so they take from each other
        ([20, 100, 120, 30], 150),  # 100 and 120 are of two pairs
        ([-127, -127, 0, 0], 254),
        ([20, 30, 127], 127),  # the last of an odd number has no neighbour
    ],
)
def test_neighbours_are_added_two_by_two(weights: list[int], largest: int) -> None:
    assert largest_pair(torch.tensor(weights, dtype=torch.float32).reshape(1, -1, 1, 1)).tolist() == [largest]


def test_neighbours_lie_at_one_place_of_the_kernel() -> None:
    weight = torch.zeros(1, 2, 1, 2)
    weight[0, 0, 0, 0] = weight[0, 1, 0, 1] = 127
    assert largest_pair(weight).tolist() == [127]
    weight[0, 1, 0, 0] = 5
    assert largest_pair(weight).tolist() == [132]


def test_an_odd_number_of_channels_is_counted_both_ways() -> None:
    """As it is, where the last has the next place's first beside it, and filled up to an even number."""
    weight = torch.zeros(2, 3, 1, 2)
    weight[0, 2, 0, 0] = weight[0, 0, 0, 1] = 100  # beside each other as they are
    weight[1, 0, 0, 1] = weight[1, 1, 0, 1] = 100  # and these if filled up
    assert largest_pair(weight).tolist() == [200, 200]


def test_weights_are_made_to_fit_for_less_than_a_bit() -> None:
    layer = convolution()
    weight, eight_bits = layer.weight.clone(), error(layer, layer.weight)
    exceeded = largest_pair(integers(layer)) > MAX_PAIR_SUM
    assert exceeded.sum() > 8
    raised = fit_pair_sums(layer)
    assert largest_pair(integers(layer)).max() <= MAX_PAIR_SUM
    assert torch.equal(raised > 1, exceeded)
    assert raised.max() <= 2 * 1.002
    seven_bits = fake_quantize(weight, min_max_scale(weight, 7), 7)
    assert eight_bits < error(layer, weight) < 0.9 * float((seven_bits - weight).square().mean())
    assert torch.equal(fit_pair_sums(layer), torch.ones(16))  # a second time changes nothing


def test_channels_that_fit_stay_as_they_are() -> None:
    layer = convolution()
    layer.weight[3:] *= 0.5  # the scale stays, so that no weight of these is beyond 64
    before, scale = layer.weight.clone(), weight_scale(layer).clone()
    raised = fit_pair_sums(layer)
    assert (raised[:3] > 1).any()
    assert torch.equal(layer.weight[3:], before[3:])
    torch.testing.assert_close(weight_scale(layer)[3:], scale[3:], rtol=1e-6, atol=0)


def test_weights_that_were_cut_stay_cut() -> None:
    """Or one of them could cost a channel all its bits."""
    layer = convolution()
    layer.weight[:, :2] = 100.0
    scale = weight_scale(layer).clone()
    assert fit_pair_sums(layer).max() <= 2 * 1.002
    assert largest_pair(integers(layer)).max() <= MAX_PAIR_SUM
    assert (layer.quant_weight().value.amax(dim=(1, 2, 3)) <= 127 * scale * 1.001).all()


def test_what_is_not_finite_ends_it() -> None:
    layer = convolution()
    layer.weight[0, 0, 0, 0] = torch.nan
    fit_pair_sums(layer)
    assert largest_pair(integers(layer))[1:].max() <= MAX_PAIR_SUM  # the other channels


@pytest.mark.parametrize(("bits", "value", "largest"), [(4, 1.0, 14), (4, -1.0, 16), (7, 1.0, 126), (7, -1.0, 128)])
def test_fewer_bits_always_fit(bits: int, value: float, largest: int) -> None:
    layer = convolution(bits)
    layer.weight.fill_(value)
    set_weight_scale(layer, torch.full((16,), 1e-3))
    assert largest_pair(integers(layer)).max() == largest
    assert torch.equal(fit_pair_sums(layer), torch.ones(16))


def test_only_channels_of_eight_bits_are_changed() -> None:
    layer = convolution(8, (4, 8) * 8)
    set_weight_scale(layer, min_max_scale(layer.weight, torch.tensor((4, 8) * 8)))
    raised = fit_pair_sums(layer)
    assert (raised[0::2] == 1).all()
    assert (raised[1::2] > 1).any()


def test_gptq_rounds_anew_what_does_not_fit() -> None:
    """With less error than when the scales of what it has rounded are raised."""
    values = torch.randn(4 * CHANNELS * 9, CHANNELS * 9) @ torch.randn(CHANNELS * 9, CHANNELS * 9)
    hessian = (values.T @ values / len(values))[None]
    nothing = torch.zeros(1, CHANNELS * 9)
    curvature = Curvature(hessian, nothing, nothing, None)

    def rounded(settings: Gptq) -> tuple[QuantizedConvolution, float]:
        layer = convolution()
        weight = grouped(layer.weight.clone(), 1)
        settings.round_layer(layer, curvature)
        fit_pair_sums(layer)
        assert largest_pair(integers(layer)).max() <= MAX_PAIR_SUM
        return layer, float(channel_errors(grouped(layer.quant_weight().value, 1) - weight, hessian).sum())

    fitting, error_fitting = rounded(Gptq(fit_pairs=True))
    _, error_raised = rounded(Gptq())
    assert error_fitting < 0.9 * error_raised
    assert torch.equal(fit_pair_sums(fitting), torch.ones(16))


def test_gptq_leaves_depthwise_convolutions_alone(make_job: MakeJob) -> None:
    plain, fitting = make_job("w8a8"), make_job("w8a8")
    for job, gptq in ((plain, Gptq()), (fitting, Gptq(fit_pairs=True))):
        apply_recipe(job, (InsertQuantizers(), ObserveActivations(), MinMaxWeightScales(), MinMaxActivationRanges()))
        apply_recipe(job, (gptq, FitPairSums()))
    of_fitting = quantized_layers(fitting.model)
    for name, layer in quantized_layers(plain.model).items():
        if is_depthwise(layer):
            assert torch.equal(layer.weight, of_fitting[name].weight)
            assert largest_pair(integers(layer)).max() > 64
        else:
            assert largest_pair(integers(of_fitting[name])).max() <= MAX_PAIR_SUM


def test_what_training_has_let_outgrow_it_fits_again(make_job: MakeJob) -> None:
    job = make_job("w8a8")
    apply_recipe(job, (InsertQuantizers(), ObserveActivations(), MinMaxWeightScales(), MinMaxActivationRanges()))
    FitPairSums().apply(job)
    learned = trainable_layers(trainable_twin(job.model, job.float_model))
    with torch.no_grad():
        for learning in learned.values():
            learning.log_change -= 0.2  # smaller scales, so larger integers where they are not cut
            learning.common_steps *= 1.2
    take_over(job.model, learned)
    wide = [layer for layer in quantized_layers(job.model).values() if not is_depthwise(layer)]
    assert max(largest_pair(integers(layer)).max() for layer in wide) > MAX_PAIR_SUM
    report = refit_pair_sums(job)
    assert report.step == "FitPairSums"
    assert report.figures["channels"] > 0
    assert max(largest_pair(integers(layer)).max() for layer in wide) <= MAX_PAIR_SUM


@pytest.mark.parametrize("name", ["fast", "default", "best"])
def test_full_placement_wants_weights_that_fit(name: str) -> None:
    recipe = parse_recipe(name)
    full = recipe_for(Variant(placement="full"), recipe)
    assert full.steps[-2:] == (FitPairSums(), BiasCorrection())
    assert all(step.fit_pairs for step in full.steps if isinstance(step, Gptq))
    assert recipe_for(Variant(placement="full"), full) == full
    assert FitPairSums() not in recipe_for(Variant(), recipe).steps
    misplaced = Recipe(name, (*recipe.steps[:3], FitPairSums(), *recipe.steps[3:]))
    assert recipe_for(Variant(placement="full"), misplaced) == full


def test_without_a_bias_correction_fitting_comes_last() -> None:
    steps = (InsertQuantizers(), ObserveActivations(), MinMaxWeightScales(), MinMaxActivationRanges())
    full = recipe_for(Variant(placement="full"), Recipe("own", steps))
    assert full.steps == (*steps, FitPairSums())
