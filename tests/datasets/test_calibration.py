from pathlib import Path

import pytest

from quantrack.datasets.calibration import load_calibration_set
from quantrack.errors import QuantrackError, UsageError


def write_list(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_lines_are_resolved_against_the_data_root(coco_root: Path, tmp_path: Path) -> None:
    direct = coco_root / "train2017/000000000010.jpg"
    listed = write_list(tmp_path / "list.txt", "datasets/elsewhere/train2017/000000000030.jpg", str(direct), "")
    chosen = load_calibration_set(listed, 0, coco_root, seed=0)
    assert chosen.paths == (coco_root / "train2017/000000000030.jpg", direct)
    batches = list(chosen.batches(imgsz=32, batch=8))
    assert [batch.shape for batch in batches] == [(2, 3, 32, 32)]


def test_a_line_is_found_where_it_was_fetched_to(coco_root: Path, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.txt", "000000000010.jpg", "images/000000000030.jpg")
    chosen = load_calibration_set(listed, 0, coco_root, seed=0)
    assert [path.name for path in chosen.paths] == ["000000000010.jpg", "000000000030.jpg"]


@pytest.mark.parametrize("folders", [("site_a", "site_b"), ("site_a", "site_a")])
def test_two_lines_do_not_lead_to_one_picture(folders: tuple[str, str], coco_root: Path, tmp_path: Path) -> None:
    one, other = folders
    listed = write_list(tmp_path / "list.txt", f"{one}/000000000010.jpg", f"{other}/000000000010.jpg")
    said = rf"{one}/.* and {other}/.* both lead to .*train2017/000000000010.jpg; list each picture once"
    with pytest.raises(QuantrackError, match=said):
        load_calibration_set(listed, 0, coco_root, seed=0)


def test_random_draw_is_seeded(coco_root: Path) -> None:
    first = load_calibration_set("random", 2, coco_root, seed=1)
    assert first == load_calibration_set("random", 2, coco_root, seed=1)
    draws = {load_calibration_set("random", 2, coco_root, seed=seed).digest for seed in range(8)}
    assert len(draws) > 1


def test_the_first_pictures_are_another_set(coco_root: Path) -> None:
    whole = load_calibration_set("random", 4, coco_root, seed=0)
    assert whole.first(4) == whole.first(9) == whole
    few = whole.first(2)
    assert few.paths == whole.paths[:2]
    assert len({whole.digest, few.digest, whole.first(3).digest}) == 3
    assert whole.first(2) == few


def test_missing_list(coco_root: Path) -> None:
    with pytest.raises(QuantrackError, match=r"calib_list=nowhere.txt: no such file"):
        load_calibration_set("nowhere.txt", 1, coco_root, seed=0)


def test_empty_list(coco_root: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match="the list is empty"):
        load_calibration_set(write_list(tmp_path / "list.txt", "", "# only a comment"), 1, coco_root, seed=0)


def test_missing_picture(coco_root: Path, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.txt", "train2017/000000000099.jpg")
    with pytest.raises(QuantrackError, match="neither as written nor as"):
        load_calibration_set(listed, 1, coco_root, seed=0)


def test_more_pictures_than_listed(coco_root: Path, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.txt", "train2017/000000000010.jpg")
    with pytest.raises(UsageError, match="calib_images=2"):
        load_calibration_set(listed, 2, coco_root, seed=0)
