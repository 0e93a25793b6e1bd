"""Load a detector from a checkpoint, a known name, an architecture or the demo; ready to quantize."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from quantrack.cache import cache_folder
from quantrack.datasets.demo import DEMO, demo_checkpoint
from quantrack.detector.checkpoint import load_safely, load_trusting
from quantrack.detector.selection import select_before_decoding
from quantrack.detector.ultralytics_setup import prepare
from quantrack.errors import QuantrackError, UsageError
from quantrack.files import combined_digest, file_digest
from quantrack.schemes import HEADS, MAX_DETECTIONS, ONE2MANY, ONE2ONE

LAST_MODULES = ("Detect", "v10Detect")


@dataclass(frozen=True)
class Detector:
    """A float detector with one head, BatchNorm folded, in evaluation mode.

    `model` maps images [B, 3, S, S] (RGB, 0..1) to one tensor: one2one [B, 300, 6] as (x1, y1, x2,
    y2, score, class), or one2many [B, 4 + classes, anchors] as (cx, cy, w, h, class scores); boxes
    in network pixels. `digest` identifies the weights; S is a multiple of `stride`, in pixels.
    """

    model: nn.Module
    name: str
    head: str
    class_names: tuple[str, ...]
    digest: str
    stride: int


def load_detector(source: str, head: str, imgsz: int, seed: int, trust_checkpoint: bool) -> Detector:
    """Load, choose the head, fold BatchNorm, and see the model work once at `imgsz` (pixels).

    `source`: `demo`, a checkpoint's path, a `*.yaml` architecture (a file, or a name that Ultralytics
    knows; random weights from `seed`), or a published checkpoint's name, which is downloaded.

    Raises:
        QuantrackError: the source is missing, broken, refused, or no detection model.
        UsageError: the head is unknown or the model lacks it, or `imgsz` does not fit its stride.
    """
    if head not in HEADS:
        raise UsageError(f"head={head}: unknown head; use {ONE2ONE} or {ONE2MANY}")
    if imgsz <= 0:
        raise UsageError(f"imgsz={imgsz}: must be positive, a multiple of the model's stride (32 for most)")
    model, digest, source = _read(source, seed, trust_checkpoint)
    _choose_head(model, head, source)
    stride = _require_stride(model, imgsz, source)
    _fold(model, source)
    names = _class_names(model, source)
    _try_once(model, head, imgsz, len(names), source)
    return Detector(model, Path(source).stem, head, names, digest, stride)


def load_auxiliary_head(source: str, seed: int, trust_checkpoint: bool) -> tuple[nn.Module, nn.Module] | None:
    """The one-to-many head that `load_detector` leaves out where the one-to-one head is chosen.

    Training wants both, as the one-to-many head tells the network of more boxes.

    Returns:
        Its box and class branches, BatchNorm folded; None where the detector has no two heads.
    """
    model, _, source = _read(source, seed, trust_checkpoint)
    last = _head(model)
    if getattr(last, "one2one_cv2", None) is None or last.cv2 is None:
        return None
    _choose_head(model, ONE2MANY, source)
    _fold(model, source)
    return last.cv2, last.cv3


def _read(source: str, seed: int, trust_checkpoint: bool) -> tuple[nn.Module, str, str]:
    """The detector as it was trained, its digest, and its path or architecture."""
    if source.endswith((".yaml", ".yml")):
        model, digest = _build(source, seed)
    else:
        path = _find_checkpoint(source)
        model = load_trusting(path) if trust_checkpoint else load_safely(path)
        digest = file_digest(path)
        source = str(path)
    _require_detection(model, source)
    return model, digest, source


def _try_once(model: nn.Module, head: str, imgsz: int, classes: int, source: str) -> None:
    """One forward pass: builds the anchors at this size, so that the export has them as constants."""
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, 3, imgsz, imgsz))
    except Exception as error:  # an odd architecture fails in many ways
        raise QuantrackError(f"model={source}: does not run ({type(error).__name__}: {_line(error)})") from error
    anchors = sum(int(imgsz / float(stride)) ** 2 for stride in _head(model).stride)
    expected = (1, min(MAX_DETECTIONS, anchors), 6) if head == ONE2ONE else (1, 4 + classes, anchors)
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != expected:
        shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise QuantrackError(
            f"model={source}: its {head} output is {shape}, not {list(expected)}; use an Ultralytics detection model"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _class_names(model: nn.Module, source: str) -> tuple[str, ...]:
    given = getattr(model, "names", None)
    names = dict(enumerate(given)) if isinstance(given, list | tuple) else given
    count = int(_head(model).nc)
    if not isinstance(names, dict) or len(names) != count:
        known = len(names) if isinstance(names, dict) else "no"
        raise QuantrackError(f"model={source}: {known} class names for {count} classes; save it again")
    by_number = {str(key): str(name) for key, name in names.items()}
    numbers = [str(number) for number in range(count)]
    if sorted(by_number) != sorted(numbers):
        listed = ", ".join(sorted(by_number)[:3])
        raise QuantrackError(f"model={source}: its classes are numbered {listed}, ..., not from 0; save it again")
    return tuple(by_number[number] for number in numbers)


def _build(source: str, seed: int) -> tuple[nn.Module, str]:
    """An architecture with random weights; the digest is its description's and the seed's."""
    prepare()
    from ultralytics.nn.tasks import DetectionModel, guess_model_task, yaml_model_load

    if "://" in source:
        raise QuantrackError(f"model={source}: an address; download it and give the file's path")
    try:
        description = yaml_model_load(source)
    except Exception as error:  # a missing file and broken YAML raise many kinds
        raise QuantrackError(
            f"model={source}: no such architecture ({type(error).__name__}); give a *.yaml file or an Ultralytics name"
        ) from error
    task = guess_model_task(description)
    if task != "detect":
        kind = f"a {task} model" if task else "no YOLO"
        raise QuantrackError(f"model={source}: {kind}; Quantrack takes detection models")
    last = description["head"][-1][-2]  # where the task was found
    if last not in LAST_MODULES:
        raise QuantrackError(
            f"model={source}: ends in {last}; Quantrack takes detectors that end in {' or '.join(LAST_MODULES)}"
        )
    # parsed, and so with the scale in the name: yolov10n and yolov10m share one text
    content = {key: value for key, value in description.items() if key != "yaml_file"}
    digest = combined_digest([json.dumps(content, sort_keys=True, default=str), str(seed)])
    torch.manual_seed(seed)
    try:
        model: nn.Module = DetectionModel(description, verbose=False).eval()
    except Exception as error:
        raise QuantrackError(f"model={source}: cannot be built ({type(error).__name__}: {_line(error)})") from error
    return model, digest


def _find_checkpoint(source: str) -> Path:
    """A file, the demo's, or one that Ultralytics publishes under this name."""
    if source == DEMO:
        return demo_checkpoint()
    path = Path(source)
    if path.is_file() or len(path.parts) > 1 or path.suffix != ".pt":
        return path
    cached = cache_folder() / "weights" / source
    return cached if cached.is_file() else _download(source, cached)


def _download(name: str, target: Path) -> Path:
    prepare()
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    if name not in GITHUB_ASSETS_NAMES:
        raise QuantrackError(f"model={name}: no such file, and no model that Ultralytics publishes")
    failed = (
        f"model={name}: not here and cannot be downloaded{{}}; give a checkpoint's path, "
        "or try the embedded demo: -P model=demo -P data_root=demo"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            fetched = Path(attempt_download_asset(Path(folder) / name, retry=1, progress=False))
        except Exception as error:  # network errors of many kinds
            raise QuantrackError(failed.format(f" ({type(error).__name__})")) from error
        if not fetched.is_file():
            raise QuantrackError(failed.format(""))
        os.replace(fetched, target)
    return target


def _require_detection(model: nn.Module, source: str) -> None:
    from ultralytics.nn.tasks import DetectionModel

    layers = getattr(model, "model", None)
    last = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    if not isinstance(model, DetectionModel) or type(last).__name__ not in LAST_MODULES:
        kind = type(model).__name__
        raise QuantrackError(f"model={source}: a {kind}, not a detection model; use a YOLO detector")


def _choose_head(model: nn.Module, head: str, source: str) -> None:
    last = _head(model)
    if head == ONE2ONE and getattr(last, "one2one_cv2", None) is None:
        raise UsageError(f"head={head}: {Path(source).name} has no one-to-one head; use head=one2many")
    last.end2end = head == ONE2ONE
    if not last.end2end and last.cv2 is None:
        raise UsageError(f"head={head}: {Path(source).name} has only its one-to-one head left; use head=one2one")


def _head(model: nn.Module) -> Any:  # noqa: ANN401 - Ultralytics is untyped
    return model.model[-1]  # type: ignore[index]


def _require_stride(model: nn.Module, imgsz: int, source: str) -> int:
    strides = getattr(model, "stride", None)
    if not isinstance(strides, torch.Tensor) or strides.numel() == 0:
        raise QuantrackError(f"model={source}: does not say its stride; save it again with Ultralytics")
    stride = int(strides.max())
    if imgsz % stride:
        raise UsageError(f"imgsz={imgsz}: must be a multiple of {stride}, the stride of {Path(source).name}")
    return stride


def _fold(model: nn.Module, source: str) -> None:
    """Fold BatchNorm into the convolutions; the unused head branch goes with it."""
    model.eval().requires_grad_(False)
    cast("Any", model).fuse(verbose=False)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if left:
        raise QuantrackError(f"model={source}: BatchNorm of {left[0]} cannot be folded; use another architecture")
    last = _head(model)
    last.export = True  # one tensor out, instead of a tuple with the training outputs
    last.format = "onnx"
    last.max_det, last.dynamic, last.xyxy = MAX_DETECTIONS, False, False  # a checkpoint may have set them
    if last.end2end:
        select_before_decoding(last)
