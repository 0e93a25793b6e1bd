"""Recipes from files, and finished steps kept on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import DEFAULT_BY_ROLE

from quantrack.errors import QuantrackError, UsageError
from quantrack.quantization.activation_range_search import ActivationRangeSearch
from quantrack.quantization.apply import apply_recipe, require_quantized
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.block_reconstruction import BlockReconstruction
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.job import QuantizationJob, Step
from quantrack.quantization.plan_bits import FOR_INT4
from quantrack.quantization.recipe import RECIPES, Recipe, parse_recipe
from quantrack.quantization.step_cache import restore_step, save_step, step_keys
from quantrack.quantization.weight_scales import MseWeightScales

MakeJob = Callable[[str], QuantizationJob]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_written_down_reads_as_the_same_steps(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(Recipe(name, RECIPES[name]).text())
    assert parse_recipe(str(path)) == Recipe("own", RECIPES[name])


def test_the_strict_recipe_of_the_benchmarks_is_the_best_without_8_bits() -> None:
    strict = parse_recipe(str(Path(__file__).parents[2] / "benchmarks/recipes/strict.yaml"))
    assert strict.steps == (InsertQuantizers(roles_at_8_bits=()), *RECIPES["best"][2:])


def test_steps_are_named_alone_or_with_settings(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text(
        "steps:\n  - insert_quantizers: {roles_at_8_bits: [first]}\n  - mse_weight_scales\n"
        "  - gptq: {damping: 1.0e-3, centred: false}\n"
    )
    insert, scales, gptq = parse_recipe(str(path)).steps
    assert isinstance(insert, InsertQuantizers)
    assert [role.value for role in insert.roles_at_8_bits] == ["first"]
    assert (scales, gptq) == (MseWeightScales(), Gptq(damping=1e-3, centred=False))


def test_a_plan_without_an_average_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "int4.yaml"
    path.write_text(Recipe("int4", (FOR_INT4, InsertQuantizers())).text())
    assert "average: null" in path.read_text()
    assert parse_recipe(str(path)).steps == (FOR_INT4, InsertQuantizers())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [sharpen]", "sharpen: unknown step; use one of plan_bits, insert_quantizers"),
        ("steps: [{gptq: {dampening: 1}}]", "gptq: no setting dampening; it has positions, importance_share"),
        ("steps: [{gptq: {damping: much}}]", "gptq: damping: 'much': must be a number"),
        ("steps: [{gptq: {positions: true}}]", "gptq: positions: True: must be a whole number"),
        ("steps: [{gptq: {damping: 2.0}}]", "gptq: .*damping in 0..1"),
        ("steps: [{insert_quantizers: {float_roles: [neck]}}]", "neck: unknown role; use first, dfl"),
        ("steps: [{plan_bits: {bits: [4, 16]}}]", r"plan_bits: bits=\[4, 16\]: give at least two of 2 to 8"),
        ("steps: [{plan_bits: {bits: [4, 4]}}]", "give at least two of 2 to 8"),
        ("steps: [{plan_bits: {average: null, bits: [5, 7]}}]", "some of 4 and some of more"),
        ("steps: [{plan_bits: {average: null, bits: [3, 4]}}]", "some of 4 and some of more"),
        ("steps: [insert_quantizers, plan_bits]", "plan_bits: .*make it the first step, and the only"),
        ("steps: [plan_bits, plan_bits, insert_quantizers]", "plan_bits: .*make it the first step, and the only"),
        ("steps: [{plan_bits: {average: 3.5, bits: [4, 8]}}]", "plan_bits: average=3.5: must lie between 4 and 8"),
        ("steps: [{plan_bits: {average: few}}]", "plan_bits: average: 'few': must be a number"),
        ("steps: [{gptq: {damping: null}}]", "gptq: damping: None: must be a number"),
        ("steps: [{plan_bits: {by: group}}]", "plan_bits: by=group: unknown; use layer or channel"),
        (
            "steps: [insert_quantizers, mse_weight_scales, gptq]",
            "gptq: add bias_correction after it, or give it `centred: false`",
        ),
        (
            "steps: [insert_quantizers, mse_weight_scales, bias_correction, gptq]",
            "bias_correction: put it after gptq$",
        ),
        (
            "steps: [insert_quantizers, observe_activations, mse_weight_scales, bias_correction, "
            "min_max_activation_ranges]",
            "bias_correction: put it after min_max_activation_ranges$",
        ),
        (
            "steps: [insert_quantizers, observe_activations, channel_equalization, observe_activations]",
            "observe_activations: put it before channel_equalization$",
        ),
        (
            "steps: [insert_quantizers, gptq]",
            "gptq: put a step that sets weight scales, such as mse_weight_scales, ",
        ),
        (
            "steps: [insert_quantizers, observe_activations, channel_equalization, channel_equalization]",
            "channel_equalization: only once$",
        ),
        (
            "steps: [insert_quantizers, mse_weight_scales, {gptq: {centred: false}}, min_max_weight_scales]",
            "min_max_weight_scales: put it before gptq$",
        ),
        ("steps: [insert_quantizers, distillation]", "distillation: put a step that sets weight scales"),
        ("steps: [insert_quantizers, bias_correction]", "bias_correction: put a step that sets weight scales"),
        (
            "steps: [insert_quantizers, mse_weight_scales, activation_range_search]",
            "activation_range_search: put a step that sets ranges, such as min_max_activation_ranges, before it",
        ),
        ("steps: [insert_quantizers, mse_weight_scales, gptq, distillation]", "gptq: add bias_correction after it"),
        ("steps: [insert_quantizers, mse_weight_scales, gptq, block_reconstruction]", "gptq: add bias_correction"),
        ("steps: [gptq, bias_correction]", r"insert_quantizers: must come first \(after plan_bits\), and once"),
        ("steps: [insert_quantizers, insert_quantizers]", "insert_quantizers: must come first .* and once"),
        ("steps: [insert_quantizers, min_max_activation_ranges]", "ranges: put observe_activations before it"),
        ("steps: [insert_quantizers, channel_equalization]", "equalization: put observe_activations before it"),
        (
            "steps: [insert_quantizers, observe_activations, mse_weight_scales, channel_equalization]",
            "channel_equalization: put it before mse_weight_scales",
        ),
        ("steps: [{min_max_activation_ranges: {margin: .nan}}]", "margin: nan: must be finite"),
        ("steps: [{distillation: {learning_rate: .inf}}]", "learning_rate: inf: must be finite"),
        ("steps: [{gptq: {damping: 0.1, damping: 0.2}}]", r"cannot be read \(damping is given twice\)"),
        ("steps: [{gptq: 3}]", "gptq: its settings must be"),
        ("steps: []", "must hold just `steps:`"),
        ("gptq", "must hold just `steps:`"),
        ("steps: [", "cannot be read"),
    ],
)
def test_a_broken_recipe_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as refusal:
        parse_recipe(str(path))
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "gptq: gptq" not in str(refusal.value)


def test_merged_settings_are_no_settings_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "steps: [insert_quantizers, mse_weight_scales, {gptq: &one {damping: 0.1, centred: false}}, "
        "{gptq: {<<: *one, damping: 0.2}}]"
    )
    assert [step.damping for step in parse_recipe(str(path)).steps if isinstance(step, Gptq)] == [0.1, 0.2]


@pytest.mark.parametrize("after", ["bias_correction", "bias_correction, distillation", "distillation, bias_correction"])
def test_what_makes_up_for_centred_gptq(after: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"steps: [insert_quantizers, mse_weight_scales, gptq, {after}]")
    assert parse_recipe(str(path)).steps[2] == Gptq()
    path.write_text("steps: [insert_quantizers, mse_weight_scales, {gptq: {centred: false}}]")
    assert parse_recipe(str(path)).steps[2] == Gptq(centred=False)


def test_numbers_that_yaml_reads_as_texts(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("steps: [insert_quantizers, mse_weight_scales, {gptq: {damping: 1e-3, centred: false}}]")
    assert parse_recipe(str(path)).steps[2] == Gptq(damping=0.001, centred=False)


def test_steps_that_leave_nothing_to_measure(make_job: MakeJob) -> None:
    job = make_job("w4a8")
    with pytest.raises(QuantrackError, match="no convolution is quantized"):
        require_quantized(job.model)
    apply_recipe(job, (InsertQuantizers(), MseWeightScales()))
    with pytest.raises(QuantrackError, match=r"not every quantizer has a scale; .* min_max_activation_ranges"):
        require_quantized(job.model)
    apply_recipe(make := make_job("w4a16"), (InsertQuantizers(), MseWeightScales()))
    require_quantized(make.model)


@pytest.mark.parametrize("step", [BiasCorrection(), BlockReconstruction(), ActivationRangeSearch()])
def test_steps_that_work_with_scales_do_not_take_unset_ones(step: Step, make_job: MakeJob) -> None:
    job = make_job("w4a8")
    apply_recipe(job, (InsertQuantizers(), MseWeightScales()))
    with pytest.raises(QuantrackError, match=r"recipe: [a-z_]+: not every quantizer has a scale yet; put steps such"):
        step.apply(job)


def test_a_missing_recipe_file() -> None:
    with pytest.raises(UsageError, match=r"recipe=nowhere.yaml: cannot be read"):
        parse_recipe("nowhere.yaml")


def test_of_a_model_without_a_digest_nothing_is_kept(make_job: MakeJob) -> None:
    job = make_job("w4a8")
    known = replace(job, model_digest="tiny", seed=6)
    key = step_keys(known, (InsertQuantizers(),))[0]
    InsertQuantizers().apply(job)
    save_step(key, job, [])
    assert restore_step(key, known) is None
    InsertQuantizers().apply(known)
    save_step(key, known, [])
    assert restore_step(key, job) is None
    assert restore_step(key, known) == []


def test_memory_that_runs_out_breaks_no_cached_step(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(make_job("w4a8"), model_digest="tiny", seed=7)
    key = step_keys(job, (InsertQuantizers(),))[0]
    InsertQuantizers().apply(job)
    save_step(key, job, [])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
        with pytest.raises(torch.OutOfMemoryError):
            restore_step(key, job)
    assert restore_step(key, job) == []


def raising(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


def test_a_kept_step_is_restored_and_a_changed_one_is_not(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantrack.quantization.apply.WORTH_SECONDS", 0.0)
    steps = DEFAULT_BY_ROLE
    first, again, other = (replace(make_job("w4a8"), model_digest="tiny") for _ in range(3))
    told: list[str] = []
    apply_recipe(first, steps, lambda place, report: told.append(f"{place} {report.step}"))
    assert told[0] == "1 InsertQuantizers"
    reports = apply_recipe(again, steps)
    assert all(report.cached for report in reports)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    changed = (*steps[:-2], Gptq(damping=0.1), steps[-1])
    cached = [report.cached for report in apply_recipe(other, changed)]
    assert cached == [True] * (len(steps) - 2) + [False, False]


def test_a_broken_cache_file_is_done_again(make_job: MakeJob) -> None:
    job, other = (replace(make_job("w4a8"), model_digest="tiny") for _ in range(2))
    key = step_keys(job, (InsertQuantizers(),))[0]
    InsertQuantizers().apply(job)
    save_step(key, job, [])
    assert restore_step(key, other) == []
    from quantrack.cache import cache_folder

    path = cache_folder() / f"steps/{key}.pt"
    path.write_bytes(path.read_bytes()[:100])
    assert restore_step(key, replace(make_job("w4a8"), model_digest="tiny")) is None
    assert not path.exists()
