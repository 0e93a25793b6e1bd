"""Tell apart what one view of a few hundred pictures cannot: the six-view tables of docs/accuracy.md and decisions.md.

    python benchmarks/six_views.py FLOAT32.onnx DATA_ROOT --name yolov10n-w8a8 W8A8.onnx W8A8-full.onnx

Each picture is shown plain and mirrored, at its full size and shrunken to 0.8 and 0.6 of it within the same input. The
pictures are the annotated train pictures that are not calibration pictures, and no evaluation picture is looked at; or,
with `--pictures evaluation`, the first 100 of val2017, by which nothing is to be chosen. For each file, means over the
six views: the drop in points of mAP50-95 against the float32 file; the agreement with it, which is mAP50-95 with the
float32 file's detections of a score of 0.25 or more as truth, all classes pooled; and how far the logits of these
objects scatter from float32's, and how many of them are found. Writes `benchmarks/results/views-NAME.json` and `.md`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from ablation import development_root
from numpy.typing import NDArray
from pycocotools import mask

from quantrack.datasets.coco import EvaluationSet, Picture, TrueBox, load_evaluation_set
from quantrack.datasets.pictures import PAD_VALUE, letterbox, read_picture
from quantrack.errors import QuantrackError
from quantrack.evaluation.agreement import SURE, agreement
from quantrack.evaluation.coco_metrics import evaluate_coco
from quantrack.evaluation.decode import decode
from quantrack.evaluation.types import Detection
from quantrack.files import file_digest
from quantrack.onnx.inspect import ModelFacts, file_facts
from quantrack.progress import track
from quantrack.runtime.session import Session, open_session
from quantrack.tracking.environment import cpu_name, git_commit, installed_versions

ROOT = Path(__file__).resolve().parents[1]
EVALUATION_PICTURES = 100
SAME_OBJECT = 0.6  # intersection over union
COLUMNS = (("drops", "{:.2f}"), ("agreements", "{:.4f}"), ("scatters", "{:.3f}"), ("found", "{:.3f}"))


class Pictures(StrEnum):
    """What choices are made on, or what they are not made on."""

    DEVELOPMENT = "development"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class View:
    """A picture mirrored or not, in a grey frame that makes it `size` of what the network sees."""

    mirrored: bool
    size: float

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """Pixels above and below, and pixels on the left and on the right."""
        side = max(height, width) / self.size
        return round((side - height) / 2) if self.size < 1 else 0, round((side - width) / 2) if self.size < 1 else 0

    def of(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The view of a picture [height, width, 3]."""
        rows, columns = self.frame(*picture.shape[:2])
        shown = picture[:, ::-1] if self.mirrored else picture
        return np.pad(shown, ((rows, rows), (columns, columns), (0, 0)), constant_values=PAD_VALUE)

    def of_set(self, pictures: EvaluationSet) -> EvaluationSet:
        """The set with its boxes where the view has them."""
        by_id = {picture.id: picture for picture in pictures.pictures}
        return replace(pictures, boxes=tuple(self._of_box(box, by_id[box.image_id]) for box in pictures.boxes))

    def _of_box(self, box: TrueBox, picture: Picture) -> TrueBox:
        rows, columns = self.frame(picture.height, picture.width)
        x, y, width, height = box.xywh
        x = picture.width - x - width if self.mirrored else x
        return replace(box, xywh=(x + columns, y + rows, width, height))


VIEWS = tuple(View(mirrored, size) for size in (1.0, 0.8, 0.6) for mirrored in (False, True))


def main(
    reference: Annotated[Path, typer.Argument(help="The float32 ONNX file.")],
    data_root: Annotated[Path, typer.Argument(help="Data root with these annotated pictures.")],
    files: Annotated[list[Path], typer.Argument(help="ONNX files to measure.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    pictures: Annotated[
        Pictures, typer.Option(help="Train pictures not calibrated on, or val pictures.")
    ] = Pictures.DEVELOPMENT,
) -> None:
    """Measure all files in all views and write the table."""
    try:
        with loaded(pictures, data_root.resolve()) as shown:
            print(measure(reference, files, shown, name))
    except QuantrackError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def loaded(pictures: Pictures, data_root: Path) -> Iterator[EvaluationSet]:
    """The pictures, as long as the context lasts."""
    if pictures is Pictures.EVALUATION:
        yield load_evaluation_set(data_root, EVALUATION_PICTURES)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield load_evaluation_set(development_root(data_root, Path(folder)), 0)


def measure(reference: Path, files: Sequence[Path], pictures: EvaluationSet, name: str) -> str:
    """The table, written anew after each file.

    Raises:
        QuantrackError: a file cannot be opened, or is of another head or input size than the float32 file.
    """
    facts = [_facts(open_session(path, "auto")) for path in (reference, *files)]
    for path, one in zip(files, facts[1:], strict=True):
        if (one.head, one.imgsz) != (facts[0].head, facts[0].imgsz):
            raise QuantrackError(
                f"{path}: head {one.head}, {one.imgsz} px; {reference} has {facts[0].head}, {facts[0].imgsz}"
            )
    expected = detections_in_views(reference, pictures)
    scores = [100 * score(view.of_set(pictures), found) for view, found in zip(VIEWS, expected, strict=True)]
    rows: list[dict[str, object]] = []
    for path, own_facts in zip(files, facts[1:], strict=True):
        found = detections_in_views(path, pictures)
        own = [100 * score(view.of_set(pictures), each) for view, each in zip(VIEWS, found, strict=True)]
        drops = [before - after for before, after in zip(scores, own, strict=True)]
        agreements = [_agreement(pictures, *pair) for pair in zip(expected, found, strict=True)]
        shifts = [logit_shifts(*pair) for pair in zip(expected, found, strict=True)]
        rows.append(
            {
                "name": path.stem, "sha256": file_digest(path), "facts": asdict(replace(own_facts, class_names=())),
                "drops": drops, "agreements": agreements, "scatters": [each.scatter for each in shifts],
                "found": [each.found for each in shifts],
            }
        )  # fmt: skip
        text = write(name, rows, pictures)
    return text


def _facts(session: Session) -> ModelFacts:
    return file_facts(session.path, "one2one", session.imgsz)


def detections_in_views(path: Path, pictures: EvaluationSet) -> list[tuple[Detection, ...]]:
    """A file's detections, view by view, in the view's pixels."""
    session = open_session(path, "auto")
    return [tuple(_detect(session, pictures, view, path.stem)) for view in VIEWS]


def _detect(session: Session, pictures: EvaluationSet, view: View, what: str) -> Iterable[Detection]:
    head = _facts(session).head
    category_ids = [category.id for category in pictures.categories]
    for picture in track(pictures.pictures, f"{what}, {view.size}{' mirrored' if view.mirrored else ''}"):
        image, fit = letterbox(view.of(read_picture(picture.path)), session.imgsz)
        yield from decode(session.run(image[None])[0], head, fit, picture.id, category_ids)


def score(pictures: EvaluationSet, detections: Sequence[Detection]) -> float:
    """mAP50-95."""
    return evaluate_coco(pictures, detections).metrics["mAP50-95"]


def _agreement(pictures: EvaluationSet, expected: Sequence[Detection], found: Sequence[Detection]) -> float:
    value = agreement(pictures, expected, found)
    if value is None:
        raise QuantrackError("the float32 file detects nothing sure in a view; show it pictures of what it detects")
    return value


@dataclass(frozen=True)
class LogitShifts:
    """Of another network's sure objects: the standard deviation of what was added to their logits, and the share found.

    What is added to all alike moves no detection before another, so it does not count; an object that is not found does
    not enter the scatter, which is None where none is.
    """

    scatter: float | None
    found: float


def logit_shifts(expected: Sequence[Detection], found: Sequence[Detection]) -> LogitShifts:
    """An object's score is that of the best detection of its class that overlaps it by `SAME_OBJECT` or more."""
    before, after = _by_picture_and_class(expected), _by_picture_and_class(found)
    shifts: list[float] = []
    objects = 0
    for key, detections in before.items():
        for one in detections:
            if one.score < SURE or best_overlapping(one, detections) is not one:
                continue
            objects += 1
            again = best_overlapping(one, after.get(key, []))
            if again is not None:
                shifts.append(logit(again.score) - logit(one.score))
    return LogitShifts(float(np.std(shifts)) if shifts else None, len(shifts) / max(1, objects))


def _by_picture_and_class(detections: Sequence[Detection]) -> dict[tuple[int, int], list[Detection]]:
    groups: dict[tuple[int, int], list[Detection]] = defaultdict(list)
    for one in detections:
        groups[one.image_id, one.category_id].append(one)
    return groups


def best_overlapping(detection: Detection, candidates: Sequence[Detection]) -> Detection | None:
    """The best of those that are the same object, if any is."""
    if not candidates:
        return None
    overlaps = mask.iou(np.array([one.xywh for one in candidates]), np.array([detection.xywh]), [0])[:, 0]
    same = [one for one, overlap in zip(candidates, overlaps, strict=True) if overlap >= SAME_OBJECT]
    return max(same, key=lambda one: one.score, default=None)


def logit(score: float) -> float:
    """The inverse of the sigmoid."""
    bounded = min(max(score, 1e-6), 1 - 1e-6)
    return math.log(bounded / (1 - bounded))


def write(name: str, rows: Sequence[dict[str, object]], pictures: EvaluationSet) -> str:
    """Write the record and the table; returns the table."""
    date = datetime.now(UTC).date().isoformat()
    taken_from = pictures.pictures[0].path.resolve().parent.name
    context = {
        "date": date, "cpu": cpu_name(), "versions": installed_versions(), "pictures": len(pictures.pictures),
        "taken_from": taken_from, "pictures_digest": pictures.digest, "views": [str(view) for view in VIEWS],
    } | git_commit()  # fmt: skip
    base = ROOT / f"benchmarks/results/views-{name}"
    base.with_suffix(".json").write_text(json.dumps(context | {"files": list(rows)}, indent=2) + "\n")
    lines = ["| file | drop, points | agreement | scatter of logits | objects found |", "| --- |" + 4 * " ---: |"]
    for row in rows:
        cells = [form.format(_mean(row[key])) for key, form in COLUMNS]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    lines += ["", f"{date}, {context['cpu']}, {len(pictures.pictures)} pictures of {taken_from}."]
    text = "\n".join(lines) + "\n"
    base.with_suffix(".md").write_text(text)
    return text


def _mean(values: object) -> float:
    return float(np.mean(np.array(values, dtype=np.float64)))


if __name__ == "__main__":
    typer.run(main)
