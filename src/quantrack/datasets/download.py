"""Prepare a data root in the official COCO layout: download only what is needed, or build from a copy."""

from __future__ import annotations

import os
import random
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

from quantrack.datasets.calibration import RANDOM, first_lines
from quantrack.datasets.coco import MEND, TRAIN_ANNOTATIONS, VAL_ANNOTATIONS, first_entries, read_annotations
from quantrack.datasets.fetch import FetchPolicy, fetch
from quantrack.datasets.picture_size import looks_like_picture
from quantrack.datasets.pictures import content_problem, pictures_in
from quantrack.errors import QuantrackError, UsageError
from quantrack.files import atomic_path, file_digest
from quantrack.progress import new_bar, track

ANNOTATION_ARCHIVE = "annotations/annotations_trainval2017.zip"
SELECTIONS = ("listed", "all")
SINGLY = 0.25  # of a split's pictures at most; more are fetched as an archive


@dataclass(frozen=True)
class DownloadSettings:
    """What to prepare where; `images=all` takes the full archives instead of single pictures."""

    data_root: Path
    calib_list: str
    calib_images: int = 100
    eval_images: int = 100
    images: str = "listed"
    base_url: str = "http://images.cocodataset.org"
    workers: int = 8
    policy: FetchPolicy = field(default_factory=FetchPolicy)

    def __post_init__(self) -> None:
        if self.images not in SELECTIONS:
            raise UsageError(f"images={self.images}: unknown; use one of {', '.join(SELECTIONS)}")
        for name in ("calib_images", "eval_images"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)}: must not be negative; 0 = all")
        if self.calib_list == RANDOM and self.images == "listed" and not self.calib_images:
            raise UsageError("calib_images=0: means all of a list; with calib_list=random say how many to draw")
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"base_url={self.base_url}: must start with http:// or https://")


@dataclass(frozen=True)
class PreparedData:
    """What is in the data root now, and what of it this call brought."""

    pictures: int
    downloaded: int
    reused: int
    bytes_downloaded: int


def download_coco(settings: DownloadSettings) -> PreparedData:
    """Fetch annotations and pictures that are not there yet; run it again to resume.

    Raises:
        QuantrackError: something cannot be fetched; what is finished stays.
    """
    received = _fetch_annotations(settings)
    if settings.images == "all":
        return _fetch_archives(settings, received)
    wanted = wanted_pictures(settings, settings.data_root, partial(_listed_train_pictures, settings.data_root))
    missing = [name for name in wanted if picture_problem(settings.data_root / name) is not None]
    received += _fetch_pictures(settings, missing)
    return PreparedData(len(wanted), len(missing), len(wanted) - len(missing), received)


def build_from_source(settings: DownloadSettings, source: Path) -> PreparedData:
    """Link or copy what is needed from a folder in the official layout, checking every picture.

    Raises:
        QuantrackError: the source lacks a file, or a picture in it cannot be read.
    """
    if source.resolve() == settings.data_root.resolve():
        raise UsageError(f"source={source}: is the data_root itself; name the folder to build from")
    if not source.is_dir():
        raise UsageError(f"source={source}: no such folder; name one with the official COCO layout")
    for instances in (VAL_ANNOTATIONS, TRAIN_ANNOTATIONS):
        if instances == VAL_ANNOTATIONS or (source / instances).is_file():
            read_annotations(source, source / instances)
            _require_same_or_none(source / instances, settings.data_root / instances)
            _copy(source / instances, settings.data_root / instances)
    if settings.images == "all":
        wanted = [str(path.relative_to(source)) for folder in ("val2017", "train2017")
                  for path in pictures_in(source / folder)]  # fmt: skip
    else:
        wanted = wanted_pictures(settings, source, partial(_present_train_pictures, source))
    missing = [name for name in wanted if picture_problem(settings.data_root / name) is not None]
    for name in missing:
        problem = picture_problem(source / name)
        if problem is not None:
            raise QuantrackError(f"{source / name}: {problem}; complete the source folder")
        _copy(source / name, settings.data_root / name)
    return PreparedData(len(wanted), len(missing), len(wanted) - len(missing), 0)


def _require_same_or_none(source: Path, target: Path) -> None:
    if target.is_file() and file_digest(target) != file_digest(source):
        raise QuantrackError(
            f"{target}: is there already, and is not {source}; move it away, or name another data_root"
        )


def wanted_pictures(settings: DownloadSettings, root: Path, drawable: Callable[[], list[str]]) -> list[str]:
    """Paths under the data root, each once: evaluation pictures by annotation, then the calibration list's.

    `drawable` names the train pictures that `calib_list=random` draws from.
    """
    annotation_file = root / VAL_ANNOTATIONS
    entries = first_entries(read_annotations(root, annotation_file), settings.eval_images, annotation_file)
    evaluated = [_file_name(entry, annotation_file) for entry in entries]
    if settings.calib_list == RANDOM:
        calibrating = _drawn(settings, drawable())
    else:
        calibrating = [Path(line).name for line in first_lines(settings.calib_list, settings.calib_images)]
    paths = [f"val2017/{name}" for name in evaluated] + [f"train2017/{name}" for name in calibrating]
    return list(dict.fromkeys(paths))


def _drawn(settings: DownloadSettings, names: Sequence[str]) -> list[str]:
    """As many train pictures as there are to be, the same ones each time.

    Raises:
        UsageError: there are fewer.
    """
    if settings.calib_images > len(names):
        raise UsageError(f"calib_images={settings.calib_images}: only {len(names)} train pictures to draw from")
    return random.Random(0).sample(sorted(names), settings.calib_images)


def _listed_train_pictures(root: Path) -> list[str]:
    entries = read_annotations(root, root / TRAIN_ANNOTATIONS)["images"]
    return [_file_name(entry, root / TRAIN_ANNOTATIONS) for entry in entries]


def _present_train_pictures(source: Path) -> list[str]:
    return [path.name for path in pictures_in(source / "train2017")]


def _file_name(entry: dict[str, object], annotation_file: Path) -> str:
    name = str(entry.get("file_name", ""))
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise QuantrackError(
            f"{annotation_file}: file name {name or 'of a picture'} leads out of its folder or is missing; {MEND}"
        )
    return name


def _fetch_annotations(settings: DownloadSettings) -> int:
    lacking = [name for name in (VAL_ANNOTATIONS, TRAIN_ANNOTATIONS) if not (settings.data_root / name).is_file()]
    if not lacking:
        return 0
    archive = settings.data_root / ANNOTATION_ARCHIVE
    with _bar() as bar:
        task = bar.add_task("annotations", total=None)
        received = _fetch_archive(settings, ANNOTATION_ARCHIVE, archive, partial(bar.advance, task))
    extract(archive, {f"annotations/{name.name}" for name in lacking}, settings.data_root)
    archive.unlink()
    return received


def _fetch_archives(settings: DownloadSettings, received: int) -> PreparedData:
    """Both splits whole; of one that lacks only a few annotated pictures these are fetched singly."""
    downloaded = reused = 0
    for split, instances in (("val2017", VAL_ANNOTATIONS), ("train2017", TRAIN_ANNOTATIONS)):
        folder = settings.data_root / split
        annotations = settings.data_root / instances
        names = [
            _file_name(entry, annotations) for entry in read_annotations(settings.data_root, annotations)["images"]
        ]
        lacking = rest = _lacking(folder, names)
        if len(lacking) > SINGLY * len(names):
            received += _fetch_split(settings, split)
            rest = _lacking(folder, lacking)  # an archive need not hold all that is annotated
        received += _fetch_pictures(settings, [f"{split}/{name}" for name in rest])
        downloaded, reused = downloaded + len(lacking), reused + len(names) - len(lacking)
    return PreparedData(downloaded + reused, downloaded, reused, received)


def _lacking(folder: Path, names: Sequence[str]) -> list[str]:
    """The pictures that are not there, or not whole."""
    return [
        name for name in track(names, f"looking through {folder.name}") if picture_problem(folder / name) is not None
    ]


def _fetch_split(settings: DownloadSettings, split: str) -> int:
    """All pictures of a split's archive; the bytes received."""
    archive = settings.data_root / f"{split}.zip"
    with _bar() as bar:
        task = bar.add_task(archive.name, total=None)
        received = _fetch_archive(settings, f"zips/{archive.name}", archive, partial(bar.advance, task))
    extract(archive, None, settings.data_root)
    archive.unlink()
    return received


def _fetch_archive(settings: DownloadSettings, name: str, target: Path, progress: Callable[[int], None]) -> int:
    if target.is_file() and zipfile.is_zipfile(target):  # whole, but its extraction was interrupted
        return 0
    return fetch(f"{settings.base_url}/{name}", target, settings.policy, _zip_problem, progress)


def picture_problem(path: Path) -> str | None:
    """Why a file is no whole picture, without decoding it; a login page that was sent in place of one is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return content_problem(content) or (None if looks_like_picture(content) else "not a picture")


def _zip_problem(path: Path) -> str | None:
    return None if zipfile.is_zipfile(path) else "not a zip archive"


def extract(archive: Path, names: set[str] | None, target: Path) -> None:
    """Unpack `names` (None = all files) of an archive, each file atomically.

    Raises:
        QuantrackError: the archive is broken, lacks a name, or would write outside the target.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = [item for item in content.infolist() if not item.is_dir()]
            chosen = [item for item in members if names is None or item.filename in names]
            lacking = (names or set()) - {item.filename for item in chosen}
            if lacking:
                archive.unlink()  # or the next call would take it for finished
                raise QuantrackError(f"{archive}: holds no {', '.join(sorted(lacking))}; check base_url")
            for item in chosen:
                path = (target / item.filename).resolve()
                if not path.is_relative_to(target.resolve()):
                    raise QuantrackError(f"{archive}: {item.filename} would be written outside {target}; refused")
                with (
                    atomic_path(path) as temporary,
                    content.open(item) as stream,
                    temporary.open("wb") as out,
                ):
                    shutil.copyfileobj(stream, out)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink(missing_ok=True)
        raise QuantrackError(f"{archive}: broken archive ({error}), removed; run again") from error


def _fetch_pictures(settings: DownloadSettings, names: Sequence[str]) -> int:
    """Fetch in parallel; the first failure or an interrupt ends the rest, what is finished stays."""
    if not names:
        return 0
    pool, stop = ThreadPoolExecutor(settings.workers), threading.Event()
    with _bar() as bar:
        task = bar.add_task("pictures", total=len(names))

        def one(name: str) -> int:
            url, target = f"{settings.base_url}/{name}", settings.data_root / name
            received = fetch(url, target, settings.policy, picture_problem, stop=stop)
            bar.advance(task)
            return received

        futures = [pool.submit(one, name) for name in names]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            return sum(future.result() for future in done)  # raises what has failed
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, otherwise a copy."""
    with atomic_path(target) as temporary:
        try:
            os.link(source.resolve(), temporary)  # a link to a relative symbolic link would lead nowhere
        except OSError:
            shutil.copyfile(source, temporary)


def _bar() -> Progress:
    return new_bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn())
