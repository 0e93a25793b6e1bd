from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow store for all demo runs of the session, so that the baseline is measured once."""
    return tmp_path_factory.mktemp("store")
