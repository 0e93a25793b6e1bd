from pathlib import Path

import cv2
import numpy as np
import pytest

from quantrack.datasets.pictures import letterbox, read_picture
from quantrack.detector.environment import prepare
from quantrack.errors import QuantrackError


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (100, 33), (640, 427), (31, 31)])
def test_letterbox_equals_ultralytics(height: int, width: int) -> None:
    prepare()
    from ultralytics.data.augment import LetterBox

    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = LetterBox((64, 64), auto=False, scaleup=True)(image=picture)
    actual, fit = letterbox(picture, 64)
    np.testing.assert_array_equal(np.round(actual * 255).astype(np.uint8), expected[:, :, ::-1].transpose(2, 0, 1))
    assert actual.dtype == np.float32
    assert (fit.width, fit.height) == (width, height)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff\xe0 half of a jpg"])
def test_unreadable_pictures(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(QuantrackError, match=r"broken.jpg"):
        read_picture(path)


def test_truncated_jpg(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(QuantrackError, match=r"cut.jpg: truncated"):
        read_picture(path)


def test_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match=r"gone.jpg: cannot be read"):
        read_picture(tmp_path / "gone.jpg")
