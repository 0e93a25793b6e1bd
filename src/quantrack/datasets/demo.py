"""Where the embedded demo lies: a small detector and drawn pictures, in the repository."""

from __future__ import annotations

from pathlib import Path

from quantrack.datasets.coco import VAL_ANNOTATIONS
from quantrack.errors import QuantrackError

DEMO = "demo"
_FOLDER = Path(__file__).resolve().parents[3] / "datasets/demo"


def demo_folder() -> Path:
    """The demo's data root, in the official COCO layout.

    Raises:
        QuantrackError: Quantrack runs outside its repository, which carries the demo.
    """
    if not (_FOLDER / VAL_ANNOTATIONS).is_file():
        raise QuantrackError(f"demo: {_FOLDER} is missing; run from a clone of the repository")
    return _FOLDER


def demo_checkpoint() -> Path:
    """The demo detector's checkpoint."""
    return demo_folder() / "yolov10n-demo.pt"


def demo_calibration_list() -> Path:
    """The list of the demo's calibration pictures."""
    return demo_folder() / "calibration.txt"
