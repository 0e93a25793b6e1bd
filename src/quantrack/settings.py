"""The settings of every entry point: one frozen dataclass each, validated before work starts.

A field is an `MLproject` parameter, an option of the pipeline's command line and a logged parameter,
under one name and with one default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from quantrack.comparison.gates import MORE_IS_BETTER, Limits
from quantrack.datasets.demo import DEMO, demo_calibration_list, demo_folder
from quantrack.datasets.download import DownloadSettings
from quantrack.errors import UsageError
from quantrack.quantization.bit_plan import BIT_RANGE, PLANNED_BY
from quantrack.quantization.plan_bits import FOR_INT4, PlanBits
from quantrack.quantization.recipe import (
    RECIPES,
    Recipe,
    for_packed_weights,
    parse_recipe,
    recipe_for,
)
from quantrack.quantization.sensitivity import ESTIMATED, MEASURES
from quantrack.quantization.steps import require_complete, require_plannable
from quantrack.runtime.session import parse_provider
from quantrack.schemes import HEADS, ONE2ONE, SCHEMES, VARIANTS, Scheme, Variant, parse_mode

T = TypeVar("T")
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
PRECISIONS = VARIANTS["precision"]
TRAINED_SIZES = 32  # pixels; Ultralytics rounds others up, whatever the stride
LARGEST_SEED = 2**32 - 1  # that NumPy's generator, which Ultralytics seeds, takes
PROMOTED_TO = ("champion", "challenger")
MODEL_NAME = re.compile(r"\w[\w .-]{0,199}")
ALL_MODES = ",".join((*PRECISIONS, *SCHEMES))
DEFAULT_CALIBRATION_LIST = "datasets/quantize-calib/quant100.txt"


def _setting(default: str | int | float | bool | None, description: str, name: str = "") -> Any:  # noqa: ANN401 - as field
    """A field; `name` is what users call it where that is no name for a field (`from` is a keyword)."""
    return field(default=default, metadata={"help": description} | ({"name": name} if name else {}))


def setting_name(item: Field[Any]) -> str:
    """What the `MLproject` parameter, the option and the logged parameter of a field are called."""
    return str(item.metadata.get("name", item.name))


@dataclass(frozen=True)
class SharedSettings:
    """What every entry point that runs a detector understands."""

    model: str = _setting("yolov10m.pt", "Checkpoint path, downloadable name, *.yaml architecture, or demo.")
    data_root: str = _setting("datasets/coco2017/source-data", "Folder in the official COCO layout, or demo.")
    calib_list: str = _setting(DEFAULT_CALIBRATION_LIST, "List of calibration pictures, or random.")
    calib_images: int = _setting(100, "Calibration pictures; 0 = all.")
    eval_images: int = _setting(100, "Evaluation pictures, the first by id; 0 = all.")
    imgsz: int = _setting(640, "Side of the square network input in pixels.")
    head: str = _setting(ONE2ONE, "one2one (NMS-free) or one2many (with NMS).")
    device: str = _setting("auto", "PyTorch device: auto, cpu or cuda.")
    provider: str = _setting("auto", "ONNX Runtime provider: auto, cuda, cpu or tensorrt.")
    seed: int = _setting(0, "Seed of everything random.")
    latency_runs: int = _setting(100, "Timed inference runs for the latency.")
    require_gpu: bool = _setting(False, "Fail unless ONNX Runtime computes everything on the GPU.")
    trust_checkpoint: bool = _setting(False, "Load a checkpoint that the safe loader refuses.")

    def __post_init__(self) -> None:
        _require(self.head in HEADS, f"head={self.head}: unknown head; use one of {', '.join(HEADS)}")
        parse_provider(self.provider)
        if self.require_gpu:
            _require(self.provider != "cpu", "require_gpu=true: provider=cpu uses none; leave it out")
        for name in ("calib_images", "eval_images", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value}: must not be negative")
        _require(self.seed <= LARGEST_SEED, f"seed={self.seed}: must be at most {LARGEST_SEED}")
        for name in ("model", "data_root", "calib_list"):
            _require(bool(getattr(self, name).strip()), f"{name} is empty; leave it out for its default")
        for name in ("imgsz", "latency_runs"):
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value}: must be at least 1")

    def values_of(self, settings_type: type[SharedSettings]) -> dict[str, Any]:
        """The values of the fields that another type of settings has as well, by name."""
        return {item.name: getattr(self, item.name) for item in fields(settings_type)}

    @property
    def data_folder(self) -> Path:
        """The data root; `demo` stands for the embedded one."""
        return demo_folder() if self.data_root == DEMO else Path(self.data_root)

    @property
    def calibration_list(self) -> str:
        """The calibration list; the default list names COCO pictures, so the demo has its own."""
        if self.data_root == DEMO and self.calib_list == DEFAULT_CALIBRATION_LIST:
            return str(demo_calibration_list())
        return self.calib_list


@dataclass(frozen=True)
class BaselineSettings(SharedSettings):
    """The float detector."""

    precision: str = _setting("fp32", "fp32 or fp16.")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(PRECISIONS)
        _require(self.precision in PRECISIONS, f"precision={self.precision}: unknown precision; use one of {known}")

    @classmethod
    def like(cls, other: SharedSettings, precision: str = "fp32") -> BaselineSettings:
        """Those of the float detector that other settings are about."""
        return cls(**other.values_of(SharedSettings), precision=precision)


@dataclass(frozen=True)
class RecipeSettings(SharedSettings):
    """How a detector is quantized, whatever the mode."""

    recipe: str = _setting("default", "naive, fast, default, best, or a *.yaml file.")
    plan: str = _setting("", "Bits of weights: the plan.json of a sensitivity run, a file or runs:/RUN_ID/plan.json.")
    avg_bits: float | None = _setting(
        None,
        "Average weight bits to plan for; 0 = bits by role; empty = the recipe's: 4.5 in default and best; with "
        "weight_storage=int4, as large a file as bits by role make.",
    )
    plan_bits: str = _setting(
        "", "Bits that a plan chooses from; empty = the recipe's: 3,4,5,6,7 in ours, 4,7 for weight_storage=int4."
    )
    plan_by: str = _setting(
        "", "layer or channel, each with bits of its own; empty = the recipe's: channel, layer for weight_storage=int4."
    )
    placement: str = _setting(
        "inputs", "Activation quantizers: at convolutions' inputs (accurate), or full (integer kernels on the CPU)."
    )
    weight_storage: str = _setting("int8", "How weights of at most 4 bits are stored: int8 or int4 (half the size).")
    precision: str = _setting("fp32", "What is computed between quantizers: fp32 or fp16 (for CUDA).")
    target: str = _setting("onnxruntime", "onnxruntime, or tensorrt: symmetric activations, no Clip.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in VARIANTS.items():
            value = getattr(self, name)
            _require(value in known, f"{name}={value}: unknown {name}; use {' or '.join(known)}")
        if self.plan_by:
            _require_plan_by(self.plan_by)

    @property
    def variant(self) -> Variant:
        """The choices that make the kind of file."""
        return Variant(*(getattr(self, name) for name in VARIANTS))


@dataclass(frozen=True)
class PtqSettings(RecipeSettings):
    """Post-training quantization."""

    method: ClassVar[str] = "ptq"

    mode: str = _setting("w4a8", "w8a16, w8a8, w4a16 or w4a8.")

    def __post_init__(self) -> None:
        super().__post_init__()
        scheme = parse_mode(self.mode)
        for name, value in self.own_bits.items():
            _require(
                scheme.weight_bits < 8 or value == 0,
                f"{name}={value}: {scheme.name} has 8-bit weights throughout; use w4a8 or w4a16",
            )
            _require(not self.plan or name == "plan", f"{name}={value}: the plan has its own bits; give one")
        recipe = self.chosen_recipe
        require_complete(recipe.name, recipe.steps, scheme)
        planned = recipe.plan is not None
        if planned or self.plan:
            require_plannable(recipe.name, recipe.steps)
        for name in ("plan_bits", "plan_by"):
            value = self.own_bits.get(name)
            _require(planned or not value, f"{name}={value}: there is no budget to plan for; give avg_bits")
        self._require_variant(scheme)

    @property
    def scheme_name(self) -> str:
        """The mode as runs are tagged with it."""
        return parse_mode(self.mode).name

    @property
    def own_bits(self) -> dict[str, object]:
        """The settings given of those that say what bits weights have, by name."""
        named: dict[str, object] = {name: getattr(self, name) for name in ("plan", "avg_bits", "plan_bits", "plan_by")}
        return {name: value for name, value in named.items() if value not in (None, "")}

    @cached_property
    def chosen_recipe(self) -> Recipe:
        """The recipe as mode, variant and these settings' bits make it; a file is read once.

        Raises:
            UsageError: there is no such recipe, or no plan has so few or so many bits.
        """
        recipe = parse_recipe(self.recipe)
        recipe = recipe.with_plan(self._plan_step(recipe))
        if self._is_our_recipe_for_int4 and self.placement == "inputs":
            recipe = for_packed_weights(recipe)
        return recipe_for(self.variant, recipe)

    @property
    def _is_our_recipe_for_int4(self) -> bool:
        """Whether weights are packed, by a recipe that is no file, which would have its own settings."""
        return self.weight_storage == "int4" and self.recipe in RECIPES

    def _plan_step(self, recipe: Recipe) -> PlanBits | None:
        """The recipe's own step to plan bits, changed by what was given; None where bits go by role, or are given."""
        if self.plan or self.avg_bits == 0 or parse_mode(self.mode).weight_bits == 8:
            return None
        if recipe.plan is None and self.avg_bits is None:
            return None
        usual = FOR_INT4 if self._is_our_recipe_for_int4 else recipe.plan or PlanBits()
        bits = parse_plan_bits(self.plan_bits) if self.plan_bits else usual.bits
        if self.avg_bits is not None:
            _require_budget(self.avg_bits, bits)
            return replace(usual, average=self.avg_bits, bits=bits, by=self.plan_by or usual.by)
        try:
            return replace(usual, bits=bits, by=self.plan_by or usual.by)
        except UsageError as error:
            raise UsageError(
                f"plan_bits={self.plan_bits}: not with the recipe's plan ({error}); give avg_bits"
            ) from error

    @property
    def mode_and_variant(self) -> str:
        """The mode, and what sets its variant apart from the usual one, for names: `w4a8-full-int4`."""
        return "-".join([self.scheme_name, *self.variant.words])

    def _require_variant(self, scheme: Scheme) -> None:
        """Full placement needs activations that integer kernels take, INT4 storage weights that fit."""
        if self.placement == "full":
            _require(scheme.activation_bits is not None, f"placement=full: {scheme.name} has float activations; use a8")
            symmetric = any(getattr(step, "activation", "") == "symmetric" for step in parse_recipe(self.recipe).steps)
            _require(
                not symmetric, f"placement=full: recipe={self.recipe} has symmetric activations; use another recipe"
            )
        if self.weight_storage == "int4":
            _require(
                scheme.weight_bits <= 4, f"weight_storage=int4: {scheme.name} has 8-bit weights; use w4a8 or w4a16"
            )
            plan = self.chosen_recipe.plan
            fewest = min(plan.bits) if plan is not None else 4
            _require(fewest <= 4, f"weight_storage=int4: weights have {fewest} bits or more; give plan_bits with 4")
        if self.target == "tensorrt":
            usual = self.placement == "inputs" and self.weight_storage == "int8" and self.precision == "fp32"
            _require(usual, "target=tensorrt: TensorRT places and stores by itself; leave the other variants out")
        if self.precision == "fp16":
            _require(self.placement == "inputs", "precision=fp16: placement=full computes on integers; use inputs")


@dataclass(frozen=True)
class QatSettings(PtqSettings):
    """Quantization-aware training, from a PTQ run's plan, scales and weights."""

    method: ClassVar[str] = "qat"

    from_run: str = _setting("", "The PTQ run to start from; empty = one of the same settings, found or made.")
    epochs: int = _setting(10, "Epochs to train.")
    batch: int = _setting(16, "Batch size, over all GPUs together.")
    lr0: float = _setting(0.001, "Adam's initial learning rate for weights, in steps of a 4-bit grid.")
    lr0_scales: float = _setting(0.0003, "Adam's initial learning rate for scales, relative.")
    distill_weight: float = _setting(3.0, "Weight of the distance to the float detector; 0 = labels only.")
    train_images: int = _setting(0, "Labelled pictures of train2017, drawn by the seed; 0 = all that are here.")
    patience: int = _setting(5, "Stop after this many epochs without improvement; 0 = never.")
    amp: bool = _setting(False, "Train in bfloat16.")
    resume: str = _setting("", "Id of an interrupted qat run to go on with; it keeps its own settings.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch"):
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value}: must be at least 1")
        for name in ("train_images", "patience", "distill_weight"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value}: must not be negative")
        _require(math.isfinite(self.distill_weight), f"distill_weight={self.distill_weight}: must be finite")
        fits = self.imgsz % TRAINED_SIZES == 0
        _require(fits, f"imgsz={self.imgsz}: must be a multiple of {TRAINED_SIZES} to be trained at")
        _require(self.train_images != 1, "train_images=1: must be at least 2, as one is held back; 0 = all")
        for name in ("lr0", "lr0_scales"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"{name}={value}: must be above 0 and at most 1")
        given = ", ".join(self.own_bits)
        _require(not (self.from_run and given), f"from_run={self.from_run}: it has its own bits; leave {given} out")

    @property
    def ptq(self) -> PtqSettings:
        """The settings of the PTQ run to start from."""
        return PtqSettings(**self.values_of(PtqSettings))

    def require_only_resume(self, recorded: Mapping[str, str]) -> None:
        """Refuse a setting that is neither its default nor what the run to go on with recorded, given as texts.

        Raises:
            UsageError: one is.
        """
        usual = default_texts(QatSettings)
        own = {name: text for name, text in recorded.items() if name in usual}
        recorded = setting_texts(parse_settings(QatSettings, own))  # 5e-4 was logged as it was typed
        for name, text in setting_texts(self).items():
            if name != "resume" and text not in (usual[name], recorded[name]):
                was = recorded[name] or "not set"
                raise UsageError(f"{name}={text}: run {self.resume} goes on with its own ({was}); leave it out")


@dataclass(frozen=True)
class CompareSettings(RecipeSettings):
    """Several modes of one detector, or runs that are there already, side by side; a bit plan is for 4 bits only."""

    modes: str = _setting(ALL_MODES, "Modes and precisions to measure, or to find measured.")
    runs: str = _setting("", "Ids of finished runs to compare instead, separated by commas.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs:
            _require(self.modes == ALL_MODES, f"modes={self.modes}: runs={self.runs} is given too; give one of the two")
            _require_distinct("runs", self.run_ids)
            _require(len(self.run_ids) > 1, f"runs={self.runs}: give at least two run ids, as in ID,ID")
            return
        _require(bool(self.mode_names), f"modes={self.modes}: names none; give some, as in fp32,w4a8")
        _require_distinct("modes", self.mode_names)
        for mode in self.mode_names:
            self.child(mode)

    @property
    def run_ids(self) -> tuple[str, ...]:
        return _parts(self.runs)

    @property
    def mode_names(self) -> tuple[str, ...]:
        return tuple(part.lower() for part in _parts(self.modes))

    def child(self, mode: str) -> BaselineSettings | PtqSettings:
        """The settings of one mode's own run; what its bits have no use for keeps its default.

        Raises:
            UsageError: no such mode, or a setting is refused.
        """
        if mode in PRECISIONS:
            return BaselineSettings.like(self, mode)
        known = (*PRECISIONS, *SCHEMES)
        _require(mode in known, f"modes={mode}: unknown mode; use some of {', '.join(known)}")
        scheme = parse_mode(mode)
        not_for_it: dict[str, Any] = {}
        if scheme.weight_bits == 8:
            not_for_it |= {"plan": "", "avg_bits": None, "plan_bits": "", "plan_by": "", "weight_storage": "int8"}
        if scheme.activation_bits is None:
            not_for_it |= {"placement": "inputs"}
        return PtqSettings(**self.values_of(RecipeSettings) | not_for_it, mode=mode)


@dataclass(frozen=True)
class SensitivitySettings(SharedSettings):
    """What each layer's quantization costs, and the bit plan that follows."""

    mode: str = _setting("w4a8", "w4a8 or w4a16.")
    avg_bits: float = _setting(4.5, "Average weight bits that the plan may use.")
    plan_bits: str = _setting("3,4,5,6,7", "Bits that a plan chooses from; 4,7 where only INT4 and INT8 are stored.")
    plan_by: str = _setting(
        "", "What has bits of its own in the plan, layer or channel; empty = channel where the measure tells of them."
    )
    measure: str = _setting(
        "gradient", "gradient or output (calibration pictures), or mAP (evaluation pictures, slow)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(not self.require_gpu, "require_gpu=true: sensitivity runs nothing in ONNX Runtime; give device=cuda")
        scheme = parse_mode(self.mode)
        known = ", ".join(MEASURES)
        _require(self.measure in MEASURES, f"measure={self.measure}: unknown measure; use one of {known}")
        _require(
            scheme.weight_bits < 8, f"mode={self.mode}: {scheme.name} has 8-bit weights throughout; use w4a8 or w4a16"
        )
        _require_budget(self.avg_bits, parse_plan_bits(self.plan_bits))
        if self.plan_by:
            _require_plan_by(self.plan_by)
        _require(
            self.plan_by != "channel" or self.measure == ESTIMATED,
            f"plan_by={self.plan_by}: measure={self.measure} tells nothing of channels; use measure=gradient",
        )

    @property
    def chosen_plan_by(self) -> str:
        """`plan_by`, or what it is where nothing is given."""
        return self.plan_by or ("channel" if self.measure == ESTIMATED else "layer")


@dataclass(frozen=True)
class OnnxSettings(SharedSettings):
    """An exported file, to evaluate or to time."""

    onnx: str = _setting("", "An ONNX file, runs:/RUN_ID/onnx/FILE.onnx or models:/NAME@ALIAS.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.onnx), "onnx: missing; give a file, runs:/RUN_ID/onnx/FILE.onnx or models:/NAME@ALIAS")


@dataclass(frozen=True)
class BenchmarkSettings(OnnxSettings):
    """An exported file to time, alone or beside a float32 one."""

    baseline: str = _setting("", "The float32 file to time it in turns with, as for onnx; empty = that of its run.")
    tune: bool = _setting(False, "Try session settings and report the fastest.")


@dataclass(frozen=True)
class ReproduceSettings:
    """A finished run to do again from its record."""

    run_id: str = _setting("", "Id of a finished run of baseline, ptq, qat or evaluate.")
    data_root: str = _setting("", "Where the pictures lie now; empty = where the run found them.")

    def __post_init__(self) -> None:
        _require(bool(self.run_id), "run_id: missing; give the id of a finished run of baseline, ptq, qat or evaluate")


@dataclass(frozen=True)
class PromoteSettings:
    """A measured run to make champion of a registered model, and the gates that it must pass; or a rollback."""

    name: str = _setting("", "Registered model, made if it is not there.")
    run_id: str = _setting("", "Id of a finished ptq or qat run.")
    from_run: str = _setting(
        "", "Instead of run_id: a compare run, whose best passing ptq or qat run is taken.", name="from"
    )
    best_by: str = _setting(
        "mAP50-95",
        "What the best of them has: the most mAP50-95, least latency_ms_p50 (in turns with float32) or onnx_mb.",
    )
    to: str = _setting("champion", "champion, or challenger to leave the champion as it is.")
    rollback: bool = _setting(False, "Swap champion and previous instead; takes no run.")
    max_drop: float = _setting(5.0, "Points that the upper end of the drop's 95 % interval may reach; 0 = any.")
    max_latency_ratio: float = _setting(0.0, "Most latency, as a multiple of float32's timed in turns; 0 = any.")
    max_mb: float = _setting(0.0, "Size of the ONNX file in 10^6 bytes; 0 = any.")
    min_map: float = _setting(0.0, "Least mAP50-95, a fraction; 0 = any.", name="min_mAP")
    min_agreement: float = _setting(0.0, "Least float32_agreement, a fraction; 0 = any.")
    max_parity: float = _setting(0.02, "Mean difference between PyTorch and ONNX Runtime; 0 = any.")
    same_evaluation: bool = _setting(True, "Pictures, head and input size must be those of the champion.")
    require_better: bool = _setting(False, "mAP50-95 must not be below the champion's.")

    def __post_init__(self) -> None:
        _require(bool(self.name), "name: missing; give the registered model's name, as in name=yolov10m")
        allowed = "use letters, digits, spaces, '.', '_' and '-', at most 200, the first a letter or digit"
        _require(MODEL_NAME.fullmatch(self.name) is not None, f"name={self.name}: not a model's name; {allowed}")
        _require(self.to in PROMOTED_TO, f"to={self.to}: unknown alias; use one of {', '.join(PROMOTED_TO)}")
        known = ", ".join(MORE_IS_BETTER)
        _require(self.best_by in MORE_IS_BETTER, f"best_by={self.best_by}: unknown metric; use one of {known}")
        self._require_one_source()
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float):
                name = setting_name(item)
                _require(math.isfinite(value) and value >= 0, f"{name}={value}: must be a number from 0; 0 = any")
        for name, fraction in (("min_mAP", self.min_map), ("min_agreement", self.min_agreement)):
            _require(fraction <= 1, f"{name}={fraction}: must be a fraction from 0 to 1")
        _require(
            self.same_evaluation or not self.require_better,
            "require_better=true: accuracies on different pictures do not compare; leave same_evaluation=true",
        )

    def _require_one_source(self) -> None:
        given = [name for name, value in (("run_id", self.run_id), ("from", self.from_run)) if value]
        if self.rollback:
            _require(not given, f"{', '.join(given)}: rollback=true takes no run; leave it out")
            _require(self.to == "champion", f"to={self.to}: rollback=true moves champion; leave it out")
            return
        _require(len(given) < 2, f"from={self.from_run}: run_id={self.run_id} is given too; give one of the two")
        _require(len(given) > 0, "run_id: missing; give run_id, from=COMPARE_RUN, or rollback=true")

    @property
    def limits(self) -> Limits:
        """Where the gates stand."""
        return Limits(**{item.name: getattr(self, item.name) for item in fields(Limits)})


@dataclass(frozen=True)
class DataSettings:
    """What to download, or the copy to build from."""

    data_root: str = _setting("datasets/coco2017/source-data", "Folder to prepare.")
    calib_list: str = _setting(DEFAULT_CALIBRATION_LIST, "List of calibration pictures to fetch, or random.")
    calib_images: int = _setting(100, "Calibration pictures; 0 = all of the list.")
    eval_images: int = _setting(100, "Evaluation pictures, the first by id; 0 = all.")
    images: str = _setting("listed", "listed (one by one) or all (the full archives).")
    source: str = _setting("", "Build from this folder in the official layout instead of downloading.")
    base_url: str = _setting("http://images.cocodataset.org", "Where COCO is served.")

    def __post_init__(self) -> None:
        _require(bool(self.data_root), "data_root: empty; name the folder to prepare")
        _require(
            self.data_root != DEMO, "data_root=demo: the embedded demo needs no preparing; name the folder to prepare"
        )
        _ = self.download  # refuses what it cannot take

    @property
    def download(self) -> DownloadSettings:
        """What is to be in `data_root`."""
        return DownloadSettings(
            data_root=Path(self.data_root),
            calib_list=self.calib_list,
            calib_images=self.calib_images,
            eval_images=self.eval_images,
            images=self.images,
            base_url=self.base_url,
        )


def parse_settings(settings_type: type[T], values: Mapping[str, str]) -> T:
    """Settings from texts, as the command line and `mlflow run -P` give them.

    Raises:
        UsageError: a value has the wrong type or is refused by the settings' own checks.
    """
    hints = get_type_hints(settings_type)
    names = {setting_name(item): item.name for item in fields(settings_type)}  # type: ignore[arg-type]
    return settings_type(**{names[name]: _convert(name, text, hints[names[name]]) for name, text in values.items()})


def setting_texts(settings: object) -> dict[str, str]:
    """The settings as they are logged: every field as text, booleans in lower case."""
    return {setting_name(item): _text(getattr(settings, item.name)) for item in fields(settings)}  # type: ignore[arg-type]


def default_texts(settings_type: type[object]) -> dict[str, str]:
    """Each field's default as text, by name."""
    return {setting_name(item): _text(item.default) for item in fields(settings_type)}  # type: ignore[arg-type]


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_plan_bits(text: str) -> tuple[int, ...]:
    """The numbers of bits that a plan chooses from, ascending.

    Raises:
        UsageError: not at least two whole numbers from 2 to 8.

    >>> parse_plan_bits("8,4")
    (4, 8)
    """
    parts = {part.strip() for part in text.split(",")}
    known = {str(bits) for bits in BIT_RANGE}
    _require(len(parts) > 1 and parts <= known, f"plan_bits={text}: give at least two of 2 to 8, as in 4,7")
    return tuple(sorted(int(part) for part in parts))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _require_distinct(name: str, parts: tuple[str, ...]) -> None:
    repeated = [part for part in parts if parts.count(part) > 1]
    _require(not repeated, f"{name}={','.join(parts)}: {''.join(repeated[:1])} is named twice")


def _require_plan_by(plan_by: str) -> None:
    _require(plan_by in PLANNED_BY, f"plan_by={plan_by}: unknown; use {' or '.join(PLANNED_BY)}")


def _require_budget(avg_bits: float, choices: tuple[int, ...]) -> None:
    low, high = choices[0], choices[-1]
    _require(low <= avg_bits <= high, f"avg_bits={avg_bits}: must lie between {low} and {high}")


def _convert(name: str, text: str, kind: object) -> str | int | float | bool | None:
    text = "" if text.strip() in ("''", '""') else text.strip()
    if kind == float | None and not text:
        return None
    if kind in (float, float | None):
        try:
            return float(text)
        except ValueError:
            raise UsageError(f"{name}={text}: not a number") from None
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{name}={text}: not a whole number") from None
    if kind is bool:
        _require(text.lower() in TRUTH, f"{name}={text}: use true or false")
        return TRUTH[text.lower()]
    return text


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
