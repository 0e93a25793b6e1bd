import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow store for all demo runs of the session, so that the baseline is measured once."""
    return tmp_path_factory.mktemp("store")


def run_pipeline(folder: Path, name: str, *options: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment.pop("MLFLOW_RUN_ID", None)
    return subprocess.run(
        [sys.executable, str(ROOT / f"pipelines/{name}.py"), *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
