"""Bad input: one line, the right exit code, and a run that ends FAILED with the reason."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
from command import ROOT, SMALL, run_pipeline, use_store

CASES = {
    "option": (("--bogus", "1"), 2, "--bogus: unknown option; --help lists those of ptq"),
    "mode": (("--mode", "w2a2"), 2, "mode=w2a2: unknown mode; use one of w8a16, w8a8, w4a16, w4a8"),
    "recipe": (("--recipe", "magic"), 2, "recipe=magic: unknown recipe"),
    "recipe file": (("--recipe", "gone.yaml"), 2, "recipe=gone.yaml: cannot be read"),
    "budget": (("--avg-bits", "2.5"), 2, "avg_bits=2.5: must lie between 3 and 7"),
    "plan bits": (("--plan-bits", "4"), 2, "plan_bits=4: give at least two of 2 to 8"),
    "plan by": (("--plan-by", "group"), 2, "plan_by=group: unknown; use layer or channel"),
    "plan by without budget": (
        ("--plan-by", "channel", "--recipe", "fast"),
        2,
        "plan_by=channel: there is no budget to plan for; give avg_bits",
    ),
    "plan bits by role": (("--plan-bits", "4,8", "--avg-bits", "0"), 2, "plan_bits=4,8: there is no budget to plan"),
    "budget of the bits": (("--plan-bits", "5,8", "--avg-bits", "4.5"), 2, "avg_bits=4.5: must lie between 5 and 8"),
    "bits beyond the recipe's budget": (
        ("--plan-bits", "5,8"),
        2,
        "plan_bits=5,8: not with the recipe's plan (average",
    ),
    "bits unlike roles": (
        ("--plan-bits", "5,7", "--weight-storage", "int4"),
        2,
        "plan_bits=5,7: not with the recipe's plan (bits=[5, 7]: as many as by role are some of 4 and some of more)",
    ),
    "plan and bits by role": (("--plan", "plan.json", "--avg-bits", "0"), 2, "avg_bits=0.0: the plan has its own bits"),
    "budget of 8 bits": (("--avg-bits", "4.5", "--mode", "w8a8"), 2, "avg_bits=4.5: w8a8 has 8-bit weights throughout"),
    "plan and budget": (
        ("--plan", "plan.json", "--plan-by", "layer"),
        2,
        "plan_by=layer: the plan has its own bits; give one",
    ),
    "budget text": (("--avg-bits", "few"), 2, "avg_bits=few: not a number"),
    "plan of 4 bits": (
        ("--plan", "plan.json", "--mode", "w8a8"),
        2,
        "plan=plan.json: w8a8 has 8-bit weights throughout",
    ),
    "plan": (("--plan", "gone.json"), 1, "plan=gone.json: no such file"),
    "plan run": (("--plan", "runs:/0123/plan.json"), 1, "plan=runs:/0123/plan.json: MLflow cannot fetch it"),
    "head": (("--head", "two2two"), 2, "head=two2two: unknown head"),
    "provider": (("--provider", "tpu"), 2, "provider=tpu: unknown provider"),
    "number": (("--calib-images", "many"), 2, "calib_images=many: not a whole number"),
    "negative": (("--eval-images", "-1"), 2, "eval_images=-1: must not be negative"),
    "seed": (("--seed", str(2**64)), 2, f"seed={2**64}: must be at most {2**32 - 1}"),
    "no name": (("--model", ""), 2, "model is empty; leave it out for its default"),
    "device": (("--device", "abacus"), 2, "device=abacus: unknown device"),
    "imgsz": (("--imgsz", "100"), 2, "imgsz=100: must be a multiple of 32"),
    "too many": (("--eval-images", "5000"), 2, "eval_images=5000"),
    "data root": (("--data-root", "nowhere"), 1, "data_root=nowhere: no such folder"),
    "list": (("--calib-list", "nowhere.txt"), 1, "calib_list=nowhere.txt: no such file"),
    "model": (("--model", "weights/gone.pt"), 1, "model=weights/gone.pt: no such file"),
    "segmentation": (("--model", "yolov8n-seg.yaml"), 1, "a segment model"),
    "transformer": (("--model", "rtdetr-l.yaml"), 1, "rtdetr-l.yaml: no YOLO; Quantrack takes detection models"),
    "classes": (("--model", "yolov10n.yaml"), 1, "detects 80 classes"),
    "placement": (("--placement", "some"), 2, "placement=some: unknown placement; use inputs or full"),
    "full placement of floats": (
        ("--placement", "full", "--mode", "w8a16"),
        2,
        "placement=full: w8a16 has float activations; use",
    ),
    "full placement of signed": (
        ("--placement", "full", "--recipe", "naive"),
        2,
        "placement=full: recipe=naive has symmetric activations; use another recipe",
    ),
    "storage": (
        ("--weight-storage", "int4", "--mode", "w8a8"),
        2,
        "weight_storage=int4: w8a8 has 8-bit weights; use w4a8 or w4a16",
    ),
    "gpu on the cpu": (("--require-gpu", "true", "--provider", "cpu"), 2, "require_gpu=true: provider=cpu uses none"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case: str, shared_store: Path) -> None:
    options, code, message = CASES[case]
    defaults = {"--model": "demo", "--data-root": "demo"} | dict(zip(options[::2], options[1::2], strict=True))
    done = run_pipeline(shared_store, "ptq", *[part for pair in defaults.items() for part in pair])
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    use_store(shared_store)
    last = mlflow.search_runs(output_format="list", max_results=1, order_by=["attributes.start_time DESC"])[0]
    assert last.info.status == "FAILED"
    assert message in last.data.tags["failure_reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_gpu_where_one_is_required(shared_store: Path) -> None:
    done = run_pipeline(shared_store, "baseline", "--model", "demo", "--data-root", "demo", "--require-gpu", "true")
    assert done.returncode == 1
    assert "error: require_gpu=true: CUDA cannot be used (no CUDA device); use require_gpu=false" in done.stderr


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)], ids=["kill", "Ctrl-C"])
def test_interrupted_run_ends_killed(tmp_path: Path, signals: tuple[signal.Signals, ...]) -> None:
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines/ptq.py"), "--model", SMALL, "--data-root", "demo", "--avg-bits", "0"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("InsertQuantizers"):
            break
    time.sleep(0.5)
    for number in signals:  # `mlflow run` sends SIGTERM after Ctrl-C, while the run is being ended
        process.send_signal(number)
        time.sleep(0.1)
    assert "interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    use_store(tmp_path)
    run = mlflow.search_runs(output_format="list")[0]
    assert run.info.status == "KILLED"
    assert run.data.tags["failure_reason"] == "interrupted"


def test_onnx_is_required(shared_store: Path) -> None:
    done = run_pipeline(shared_store, "evaluate", "--data-root", "demo")
    assert done.returncode == 2
    assert "error: onnx: missing" in done.stderr
