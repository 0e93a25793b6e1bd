import re
from pathlib import Path
from typing import Any

import pytest

from quantrack.errors import UsageError
from quantrack.quantization.plan_bits import PlanBits
from quantrack.settings import (
    CompareSettings,
    DataSettings,
    PtqSettings,
    QatSettings,
    SensitivitySettings,
    parse_settings,
    setting_texts,
)

PLANS = (
    ({}, PlanBits()),
    ({"mode": "w4a16", "recipe": "best"}, PlanBits()),
    ({"avg_bits": 4.1, "plan_bits": "8,4", "plan_by": "layer"}, PlanBits(4.1, (4, 8), "layer")),
    ({"plan_by": "layer"}, PlanBits(by="layer")),
    ({"recipe": "fast", "avg_bits": 5.0}, PlanBits(5.0)),
    ({"weight_storage": "int4"}, PlanBits(None, (4, 7), "layer", weigh_all=True)),  # the smallest file
    ({"weight_storage": "int4", "placement": "full"}, PlanBits(None, (4, 7), "layer")),
    ({"weight_storage": "int4", "avg_bits": 4.25}, PlanBits(4.25, (4, 7), "layer", weigh_all=True)),
    (
        {"weight_storage": "int4", "plan_bits": "4,8", "plan_by": "channel"},
        PlanBits(None, (4, 8), "channel", weigh_all=True),
    ),
    ({"weight_storage": "int4", "avg_bits": 0.0}, None),
    ({"avg_bits": 0.0}, None),
    ({"plan": "plan.json"}, None),
    ({"recipe": "fast"}, None),
    ({"recipe": "naive"}, None),
    ({"weight_storage": "int4", "recipe": "fast"}, None),
    ({"mode": "w8a8"}, None),
)


def test_each_mode_of_a_comparison_gets_what_its_bits_have_a_use_for():
    settings = CompareSettings(placement="full", weight_storage="int4", avg_bits=4.5)
    children = {mode: settings.child(mode) for mode in ("w8a16", "w8a8", "w4a16", "w4a8")}
    assert {mode: (one.placement, one.weight_storage, one.avg_bits) for mode, one in children.items()} == {
        "w8a16": ("inputs", "int8", None),
        "w8a8": ("full", "int8", None),
        "w4a16": ("inputs", "int4", 4.5),
        "w4a8": ("full", "int4", 4.5),
    }


@pytest.mark.parametrize(("given", "planned"), PLANS)
def test_bits_are_planned_unless_they_go_by_role(given, planned):
    recipe = PtqSettings(**given).chosen_recipe
    assert recipe.plan == planned
    assert recipe.with_plan(None).steps == recipe.steps[planned is not None :]


@pytest.mark.parametrize("given", [given for given, _ in PLANS if "plan" not in given])
def test_a_logged_recipe_and_the_same_settings_are_the_run_again(given, tmp_path):
    settings = PtqSettings(**given)
    path = tmp_path / "default.yaml"  # as `reproduce` fetches a run's `recipe.yaml`
    path.write_text(settings.chosen_recipe.text())
    again = parse_settings(PtqSettings, setting_texts(settings) | {"recipe": str(path)})
    assert again.chosen_recipe.steps == settings.chosen_recipe.steps


def test_a_recipe_file_plans_bits_for_int4_too(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "steps: [{plan_bits: {average: 4.2, bits: [4, 8]}}, insert_quantizers, observe_activations, mse_weight_scales, "
        "min_max_activation_ranges]"
    )
    settings = PtqSettings(recipe=str(path), weight_storage="int4", plan_by="layer")
    assert settings.chosen_recipe.plan == PlanBits(4.2, (4, 8), "layer")


def test_what_is_not_given_reads_as_nothing():
    texts = setting_texts(PtqSettings())
    assert texts["avg_bits"] == texts["plan_by"] == ""
    assert parse_settings(PtqSettings, texts) == PtqSettings()
    assert parse_settings(PtqSettings, texts | {"avg_bits": "''"}).avg_bits is None


def test_kinds_for_names():
    assert PtqSettings(mode="w4a8").mode_and_variant == "w4a8"
    assert PtqSettings(mode="W4A8", placement="full", weight_storage="int4").mode_and_variant == "w4a8-full-int4"


@pytest.mark.parametrize("other", [{"placement": "full"}, {"weight_storage": "int4"}, {"precision": "fp16"}])
def test_tensorrt_takes_no_other_variant(other):
    with pytest.raises(UsageError, match="target=tensorrt: TensorRT places and stores by itself"):
        PtqSettings(target="tensorrt", **other)


def test_integer_kernels_do_not_compute_in_float16():
    with pytest.raises(UsageError, match="precision=fp16: placement=full computes on integers; use inputs"):
        PtqSettings(precision="fp16", placement="full")


def test_an_unknown_storage_is_refused():
    with pytest.raises(UsageError, match="weight_storage=int2: unknown weight_storage; use int8 or int4"):
        PtqSettings(weight_storage="int2")


@pytest.mark.parametrize(
    ("root", "said"), [("demo", "the embedded demo needs no preparing"), ("''", "data_root: empty")]
)
def test_there_must_be_a_folder_to_prepare(root, said):
    with pytest.raises(UsageError, match=said):
        parse_settings(DataSettings, {"data_root": root})


def test_a_resumed_training_takes_its_own_settings_however_they_were_typed():
    recorded = {"lr0": "5e-4", "amp": "True", "model": "demo", "device_resolved": "cpu"}
    parse_settings(QatSettings, {"lr0": "5e-4", "amp": "true", "resume": "x"}).require_only_resume(recorded)
    with pytest.raises(UsageError, match=r"lr0=0.002: run x goes on with its own \(0.0005\); leave it out"):
        parse_settings(QatSettings, {"lr0": "2e-3", "resume": "x"}).require_only_resume(recorded)


def test_sensitivity_runs_nothing_in_onnx_runtime():
    with pytest.raises(UsageError, match="require_gpu=true: sensitivity runs nothing in ONNX Runtime"):
        SensitivitySettings(require_gpu=True)


def test_a_training_has_the_size_that_it_says():
    with pytest.raises(UsageError, match="imgsz=304: must be a multiple of 32 to be trained at"):
        QatSettings(imgsz=304)


OBSERVED = "insert_quantizers, observe_activations"


@pytest.mark.parametrize(
    ("steps", "settings", "said"),
    [
        (f"{OBSERVED}, mse_weight_scales, gptq, bias_correction", {}, "lacks a step for w4a8: one that sets ranges"),
        (
            f"{OBSERVED}, mse_weight_scales, distillation, min_max_activation_ranges",
            {},
            "distillation: put one that sets ranges before it, for w4a8",
        ),
        (f"{OBSERVED}, mse_weight_scales", {}, "lacks a step for w4a8: one that sets ranges"),
        (f"{OBSERVED}, min_max_activation_ranges", {}, "lacks a step for w4a8: one that sets weight scales"),
        ("plan_bits", {}, "lacks a step for w4a8: insert_quantizers"),
        (
            "plan_bits, insert_quantizers: {float_roles: [dfl, first]}, observe_activations, mse_weight_scales, "
            "min_max_activation_ranges",
            {},
            "float_roles: a plan of bits leaves only dfl float, not first",
        ),
        (
            "insert_quantizers: {float_roles: [head output]}, observe_activations, mse_weight_scales, "
            "min_max_activation_ranges",
            {"avg_bits": 4.5},
            "float_roles: a plan of bits leaves only dfl float, not head output",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_any_work(
    steps: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("steps: [" + re.sub(r"(\w+: \{[^}]*\})", r"{\1}", steps) + "]")
    with pytest.raises(UsageError, match=f"recipe=own: {said}"):
        PtqSettings(recipe=str(path), **settings)


def test_float_activations_need_no_ranges(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("steps: [insert_quantizers, mse_weight_scales, gptq, bias_correction]")
    assert PtqSettings(recipe=str(path), mode="w4a16").chosen_recipe.name == "own"


def test_a_file_is_not_called_as_one_of_our_recipes(tmp_path: Path) -> None:
    path = tmp_path / "default.yaml"
    path.write_text("steps: [insert_quantizers, mse_weight_scales]")
    assert PtqSettings(recipe=str(path), mode="w4a16").chosen_recipe.name == "default.yaml"


def test_weights_that_could_not_be_packed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weight_storage=int4: weights have 5 bits or more; give plan_bits with 4"):
        PtqSettings(mode="w4a16", weight_storage="int4", avg_bits=5.5, plan_bits="5,6")
