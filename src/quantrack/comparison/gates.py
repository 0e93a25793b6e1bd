"""What a measured run must hold before its model is promoted, and which of several runs is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from quantrack.comparison.runs import (
    ACCURACY,
    AGREEMENT,
    EVALUATION,
    LATENCY,
    LATENCY_RATIO,
    SIZE,
    ComparisonKey,
    latency_measure,
)
from quantrack.errors import QuantrackError
from quantrack.evaluation.bootstrap import LEAST_PICTURES

DROP_HIGH, PARITY = "mAP50-95_drop_ci_high", "parity_mean_abs"
CONTRACT = (
    ACCURACY, "mAP50-95_drop", "mAP50-95_drop_ci_low", DROP_HIGH, LATENCY, SIZE, "weight_bits_avg", PARITY,
)  # fmt: skip
COMPARABLE = tuple(item.name for item in fields(ComparisonKey))
IDENTITY = (*COMPARABLE, "calibration_digest", "device_name", "mode", "recipe", "model_name")
MORE_IS_BETTER = {ACCURACY: True, LATENCY: False, SIZE: False}  # what the best run may be chosen by


@dataclass(frozen=True)
class Limits:
    """Where the gates stand; 0 and False switch a gate off.

    `max_drop` is in points, `max_latency_ratio` a factor, `max_mb` in 10^6 bytes, `min_map` and `min_agreement` are
    fractions.
    """

    max_drop: float = 0.0
    max_latency_ratio: float = 0.0
    max_mb: float = 0.0
    min_map: float = 0.0
    min_agreement: float = 0.0
    max_parity: float = 0.0
    same_evaluation: bool = True
    require_better: bool = False


@dataclass(frozen=True)
class MeasuredRun:
    """A run as its store has it: status, metrics, tags, its LoggedModels, and the float32 run it is held against."""

    run_id: str
    name: str
    status: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    model_ids: tuple[str, ...] = ()
    baseline: MeasuredRun | None = None

    @property
    def label(self) -> str:
        """One short text for people."""
        return f"{self.name} ({self.run_id[:8]})"


@dataclass(frozen=True)
class Champion:
    """The version that holds the alias `champion`, with its tags (measured figures among them)."""

    version: str
    tags: Mapping[str, str]


OPTIONAL_GATES = (
    "max_drop", "max_latency_ratio", "max_mb", "min_mAP", "min_agreement", "max_parity", "same_evaluation",
    "require_better",
)  # fmt: skip


@dataclass(frozen=True)
class GateResult:
    """One gate: what was held against which limit; `text` says it in a line."""

    gate: str
    value: float | str | None
    limit: float | str
    passed: bool
    text: str


@dataclass(frozen=True)
class Verdict:
    """All gates of one run, in order."""

    run: MeasuredRun
    gates: tuple[GateResult, ...]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def reasons(self) -> str:
        """Each gate that failed, with its value and limit."""
        return "; ".join(f"{gate.gate}: {gate.text}" for gate in self.gates if not gate.passed)


def judge(run: MeasuredRun, champion: Champion | None, limits: Limits) -> Verdict:
    """Hold a run against every gate that is on; another checkpoint than the champion's may replace it."""
    gates = [_finished(run), _one_model(run), _contract(run), _identity(run)]
    if limits.max_drop:
        gates.append(_at_most("max_drop", DROP_HIGH, run.metrics.get(DROP_HIGH), limits.max_drop))
    if limits.max_latency_ratio:
        gates.append(_latency_ratio(run, limits.max_latency_ratio))
    if limits.max_mb:
        gates.append(_at_most("max_mb", SIZE, run.metrics.get(SIZE), limits.max_mb))
    if limits.min_map:
        gates.append(_at_least("min_mAP", ACCURACY, run.metrics.get(ACCURACY), limits.min_map))
    if limits.min_agreement:
        gates.append(_at_least("min_agreement", AGREEMENT, run.metrics.get(AGREEMENT), limits.min_agreement))
    if limits.max_parity:
        gates.append(_at_most("max_parity", PARITY, run.metrics.get(PARITY), limits.max_parity))
    if champion is not None and limits.same_evaluation:
        gates += [_same_as_champion(run, champion, tag) for tag in EVALUATION]
    if champion is not None and limits.require_better:
        gates.append(_not_worse(run, champion))
    return Verdict(run, tuple(gates))


def _finished(run: MeasuredRun) -> GateResult:
    text = f"the run's status is {run.status}, must be FINISHED"
    return GateResult("finished", run.status, "FINISHED", run.status == "FINISHED", text)


def _one_model(run: MeasuredRun) -> GateResult:
    count = len(run.model_ids)
    return GateResult("logged_model", float(count), 1.0, count == 1, f"the run has {count} LoggedModels, must be 1")


def _contract(run: MeasuredRun) -> GateResult:
    lacking = [name for name in CONTRACT if not math.isfinite(run.metrics.get(name, math.nan))]
    text = f"{', '.join(lacking) or 'nothing'} missing or not finite, all of {', '.join(CONTRACT)} must be there"
    text += f" (an interval wants at least {LEAST_PICTURES} pictures)" if DROP_HIGH in lacking else ""
    return GateResult("metrics", ", ".join(lacking), "none missing", not lacking, text)


def _identity(run: MeasuredRun) -> GateResult:
    lacking = [name for name in IDENTITY if name not in run.tags]
    text = f"{', '.join(lacking) or 'nothing'} missing, as ptq and qat tag their runs; give one of theirs"
    return GateResult("tags", ", ".join(lacking), "none missing", not lacking, text)


def _at_most(gate: str, what: str, value: float | None, limit: float) -> GateResult:
    if value is None or not math.isfinite(value):
        return _absent(gate, what, limit)
    return GateResult(gate, value, limit, value <= limit, f"{what} is {value:.6g}, limit {limit:.6g}")


def _at_least(gate: str, what: str, value: float | None, limit: float) -> GateResult:
    if value is None or not math.isfinite(value):
        return _absent(gate, what, limit)
    return GateResult(gate, value, limit, value >= limit, f"{what} is {value:.6g}, limit {limit:.6g}")


def _absent(gate: str, what: str, limit: float) -> GateResult:
    return GateResult(gate, None, limit, False, f"{what} is missing or not finite, limit {limit:.6g}")


def _latency_ratio(run: MeasuredRun, limit: float) -> GateResult:
    """By the ratio that was timed in turns; two runs' medians, of a fast and a slow hour maybe, where there is none."""
    gate, what, baseline = "max_latency_ratio", f"{LATENCY} over the float32 run's", run.baseline
    if LATENCY_RATIO in run.metrics:
        return _at_most(gate, f"{LATENCY_RATIO} to float32, timed in turns,", run.metrics[LATENCY_RATIO], limit)
    if baseline is None:
        return _absent(gate, f"{what} (no run behind the tag baseline_run_id)", limit)
    for tag in ("device_name", "provider"):
        ours, theirs = run.tags.get(tag), baseline.tags.get(tag)
        if ours is None or ours != theirs:
            text = f"{tag} is {ours}, but {theirs} of the float32 run {baseline.run_id}; limit {limit:.6g}"
            return GateResult(gate, None, limit, False, text)
    mine, reference = run.metrics.get(LATENCY), baseline.metrics.get(LATENCY)
    return _at_most(gate, what, mine / reference if mine is not None and reference else None, limit)


def _same_as_champion(run: MeasuredRun, champion: Champion, tag: str) -> GateResult:
    ours, theirs = run.tags.get(tag), champion.tags.get(tag)
    holds = ours is not None and ours == theirs
    text = f"{tag} is {_short(ours)}, but {_short(theirs)} of the champion, version {champion.version}"
    return GateResult("same_evaluation", ours, theirs or "missing", holds, text)


def _short(value: str | None) -> str:
    return "missing" if value is None else value[:12]


def _not_worse(run: MeasuredRun, champion: Champion) -> GateResult:
    recorded = champion.tags.get(ACCURACY)
    if recorded is None:
        text = f"the champion, version {champion.version}, does not say its {ACCURACY}"
        return GateResult("require_better", run.metrics.get(ACCURACY), "missing", False, text)
    what = f"{ACCURACY} against the champion's (version {champion.version})"
    return _at_least("require_better", what, run.metrics.get(ACCURACY), float(recorded))


def require_comparable(runs: Sequence[MeasuredRun], best_by: str) -> None:
    """Refuse to choose among runs that were not measured alike; for latency the processor counts as well.

    Raises:
        QuantrackError: two runs differ in one of the tags, or lack it.
    """
    tags = (*COMPARABLE, "device_name") if best_by == LATENCY else COMPARABLE
    for tag in tags:
        values = {run.tags.get(tag) for run in runs}
        if len(runs) > 1 and (len(values) > 1 or None in values):
            told = ", ".join(f"{run.label} {_short(run.tags.get(tag))}" for run in runs)
            raise QuantrackError(f"from: these runs are not comparable, {tag} differs: {told}; give one as run_id")


def choose_best(verdicts: Sequence[Verdict], best_by: str) -> MeasuredRun:
    """The best run by a metric among those that pass; ties go to accuracy, then latency, size and run id.

    Latencies are ranked by what was timed in turns with float32, where all runs were (`latency_measure`).

    Raises:
        QuantrackError: none passes; the line names each failed gate of each run.
    """
    passed = [verdict.run for verdict in verdicts if verdict.passed]
    if not passed:
        if len(verdicts) == 1:
            raise QuantrackError(f"refused: {verdicts[0].reasons}")
        told = " | ".join(f"{verdict.run.label}: {verdict.reasons}" for verdict in verdicts)
        raise QuantrackError(f"refused: none of {len(verdicts)} runs passes: {told}")

    latency = latency_measure([run.metrics for run in passed])

    def rank(run: MeasuredRun) -> tuple[float | str, ...]:
        order = (best_by, *MORE_IS_BETTER)
        values = {name: run.metrics[latency if name == LATENCY else name] for name in order}
        return (*(-values[name] if MORE_IS_BETTER[name] else values[name] for name in order), run.run_id)

    return min(passed, key=rank)


def off_gates(verdict: Verdict) -> tuple[str, ...]:
    """The gates that a run was not held against: switched off, or about a champion that is not there."""
    held = {gate.gate for gate in verdict.gates}
    return tuple(name for name in OPTIONAL_GATES if name not in held)
