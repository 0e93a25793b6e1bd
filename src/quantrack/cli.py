"""The `quantrack` command: look at what a model finds in pictures."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from quantrack.entry import exit_on_error
from quantrack.errors import QuantrackError, UsageError
from quantrack.evaluation.decode import NmsSettings
from quantrack.evaluation.picture_detector import (
    CONFIDENCE,
    PictureDetector,
    detection_settings,
    open_picture_detector,
    to_picture,
)
from quantrack.evaluation.samples import draw_detections
from quantrack.files import atomic_path, write_json
from quantrack.interrupts import OWN, interruptible
from quantrack.progress import say, track
from quantrack.runtime.session import parse_provider
from quantrack.tracking.models import fetch_onnx

DETECTIONS_FILE = "detections.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def quantrack() -> None:
    """Quantized detectors at work; quantizing and measuring are MLflow entry points (`mlflow run .`)."""


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files.")],
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, runs:/RUN_ID/onnx/FILE.onnx, or an ONNX file.")],
    out: Annotated[Path, typer.Option(help=f"Folder for the drawn pictures and {DETECTIONS_FILE}.")],
    confidence: Annotated[float, typer.Option(help="Boxes with a higher score are kept.")] = CONFIDENCE,
    provider: Annotated[str, typer.Option(help="ONNX Runtime provider: auto, cuda, cpu or tensorrt.")] = "auto",
) -> None:
    """Draw the boxes that a model finds on pictures, and write them to detections.json."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with interruptible(), exit_on_error("the pictures drawn so far stay"):
        OWN.raise_if_waiting()
        settings = detection_settings(confidence)
        parse_provider(provider)
        targets = output_paths(images, out)
        with tempfile.TemporaryDirectory() as folder:
            detector = open_picture_detector(fetch_onnx(model, Path(folder), "model"), provider)
            done = predict_all(detector, images, targets, settings)
        write_json(out / DETECTIONS_FILE, done)
        if len(done) < len(images):
            raise QuantrackError(f"{len(images) - len(done)} of {len(images)} pictures failed; see above")


def predict_all(
    detector: PictureDetector, images: Sequence[Path], targets: Sequence[Path], settings: NmsSettings
) -> list[dict[str, object]]:
    """Draw each picture to its target; a bad one is named on standard error and left out of the result."""
    done: list[dict[str, object]] = []
    for image, target in track(list(zip(images, targets, strict=True)), "detecting"):
        try:
            picture = to_picture(image)
            found = detector.detect(picture, settings)
        except QuantrackError as error:
            say(f"error: {error}")
            continue
        _save(target, draw_detections(picture[:, :, ::-1], found, detector.names))
        _tell(f"{image}: {_summary([detector.names[one.category_id] for one in found])} -> {target}")
        done.append({"image": str(image), "drawn": target.name, "detections": detector.records(found)})
    return done


def output_paths(images: Sequence[Path], out: Path) -> list[Path]:
    """A PNG in `out` for each picture: its name, with a number where that is taken or is an input itself.

    Raises:
        UsageError: `out` is a file, or its detections.json is one of the inputs.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"out={out}: is a file; give a folder")
    taken = {image.resolve() for image in images}
    if (out / DETECTIONS_FILE).resolve() in taken:
        raise UsageError(f"{out / DETECTIONS_FILE}: would be overwritten; give another folder with --out")
    targets = []
    for image in images:
        target, number = out / f"{image.stem}.png", 1
        while target.resolve() in taken:
            number += 1
            target = out / f"{image.stem}-{number}.png"
        taken.add(target.resolve())
        targets.append(target)
    return targets


def _tell(line: str) -> None:
    """One line on standard output; where nobody reads on (`| head`), nothing more."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _save(target: Path, drawn: NDArray[np.uint8]) -> None:
    _, content = cv2.imencode(".png", drawn[:, :, ::-1])
    with atomic_path(target) as temporary:
        temporary.write_bytes(content.tobytes())


def _summary(names: Sequence[str]) -> str:
    """How many boxes, and of what, the most frequent class first.

    >>> _summary(["car", "dog", "car"]), _summary([])
    ('3 boxes (2 car, 1 dog)', '0 boxes')
    """
    kinds = ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())
    return f"{len(names)} box{'' if len(names) == 1 else 'es'}" + (f" ({kinds})" if kinds else "")
