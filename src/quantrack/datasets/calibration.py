"""Calibration pictures: a list file, resolved against the data root, or a seeded draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantrack.datasets.pictures import network_input, pictures_in
from quantrack.errors import QuantrackError, UsageError
from quantrack.files import combined_digest, file_digest

RANDOM = "random"  # in the place of a list: a seeded draw


@dataclass(frozen=True)
class CalibrationSet:
    """Unlabelled pictures in list order; `digest` covers their names and bytes."""

    source: str
    paths: tuple[Path, ...]
    digest: str

    @property
    def name(self) -> str:
        return f"calibration-{len(self.paths)}"

    def first(self, count: int) -> CalibrationSet:
        """The first pictures alone, with a digest of their own; all of them where there are no more."""
        if count >= len(self.paths):
            return self
        return CalibrationSet(self.source, self.paths[:count], combined_digest([self.digest, f"first {count}"]))

    def batches(self, imgsz: int, batch: int) -> Iterator[NDArray[np.float32]]:
        """Letterboxed inputs, shape [<=batch, 3, imgsz, imgsz], read as they are asked for."""
        for start in range(0, len(self.paths), batch):
            yield np.stack([network_input(path, imgsz) for path in self.paths[start : start + batch]])


def load_calibration_set(calib_list: str, calib_images: int, data_root: Path, seed: int) -> CalibrationSet:
    """The first `calib_images` pictures (0 = all) of a list file, or `random` for a seeded draw.

    Each line is used as written if that file exists, otherwise its last two parts
    (`train2017/000000000009.jpg`) are looked for under `data_root`, then its name in `train2017`.
    `calib_list=random` draws from `data_root/train2017` instead.

    Raises:
        QuantrackError: the list or one of its pictures is missing, or the list is empty.
        UsageError: more pictures were asked for than there are.
    """
    if calib_list == RANDOM:
        available = pictures_in(data_root / "train2017")
        _check_count(calib_images, len(available), str(data_root / "train2017"))
        drawn = random.Random(seed).sample(available, calib_images or len(available))
        paths = tuple(sorted(drawn))
    else:
        chosen = first_lines(calib_list, calib_images)
        paths = tuple(_resolve(line, data_root, calib_list) for line in chosen)
        _require_own_pictures(chosen, paths, calib_list)
    digest = combined_digest(f"{path.name} {file_digest(path)}" for path in paths)
    return CalibrationSet(calib_list, paths, digest)


def first_lines(calib_list: str, calib_images: int) -> list[str]:
    """The first lines (0 = all) of a list file.

    Raises:
        QuantrackError: it is missing or empty, or no text.
        UsageError: it has fewer.
    """
    lines = read_list(Path(calib_list))
    _check_count(calib_images, len(lines), calib_list)
    return lines[: calib_images or len(lines)]


def read_list(path: Path) -> list[str]:
    """The lines of a list file, without blanks and comments.

    Raises:
        QuantrackError: it is missing or empty, or no text.
    """
    if not path.is_file():
        raise QuantrackError(f"calib_list={path}: no such file; give a text file with one picture path a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise QuantrackError(f"calib_list={path}: no text in UTF-8; give one picture path a line") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise QuantrackError(f"calib_list={path}: the list is empty; give one picture path a line")
    return lines


def _check_count(asked: int, available: int, source: str) -> None:
    if available == 0:
        raise QuantrackError(f"{source}: no calibration pictures there; run the `data` entry point")
    if asked > available:
        raise UsageError(
            f"calib_images={asked}: {source} has only {available} pictures; ask for at most {available}, or 0 for all"
        )


def _require_own_pictures(lines: list[str], paths: tuple[Path, ...], calib_list: str) -> None:
    """No picture may count twice, and lines of folders that are not here lead to one picture of the same name."""
    line_of: dict[Path, str] = {}
    for place, (line, path) in enumerate(zip(lines, paths, strict=True)):
        other = line_of.setdefault(path.resolve(), line)
        if len(line_of) <= place:
            fix = f"{other} and {line} both lead to {path}; list each picture once, by a path of its own"
            raise QuantrackError(f"{calib_list}: {fix}")


def _resolve(line: str, data_root: Path, calib_list: str) -> Path:
    written = Path(line)
    under_root = data_root.joinpath(*written.parts[-2:])
    where_fetched = data_root / "train2017" / written.name  # by the `data` entry point, whatever the line's folder
    for path in (written, under_root, where_fetched):
        if path.is_file():
            return path
    places = " nor as ".join(dict.fromkeys((str(under_root), str(where_fetched))))
    raise QuantrackError(
        f"{line}: listed in {calib_list} but found neither as written nor as {places}; run the `data` entry point"
    )
