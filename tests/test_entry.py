"""What stops a command."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from command import ROOT, run_pipeline, use_store

from quantrack.interrupts import SIGNALS, interruptible


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Those of a program's start, whatever whoever runs the tests has this process ignore."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_interrupt_and_are_given_back(number: signal.Signals) -> None:
    with interruptible():
        pass
    assert signal.getsignal(number) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert {signal.getsignal(each) for each in SIGNALS} == {signal.SIG_IGN}  # others of the same interrupt


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_garbage_is_collected_again_after_the_imports(tmp_path: Path) -> None:
    gc.disable()  # as `program` does, which this process has imported long ago
    try:
        assert run_pipeline(tmp_path, "ptq", "--help").returncode == 0
        assert gc.isenabled()
    finally:
        gc.enable()


def started(pipeline: str, store: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
    """A pipeline that heeds SIGTERM already, and imports still."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"} | variables
    command = [sys.executable, str(ROOT / f"pipelines/{pipeline}.py"), *options]
    process = subprocess.Popen(command, cwd=store, env=environment, stderr=subprocess.PIPE, text=True)
    heeded = re.compile(r"^SigCgt:\s*([0-9a-f]+)$", re.MULTILINE)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        found = heeded.search(Path(f"/proc/{process.pid}/status").read_text())
        if found and int(found[1], 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.01)
    return process


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system does not say what a process heeds")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_is_interrupted_while_it_imports(number: signal.Signals, tmp_path: Path) -> None:
    process = started("ptq", tmp_path, "--mode", "w5a8")
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "interrupted\n"
    assert process.returncode == 130
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system does not say what a process heeds")
def test_a_run_that_mlflow_has_begun_is_told_why(tmp_path: Path) -> None:
    use_store(tmp_path)
    run_id = mlflow.MlflowClient().create_run("0").info.run_id
    process = started("ptq", tmp_path, "--mode", "w5a8", MLFLOW_RUN_ID=run_id)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # which `mlflow run` sends as well
    assert process.communicate(timeout=120)[1].startswith("interrupted; what was logged so far stays in the run")
    assert process.returncode == 130
    ended = mlflow.get_run(run_id)
    assert (ended.info.status, ended.data.tags["failure_reason"]) == ("KILLED", "interrupted")
