"""The model card of a promoted version: Markdown that says what it is, on what it was measured, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantrack.comparison.fitting import fitting
from quantrack.comparison.gates import MeasuredRun
from quantrack.comparison.runs import ACCURACY, AGREEMENT, LATENCY, LATENCY_RATIO, SIZE
from quantrack.schemes import Scheme, Variant, parse_mode

MAX_DESCRIPTION = 5000  # what MLflow keeps of a version's description
ROWS = (
    (ACCURACY, "mAP50-95", "{:.4f}"),
    ("mAP50", "mAP50", "{:.4f}"),
    ("mAP50-95_drop", "drop against float32, points", "{:.2f}"),
    ("mAP50-95_drop_ci_low", "drop, lower end of its 95 % interval", "{:.2f}"),
    ("mAP50-95_drop_ci_high", "drop, upper end of its 95 % interval", "{:.2f}"),
    (AGREEMENT, "agreement with float32's detections", "{:.3f}"),
    (LATENCY, "median latency, ms", "{:.1f}"),
    (LATENCY_RATIO, "latency, times float32's in turns", "{:.2f}"),
    (SIZE, "ONNX file, MB", "{:.2f}"),
    ("weight_bits_avg", "average weight bits", "{:.2f}"),
    ("weight_bits_stored_avg", "average bits as stored, in ONNX's INT4 and INT8 types", "{:.2f}"),
    ("parity_mean_abs", "mean difference to the reference", "{:.1e}"),
)
LIBRARIES = ("quantrack", "brevitas", "ultralytics", "torch", "onnx", "onnxruntime-gpu")


@dataclass(frozen=True)
class Measurement:
    """What a run's artifacts and inputs say beside its metrics and tags."""

    pictures: str
    timed_runs: str
    calibration_pictures: int
    calibration_seed: int
    versions: Mapping[str, str]


def model_card(name: str, run: MeasuredRun, measurement: Measurement) -> str:
    """The card of a run that passed all gates, registered under `name`; at most 5,000 characters."""
    sections = (
        _what(run),
        _results(run),
        _measured(run, measurement),
        _quantized(run, measurement),
        _use(name),
        _limits(run),
        "## Licence\n\nAGPL-3.0, because Ultralytics is.",
    )
    return fitting("\n\n".join(sections), "the run's description and artifacts", MAX_DESCRIPTION)


def family_description(run: MeasuredRun) -> str:
    """A line for the registered model, which holds all versions."""
    return (
        f"{run.tags['model_name']} quantized by Quantrack, as ONNX with quantizers for ONNX Runtime. The alias "
        "`champion` is the version to use, `previous` the one before it, `challenger` one that waits. AGPL-3.0."
    )


def _what(run: MeasuredRun) -> str:
    scheme, words = parse_mode(run.tags["mode"]), Variant.of(run.tags).words
    trained = run.tags.get("entry_point") == "qat"
    clip = "" if {"int4", "tensorrt"} & set(words) else "-Clip"
    return (
        f"# {' '.join((run.tags['model_name'], scheme.name.upper(), *words))}\n\n"
        f"The object detector {run.tags['model_name']} after "
        f"{'quantization-aware training' if trained else 'post-training quantization'} with {_bits(scheme)}, exported "
        f"as ONNX with quantizers (QuantizeLinear{clip}-DequantizeLinear) and measured in ONNX Runtime."
    )


def _bits(scheme: Scheme) -> str:
    activations = "float activations" if scheme.activation_bits is None else "INT8 activations (never FP8)"
    return f"{scheme.weight_bits}-bit weights and {activations}"


def _results(run: MeasuredRun) -> str:
    """This run beside its float32 one; what was not measured is absent."""
    reference: Mapping[str, float] = run.baseline.metrics if run.baseline is not None else {}
    lines = ["| metric | this version | float32 |", "| --- | ---: | ---: |"]
    for name, label, form in ROWS:
        if name in run.metrics:
            other = form.format(reference[name]) if name in reference else "-"
            lines.append(f"| {label} | {form.format(run.metrics[name])} | {other} |")
    return "## Results\n\n" + "\n".join(lines)


def _measured(run: MeasuredRun, measurement: Measurement) -> str:
    tags = run.tags
    versions = ", ".join(f"{name} {measurement.versions[name]}" for name in LIBRARIES if name in measurement.versions)
    return (
        "## Measured on\n\n"
        f"- pictures: {measurement.pictures} (digest {tags['evaluation_digest'][:12]}), "
        f"head {tags['head']}, {tags['imgsz']} px\n"
        f"- ONNX Runtime provider {tags['provider']} on {tags['device_name']}, {measurement.timed_runs} timed runs, "
        "one picture each, without reading, letterbox or NMS\n"
        f"- versions: {versions}\n"
        f"- reference of the difference: {_reference(run)}\n"
        f"- run {run.run_id}, commit {tags.get('git_commit', 'unknown')}"
    )


def _reference(run: MeasuredRun) -> str:
    """What `parity_mean_abs` is a difference to (`runtime.variants.reference_for`)."""
    if run.tags.get("placement") == "full":
        return "the same file in ONNX Runtime without optimization, every quantizer in float"
    return "the quantized network in PyTorch"


def _quantized(run: MeasuredRun, measurement: Measurement) -> str:
    start = run.tags.get("ptq_run_id")  # of a qat run
    steps = f"of run {start}, then trained: `config.yaml` of this one" if start else "of the run"
    return (
        "## Quantized\n\n"
        f"Recipe `{run.tags['recipe']}` (every step with its settings: `recipe.yaml` {steps}), calibrated on "
        f"{measurement.calibration_pictures} unlabelled pictures (digest {run.tags['calibration_digest'][:12]}, "
        f"seed {measurement.calibration_seed}); bits of each layer: `layers.json`. "
        f"Checkpoint digest {run.tags['model_digest'][:12]}."
    )


def _use(name: str) -> str:
    return (
        "## Use\n\n"
        "```python\n"
        "import mlflow\n"
        f'detector = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
        "```\n\n"
        "```sh\n"
        f'mlflow models serve -m "models:/{name}@champion" --env-manager local\n'
        "```\n\n"
        f'`onnx="models:/{name}@champion"` gives it to the entry points `evaluate` and `benchmark`.'
    )


def _limits(run: MeasuredRun) -> str:
    lines = [
        "- Accuracy holds for these pictures. The interval comes from resampling them: with few pictures it is wide, "
        "and a difference inside it is noise.",
        f"- {_kernels(run)} The latency is that of the processor named above.",
        "- The drop is held against the float32 network of the same checkpoint, not against published figures; "
        "so is the agreement, mAP50-95 with that network's sure detections as truth.",
    ]
    if parse_mode(run.tags["mode"]).weight_bits < 8:
        lines.append(f"- {_storage(run)}")
    return "## Limits\n\n" + "\n".join(lines)


def _kernels(run: MeasuredRun) -> str:
    if run.tags.get("placement") == "full":
        return "ONNX Runtime's CPU provider computes this file on integers, others in float around its quantizers."
    return "The kernels are float ones around quantizers on most providers: quantized need not be faster."


def _storage(run: MeasuredRun) -> str:
    if run.tags.get("weight_storage") == "int4":
        return "Weights that fit into 4 bits are stored as INT4 where that saves space, all others as INT8."
    return "Weights below 8 bits are stored as INT8 whose values a Clip bounds: the file is that of 8 bits."
