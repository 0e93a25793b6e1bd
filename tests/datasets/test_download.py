"""The downloader against a local server that is slow, drops, truncates and refuses."""

import io
import json
import random
import socket
import struct
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quantrack.datasets.download import DownloadSettings, build_from_source, download_coco, extract
from quantrack.datasets.fetch import PROGRESS_BYTES, FetchPolicy, fetch
from quantrack.datasets.pictures import content_problem
from quantrack.errors import QuantrackError, UsageError

Misbehaviour = Callable[[BaseHTTPRequestHandler, bytes], None]
FAST = FetchPolicy(retries=2, timeout=0.4, backoff=0.01)


def problem_of(path: Path) -> str | None:
    """What is downloaded here need not be a picture, but a whole one if it is."""
    return content_problem(path.read_bytes())


class Server(ThreadingHTTPServer):
    """Serves `content`; `faults` are taken one a request and path, then it behaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.faults: dict[str, list[Misbehaviour]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.honours_ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        faults = self.server.faults.get(self.path, [])
        body = self.server.content.get(self.path)
        try:
            if body is None:
                self.send_error(404)
            elif faults:
                faults.pop(0)(self, body)
            else:
                self.answer(body)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def answer(self, body: bytes) -> None:
        wanted = self.headers.get("Range")
        start = 0
        if wanted and self.server.honours_ranges:
            self.server.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])


def head(handler: BaseHTTPRequestHandler, length: int | None) -> None:
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()


def fails(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_error(500)


def truncates(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    head(handler, len(body))
    handler.wfile.write(body[: len(body) // 2])


def truncates_silently(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    head(handler, None)
    handler.wfile.write(body[: len(body) // 2])


def stalls(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    head(handler, len(body))
    handler.wfile.write(body[:10])
    time.sleep(0.8)


def drops(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    head(handler, len(body))
    handler.wfile.write(body[: len(body) // 2])
    time.sleep(0.05)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def crawls(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    head(handler, len(body))
    for byte in body:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def drips(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    head(handler, len(body))
    for start in range(0, len(body), len(body) // 8):
        handler.wfile.write(body[start : start + len(body) // 8])
        time.sleep(0.02)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def jpg(size: int = 4000) -> bytes:
    return b"\xff\xd8" + bytes(range(256)) * (size // 256) + b"\xff\xd9"


def get(server: Server, tmp_path: Path) -> Path:
    target = tmp_path / "picture.jpg"
    fetch(f"{server.url}/picture.jpg", target, FAST, problem_of)
    return target


@pytest.mark.parametrize("fault", [fails, truncates, truncates_silently, stalls, drops, drips, crawls])
def test_one_fault_is_survived(server: Server, tmp_path: Path, fault: Misbehaviour) -> None:
    server.content["/picture.jpg"] = jpg()
    server.faults["/picture.jpg"] = [fault]
    assert get(server, tmp_path).read_bytes() == jpg()
    assert [path.name for path in tmp_path.iterdir()] == ["picture.jpg"]
    assert server.requests["/picture.jpg"] == (1 if fault is drips else 2)


@pytest.mark.parametrize(("fault", "have"), [(truncates, len(jpg()) // 2), (drops, len(jpg()) // 2), (stalls, 10)])
def test_the_next_try_resumes_what_arrived(server: Server, tmp_path: Path, fault: Misbehaviour, have: int) -> None:
    server.content["/picture.jpg"] = jpg()
    server.faults["/picture.jpg"] = [fault]
    assert get(server, tmp_path).read_bytes() == jpg()
    assert server.ranges == [f"bytes={have}-"]


def test_a_steady_body_may_take_longer_than_the_timeout(server: Server, tmp_path: Path) -> None:
    def takes_its_time(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        head(handler, len(body))
        for start in range(0, len(body), 4000):
            time.sleep(0.15)
            handler.wfile.write(body[start : start + 4000])

    server.content["/picture.jpg"] = jpg(16000)
    server.faults["/picture.jpg"] = [takes_its_time]
    assert get(server, tmp_path).read_bytes() == jpg(16000)
    assert server.requests["/picture.jpg"] == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (fails, "answered 500"),
        (truncates, "connection was dropped"),
        (drops, "connection was dropped"),
        (truncates_silently, "truncated jpg"),
        (stalls, "no answer in time"),
        (crawls, "too slow"),
    ],
)
def test_faults_without_end_give_one_line(server: Server, tmp_path: Path, fault: Misbehaviour, reason: str) -> None:
    server.content["/picture.jpg"] = jpg()
    server.faults["/picture.jpg"] = [fault] * 10
    with pytest.raises(QuantrackError, match=r"cannot fetch http.*picture.jpg after 3 tries") as caught:
        get(server, tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.requests["/picture.jpg"] == 3
    assert not (tmp_path / "picture.jpg").exists()


def test_a_long_file_takes_as_many_tries_as_it_needs(server: Server, tmp_path: Path) -> None:
    def breaks_off(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        handler.wfile.write(body[start : start + PROGRESS_BYTES + 4096])

    long = jpg(6 * PROGRESS_BYTES)
    server.content["/picture.jpg"], server.faults["/picture.jpg"] = long, [breaks_off] * 5
    assert get(server, tmp_path).read_bytes() == long
    assert server.requests["/picture.jpg"] > FAST.retries + 1


def test_a_server_that_asks_for_a_pause_gets_it(server: Server, tmp_path: Path) -> None:
    def busy(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(429)
        handler.send_header("Retry-After", "1")
        handler.end_headers()

    server.content["/picture.jpg"], server.faults["/picture.jpg"] = jpg(), [busy]
    start = time.monotonic()
    assert get(server, tmp_path).read_bytes() == jpg()
    assert time.monotonic() - start >= 1


def test_missing_is_not_retried(server: Server, tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match=r"picture.jpg: the server answered 404"):
        get(server, tmp_path)
    assert server.requests["/picture.jpg"] == 1


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_resumes_a_part(server: Server, tmp_path: Path, honours_ranges: bool) -> None:
    server.content["/picture.jpg"], server.honours_ranges = jpg(), honours_ranges
    (tmp_path / "picture.jpg.part").write_bytes(jpg()[:1000])
    assert get(server, tmp_path).read_bytes() == jpg()
    assert server.ranges == (["bytes=1000-"] if honours_ranges else [])


def test_part_longer_than_the_file_starts_again(server: Server, tmp_path: Path) -> None:
    server.content["/picture.jpg"] = jpg()
    (tmp_path / "picture.jpg.part").write_bytes(jpg(8000))
    assert get(server, tmp_path).read_bytes() == jpg()


def test_offline_names_the_demo(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(QuantrackError, match=r"no connection.*model=demo"):
        fetch(f"http://127.0.0.1:{port}/x.jpg", tmp_path / "x.jpg", FAST, problem_of)
    assert not list(tmp_path.iterdir())


def test_stop_ends_the_tries(server: Server, tmp_path: Path) -> None:
    server.content["/picture.jpg"] = jpg()
    server.faults["/picture.jpg"] = [fails] * 100
    policy, stop = FetchPolicy(retries=50, timeout=1, backoff=30), threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(QuantrackError, match="stopped"):
        fetch(f"{server.url}/picture.jpg", tmp_path / "picture.jpg", policy, problem_of, stop=stop)
    assert time.monotonic() - start < 5


def test_stop_ends_a_slow_body(server: Server, tmp_path: Path) -> None:
    server.content["/picture.jpg"] = jpg()
    server.faults["/picture.jpg"] = [crawls]
    policy, stop = FetchPolicy(retries=2, timeout=30, backoff=0.01), threading.Event()
    threading.Timer(0.1, stop.set).start()
    start = time.monotonic()
    with pytest.raises(QuantrackError, match="stopped; what is downloaded stays"):
        fetch(f"{server.url}/picture.jpg", tmp_path / "picture.jpg", policy, problem_of, stop=stop)
    assert time.monotonic() - start < 2
    assert (tmp_path / "picture.jpg.part").stat().st_size > 0


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as content:
        for name, data in members.items():
            content.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def coco_server(server: Server, coco_root: Path) -> Server:
    """The fixture's data root, served as cocodataset.org serves it."""
    instances = (coco_root / "annotations/instances_val2017.json").read_bytes()
    members = {
        f"annotations/{name}2017.json": instances for name in ("instances_val", "instances_train", "captions_val")
    }
    server.content["/annotations/annotations_trainval2017.zip"] = archive(members)
    for split in ("val2017", "train2017"):
        files = {f"{split}/{path.name}": path.read_bytes() for path in (coco_root / split).glob("*.jpg")}
        server.content |= {f"/{name}": content for name, content in files.items()}
        server.content[f"/zips/{split}.zip"] = archive(files)
    return server


def wanted(server: Server, tmp_path: Path, **changes: object) -> DownloadSettings:
    listed = tmp_path / "list.txt"
    listed.write_text("datasets/train2017/000000000010.jpg\ndatasets/train2017/000000000030.jpg\n")
    settings = {"data_root": tmp_path / "data", "calib_list": str(listed), "calib_images": 0, "eval_images": 2}
    return DownloadSettings(**{**settings, "base_url": server.url, "policy": FAST, **changes})  # type: ignore[arg-type]


def test_downloads_only_what_is_needed_and_only_once(coco_server: Server, tmp_path: Path) -> None:
    prepared = download_coco(wanted(coco_server, tmp_path))
    assert (prepared.pictures, prepared.downloaded, prepared.reused) == (4, 4, 0)
    found = sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*") if p.is_file())
    assert found == [
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "train2017/000000000010.jpg",
        "train2017/000000000030.jpg",
        "val2017/000000000010.jpg",
        "val2017/000000000020.jpg",
    ]
    asked = coco_server.requests.total()
    again = download_coco(wanted(coco_server, tmp_path))
    assert (again.downloaded, again.reused, coco_server.requests.total()) == (0, 4, asked)


def test_one_missing_picture_keeps_the_finished_ones(coco_server: Server, tmp_path: Path) -> None:
    del coco_server.content["/train2017/000000000030.jpg"]
    with pytest.raises(QuantrackError, match=r"000000000030.jpg: the server answered 404"):
        download_coco(wanted(coco_server, tmp_path, workers=1))
    assert (tmp_path / "data/val2017/000000000010.jpg").is_file()
    assert not list((tmp_path / "data").rglob("*.part"))


def test_interrupt_ends_the_other_threads(coco_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr("quantrack.datasets.download.wait", interrupted)
    coco_server.faults = {name: [crawls] for name in coco_server.content if name.endswith(".jpg")}
    settings = wanted(coco_server, tmp_path, policy=FetchPolicy(retries=2, timeout=30, backoff=0.01))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download_coco(settings)
    assert time.monotonic() - start < 3
    monkeypatch.undo()
    coco_server.faults = {}
    assert download_coco(settings).downloaded == 4  # the next call with these settings is not stopped


def test_a_random_draw_fetches_what_it_can_draw_from(coco_server: Server, tmp_path: Path) -> None:
    expected = random.Random(0).sample([f"{number:012d}.jpg" for number in (10, 20, 30, 40)], 2)
    for place in ("one", "two"):
        settings = wanted(coco_server, tmp_path, calib_list="random", calib_images=2, data_root=tmp_path / place)
        assert download_coco(settings).downloaded == 4
        assert sorted(path.name for path in (tmp_path / place / "train2017").iterdir()) == sorted(expected)


def test_a_random_draw_from_a_copy_takes_what_is_there(server: Server, coco_root: Path, tmp_path: Path) -> None:
    """Its annotations may list many more."""
    content = json.loads((coco_root / "annotations/instances_val2017.json").read_text())
    more = [entry | {"id": entry["id"] + 1, "file_name": f"more {entry['id']}.jpg"} for entry in content["images"]]
    content["images"] += more
    (coco_root / "annotations/instances_train2017.json").write_text(json.dumps(content))
    assert build_from_source(wanted(server, tmp_path, calib_list="random", calib_images=3), coco_root).downloaded == 5
    assert len(list((tmp_path / "data/train2017").iterdir())) == 3
    with pytest.raises(UsageError, match="calib_images=5: only 4 train pictures to draw from"):
        build_from_source(wanted(server, tmp_path, calib_list="random", calib_images=5), coco_root)


def test_more_than_the_list_has_is_refused(server: Server, coco_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calib_images=3: .*list.txt has only 2 pictures; ask for at most 2, or 0"):
        build_from_source(wanted(server, tmp_path, calib_images=3), coco_root)


def test_a_random_draw_has_a_size(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calib_images=0: .* say how many to draw"):
        wanted(server, tmp_path, calib_list="random", calib_images=0)


def test_a_picture_listed_twice_is_fetched_once(coco_server: Server, tmp_path: Path) -> None:
    settings = wanted(coco_server, tmp_path)
    Path(settings.calib_list).write_text("train2017/000000000010.jpg\nelsewhere/train2017/000000000010.jpg\n")
    coco_server.faults["/train2017/000000000010.jpg"] = [drips] * 2
    assert download_coco(settings).downloaded == 3
    assert coco_server.requests["/train2017/000000000010.jpg"] == 1


def test_a_login_page_is_no_picture(coco_server: Server, tmp_path: Path) -> None:
    coco_server.content["/train2017/000000000010.jpg"] = b"<html>captive portal</html>"
    with pytest.raises(QuantrackError, match=r"000000000010.jpg after 3 tries \(not a picture\)"):
        download_coco(wanted(coco_server, tmp_path))
    assert not (tmp_path / "data/train2017/000000000010.jpg").exists()


def test_bodies_are_asked_for_uncompressed(server: Server, tmp_path: Path) -> None:
    asked = []

    def notes(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked.append(handler.headers["Accept-Encoding"])
        handler.answer(body)  # type: ignore[attr-defined]

    server.content["/picture.jpg"], server.faults["/picture.jpg"] = jpg(), [notes]
    get(server, tmp_path)
    assert asked == ["identity"]


def test_full_archives(coco_server: Server, tmp_path: Path) -> None:
    prepared = download_coco(wanted(coco_server, tmp_path, images="all"))
    assert prepared.pictures == 8
    assert coco_server.requests == {
        "/annotations/annotations_trainval2017.zip": 1,
        "/zips/val2017.zip": 1,
        "/zips/train2017.zip": 1,
    }
    assert not list((tmp_path / "data").rglob("*.zip"))
    again = download_coco(wanted(coco_server, tmp_path, images="all"))
    assert (again.downloaded, again.reused, coco_server.requests.total()) == (0, 8, 3)


def test_what_a_full_archive_lacks_is_fetched_singly_or_said(coco_server: Server, tmp_path: Path) -> None:
    last = "val2017/000000000040.jpg"
    names = [name for name in coco_server.content if name.startswith("/val2017/") and last not in name]
    coco_server.content["/zips/val2017.zip"] = archive({name[1:]: coco_server.content[name] for name in names})
    settings = wanted(coco_server, tmp_path, images="all")
    (tmp_path / "data/val2017").mkdir(parents=True)
    (tmp_path / "data" / names[0][1:]).write_bytes(coco_server.content[names[0]])
    prepared = download_coco(settings)
    assert (prepared.pictures, prepared.downloaded, prepared.reused) == (8, 7, 1)
    assert coco_server.requests[f"/{last}"] == 1
    (tmp_path / "data" / last).unlink()
    del coco_server.content[f"/{last}"]
    with pytest.raises(QuantrackError, match=last):
        download_coco(settings)


def test_of_a_split_a_truncated_picture_is_fetched_again(coco_server: Server, tmp_path: Path) -> None:
    download_coco(wanted(coco_server, tmp_path, images="all"))
    picture = tmp_path / f"data/val2017/{10:012d}.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-40])
    again = download_coco(wanted(coco_server, tmp_path, images="all"))
    assert picture.read_bytes() == whole
    assert (again.downloaded, again.reused) == (1, 7)
    assert coco_server.requests["/zips/val2017.zip"] == 1


def test_all_pictures_of_annotations_without_a_name(coco_server: Server, tmp_path: Path) -> None:
    nameless = json.dumps({"images": [{"id": 1}], "annotations": [], "categories": []}).encode()
    members = dict.fromkeys(("annotations/instances_val2017.json", "annotations/instances_train2017.json"), nameless)
    coco_server.content["/annotations/annotations_trainval2017.zip"] = archive(members)
    with pytest.raises(
        QuantrackError, match=r"instances_val2017.json: file name of a picture leads out of its folder or is missing"
    ):
        download_coco(wanted(coco_server, tmp_path, images="all"))


def test_annotation_archive_without_the_instances(coco_server: Server, tmp_path: Path) -> None:
    coco_server.content["/annotations/annotations_trainval2017.zip"] = archive({"readme.txt": b""})
    with pytest.raises(QuantrackError, match=r"holds no annotations/instances_train2017.json"):
        download_coco(wanted(coco_server, tmp_path))


def test_archive_that_is_none(coco_server: Server, tmp_path: Path) -> None:
    coco_server.content["/annotations/annotations_trainval2017.zip"] = b"<html>captive portal</html>"
    with pytest.raises(QuantrackError, match="not a zip archive"):
        download_coco(wanted(coco_server, tmp_path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_corrupt_archive_is_removed(tmp_path: Path, compression: int) -> None:
    content = bytearray(archive({"a.json": random.Random(0).randbytes(2000).hex().encode()}, compression))
    content[40:60] = b"\xff" * 20
    (tmp_path / "broken.zip").write_bytes(content)
    with pytest.raises(QuantrackError, match=r"broken.zip: broken archive .* run again"):
        extract(tmp_path / "broken.zip", None, tmp_path / "data")
    assert not (tmp_path / "broken.zip").exists()
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("absolute", [False, True])
def test_archive_may_not_write_outside(tmp_path: Path, absolute: bool) -> None:
    name = str(tmp_path / "outside.txt") if absolute else "../outside.txt"
    (tmp_path / "evil.zip").write_bytes(archive({name: b"x"}))
    with pytest.raises(QuantrackError, match="would be written outside"):
        extract(tmp_path / "evil.zip", None, tmp_path / "data")
    assert not (tmp_path / "outside.txt").exists()


def test_build_from_a_copy(server: Server, coco_root: Path, tmp_path: Path) -> None:
    prepared = build_from_source(wanted(server, tmp_path), coco_root)
    assert (prepared.pictures, prepared.downloaded) == (4, 4)
    content = json.loads((tmp_path / "data/annotations/instances_val2017.json").read_text())
    assert len(content["images"]) == 4
    assert build_from_source(wanted(server, tmp_path), coco_root).reused == 4
    assert server.requests.total() == 0


def test_annotations_that_are_there_are_not_replaced(coco_server: Server, coco_root: Path, tmp_path: Path) -> None:
    own = tmp_path / "data/annotations/instances_val2017.json"
    own.parent.mkdir(parents=True)
    content = json.loads((coco_root / "annotations/instances_val2017.json").read_text())
    own.write_text(json.dumps(content | {"info": "mine"}))
    download_coco(wanted(coco_server, tmp_path))
    assert json.loads(own.read_text())["info"] == "mine"
    with pytest.raises(QuantrackError, match=r"instances_val2017.json: is there already, and is not .*move it away"):
        build_from_source(wanted(coco_server, tmp_path), coco_root)
    assert json.loads(own.read_text())["info"] == "mine"


def test_build_from_a_copy_all(server: Server, coco_root: Path, tmp_path: Path) -> None:
    assert build_from_source(wanted(server, tmp_path, images="all"), coco_root).downloaded == 8


def test_build_from_a_copy_of_other_formats(server: Server, coco_root: Path, tmp_path: Path) -> None:
    import cv2

    picture = cv2.imread(str(coco_root / "train2017/000000000010.jpg"))
    for suffix in (".png", ".bmp", ".webp", ".JPG"):
        cv2.imwrite(str(coco_root / f"train2017/other{suffix}"), picture)
    assert build_from_source(wanted(server, tmp_path, images="all"), coco_root).downloaded == 12


def test_build_from_a_copy_made_of_links(server: Server, coco_root: Path, tmp_path: Path) -> None:
    picture = coco_root / "val2017/000000000010.jpg"
    picture.rename(coco_root / "real.jpg")
    picture.symlink_to("../real.jpg")
    build_from_source(wanted(server, tmp_path, data_root=tmp_path / "deep/er/data"), coco_root)
    built = tmp_path / "deep/er/data/val2017/000000000010.jpg"
    assert built.read_bytes() == (coco_root / "real.jpg").read_bytes()


def test_build_from_a_copy_with_a_truncated_picture(server: Server, coco_root: Path, tmp_path: Path) -> None:
    picture = coco_root / "val2017/000000000010.jpg"
    picture.write_bytes(picture.read_bytes()[:1000])
    with pytest.raises(QuantrackError, match=r"val2017/000000000010.jpg: truncated jpg.*complete the source"):
        build_from_source(wanted(server, tmp_path), coco_root)
    assert not (tmp_path / "data/val2017").exists()


def test_build_from_the_data_root_itself(server: Server, coco_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the data_root itself"):
        build_from_source(wanted(server, tmp_path, data_root=coco_root), coco_root)


def test_build_from_nowhere(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"source=.*/nowhere: no such folder"):
        build_from_source(wanted(server, tmp_path), tmp_path / "nowhere")


def test_build_from_an_incomplete_copy(server: Server, coco_root: Path, tmp_path: Path) -> None:
    (coco_root / "train2017/000000000030.jpg").unlink()
    with pytest.raises(QuantrackError, match=r"train2017/000000000030.jpg: cannot be read.*complete the source"):
        build_from_source(wanted(server, tmp_path), coco_root)


def test_build_from_a_folder_without_the_layout(server: Server, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(QuantrackError, match="official COCO layout"):
        build_from_source(wanted(server, tmp_path), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "some"}, "images=some: unknown"),
        ({"eval_images": -1}, "eval_images=-1"),
        ({"calib_images": -1}, "calib_images=-1"),
        ({"base_url": "ftp://x"}, "base_url=ftp://x"),
    ],
)
def test_settings_are_checked(server: Server, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wanted(server, tmp_path, **changes)
