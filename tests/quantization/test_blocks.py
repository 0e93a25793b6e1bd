"""Steps that walk a real detector block by block, on a small one and the demo's pictures."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import brevitas.nn as qnn
import pytest
import torch
from brevitas.graph.gptq import gptq_mode
from command import SMALL, SMALL_LAYERS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quantrack.datasets.calibration import load_calibration_set
from quantrack.datasets.demo import demo_calibration_list, demo_folder
from quantrack.detector.blocks import INPUT, network_blocks, run_blocks
from quantrack.detector.heads import RawOutputs, head_levels, raw_outputs
from quantrack.detector.load import Detector, load_detector
from quantrack.detector.roles import Role, convolution_roles
from quantrack.errors import QuantrackError, UsageError
from quantrack.quantization import activation_range_search
from quantrack.quantization.activation_range_search import ActivationRangeSearch, range_of
from quantrack.quantization.apply import apply_recipe, float_probe, output_divergence
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.bit_plan import BitPlan
from quantrack.quantization.block_reconstruction import BlockReconstruction
from quantrack.quantization.block_walk import ActivationStore, BlockWalk
from quantrack.quantization.channel_equalization import ChannelEqualization
from quantrack.quantization.distillation import Distillation
from quantrack.quantization.divergence import detection_divergence, divergence
from quantrack.quantization.gptq import Gptq, channel_errors, grouped
from quantrack.quantization.gradient_sensitivity import LayerChange, gradient_errors
from quantrack.quantization.input_columns import input_columns
from quantrack.quantization.insert_quantizers import InsertQuantizers, average_stored_bits, average_weight_bits
from quantrack.quantization.job import CachedTime, QuantizationJob, Step, first_pictures, new_job
from quantrack.quantization.layers import (
    activation_quantization,
    another_activation_range,
    bits_per_channel,
    fake_quantize,
    layer_plan,
    quantized_layers,
    set_activation_range,
    weight_bits,
    weight_range,
    weight_scale,
)
from quantrack.quantization.plan_bits import FOR_INT4, PlanBits
from quantrack.quantization.recipe import CALIBRATED, RECIPES
from quantrack.quantization.sensitivity import (
    SensitivityMeasurement,
    cached_sensitivity,
    make_plan,
)
from quantrack.quantization.state import model_of_state, model_state
from quantrack.quantization.step_cache import save_step, step_keys
from quantrack.quantization.trainable import FakeQuantize, take_over, trainable_layers, trainable_twin
from quantrack.quantization.weight_scales import MinMaxWeightScales, MseWeightScales, PercentileWeightScales
from quantrack.schemes import parse_mode

SIDE = 160
# of ranges that do not depend on bits
NOT_EQUALIZED = tuple(step for step in CALIBRATED if not isinstance(step, ChannelEqualization))


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector(SMALL, "one2one", SIDE, 0, False)


@pytest.fixture
def job(detector: Detector) -> QuantizationJob:
    calibration = load_calibration_set(str(demo_calibration_list()), 6, demo_folder(), 0)
    return replace(new_job(detector, parse_mode("w4a8"), calibration, SIDE, torch.device("cpu"), seed=0), batch=4)


def test_blocks_run_one_by_one_give_the_whole_output(detector: Detector) -> None:
    blocks = network_blocks(detector.model)
    pictures = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = detector.model(pictures)
        torch.testing.assert_close(run_blocks(detector.model, blocks, {INPUT: pictures}), expected)


def test_a_model_of_unknown_structure_is_one_block() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    (block,) = network_blocks(model)
    assert block.holds("0")
    assert block.sources == (INPUT,)


@pytest.mark.parametrize("memory_gb", [1.0, 1e-9])
def test_the_walk_gives_each_block_what_it_gets_in_the_network(job: QuantizationJob, memory_gb: float) -> None:
    seen: dict[int, list[Tensor]] = {}
    with BlockWalk(job.float_model, job.batches(), job.device, memory_gb) as walk:
        for block in walk.blocks:
            seen[block.index] = [value for batch in range(walk.batch_count) for value in walk.inputs(block, batch)]
            walk.advance(block)
        assert not walk.store.kept  # everything was forgotten after its last use
    expected: list[Tensor] = []
    handle = walk.model.get_submodule("model.4").register_forward_pre_hook(
        lambda module, inputs: expected.append(inputs[0])
    )
    with torch.no_grad():
        for batch in job.batches():
            walk.model(batch)
    handle.remove()
    for own, other in zip(seen[4], expected, strict=True):
        torch.testing.assert_close(own, other)


def test_the_store_spills_to_disk_unrounded() -> None:
    store = ActivationStore(memory_gb=1e-7)  # 100 bytes
    small, large = torch.rand(5), torch.rand(1000)
    store.put((0, 0), small)
    store.put((0, 1), large)
    assert list(store.kept) == [(0, 0)]
    assert torch.equal(store.get((0, 1)), large)
    store.drop(0)
    assert store.room == pytest.approx(100)
    store.close()


def test_raw_outputs_are_the_head_convolutions_own(detector: Detector) -> None:
    levels = head_levels(detector.model)
    assert len(levels) == 2
    pictures = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        before = detector.model(pictures)
        with raw_outputs(detector.model) as tap:
            detector.model(pictures)
        raw = tap.taken()
        assert [tuple(level.shape[2:]) for level in raw.classes] == [(20, 20), (10, 10)]
        assert all(boxes.shape[1] == 64 for boxes in raw.boxes)
        assert len(raw.features) == 2
        torch.testing.assert_close(detector.model(pictures), before)  # decoding is back


def test_divergence_of_a_detector_from_itself_is_zero(detector: Detector) -> None:
    with torch.no_grad(), raw_outputs(detector.model) as tap:
        detector.model(torch.rand(1, 3, SIDE, SIDE))
        apart = divergence(tap.taken(), tap.taken())
    for term in (apart.scores, apart.boxes, apart.features):
        assert float(term) == pytest.approx(0, abs=1e-5)


def outputs_of_one_object(column: int, logit: float = 3.0) -> RawOutputs:
    classes = torch.full((1, 2, 6, 8), -20.0)
    classes[0, 1, 2, column] = logit
    return RawOutputs((torch.zeros(1, 4, 6, 8),), (classes,), (torch.ones(1, 3, 6, 8),))


def test_an_object_may_move_by_a_position_and_no_further() -> None:
    here = outputs_of_one_object(3)
    assert float(detection_divergence(outputs_of_one_object(4), here).scores) == pytest.approx(0, abs=1e-6)
    assert float(divergence(outputs_of_one_object(4), here).scores) > 1.8
    gone = outputs_of_one_object(5)
    assert float(detection_divergence(gone, here).scores) == pytest.approx(float(divergence(gone, here).scores))
    weaker = outputs_of_one_object(3, logit=1.0)
    assert float(detection_divergence(weaker, here).scores) == pytest.approx(float(divergence(weaker, here).scores))


def test_trainable_twin_computes_what_brevitas_computes(job: QuantizationJob) -> None:
    apply_recipe(job, CALIBRATED)
    twin = trainable_twin(job.model, job.float_model)
    pictures = next(job.batches())
    with torch.no_grad(), raw_outputs(job.model) as one, raw_outputs(twin) as other:
        job.model(pictures)
        twin(pictures)
        for own, theirs in zip(one.taken().features, other.taken().features, strict=True):
            assert float((own - theirs).abs().mean()) < 0.03 * float(own.abs().mean())
    before = {name: layer.quant_weight().value for name, layer in quantized_layers(job.model).items()}
    take_over(job.model, trainable_layers(twin))
    for name, layer in quantized_layers(job.model).items():
        torch.testing.assert_close(layer.quant_weight().value, before[name])


def test_range_search_finds_the_range_that_is_too_wide(job: QuantizationJob) -> None:
    apply_recipe(job, NOT_EQUALIZED)
    layer = quantized_layers(job.model)["model.6.cv1.conv"]
    low, high = range_of(layer)
    set_activation_range(layer, low, 16 * high)
    search = ActivationRangeSearch(shrinks=(0.5, 1 / 16), images=2)
    figures = search.apply(job)
    assert figures["error_after"] < 0.5 * figures["error_before"]
    assert range_of(layer) == pytest.approx((low, high), rel=0.02, abs=0.02 * high)
    assert not any(module._forward_pre_hooks for module in job.float_model.modules())
    weight_only = replace(job, scheme=parse_mode("w4a16"))
    assert search.apply(weight_only) == {}


def test_range_search_tries_only_layers_that_cost_much(job: QuantizationJob) -> None:
    apply_recipe(job, NOT_EQUALIZED)
    ranges = {name: range_of(layer) for name, layer in quantized_layers(job.model).items()}
    shrinks = (0.5, 0.1)
    everything = ActivationRangeSearch(least_share=0.0, shrinks=shrinks, images=2).errors(job, ranges)
    assert len(everything) == SMALL_LAYERS
    total = sum(tried[1.0] for tried in everything.values())  # on the pictures that the first look takes, too
    found = ActivationRangeSearch(least_share=0.03, shrinks=shrinks, images=2).errors(job, ranges)
    assert list(found) == [name for name, tried in everything.items() if tried[1.0] > 0.03 * total]
    assert 0 < len(found) < SMALL_LAYERS / 4
    assert all(list(tried) == [1.0, *shrinks] for tried in found.values())
    search = ActivationRangeSearch(least_share=0.9, images=2)
    assert search.apply(job) == {"shrunken": 0, "error_before": 0, "error_after": 0}
    assert {name: range_of(layer) for name, layer in quantized_layers(job.model).items()} == ranges


def test_another_range_is_gone_after_a_failure(job: QuantizationJob) -> None:
    apply_recipe(job, NOT_EQUALIZED)
    layer = quantized_layers(job.model)["model.6.cv1.conv"]
    before = [parameter.clone() for parameter in layer.input_quant.parameters()]

    def fail() -> None:
        with another_activation_range(layer, -0.125, 0.25):
            assert range_of(layer) == pytest.approx((-0.125, 0.25), rel=0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    after = list(layer.input_quant.parameters())
    assert len(after) == 2
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_costs_of_ranges_are_measured_once_for_all_bits_of_weights(
    job: QuantizationJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QUANTRACK_CACHE", str(tmp_path))
    apply_recipe(job, NOT_EQUALIZED)
    other = replace(job, scheme=parse_mode("w8a8"), model=copy.deepcopy(job.model))
    search = ActivationRangeSearch(least_share=0.03, images=2)
    search.apply(job)
    with monkeypatch.context() as patch:
        patch.setattr(activation_range_search, "trial_errors", lambda *arguments: pytest.fail("measured again"))
        search.apply(other)
    ranges, others = ({n: range_of(layer) for n, layer in quantized_layers(j.model).items()} for j in (job, other))
    assert ranges == others
    (kept,) = (tmp_path / "ranges").iterdir()
    kept.write_text("[1]")
    search.apply(other)  # of ranges that are not those before, so that this is another key
    other.model = copy.deepcopy(other.float_model)
    apply_recipe(other, NOT_EQUALIZED)
    assert search.apply(other)["error_after"] > 0  # damaged, so measured again
    assert kept.read_text() != "[1]"


@pytest.mark.parametrize(
    "settings", [{"least_share": 1.0}, {"least_share": -0.1}, {"images": 0}, {"shrinks": ()}, {"shrinks": (1.0,)}]
)
def test_range_search_refuses_nonsense(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ActivationRangeSearch(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["symmetric", "asymmetric"])
def test_learned_scales_reach_the_quantized_model(job: QuantizationJob, activation: str) -> None:
    apply_recipe(job, (InsertQuantizers(activation=activation), *CALIBRATED[1:]))
    before = quantized_grids(job)
    twin = trainable_twin(job.model, job.float_model)
    take_over(job.model, trainable_layers(twin))
    assert quantized_grids(job) == before  # nothing was learned
    for layer in trainable_layers(twin).values():
        layer.input_log_change.data.fill_(math.log(1.25))
    take_over(job.model, trainable_layers(twin))
    for (scale, *others), (old_scale, *old_others) in zip(quantized_grids(job), before, strict=True):
        assert scale == pytest.approx(1.25 * old_scale, rel=1e-4)
        assert others == old_others


def quantized_grids(job: QuantizationJob) -> list[tuple[float, int, int, int]]:
    chosen = [activation_quantization(layer) for layer in quantized_layers(job.model).values()]
    return [(float(f"{one.scale:.6g}"), *one.grid[1:]) for one in chosen if one is not None]


def test_the_scales_gradient_is_that_of_the_rounding_error() -> None:
    x = torch.tensor([0.26, 0.74, 99.0], requires_grad=True)
    log_change = torch.zeros((), requires_grad=True)
    output = FakeQuantize.apply(x, log_change, (0.5, 0, 0, 10))
    torch.testing.assert_close(output, torch.tensor([0.5, 0.5, 5.0]))
    output.sum().backward()
    assert float(log_change.grad) == pytest.approx((0.5 - 0.26) + (0.5 - 0.74) + 5.0)
    assert x.grad.tolist() == [1, 1, 0]


def test_learned_rounding_beats_rounding_to_nearest(job: QuantizationJob) -> None:
    apply_recipe(job, CALIBRATED)
    before = output_divergence(job, float_probe(job))
    figures = BlockReconstruction(iterations=25).apply(job)
    after = output_divergence(job, float_probe(job))
    assert figures["error_after"] < figures["error_before"]
    assert before is not None
    assert after is not None
    assert after < before
    for layer in quantized_layers(job.model).values():
        torch.testing.assert_close(layer.quant_weight().value, layer.weight)  # on the grid


def test_distillation_comes_closer_to_the_float_outputs(job: QuantizationJob) -> None:
    apply_recipe(job, CALIBRATED)
    before = output_divergence(job, float_probe(job))
    figures = Distillation(steps=20, batch=2).apply(job)
    after = output_divergence(job, float_probe(job))
    assert figures["held_back_after"] < figures["held_back_before"]
    assert before is not None
    assert after is not None
    assert after < before


def test_distillation_needs_a_picture_to_hold_back(job: QuantizationJob) -> None:
    apply_recipe(job, CALIBRATED)
    alone = replace(job, calibration=replace(job.calibration, paths=job.calibration.paths[:1]))
    with pytest.raises(QuantrackError, match="at least 2 calibration pictures"):
        Distillation(steps=1).apply(alone)


def test_sensitivity_measures_every_layer_and_feeds_the_plan(
    job: QuantizationJob, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = SensitivityMeasurement(bits=(4, 8), gptq_images=4)
    rows = cached_sensitivity(job, trials)
    assert cached_sensitivity(replace(job, scheme=parse_mode("w4a16")), trials) == rows
    assert "from the cache" in capsys.readouterr().err
    assert len(rows) == SMALL_LAYERS  # every convolution but DFL's
    assert sum(row.errors[4] for row in rows) > sum(row.errors[8] for row in rows)
    plan = make_plan(job, rows, 4.5)
    weights = sum(row.weights for row in rows)
    assert 4.4 < sum(plan.bits[row.name] * row.weights for row in rows) / weights <= 4.5
    planned = replace(job, plan=plan)
    reports = apply_recipe(planned, CALIBRATED)
    assert reports[0].figures["weight_bits_avg"] <= 4.5
    naive = replace(job, model=copy.deepcopy(job.float_model), plan=plan)  # a recipe that quantizes DFL as well
    apply_recipe(naive, RECIPES["naive"])
    assert {n: weight_bits(layer) for n, layer in quantized_layers(naive.model).items()} == plan.bits


def test_a_planned_recipe_is_found_with_its_plan(job: QuantizationJob) -> None:
    steps = (PlanBits(average=4.4, bits=(4, 8)), *CALIBRATED)
    first = replace(job, model=copy.deepcopy(job.float_model))
    reports = apply_recipe(first, steps)
    assert not reports[0].cached
    assert reports[0].figures["planned_error"] > 0
    assert first.plan == make_plan(job, cached_sensitivity(job, SensitivityMeasurement(bits=(4, 8))), 4.4, "channel")
    assert 4.3 < average_weight_bits(first.model) <= 4.4
    save_step(step_keys(job, steps)[-1], first, reports)  # they took too little time to be kept by themselves
    again = replace(job, model=copy.deepcopy(job.float_model))
    assert all(report.cached for report in apply_recipe(again, steps))
    assert again.plan == first.plan
    assert average_weight_bits(again.model) == average_weight_bits(first.model)


def test_a_plan_for_int4_stores_no_more_than_bits_by_role(job: QuantizationJob) -> None:
    planned, by_role = (replace(job, model=copy.deepcopy(job.float_model)) for _ in range(2))
    apply_recipe(planned, (FOR_INT4, InsertQuantizers()))
    apply_recipe(by_role, (InsertQuantizers(),))
    stored = average_stored_bits(by_role.model, "int4")
    assert stored - 0.1 < average_stored_bits(planned.model, "int4") <= stored
    assert {weight_bits(layer) for layer in quantized_layers(planned.model).values()} == {4, 7}


def test_a_plan_is_of_few_bits_and_comes_before_quantizers(job: QuantizationJob) -> None:
    of_eight = replace(job, model=copy.deepcopy(job.float_model), scheme=parse_mode("w8a8"))
    assert PlanBits().apply(of_eight) == {}
    assert of_eight.plan is None
    with pytest.raises(UsageError, match="make it the first step"):
        apply_recipe(replace(job, model=copy.deepcopy(job.float_model)), (InsertQuantizers(), PlanBits()))


def test_a_plan_and_gptq_count_their_walk_once(
    job: QuantizationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTRACK_CACHE", str(tmp_path))

    def seconds() -> tuple[float, float]:
        """Of planning, and of GPTQ, in a run of their own."""
        own = replace(job, model=copy.deepcopy(job.float_model), cached_time=CachedTime())
        reports = apply_recipe(own, (PlanBits(bits=(4, 8)), InsertQuantizers(), MseWeightScales(), Gptq(sweeps=0)))
        return reports[0].seconds, reports[-1].seconds

    assert max(seconds()) < 100
    (kept,) = (tmp_path / "curvatures").glob("*/kept.json")  # one walk served both; as if it had taken longer
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"seconds": 1000.0}))
    shutil.rmtree(tmp_path / "steps", ignore_errors=True)
    shutil.rmtree(tmp_path / "sensitivity")
    for _ in ("the trials find the walk", "the plan is found"):
        plan, gptq = seconds()
        assert plan > 1000
        assert gptq < 100
        shutil.rmtree(tmp_path / "steps", ignore_errors=True)


def test_channels_keep_to_bits_of_their_own(job: QuantizationJob) -> None:
    rows = cached_sensitivity(job, SensitivityMeasurement(bits=(4, 8), gptq_images=4))
    plan = make_plan(job, rows, 4.5, "channel")
    by_layer = make_plan(job, rows, 4.5)
    weights = sum(row.weights for row in rows)
    assert 4.49 < sum(plan.average(row.name) * row.weights for row in rows) / weights <= 4.5
    assert all(isinstance(plan.bits[row.name], int) == (row.role is Role.HEAD_OUTPUT) for row in rows)
    inner = [row for row in rows if row.role is not Role.HEAD_OUTPUT]
    as_channels = {row.name: (by_layer.bits[row.name],) * len(row.parts) for row in inner}
    errors = [sum(row.planned_error(bits[row.name]) for row in inner) for bits in (plan.bits, as_channels)]
    assert errors[0] < 0.9 * errors[1]
    planned = replace(job, plan=plan)
    steps = (*CALIBRATED, Gptq(positions=64, output_sweeps=1), BiasCorrection())
    reports = apply_recipe(planned, steps)
    assert reports[0].figures["weight_bits_avg"] == pytest.approx(average_weight_bits(planned.model))
    assert reports[-1].figures["divergence_after"] < reports[5].figures["divergence_before"]
    twin = trainable_layers(trainable_twin(planned.model, planned.float_model))
    for name, layer in quantized_layers(planned.model).items():
        assert plan.bits[name] in (layer_plan(layer).channel_bits, layer_plan(layer).weight_bits)
        bits = torch.tensor(bits_per_channel(layer))
        for weight in (layer.quant_weight().value, twin[name].weight().detach()):
            integers = torch.round(weight.flatten(1) / weight_scale(layer)[:, None])
            lowest, highest = weight_range(bits)
            assert (integers.amin(dim=1) >= lowest).all()
            assert (integers.amax(dim=1) <= highest).all()
    again = model_of_state(model_state(planned.model), planned.float_model)
    for name, layer in quantized_layers(again).items():
        assert layer_plan(layer) == layer_plan(quantized_layers(planned.model)[name])


@pytest.mark.parametrize("scales", [MinMaxWeightScales(), MseWeightScales(), PercentileWeightScales(percentile=90)])
def test_scales_alone_keep_channels_to_their_bits(job: QuantizationJob, scales: Step) -> None:
    names = [name for name, role in convolution_roles(job.model).items() if role is not Role.DFL]
    channels = {name: job.model.get_submodule(name).weight.shape[0] for name in names}
    plan = BitPlan(job.model_digest, {name: tuple(3 + i % 5 for i in range(count)) for name, count in channels.items()})
    planned = replace(job, plan=plan)
    apply_recipe(planned, (InsertQuantizers(), scales))
    copies = copy.deepcopy(planned.model), model_of_state(model_state(planned.model), planned.float_model)
    for model in (planned.model, *copies):
        for name, layer in quantized_layers(model).items():
            bits, scale = torch.tensor(plan.bits[name]), weight_scale(layer)
            expected = fake_quantize(layer.weight, scale, bits)
            torch.testing.assert_close(layer.quant_weight().value, expected, rtol=1e-5, atol=0)
            with torch.enable_grad():
                torch.testing.assert_close(layer.quant_weight().value, expected, rtol=1e-5, atol=0)
            integers = torch.round(layer.quant_weight().value.flatten(1) / scale[:, None])
            lowest, highest = weight_range(bits)
            assert (integers.amin(dim=1) >= lowest).all()
            assert (integers.amax(dim=1) <= highest).all()


def test_a_plan_of_other_channels_is_refused(job: QuantizationJob) -> None:
    names = [name for name, role in convolution_roles(job.model).items() if role is not Role.DFL]
    plan = BitPlan(job.model_digest, dict.fromkeys(names, (4, 8)))
    with pytest.raises(QuantrackError, match=r"plan: model.0.conv has 2 channels there, 8 in the model"):
        apply_recipe(replace(job, plan=plan), CALIBRATED)


def test_estimated_error_is_quadratic_and_counts_mean_outputs_as_restored(job: QuantizationJob) -> None:
    name = "model.0.conv"
    convolution = job.float_model.get_submodule(name)
    assert isinstance(convolution, nn.Conv2d)
    change, none = torch.randn_like(convolution.weight) * 1e-3, torch.zeros(convolution.out_channels)
    changes = {4: LayerChange(change, none), 5: LayerChange(2 * change, none), 6: LayerChange(change, none + 1)}
    errors = gradient_errors(first_pictures(job, 2), {name: changes})[name]
    assert 0 < errors[4].layer != errors[6].layer
    assert errors[5].layer == pytest.approx(4 * errors[4].layer, rel=1e-3)
    assert len(errors[4].channels) == convolution.out_channels
    alone = torch.zeros_like(change).index_copy(0, torch.tensor([2]), change[2:3])
    alone_errors = gradient_errors(first_pictures(job, 2), {name: {4: LayerChange(alone, none)}})[name]
    assert alone_errors[4].layer == pytest.approx(errors[4].channels[2], rel=1e-4)
    assert alone_errors[4].channels[2] == pytest.approx(errors[4].channels[2], rel=1e-4)
    assert sum(alone_errors[4].channels) == alone_errors[4].channels[2]
    assert not any(parameter.requires_grad for parameter in job.float_model.parameters())


@pytest.mark.parametrize("settings", [{"bits": (4,)}, {"bits": (4, 16)}, {"images": 0}, {"measure": "weights"}])
def test_trials_refuse_nonsense(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SensitivityMeasurement(**settings)  # type: ignore[arg-type]


def test_gptq_is_as_good_as_brevitas_own_at_a_fraction_of_its_passes(job: QuantizationJob) -> None:
    weight_only = replace(job, scheme=parse_mode("w4a16"))
    # Brevitas' does not know what equalizes channels
    apply_recipe(weight_only, NOT_EQUALIZED)
    theirs = replace(weight_only, model=copy.deepcopy(weight_only.model))
    Gptq(centred=False, output_sweeps=0).apply(weight_only)  # one layer's own error, its mean included
    with (
        torch.no_grad(),
        gptq_mode(theirs.model, use_quant_activations=False, create_weight_orig=False, act_order=True) as gptq,
    ):
        for _ in range(gptq.num_layers):
            for batch in theirs.batches():
                gptq.model(batch)
            gptq.update()
    own, other = relative_errors(weight_only), relative_errors(theirs)
    assert sum(own) <= sum(other)


def test_gptq_costs_at_most_five_passes_over_the_pictures(job: QuantizationJob) -> None:
    """In what convolutions compute, forwards and backwards, however many layers there are."""
    uncached = replace(first_pictures(job, 2), model_digest="")
    apply_recipe(uncached, CALIBRATED)

    def one_pass() -> None:
        with torch.no_grad():
            for batch in uncached.batches():
                uncached.float_model(batch)

    assert 0 < convolution_flops(lambda: Gptq().apply(uncached)) <= 5 * convolution_flops(one_pass)


def convolution_flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return sum(count for name, count in counter.get_flop_counts()["Global"].items() if "convolution" in str(name))


def relative_errors(job: QuantizationJob) -> list[float]:
    """Each layer's squared output error on the float network's inputs, over its output power."""
    hessians: dict[str, Tensor] = {}

    def collect(name: str, module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        columns = input_columns(inputs[0], module)
        hessians[name] = hessians.get(name, torch.zeros(1)) + columns @ columns.transpose(1, 2)

    handles = [
        job.float_model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: collect(name, module, inputs)
        )
        for name in quantized_layers(job.model)
    ]
    with torch.no_grad():
        for batch in job.batches():
            job.float_model(batch)
    for handle in handles:
        handle.remove()
    return list(_errors(job, hessians))


def _errors(job: QuantizationJob, hessians: dict[str, Tensor]) -> Iterator[float]:
    for name, layer in quantized_layers(job.model).items():
        assert isinstance(layer, qnn.QuantConv2d)
        weight = grouped(job.float_model.get_submodule(name).weight, layer.groups)  # type: ignore[arg-type]
        quantized = grouped(layer.quant_weight().value.detach(), layer.groups)
        yield float(
            channel_errors(weight - quantized, hessians[name]).sum() / channel_errors(weight, hessians[name]).sum()
        )
