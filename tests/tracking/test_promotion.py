"""Which runs may be promoted."""

from pathlib import Path

import mlflow
import pytest

from quantrack.comparison.runs import COMPARED
from quantrack.errors import QuantrackError
from quantrack.tracking.promotion import read_candidates
from quantrack.tracking.run import tracked_run


def test_compared_runs_that_were_deleted_are_gone_on_without(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = []
    for _ in range(3):
        with tracked_run("ptq", {}) as run:
            ids.append(run.info.run_id)
    with tracked_run("compare", {}) as parent:
        mlflow.set_tag(COMPARED, ", ".join(ids))
    assert [each.run_id for each in read_candidates("", parent.info.run_id)] == ids
    mlflow.delete_run(ids[1])
    assert [each.run_id for each in read_candidates("", parent.info.run_id)] == [ids[0], ids[2]]
    assert f"run {ids[1]} was compared, and is deleted now" in capsys.readouterr().err
    for run_id in (ids[0], ids[2]):
        mlflow.delete_run(run_id)
    with pytest.raises(QuantrackError, match="no finished ptq or qat run among its runs"):
        read_candidates("", parent.info.run_id)
