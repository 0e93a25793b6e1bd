from dataclasses import replace

import pytest

from quantrack.comparison.gates import (
    COMPARABLE,
    CONTRACT,
    IDENTITY,
    Champion,
    Limits,
    MeasuredRun,
    choose_best,
    judge,
    off_gates,
    require_comparable,
)
from quantrack.errors import QuantrackError

METRICS = {
    "mAP50-95": 0.44, "mAP50-95_drop": 2.7, "mAP50-95_drop_ci_low": 1.6, "mAP50-95_drop_ci_high": 4.1,
    "latency_ms_p50": 60.0, "onnx_mb": 2.77, "weight_bits_avg": 4.5, "parity_mean_abs": 0.003,
}  # fmt: skip
TAGS = {name: f"{name} value" for name in IDENTITY}
BASELINE = MeasuredRun("f" * 32, "baseline", "FINISHED", {"latency_ms_p50": 40.0}, TAGS)
RUN = MeasuredRun("a" * 32, "ptq", "FINISHED", METRICS, TAGS, ("m-1",), BASELINE)
CHAMPION = Champion("3", TAGS | {"mAP50-95": "0.45"})


def with_metrics(**changes: float) -> MeasuredRun:
    return replace(RUN, metrics=METRICS | {name.replace("__", "-"): value for name, value in changes.items()})


def reasons(run: MeasuredRun, limits: Limits, champion: Champion | None = None) -> str:
    verdict = judge(run, champion, limits)
    assert verdict.passed == (not verdict.reasons)
    return verdict.reasons


def test_tags_that_runs_must_share_are_those_of_the_comparison_key() -> None:
    assert set(COMPARABLE) == {"model_digest", "evaluation_digest", "head", "imgsz", "provider"}


CASES = {
    "upper end of the drop": (
        RUN, Limits(max_drop=2.5), "max_drop: mAP50-95_drop_ci_high is 4.1, limit 2.5",
    ),
    "latency": (
        RUN, Limits(max_latency_ratio=1.2),
        "max_latency_ratio: latency_ms_p50 over the float32 run's is 1.5, limit 1.2",
    ),
    "latency in turns": (
        with_metrics(latency_ratio=1.3), Limits(max_latency_ratio=1.2),
        "max_latency_ratio: latency_ratio to float32, timed in turns, is 1.3, limit 1.2",
    ),
    "latency in turns is no number": (
        with_metrics(latency_ratio=float("nan")), Limits(max_latency_ratio=2), "is missing or not finite, limit 2",
    ),
    "size": (RUN, Limits(max_mb=2.5), "max_mb: onnx_mb is 2.77, limit 2.5"),
    "accuracy": (RUN, Limits(min_map=0.5), "min_mAP: mAP50-95 is 0.44, limit 0.5"),
    "agreement": (
        with_metrics(float32_agreement=0.93), Limits(min_agreement=0.95),
        "min_agreement: float32_agreement is 0.93, limit 0.95",
    ),
    "agreement was not measured": (
        RUN, Limits(min_agreement=0.9), "min_agreement: float32_agreement is missing or not finite, limit 0.9",
    ),
    "parity": (RUN, Limits(max_parity=0.001), "max_parity: parity_mean_abs is 0.003, limit 0.001"),
    "failed": (replace(RUN, status="FAILED"), Limits(), "finished: the run's status is FAILED, must be FINISHED"),
    "no model": (replace(RUN, model_ids=()), Limits(), "logged_model: the run has 0 LoggedModels, must be 1"),
    "two models": (replace(RUN, model_ids=("1", "2")), Limits(), "logged_model: the run has 2 LoggedModels, must be 1"),
    "not a number": (with_metrics(onnx_mb=float("nan")), Limits(), "metrics: onnx_mb missing or not finite"),
    "few pictures": (
        with_metrics(**{"mAP50-95_drop_ci_high": float("nan")}), Limits(), "(an interval wants at least 5 pictures)",
    ),
    "no tag": (
        replace(RUN, tags={name: "x" for name in IDENTITY if name != "head"}), Limits(), "tags: head missing",
    ),
    "no baseline": (
        replace(RUN, baseline=None), Limits(max_latency_ratio=2), "(no run behind the tag baseline_run_id) is missing",
    ),
    "other processor": (
        replace(RUN, baseline=replace(BASELINE, tags=TAGS | {"device_name": "abacus"})), Limits(max_latency_ratio=2),
        "device_name is device_name value, but abacus of the float32 run",
    ),
    "baseline without latency": (
        replace(RUN, baseline=replace(BASELINE, metrics={})), Limits(max_latency_ratio=2), "missing or not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_gate_fails_alone(case: str) -> None:
    run, limits, message = CASES[case]
    text = reasons(run, limits)
    assert message in text
    assert "; " not in text.replace("; limit", "").replace("; give", "")


@pytest.mark.parametrize("name", CONTRACT)
def test_no_metric_may_be_missing(name: str) -> None:
    lacking = replace(RUN, metrics={key: value for key, value in METRICS.items() if key != name})
    assert f"metrics: {name} missing" in reasons(lacking, Limits())


def test_a_gate_whose_metric_is_missing_fails() -> None:
    text = reasons(with_metrics(parity_mean_abs=float("inf")), Limits(max_parity=0.02))
    assert "max_parity: parity_mean_abs is missing or not finite, limit 0.02" in text


def test_limits_may_be_reached() -> None:
    limits = Limits(
        max_drop=4.1, max_latency_ratio=1.5, max_mb=2.77, min_map=0.44, min_agreement=0.93, max_parity=0.003
    )
    run = with_metrics(float32_agreement=0.93)
    assert reasons(run, limits) == ""
    assert len(judge(run, None, limits).gates) == 4 + 6


def test_a_slow_hour_of_the_machine_refuses_no_model() -> None:
    slow_hour = with_metrics(latency_ratio=0.7, latency_ms_p50=60.0)  # 1.5 times the baseline's median, of another hour
    assert reasons(slow_hour, Limits(max_latency_ratio=1)) == ""


def test_every_failed_gate_is_named() -> None:
    text = reasons(RUN, Limits(max_drop=1, max_mb=1, min_map=0.9), None)
    assert [part.split(":")[0] for part in text.split("; ")] == ["max_drop", "max_mb", "min_mAP"]


@pytest.mark.parametrize("tag", ["evaluation_digest", "head", "imgsz"])
def test_a_champion_must_have_been_measured_alike(tag: str) -> None:
    other = Champion("3", CHAMPION.tags | {tag: "other"})
    assert f"same_evaluation: {tag} is" in reasons(RUN, Limits(), other)
    assert reasons(RUN, Limits(same_evaluation=False), other) == ""
    unknown = Champion("3", {name: value for name, value in CHAMPION.tags.items() if name != tag})
    assert "but missing of the champion, version 3" in reasons(RUN, Limits(), unknown)


def test_another_checkpoint_may_replace_the_champion() -> None:
    assert reasons(RUN, Limits(), Champion("3", CHAMPION.tags | {"model_digest": "other"})) == ""


def test_require_better() -> None:
    assert reasons(RUN, Limits(), CHAMPION) == ""
    text = reasons(RUN, Limits(require_better=True), CHAMPION)
    assert text == "require_better: mAP50-95 against the champion's (version 3) is 0.44, limit 0.45"
    assert reasons(with_metrics(mAP50__95=0.45), Limits(require_better=True), CHAMPION) == ""
    assert "does not say its mAP50-95" in reasons(RUN, Limits(require_better=True), Champion("3", TAGS))
    assert reasons(RUN, Limits(require_better=True), None) == ""


def test_off_gates_are_told() -> None:
    assert off_gates(judge(RUN, None, Limits(max_drop=5, max_parity=0.02))) == (
        "max_latency_ratio", "max_mb", "min_mAP", "min_agreement", "same_evaluation", "require_better",
    )  # fmt: skip
    assert "same_evaluation" not in off_gates(judge(RUN, CHAMPION, Limits()))
    every = Limits(5, 1, 10, 0.1, 0.9, 0.02, same_evaluation=True, require_better=True)
    assert off_gates(judge(RUN, CHAMPION, every)) == ()


def candidates() -> list[MeasuredRun]:
    exact = replace(with_metrics(mAP50__95=0.46, onnx_mb=3.0, latency_ms_p50=70), run_id="b" * 32, name="exact")
    small = replace(with_metrics(mAP50__95=0.40, onnx_mb=2.0, latency_ms_p50=80), run_id="c" * 32, name="small")
    return [RUN, exact, small]


@pytest.mark.parametrize(("best_by", "name"), [("mAP50-95", "exact"), ("onnx_mb", "small"), ("latency_ms_p50", "ptq")])
def test_best_of_several(best_by: str, name: str) -> None:
    verdicts = [judge(run, None, Limits()) for run in candidates()]
    assert choose_best(verdicts, best_by).name == name
    assert choose_best(verdicts[::-1], best_by).name == name


def test_latencies_are_ranked_by_what_was_timed_in_turns() -> None:
    """Where all runs were: a run of a slow hour has more milliseconds than a slower file of a fast one."""
    ratios = {"ptq": 1.3, "exact": 0.5, "small": 0.7}
    timed = [replace(run, metrics={**run.metrics, "latency_ratio": ratios[run.name]}) for run in candidates()]
    assert choose_best([judge(run, None, Limits()) for run in timed], "latency_ms_p50").name == "exact"
    one_was_not = [*timed[:2], candidates()[2]]
    assert choose_best([judge(run, None, Limits()) for run in one_was_not], "latency_ms_p50").name == "ptq"


def test_the_best_must_pass() -> None:
    verdicts = [judge(run, None, Limits(max_mb=2.8)) for run in candidates()]
    assert choose_best(verdicts, "mAP50-95").name == "ptq"


def test_ties_do_not_depend_on_order() -> None:
    twins = [judge(replace(RUN, run_id=run_id * 32), None, Limits()) for run_id in "cab"]
    assert choose_best(twins, "mAP50-95").run_id == "a" * 32


def test_none_passes() -> None:
    verdicts = [judge(run, None, Limits(min_map=0.9)) for run in candidates()]
    with pytest.raises(QuantrackError) as refusal:
        choose_best(verdicts, "mAP50-95")
    assert str(refusal.value) == (
        "refused: none of 3 runs passes: ptq (aaaaaaaa): min_mAP: mAP50-95 is 0.44, limit 0.9 | "
        "exact (bbbbbbbb): min_mAP: mAP50-95 is 0.46, limit 0.9 | small (cccccccc): min_mAP: mAP50-95 is 0.4, limit 0.9"
    )
    with pytest.raises(QuantrackError, match=r"^refused: min_mAP: mAP50-95 is 0\.44, limit 0\.9$"):
        choose_best(verdicts[:1], "mAP50-95")


@pytest.mark.parametrize("tag", COMPARABLE)
def test_runs_measured_differently_are_not_ranked(tag: str) -> None:
    other = replace(RUN, run_id="b" * 32, name="other", tags=TAGS | {tag: "else"})
    with pytest.raises(QuantrackError, match=f"{tag} differs: .*other \\(bbbbbbbb\\) else"):
        require_comparable([RUN, other], "mAP50-95")


def test_latency_ranks_on_one_processor_only() -> None:
    other = replace(RUN, tags=TAGS | {"device_name": "abacus"})
    require_comparable([RUN, other], "mAP50-95")
    with pytest.raises(QuantrackError, match="device_name differs"):
        require_comparable([RUN, other], "latency_ms_p50")
