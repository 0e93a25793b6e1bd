"""The downloader against a local server that is slow, drops, truncates and refuses."""

import io
import json
import socket
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quantrack.datasets.download import DownloadSettings, build_from_source, download_coco, extract
from quantrack.datasets.fetch import FetchPolicy, fetch
from quantrack.datasets.pictures import picture_problem
from quantrack.errors import QuantrackError, UsageError

Misbehaviour = Callable[[BaseHTTPRequestHandler, bytes], None]
FAST = FetchPolicy(retries=2, timeout=0.4, backoff=0.01)


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


def drips(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    head(handler, len(body))
    for start in range(0, len(body), len(body) // 8):
        handler.wfile.write(body[start : start + len(body) // 8])
        time.sleep(0.02)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def jpg(size: int = 4000) -> bytes:
    return b"\xff\xd8" + bytes(range(256)) * (size // 256) + b"\xff\xd9"


def get(server: Server, tmp_path: Path) -> Path:
    target = tmp_path / "picture.jpg"
    fetch(f"{server.url}/picture.jpg", target, FAST, picture_problem)
    return target


@pytest.mark.parametrize("fault", [fails, truncates, truncates_silently, stalls, drips])
def test_one_fault_is_survived(server: Server, tmp_path: Path, fault: Misbehaviour) -> None:
    server.content["/picture.jpg"] = jpg()
    server.faults["/picture.jpg"] = [fault]
    assert get(server, tmp_path).read_bytes() == jpg()
    assert [path.name for path in tmp_path.iterdir()] == ["picture.jpg"]


@pytest.mark.parametrize(
    ("fault", "reason"), [(fails, "answered 500"), (truncates_silently, "truncated jpg"), (stalls, "no ")]
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
        fetch(f"http://127.0.0.1:{port}/x.jpg", tmp_path / "x.jpg", FAST, picture_problem)


def test_stop_ends_the_tries(server: Server, tmp_path: Path) -> None:
    server.content["/picture.jpg"] = jpg()
    server.faults["/picture.jpg"] = [fails] * 100
    policy = FetchPolicy(retries=50, timeout=1, backoff=30)
    threading.Timer(0.2, policy.stop.set).start()
    start = time.monotonic()
    with pytest.raises(QuantrackError, match="stopped"):
        fetch(f"{server.url}/picture.jpg", tmp_path / "picture.jpg", policy, picture_problem)
    assert time.monotonic() - start < 5


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
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


def test_full_archives(coco_server: Server, tmp_path: Path) -> None:
    prepared = download_coco(wanted(coco_server, tmp_path, images="all"))
    assert prepared.pictures == 8
    assert not list((tmp_path / "data").rglob("*.zip"))


def test_annotation_archive_without_the_instances(coco_server: Server, tmp_path: Path) -> None:
    coco_server.content["/annotations/annotations_trainval2017.zip"] = archive({"readme.txt": b""})
    with pytest.raises(QuantrackError, match=r"holds no annotations/instances_train2017.json"):
        download_coco(wanted(coco_server, tmp_path))


def test_archive_that_is_none(coco_server: Server, tmp_path: Path) -> None:
    coco_server.content["/annotations/annotations_trainval2017.zip"] = b"<html>captive portal</html>"
    with pytest.raises(QuantrackError, match="not a zip archive"):
        download_coco(wanted(coco_server, tmp_path))


def test_archive_may_not_write_outside(tmp_path: Path) -> None:
    (tmp_path / "evil.zip").write_bytes(archive({"../outside.txt": b"x"}))
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
        ({"base_url": "ftp://x"}, "base_url=ftp://x"),
    ],
)
def test_settings_are_checked(server: Server, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wanted(server, tmp_path, **changes)
