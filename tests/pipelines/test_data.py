"""The `data` entry point as a user runs it."""

from pathlib import Path

import mlflow
from command import run_pipeline, use_store


def listed(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "list.txt").write_text("train2017/000000000010.jpg\ntrain2017/000000000020.jpg\n")
    return "--calib-list", str(tmp_path / "list.txt"), "--calib-images", "0", "--eval-images", "2"


def test_build_from_a_copy(coco_root: Path, tmp_path: Path) -> None:
    options = ("--source", str(coco_root), "--data-root", str(tmp_path / "data"), *listed(tmp_path))
    done = run_pipeline(tmp_path, "data", *options)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "data").rglob("*.jpg"))) == 4
    use_store(tmp_path)
    run = mlflow.search_runs(output_format="list")[0]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["pictures"] == 4


def test_offline_is_one_line_that_names_the_demo(tmp_path: Path) -> None:
    options = ("--base-url", "http://127.0.0.1:9", "--data-root", str(tmp_path / "data"), *listed(tmp_path))
    done = run_pipeline(tmp_path, "data", *options)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "model=demo" in errors[0]
    use_store(tmp_path)
    run = mlflow.search_runs(output_format="list")[0]
    assert run.info.status == "FAILED"
    assert "cannot fetch" in run.data.tags["failure_reason"]
