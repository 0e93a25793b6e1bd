"""Channels divided and weights multiplied: the same convolution, less rounding error."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from torch import nn
from weights import effective_weight

from quantrack.errors import QuantrackError, UsageError
from quantrack.quantization.activation_ranges import MinMaxActivationRanges
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.channel_equalization import (
    ChannelEqualization,
    LayerError,
    least_logarithms,
    require_scales_of_tensors,
)
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import ActivationStatistics, QuantizationJob
from quantrack.quantization.layers import (
    equalize,
    equalized_weight,
    of_weight_columns,
    quantized_input,
    quantized_layers,
)
from quantrack.quantization.observe_activations import ObserveActivations
from quantrack.quantization.state import model_of_state, model_state
from quantrack.quantization.trainable import trainable_layers, trainable_twin
from quantrack.quantization.weight_scales import MseWeightScales

MakeJob = Callable[[str], QuantizationJob]
FIRST_STEPS = (InsertQuantizers(roles_at_8_bits=(), float_roles=()), ObserveActivations())
LAST_STEPS = (MseWeightScales(), MinMaxActivationRanges())


@pytest.fixture
def uneven_job(make_job: MakeJob) -> MakeJob:
    """The last layer's input channels reach a hundred times as far as each other, its weights make up for it."""

    def make(mode: str) -> QuantizationJob:
        job = make_job(mode)
        reaches = torch.logspace(-1, 1, 8)
        for model in (job.float_model, job.model):
            model.model[1].weight.data.mul_(20 * reaches[:, None, None, None])
            model.model[2].weight.data.div_(reaches[None, :, None, None])
        return job

    return make


def equalized(job: QuantizationJob, **settings: float) -> QuantizationJob:
    apply_recipe(job, (*FIRST_STEPS, ChannelEqualization(**settings), *LAST_STEPS))
    return job


def output_error(job: QuantizationJob) -> float:
    with torch.no_grad():
        return sum(float((job.model(batch) - job.float_model(batch)).square().mean()) for batch in job.batches())


@pytest.mark.parametrize("mode", ["w4a8", "w4a16", "w8a8"])
def test_uneven_channels_lose_less(uneven_job: MakeJob, mode: str) -> None:
    plain, job = uneven_job(mode), uneven_job(mode)
    apply_recipe(plain, (*FIRST_STEPS, *LAST_STEPS))
    equalized(job)
    assert output_error(job) < 0.5 * output_error(plain)


def test_the_float_network_stays_the_same(uneven_job: MakeJob) -> None:
    job = equalized(uneven_job("w4a8"))
    for layer in quantized_layers(job.model).values():
        layer.weight_quant.disable_quant = layer.input_quant.disable_quant = True
    batch = next(job.batches())
    torch.testing.assert_close(job.model(batch), job.float_model(batch))


def test_the_estimate_falls_and_statistics_follow(uneven_job: MakeJob) -> None:
    job = uneven_job("w4a8")
    apply_recipe(job, FIRST_STEPS)
    seen = dict(job.statistics)
    figures = ChannelEqualization().apply(job)
    assert figures["layers"] == 2
    assert figures["error_after"] < 0.6 * figures["error_before"]
    first, *others = quantized_layers(job.model).items()
    inputs: list[torch.Tensor] = []
    job.float_model.model[1].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    job.float_model(next(job.batches()))
    scaled = inputs[0] * others[0][1].input_scale
    assert float(scaled.max()) <= job.statistics[others[0][0]].maximum * (1 + 1e-6)
    for name, layer in others:
        factors = layer.input_scale.flatten()
        assert float(factors.log().mean()) == pytest.approx(0, abs=1e-5)
        torch.testing.assert_close(job.statistics[name].channel_maximum, seen[name].channel_maximum * factors)
        own = factors[seen[name].sample_channels]
        torch.testing.assert_close(job.statistics[name].sample, seen[name].sample * own)
    assert first[1].input_scale is None  # a picture's values lie on the grid already
    assert job.statistics[first[0]] is seen[first[0]]


def test_eight_bit_weights_with_float_inputs_stay(uneven_job: MakeJob) -> None:
    job = equalized(uneven_job("w8a16"))
    assert all(layer.input_scale is None for layer in quantized_layers(job.model).values())


def test_pooling_draws_channels_together(uneven_job: MakeJob) -> None:
    spreads = []
    for pooled in (0.0, 0.5, 1.0):
        job = equalized(uneven_job("w8a8"), pooled=pooled)
        spreads.append(float(quantized_layers(job.model)["model.1"].input_scale.log().std()))
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[2] < 0.5 * spreads[0]  # what is left is by the weights


def test_gptq_knows_the_equalized_inputs(uneven_job: MakeJob) -> None:
    """What is left by its own account is what the layers' outputs are off by, float inputs coming in."""
    errors = {}
    for name, step in (("plain", ()), ("equalized", (ChannelEqualization(),))):
        job = uneven_job("w4a16")
        apply_recipe(job, (*FIRST_STEPS, *step, *LAST_STEPS))
        gptq = Gptq(positions=100_000, importance_share=0.0, centred=False, damping=1e-6)
        errors[name] = gptq.apply(job)["error_after"]
        measured = 0.0
        for batch in job.batches():
            x = batch
            for layer, kept in zip(quantized_layers(job.model).values(), job.float_model.model, strict=True):
                change = nn.functional.conv2d(
                    x, effective_weight(layer) - kept.weight, None, kept.stride, kept.padding, groups=kept.groups
                )
                share = len(batch) / len(job.calibration.paths)
                measured += share * float(change.square().mean(dim=(0, 2, 3)).sum())
                x = nn.functional.silu(kept(x))
        assert errors[name] == pytest.approx(measured, rel=1e-3)
    assert errors["equalized"] < 0.8 * errors["plain"]


def test_bias_correction_keeps_the_mean(uneven_job: MakeJob) -> None:
    job = uneven_job("w4a8")
    apply_recipe(job, (*FIRST_STEPS, ChannelEqualization(), *LAST_STEPS, BiasCorrection()))
    first, kept = quantized_layers(job.model)["model.0"], job.float_model.model[0]
    apart = [(first(batch) - kept(batch)).mean(dim=(0, 2, 3)) * len(batch) for batch in job.batches()]
    torch.testing.assert_close(torch.stack(apart).sum(dim=0), torch.zeros(8), atol=1e-4, rtol=0)


def test_kept_and_trained_models_have_the_scales(uneven_job: MakeJob) -> None:
    job = equalized(uneven_job("w4a8"))
    batch = next(job.batches())
    again = model_of_state(model_state(job.model), job.float_model)
    assert torch.equal(again(batch), job.model(batch))
    twin = trainable_twin(job.model, job.float_model)
    assert [layer.input_scale is None for layer in trainable_layers(twin).values()] == [True, False, False]
    torch.testing.assert_close(twin(batch), job.model(batch), atol=1e-5, rtol=1e-5)
    for name, layer in trainable_layers(twin).items():  # training starts towards the float weight
        own = quantized_layers(job.model)[name]
        wanted = equalized_weight(job.float_model.get_submodule(name).weight, own)
        off = (layer.units * layer.scale[:, None, None, None] - wanted).abs().mean()
        assert off < (own.quant_weight().value - wanted).abs().mean()


def test_columns_of_groups() -> None:
    layer = nn.Conv2d(4, 6, 1, groups=2, bias=False)
    divisors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.rand(1, 4, 2, 2)
    divided = nn.functional.conv2d(
        x / divisors[:, None, None], layer.weight * of_weight_columns(divisors, layer), groups=2
    )
    torch.testing.assert_close(divided, layer(x))


def test_the_input_is_given_as_it_came(uneven_job: MakeJob) -> None:
    job = equalized(uneven_job("w4a8"))
    layer = quantized_layers(job.model)["model.1"]
    seen: list[torch.Tensor] = []
    job.float_model.model[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    job.float_model(next(job.batches()))
    (x,) = seen
    step = float(layer.input_quant.scale()) / float(layer.input_scale.min())
    assert 0 < float((quantized_input(layer, x) - x).abs().max()) <= 0.51 * step


def test_variance_is_about_each_channels_own_mean() -> None:
    values, channels = torch.tensor([1.0, 3.0, 101.0, 103.0]), torch.tensor([0, 0, 1, 1])
    seen = ActivationStatistics(torch.tensor([1.0, 101.0]), torch.tensor([3.0, 103.0]), values, channels)
    assert seen.channel_variance == pytest.approx(1.0)
    assert (seen.minimum, seen.maximum) == (1.0, 103.0)


def test_equalizing_twice_is_refused(uneven_job: MakeJob) -> None:
    job = equalized(uneven_job("w4a8"))
    with pytest.raises(QuantrackError, match="equalized already"):
        equalize(quantized_layers(job.model)["model.1"], torch.ones(8))
    with pytest.raises(QuantrackError, match=r"model\.1's channels are equalized already; insert them first, once"):
        FIRST_STEPS[0].apply(job)


def test_runtimes_that_want_one_scale_are_protected(uneven_job: MakeJob) -> None:
    job = uneven_job("w4a8")
    apply_recipe(job, (*FIRST_STEPS, *LAST_STEPS))
    require_scales_of_tensors(job.model, "placement=full")
    with pytest.raises(QuantrackError, match=r"placement=full: model\.1's input channels are equalized"):
        require_scales_of_tensors(equalized(uneven_job("w4a8")).model, "placement=full")


@pytest.mark.parametrize("settings", [{"unexplained": 0.0}, {"pooled": -0.1}, {"pooled": 1.1}, {"iterations": 0}])
def test_settings_validate_themselves(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="channel equalization"):
        ChannelEqualization(**settings)


def test_a_layer_of_zeros_stays(uneven_job: MakeJob) -> None:
    job = uneven_job("w4a8")
    for model in (job.float_model, job.model):
        model.model[1].weight.data.zero_()
    equalized(job)
    for layer in list(quantized_layers(job.model).values())[1:]:
        assert layer.input_scale.isfinite().all()
        assert layer.weight.isfinite().all()


def layer_error(activation: str | None, groups: int) -> LayerError:
    drawn = np.random.default_rng(0)
    low, high = -drawn.random(6), 3 * drawn.random(6)
    return LayerError(drawn.random(6), low, high, drawn.random((groups, 4, 6 // groups)), 1e-5, activation)


@pytest.mark.parametrize("activation", [None, "symmetric", "asymmetric"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_gradient_is_the_errors_own(activation: str | None, groups: int) -> None:
    error = layer_error(activation, groups)
    logarithms = np.random.default_rng(1).normal(size=6)
    by_differences = approx_fprime(logarithms, lambda tried: error(tried)[0], 1e-7)
    np.testing.assert_allclose(error(logarithms)[1], by_differences, rtol=1e-4, atol=1e-6 * error(logarithms)[0])


@pytest.mark.parametrize("activation", [None, "symmetric", "asymmetric"])
def test_no_other_divisors_are_better_by_much(activation: str | None) -> None:
    error = layer_error(activation, 1)
    found = least_logarithms(error, 300)
    drawn = np.random.default_rng(2)
    for size in (0.01, 0.1, 1.0):
        for _ in range(300):
            assert error(found + size * drawn.normal(size=6))[0] > 0.98 * error(found)[0]
    assert error(found)[0] < 0.92 * error(np.zeros(6))[0]
