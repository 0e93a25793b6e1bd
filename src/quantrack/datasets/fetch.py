"""One URL to one file: retried, resumed, checked, and there only when it is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from quantrack.errors import QuantrackError

CHUNK_BYTES = 1 << 16
PROGRESS_BYTES = 1 << 20  # more than ever before, and the tries are counted anew
LONGEST_PAUSE = 60.0  # seconds, whatever the server asks for
SLOWEST_BYTES = 1 << 12  # fewer than this within the policy's timeout is as good as no answer
Check = Callable[[Path], str | None]  # why a downloaded file is not good, or None


class _TransientError(Exception):
    """Worth another try: a dropped connection, a server error, a truncated body.

    Not before `pause` seconds, if the server asks for that.
    """

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class FetchPolicy:
    """Tries without progress, seconds without an answer before giving one up, and the first pause between them."""

    retries: int = 4
    timeout: float = 30.0
    backoff: float = 0.5


def fetch(
    url: str,
    target: Path,
    policy: FetchPolicy,
    check: Check,
    progress: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> int:
    """Download `url` to `target`; returns the bytes received now. A `.part` file is resumed.

    Another thread sets `stop` to make it end at its next chunk.

    Raises:
        QuantrackError: the server says no (4xx), cannot be reached, or sends bad data at every try. Tries are
            counted anew where one brought the file further.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stop = stop or threading.Event()
    part = target.with_name(target.name + ".part")
    received, furthest, tries, failed, pause, reason = 0, _size(part), 0, 0, 0.0, ""
    while failed <= policy.retries and not stop.wait(pause):
        tries += 1
        try:
            received += _download(url, part, policy, progress, stop)
            problem = check(part)
            if problem is not None:
                part.unlink(missing_ok=True)  # nothing in it can be trusted to resume from
                raise _TransientError(problem)
            part.replace(target)
            return received
        except _TransientError as error:
            failed = 0 if _size(part) >= furthest + PROGRESS_BYTES else failed + 1
            furthest = max(furthest, _size(part))
            pause, reason = max(policy.backoff * 2 ** (failed - 1), error.pause), str(error)
    if stop.is_set():
        raise QuantrackError(f"{url}: stopped; what is downloaded stays")
    raise QuantrackError(
        f"cannot fetch {url} after {tries} tries ({reason}); check the network and run again to resume, "
        "build from a copy with source=DIR, or try the embedded demo: -P model=demo -P data_root=demo"
    )


def _download(url: str, part: Path, policy: FetchPolicy, progress: Callable[[int], None], stop: threading.Event) -> int:
    have = _size(part)
    headers = {"Accept-Encoding": "identity"}  # what arrives is what is counted, resumed and kept
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=policy.timeout) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink(missing_ok=True)
                raise _TransientError("the part already here is not a part of this file")
            _require_success(url, answer)
            resumed = answer.status_code == requests.codes.partial_content
            return _write(answer, part, "ab" if resumed else "wb", policy, progress, stop)
    except (requests.RequestException, HTTPError) as error:
        raise _TransientError(_reason(error)) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_success(url: str, answer: requests.Response) -> None:
    status = answer.status_code
    if status >= 500 or status == requests.codes.too_many_requests:
        seconds = answer.headers.get("Retry-After", "")
        asked = float(seconds) if seconds.isdecimal() else 0.0  # it may be a date, which is left alone
        raise _TransientError(f"the server answered {status}", min(asked, LONGEST_PAUSE))
    if status >= 400:
        raise QuantrackError(f"{url}: the server answered {status}; check the list and base_url")


def _write(
    answer: requests.Response,
    part: Path,
    mode: str,
    policy: FetchPolicy,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> int:
    expected = answer.headers.get("Content-Length")
    received, lately = 0, 0
    deadline = time.monotonic() + policy.timeout
    with part.open(mode) as stream:
        # read1 gives what has arrived: a slow body can be stopped, a dropped one resumed
        while chunk := answer.raw.read1(CHUNK_BYTES, decode_content=False):
            stream.write(chunk)
            received, lately = received + len(chunk), lately + len(chunk)
            progress(len(chunk))
            if stop.is_set():
                raise _TransientError("stopped")
            if lately >= SLOWEST_BYTES:
                lately, deadline = 0, time.monotonic() + policy.timeout
            elif time.monotonic() > deadline and received != int(expected or -1):
                raise _TransientError("the server is too slow")
    if expected is not None and received != int(expected):
        raise _TransientError(f"truncated: {received} of {expected} bytes")
    return received


def _reason(error: requests.RequestException | HTTPError) -> str:
    """One short phrase out of a nested chain of causes."""
    if isinstance(error, requests.Timeout | ReadTimeoutError):
        return "no answer in time"
    if isinstance(error, HTTPError):
        return "the connection was dropped"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return type(error).__name__
