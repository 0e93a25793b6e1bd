"""Try session settings on a file, in turns, and find the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantrack.onnx.inspect import has_quantizers
from quantrack.progress import say
from quantrack.runtime.latency import Latency, Ratio, measure_in_turns
from quantrack.runtime.session import (
    CUDA,
    TENSORRT,
    Session,
    SessionSettings,
    open_session,
    resolve_provider,
    settings_for,
    usable_cores,
    wants_exact_sums,
)


@dataclass(frozen=True)
class Trial:
    """One combination of settings: its latency, and its ratio to the file that it was timed beside."""

    settings: SessionSettings
    latency: Latency
    ratio: Ratio | None


def candidates(path: Path, provider: str) -> tuple[SessionSettings, ...]:
    """The combinations that can make a difference to this file on this provider.

    A captured CUDA graph needs every node on the GPU; where that fails, the combination is left out.
    """
    resolved = resolve_provider(provider)
    usual = settings_for(path, resolved)
    copying = replace(usual, io_binding=False)  # what copying to the GPU and back costs; no setting to choose
    if resolved == TENSORRT:
        return (usual, replace(usual, fp16=True), copying)
    # what is right comes before what is fast, also where not most but some convolutions compute on integers
    plain = SessionSettings(exact_sums=wants_exact_sums(path))
    found: tuple[SessionSettings, ...] = (plain,)
    if has_quantizers(path):
        found += (SessionSettings(fold_weights=True),)
    if resolved == CUDA:
        without = tuple(replace(one, tf32=False) for one in found)
        return (*found, *without, *(replace(one, cuda_graph=True) for one in found), copying)
    found += tuple(replace(one, optimization="extended") for one in found)
    if usable_cores() > 1:
        found += tuple(replace(one, threads=1) for one in found if one.optimization == "all")
    return found


def tune(path: Path, provider: str, runs: int, beside: Session | None) -> tuple[Trial, ...]:
    """All combinations, the fastest first, and last the one that copies; `beside` is timed in turns with them."""
    sessions = [session for settings in candidates(path, provider) if (session := _open(path, provider, settings))]
    latencies, ratios = measure_in_turns([beside, *sessions] if beside else sessions, runs)
    own = slice(1 if beside else 0, None)
    trials = _trials(sessions, latencies[own], ratios[own] if beside else [None] * len(sessions))
    return tuple(sorted(trials, key=lambda trial: (not trial.settings.io_binding, trial.latency.p50)))


def _trials(
    sessions: Sequence[Session], latencies: Sequence[Latency], ratios: Sequence[Ratio | None]
) -> tuple[Trial, ...]:
    return tuple(
        Trial(session.settings, latency, ratio)
        for session, latency, ratio in zip(sessions, latencies, ratios, strict=True)
    )


def _open(path: Path, provider: str, settings: SessionSettings) -> Session | None:
    """A session that has run once; None where the settings do not fit the file, which is said."""
    try:
        session = open_session(path, provider, settings)
        measure_in_turns([session], 1)
    except Exception as error:  # ONNX Runtime's exception classes share no public base
        say(f"{settings.text}: not possible here ({' '.join(str(error).split())[:120]})")
        return None
    return session
