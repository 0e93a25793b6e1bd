from pathlib import Path

import pytest
from command import QUICK, newest_run, run_pipeline, use_store
from mlflow.entities import Run


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow store for all quick runs of the session, so that the baseline is measured once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def ptq_run(shared_store: Path) -> Run:
    """A whole W4A8 run, for all files of this folder."""
    done = run_pipeline(shared_store, "ptq", *QUICK, "--mode", "W4A8")
    assert done.returncode == 0, done.stderr
    return newest_run(shared_store, "ptq")


@pytest.fixture(autouse=True)
def look_at_shared_store(request: pytest.FixtureRequest) -> None:
    """Tests of the shared store's runs look there, whatever store the test before used."""
    if "shared_store" in request.fixturenames:
        use_store(request.getfixturevalue("shared_store"))
