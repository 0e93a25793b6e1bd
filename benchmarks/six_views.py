"""Tell apart what one view of a few hundred pictures cannot: the six-view tables of docs/accuracy.md.

    python benchmarks/six_views.py FLOAT32.onnx DATA_ROOT --name yolov10n-w8a8 W8A8.onnx W8A8-full.onnx

Each annotated train picture that is not a calibration picture is shown plain and mirrored, at its full size and
shrunken to 0.8 and 0.6 of it within the same input; no evaluation picture is looked at. For each file, means over the
six views: the drop in points of mAP50-95 against the float32 file, and the agreement with it, which is mAP50-95
with the float32 file's detections of a score of 0.25 or more as truth, all classes pooled. Writes
`benchmarks/results/views-NAME.json` and `.md`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from ablation import development_root
from numpy.typing import NDArray

from quantrack.datasets.coco import Category, EvaluationSet, Picture, TrueBox, load_evaluation_set
from quantrack.datasets.pictures import PAD_VALUE, letterbox, read_picture
from quantrack.evaluation.coco_metrics import evaluate_coco
from quantrack.evaluation.decode import decode
from quantrack.evaluation.types import Detection
from quantrack.onnx.inspect import file_facts
from quantrack.progress import track
from quantrack.runtime.session import Session, open_session
from quantrack.tracking.environment import cpu_name, installed_versions

ROOT = Path(__file__).resolve().parents[1]
SURE = 0.25
APART = 100_000.0  # between classes, so that pooled boxes of two classes never overlap
POOLED = Category(1, "any")


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
    data_root: Annotated[Path, typer.Argument(help="Data root with annotated train2017 pictures.")],
    files: Annotated[list[Path], typer.Argument(help="ONNX files to measure.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
) -> None:
    """Measure all files in all views and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = load_evaluation_set(development_root(data_root.resolve(), Path(folder)), 0)
        expected = detections_in_views(reference, pictures)
        plain = [100 * score(view.of_set(pictures), found) for view, found in zip(VIEWS, expected, strict=True)]
        rows: list[dict[str, object]] = []
        for path in files:
            found = detections_in_views(path, pictures)
            own = [100 * score(view.of_set(pictures), each) for view, each in zip(VIEWS, found, strict=True)]
            drops = [before - after for before, after in zip(plain, own, strict=True)]
            agreements = [agreement(pictures, *pair) for pair in zip(expected, found, strict=True)]
            rows.append({"name": path.stem, "drops": drops, "agreements": agreements})
            text = write(name, rows, pictures)
    print(text)


def detections_in_views(path: Path, pictures: EvaluationSet) -> list[tuple[Detection, ...]]:
    """A file's detections, view by view, in the view's pixels."""
    session = open_session(path, "auto")
    return [tuple(_detect(session, pictures, view, path.stem)) for view in VIEWS]


def _detect(session: Session, pictures: EvaluationSet, view: View, what: str) -> Iterable[Detection]:
    head = file_facts(session.path, "one2one", session.imgsz).head
    category_ids = [category.id for category in pictures.categories]
    for picture in track(pictures.pictures, f"{what}, {view.size}{' mirrored' if view.mirrored else ''}"):
        image, fit = letterbox(view.of(read_picture(picture.path)), session.imgsz)
        yield from decode(session.run(image[None])[0], head, fit, picture.id, category_ids)


def score(pictures: EvaluationSet, detections: Sequence[Detection]) -> float:
    """mAP50-95."""
    return evaluate_coco(pictures, detections).metrics["mAP50-95"]


def agreement(pictures: EvaluationSet, expected: Sequence[Detection], found: Sequence[Detection]) -> float:
    """mAP50-95 of detections with another network's sure ones as truth; 1 if they are the same."""
    truth = tuple(
        TrueBox(one.image_id, POOLED.id, pooled(one).xywh, crowd=False, area=one.xywh[2] * one.xywh[3])
        for one in expected
        if one.score >= SURE
    )
    return score(replace(pictures, boxes=truth, categories=(POOLED,)), [pooled(one) for one in found])


def pooled(detection: Detection) -> Detection:
    """A detection of the one class that all are pooled in, out of the way of those of other classes."""
    x, y, width, height = detection.xywh
    return replace(detection, category_id=POOLED.id, xywh=(x + APART * detection.category_id, y, width, height))


def write(name: str, rows: Sequence[dict[str, object]], pictures: EvaluationSet) -> str:
    """Write the record and the table; returns the table."""
    date = datetime.now(UTC).date().isoformat()
    context = {
        "date": date, "cpu": cpu_name(), "versions": installed_versions(), "pictures": len(pictures.pictures),
        "pictures_digest": pictures.digest, "views": [str(view) for view in VIEWS],
    }  # fmt: skip
    base = ROOT / f"benchmarks/results/views-{name}"
    base.with_suffix(".json").write_text(json.dumps(context | {"files": list(rows)}, indent=2) + "\n")
    lines = ["| file | drop, six views | agreement |", "| --- | ---: | ---: |"]
    for row in rows:
        means = [float(np.mean(np.asarray(row[key]))) for key in ("drops", "agreements")]
        lines.append(f"| {row['name']} | {means[0]:.2f} | {means[1]:.4f} |")
    lines += ["", f"{date}, {context['cpu']}, {len(pictures.pictures)} pictures."]
    text = "\n".join(lines) + "\n"
    base.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    typer.run(main)
