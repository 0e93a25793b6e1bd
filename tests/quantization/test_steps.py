"""Each step of a recipe on a net of three convolutions."""

import itertools
from collections.abc import Callable

import pytest
import torch
from brevitas.core.function_wrapper import Identity, TensorClamp
from brevitas.core.quant import IntQuant
from recipes import DEFAULT_BY_ROLE
from torch import Tensor, nn
from weights import effective_weight

from quantrack.detector.roles import Role
from quantrack.errors import QuantrackError, UsageError
from quantrack.quantization import coordinate_descent, sensitivity
from quantrack.quantization.activation_ranges import MinMaxActivationRanges, MseActivationRanges
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.coordinate_descent import (
    channel_errors,
    channel_products,
    damped,
    refined,
    refined_jointly,
    restoring_gain,
)
from quantrack.quantization.curvature import layers_at_a_time
from quantrack.quantization.curvature_cache import float_curvatures
from quantrack.quantization.gptq import Gptq, grouped
from quantrack.quantization.insert_quantizers import InsertQuantizers, average_stored_bits, average_weight_bits
from quantrack.quantization.job import QuantizationJob
from quantrack.quantization.layers import (
    Clamp,
    QuantizeInPlace,
    activation_quantization,
    fake_quantize,
    quantized_input,
    quantized_layers,
    set_activation_range,
    weight_bits,
    weight_scale,
)
from quantrack.quantization.observe_activations import ObserveActivations
from quantrack.quantization.recipe import parse_recipe
from quantrack.quantization.sensitivity import rounded_at
from quantrack.quantization.weight_scales import MinMaxWeightScales, MseWeightScales
from quantrack.schemes import Scheme

MakeJob = Callable[[str], QuantizationJob]


def prepared(job: QuantizationJob, **settings: object) -> QuantizationJob:
    plain = {"roles_at_8_bits": (), "float_roles": ()}
    apply_recipe(job, (InsertQuantizers(**{**plain, **settings}), ObserveActivations(), MseWeightScales()))
    apply_recipe(job, (MinMaxActivationRanges(),))
    return job


def output_error(job: QuantizationJob) -> float:
    with torch.no_grad():
        return sum(float((job.model(batch) - job.float_model(batch)).square().mean()) for batch in job.batches())


def test_roles_decide_the_bits(make_job: MakeJob) -> None:
    job = make_job("w4a8")
    apply_recipe(job, (InsertQuantizers(),))
    bits = [weight_bits(layer) for layer in quantized_layers(job.model).values()]
    assert bits == [8, 8, 4]  # first, depthwise, and an ordinary one
    sizes = [3 * 8 * 9, 8 * 9, 8 * 6]
    expected = (8 * sizes[0] + 8 * sizes[1] + 4 * sizes[2]) / sum(sizes)
    assert average_weight_bits(job.model) == pytest.approx(expected)
    assert average_stored_bits(job.model, "int4") == pytest.approx(expected)  # 4 and 8 are what is stored
    assert average_stored_bits(job.model, "int8") == 8


def test_weights_that_stay_float_count_with_their_bits(make_job: MakeJob) -> None:
    job = make_job("w4a8")
    apply_recipe(job, (InsertQuantizers(float_roles=(Role.DEPTHWISE,), roles_at_8_bits=()),))
    sizes = [3 * 8 * 9, 8 * 9, 8 * 6]
    expected = (4 * (sizes[0] + sizes[2]) + 32 * sizes[1]) / sum(sizes)
    assert average_weight_bits(job.model) == pytest.approx(expected)
    assert average_stored_bits(job.model, "int4") == pytest.approx(expected)
    assert average_stored_bits(job.model, "int8") == pytest.approx(
        (8 * (sizes[0] + sizes[2]) + 32 * sizes[1]) / sum(sizes)
    )


@pytest.mark.parametrize(("mode", "quantized"), [("w4a16", False), ("w4a8", True)])
def test_a16_keeps_activations_float(make_job: MakeJob, mode: str, quantized: bool) -> None:
    job = prepared(make_job(mode))
    for layer in quantized_layers(job.model).values():
        assert (activation_quantization(layer) is not None) == quantized


def test_float_model_is_left_alone(make_job: MakeJob) -> None:
    job = make_job("w4a8")
    before = {name: value.clone() for name, value in job.float_model.state_dict().items()}
    apply_recipe(job, DEFAULT_BY_ROLE)
    for name, value in job.float_model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_margin_is_for_pictures_that_were_not_seen(make_job: MakeJob) -> None:
    job = prepared(make_job("w4a8"))
    layers = quantized_layers(job.model)
    plain = {name: activation_quantization(layer) for name, layer in layers.items()}
    first, *others = layers
    for margin, wider in ((1.0, 1 + 1 / len(job.calibration.paths)), (1000.0, 2.0)):
        apply_recipe(job, (MinMaxActivationRanges(margin),))
        for name in others:
            assert activation_quantization(layers[name]).scale == pytest.approx(wider * plain[name].scale, rel=1e-5)
        assert activation_quantization(layers[first]) == plain[first]  # how far a picture reaches is known
    with pytest.raises(UsageError, match=r"margin=-1\.0"):
        MinMaxActivationRanges(margin=-1.0)


def test_asymmetric_range_covers_what_was_seen(make_job: MakeJob) -> None:
    job = prepared(make_job("w4a8"))
    for name, layer in quantized_layers(job.model).items():
        seen, chosen = job.statistics[name], activation_quantization(layer)
        assert chosen is not None
        assert not chosen.signed
        # a picture can be anything from 0 to 1
        low, high = (0, 1) if name == "model.0" else (min(seen.minimum, 0), seen.maximum)
        assert chosen.minimum == pytest.approx(low, abs=chosen.scale)
        assert chosen.maximum == pytest.approx(high, abs=chosen.scale)


def test_least_squares_go_by_the_grid_that_there_is(make_job: MakeJob) -> None:
    job = make_job("w8a8")
    apply_recipe(job, (InsertQuantizers(activation="symmetric"), ObserveActivations(), MseActivationRanges()))
    for name, layer in quantized_layers(job.model).items():
        chosen, seen = activation_quantization(layer), job.statistics[name]
        assert chosen is not None
        largest = max(-seen.minimum, seen.maximum)

        def error(limit: float, values: Tensor = seen.sample) -> float:
            step = limit / 127
            return float(((values / step).round().clamp(-128, 127) * step - values).square().mean())

        others = [error(share * largest) for share in torch.linspace(0.3, 1, 15).tolist()]
        assert error(chosen.maximum) <= min(others) * 1.02  # it tries fifty


def test_a_network_without_quantizers_is_refused(make_job: MakeJob) -> None:
    with pytest.raises(QuantrackError, match="no convolution is quantized"):
        InsertQuantizers(float_roles=tuple(Role)).apply(make_job("w4a8"))


def test_only_zeros_are_padded_with(make_job: MakeJob) -> None:
    job = make_job("w4a8")
    job.model.model[1].padding_mode = "reflect"
    with pytest.raises(QuantrackError, match=r"model\.1 pads by reflect"):
        InsertQuantizers().apply(job)


def test_what_stays_float_is_said(make_job: MakeJob, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job("w4a8")
    InsertQuantizers().apply(job)
    assert "stay float" not in capsys.readouterr().err
    job = make_job("w4a8")
    job.float_model.transformer = nn.Linear(8, 8)
    InsertQuantizers().apply(job)
    assert "1 layers stay float (Linear), 1" in capsys.readouterr().err


def test_symmetric_range(make_job: MakeJob) -> None:
    job = prepared(make_job("w8a8"), activation="symmetric")
    layer = next(iter(quantized_layers(job.model).values()))
    set_activation_range(layer, -0.5, 2.0)
    chosen = activation_quantization(layer)
    assert chosen is not None
    assert (chosen.signed, chosen.zero_point) == (True, 0)
    assert chosen.maximum == pytest.approx(2.0)


def test_brevitas_rounds_to_our_grid(make_job: MakeJob) -> None:
    job = prepared(make_job("w4a8"))
    for layer in quantized_layers(job.model).values():
        expected = fake_quantize(layer.weight.detach(), weight_scale(layer), weight_bits(layer))
        torch.testing.assert_close(layer.quant_weight().value, expected)


def test_clamping_is_brevitas_own() -> None:
    x = torch.tensor([-torch.inf, -2.5, -2.0, 0.1, 1.0, 1.5, torch.inf, torch.nan], requires_grad=True)
    gradients = []
    for clamp in (Clamp(), TensorClamp()):
        clamped = clamp(x, min_val=torch.tensor(-2.0), max_val=torch.tensor(1.0))
        torch.testing.assert_close(
            clamped, torch.tensor([-2.0, -2, -2, 0.1, 1, 1, 1, torch.nan]), rtol=0, atol=0, equal_nan=True
        )
        gradients.append(torch.autograd.grad(clamped.nansum(), x)[0][[0, 1, 3, 5, 6]])  # not on the bounds themselves
    assert torch.equal(*gradients)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_quantizing_in_one_buffer_gives_brevitas_own_bits(signed: bool, narrow: bool) -> None:
    extremes = torch.tensor([-torch.inf, -0.0, torch.inf, torch.nan])
    x = torch.cat([torch.randn(10_000) * 3, torch.arange(-300, 300) * 0.035, extremes]).reshape(2, -1, 1, 1)
    before = x.clone()
    scale, zero_point = torch.tensor([0.07, 0.013]).reshape(2, 1, 1, 1), torch.tensor(0.0 if signed else 113.0)
    own, theirs = (quantizer(narrow, signed, Identity()) for quantizer in (QuantizeInPlace, IntQuant))
    with torch.no_grad():
        quantized = own(scale, zero_point, torch.tensor(8.0), x)
        expected = theirs(scale, zero_point, torch.tensor(8.0), x)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
def test_layers_quantize_to_the_same_bits_with_and_without_gradients(make_job: MakeJob, kind: str) -> None:
    job = prepared(make_job("w4a8"), activation=kind)
    for layer in quantized_layers(job.model).values():
        x = torch.randn(2, layer.in_channels, 5, 5)
        seen = []
        for with_gradients in (False, True):
            with torch.set_grad_enabled(with_gradients):
                seen.append((quantized_input(layer, x), effective_weight(layer)))
        assert torch.equal(seen[0][0], seen[1][0])
        assert torch.equal(seen[0][1], seen[1][1])


def test_mse_scales_beat_min_max(make_job: MakeJob) -> None:
    job = make_job("w4a16")
    apply_recipe(job, (InsertQuantizers(roles_at_8_bits=()), ObserveActivations(), MinMaxWeightScales()))
    figures = MseWeightScales().apply(job)
    assert figures["error_after"] < figures["error_before"]


@pytest.mark.parametrize("mode", ["w4a16", "w4a8", "w8a16", "w8a8"])
def test_gptq_stays_on_the_grid_and_lowers_the_output_error(make_job: MakeJob, mode: str) -> None:
    job = prepared(make_job(mode))
    rounded_error = output_error(job)
    figures = Gptq().apply(job)
    assert figures["error_after"] < 0.8 * figures["error_before"]
    assert output_error(job) < rounded_error
    for layer in quantized_layers(job.model).values():
        on_grid = fake_quantize(layer.weight.detach(), weight_scale(layer), weight_bits(layer))
        torch.testing.assert_close(layer.weight.detach(), on_grid)


def test_gptq_in_several_looks_gives_the_same(make_job: MakeJob) -> None:
    one, many = prepared(make_job("w4a16")), prepared(make_job("w4a16"))
    assert len(list(layers_at_a_time(quantized_layers(one.model), 0.75))) == 1
    assert len(list(layers_at_a_time(quantized_layers(many.model), 1e-9))) == 3
    Gptq(positions=10**9).apply(one)
    Gptq(positions=10**9, memory_gb=1e-9).apply(many)
    for name, layer in quantized_layers(one.model).items():
        torch.testing.assert_close(layer.weight, quantized_layers(many.model)[name].weight)


def test_gptq_sees_pictures_mirrored_where_asked(make_job: MakeJob) -> None:
    plain, mirrored = (prepared(make_job("w4a16")) for _ in range(2))
    batches = list(Gptq(mirrored=True).sampling.batches(mirrored))
    assert len(batches) == 2 * plain.batch_count
    assert torch.equal(batches[1], batches[0].flip(-1))
    Gptq().apply(plain)
    Gptq(mirrored=True).apply(mirrored)
    one, other = (
        torch.cat([layer.weight.flatten() for layer in quantized_layers(job.model).values()])
        for job in (plain, mirrored)
    )
    assert not torch.equal(one, other)


def test_gptq_with_unit_hessian_rounds_to_nearest() -> None:
    weight, scale = torch.randn(2, 3, 5), torch.full((2, 3), 0.3)
    rounded = Gptq().round(weight, torch.eye(5).expand(2, 5, 5), scale, 4)
    torch.testing.assert_close(rounded, torch.clamp(torch.round(weight / 0.3), -8, 7) * 0.3)


def test_coordinate_descent_lessens_the_error_and_stays_on_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 40, 12, generator=generator) @ torch.randn(2, 12, 12, generator=generator)
    hessian = damped(inputs.transpose(1, 2) @ inputs / 40, 0.01)
    weight, scale = torch.randn(2, 6, 12, generator=generator), torch.full((2, 6), 0.3)
    rounded = torch.clamp(torch.round(weight / 0.3), -8, 7) * 0.3
    errors = [channel_errors(rounded - weight, hessian)]
    for _ in range(3):
        rounded, scale = refined(weight, rounded, scale, hessian, 4)
        errors.append(channel_errors(rounded - weight, hessian))
    assert all((after <= before * 1.0001).all() for before, after in itertools.pairwise(errors))
    assert errors[-1].sum() < 0.7 * errors[0].sum()
    integers = rounded / scale[:, :, None]
    torch.testing.assert_close(integers, integers.round())
    assert -8.001 < integers.min() < integers.max() < 7.001


def test_columns_in_blocks_move_as_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 90, 50, generator=generator)
    hessian = damped(inputs.transpose(1, 2) @ inputs / 90, 0.01)
    weight, scale = torch.randn(1, 6, 50, generator=generator), torch.full((1, 6), 0.3)
    rounded = torch.clamp(torch.round(weight / 0.3), -8, 7) * 0.3
    results = []
    for block in (1, 16, 64):
        monkeypatch.setattr(coordinate_descent, "BLOCK", block)
        results.append(refined(weight, rounded, scale, hessian, 4)[0])
    assert not torch.equal(results[0], rounded)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_joint_descent_lessens_the_error_of_all_channels_together() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(40, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    inputs = damped((mixed.T @ mixed / 40)[None], 0.01)[0]
    gradients = torch.randn(30, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    outputs = gradients.T @ gradients / 30
    weight, scale = torch.randn(6, 12, generator=generator), torch.full((6,), 0.3)
    rounded = torch.clamp(torch.round(weight / 0.3), -8, 7) * 0.3
    moved = rounded
    for _ in range(8):
        moved = refined_jointly(weight, moved, scale, inputs, outputs, 4)
    errors = [float(torch.trace(outputs @ change @ inputs @ change.T)) for change in (rounded - weight, moved - weight)]
    assert errors[1] < 0.7 * errors[0]
    torch.testing.assert_close(moved / 0.3, (moved / 0.3).round())
    again = refined_jointly(weight, moved, scale, inputs, outputs, 4)
    assert float(torch.trace(outputs @ (again - weight) @ inputs @ (again - weight).T)) <= errors[1] * 1.0001


def test_the_gain_restores_what_least_error_shrinks() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4, 18, generator=generator)
    columns = torch.randn(2, 18, 400, generator=generator)
    hessian = columns @ columns.transpose(1, 2) / 400
    rounded, scale = torch.round(weight / 0.8) * 0.8, torch.full((2, 4), 0.8)
    for _ in range(3):
        rounded, scale = refined(weight, rounded, scale, hessian, 3)
    rounded[1, 2] = 0  # a channel whose weights were rounded away has nothing to restore
    gain = restoring_gain(weight, rounded, hessian)
    whole, kept = channel_products(weight, weight, hessian), channel_products(weight, rounded, hessian)
    answers = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3)]
    assert all(0.5 * whole[at] < kept[at] < 0.999 * whole[at] for at in answers)
    assert all(float(gain[at] * kept[at]) == pytest.approx(float(whole[at]), rel=1e-5) for at in answers)
    assert gain[1, 2] == 1


@pytest.mark.parametrize("output_sweeps", [0, 2])
def test_gptq_does_not_shrink_what_a_layer_answers(make_job: MakeJob, output_sweeps: int) -> None:
    job = prepared(make_job("w4a16"))
    gptq = Gptq(output_sweeps=output_sweeps)
    layers = quantized_layers(job.model)
    for by_name in float_curvatures(job, gptq.sampling):
        for name, curvature in by_name.items():
            gptq.round_layer(layers[name], curvature)
            layer, float_layer = layers[name], job.float_model.get_submodule(name)
            weight = grouped(float_layer.weight, layer.groups)
            rounded = grouped(layer.quant_weight().value, layer.groups)
            whole = channel_products(weight, weight, curvature.centred)
            torch.testing.assert_close(channel_products(weight, rounded, curvature.centred), whole)


@pytest.mark.parametrize("most", [sensitivity.MOST_TOGETHER, 1])
def test_bits_that_are_rounded_together_are_as_the_step_rounds_each(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(sensitivity, "MOST_TOGETHER", most)
    alone = {}
    for bits in (3, 4, 7):
        job = make_job("w4a16")
        job.scheme = Scheme("few bits", bits, None)
        alone[bits] = quantized_layers(prepared(job).model)
    for by_name in float_curvatures(job, Gptq().sampling):
        for name, curvature in by_name.items():
            together = rounded_at(job.float_model.get_submodule(name), curvature, tuple(alone))
            for bits, layers in alone.items():
                Gptq().round_layer(layers[name], curvature)
                same = torch.isclose(together[bits], effective_weight(layers[name]), rtol=1e-4, atol=1e-6)
                assert same.float().mean() > 0.98  # but for ties


def test_bias_correction_restores_each_layers_mean(make_job: MakeJob) -> None:
    job = prepared(make_job("w4a16"))
    before = output_error(job)
    BiasCorrection().apply(job)
    assert output_error(job) < before
    first = next(iter(quantized_layers(job.model).values()))
    float_first = job.float_model.get_submodule("model.0")
    with torch.no_grad():
        shifts = [(first(batch) - float_first(batch)).mean(dim=(2, 3)) for batch in job.batches()]
    assert torch.cat(shifts).mean(dim=0).abs().max() < 1e-5
    assert all(layer.bias is not None for layer in quantized_layers(job.model).values())


def test_same_seed_same_weights(make_job: MakeJob) -> None:
    first, second = make_job("w4a8"), make_job("w4a8")
    for job in (first, second):
        apply_recipe(job, DEFAULT_BY_ROLE)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_another_seed_draws_otherwise(make_job: MakeJob) -> None:
    first, second = make_job("w4a8"), make_job("w4a8")
    second.seed = 1
    for job in (first, second):
        prepared(job)
        Gptq(positions=64).apply(job)
    weights = [
        torch.cat([layer.weight.flatten() for layer in quantized_layers(job.model).values()]) for job in (first, second)
    ]
    assert not torch.equal(*weights)


def test_unknown_recipe() -> None:
    with pytest.raises(UsageError, match="recipe=finest: unknown recipe; use one of naive, fast, default, best, or a"):
        parse_recipe("finest")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gptq(damping=0),
        lambda: Gptq(positions=0),
        lambda: Gptq(sweeps=-1),
        lambda: Gptq(output_share=1.0),
        lambda: MseWeightScales(candidates=1),
        lambda: InsertQuantizers(activation="fp8"),
    ],
)
def test_settings_refuse_nonsense(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()
