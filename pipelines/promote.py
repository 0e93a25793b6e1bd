"""Hold a measured run against gates; register it and move the alias champion if all hold, or roll back."""

from __future__ import annotations

import quantrack.program  # noqa: F401
from quantrack.comparison.gates import choose_best, judge, off_gates, require_comparable
from quantrack.comparison.model_card import family_description, model_card
from quantrack.entry import run_entry_point
from quantrack.progress import say
from quantrack.settings import PromoteSettings
from quantrack.tracking.promotion import (
    log_move,
    log_promotion,
    log_verdicts,
    read_candidates,
    read_measurement,
    version_tags,
)
from quantrack.tracking.registry import Registry, open_registry
from quantrack.tracking.run import name_run


def promote(settings: PromoteSettings) -> None:
    """Register a ptq or qat run's model and make it champion if every gate holds, or return to the previous one."""
    name_run(f"{'rollback' if settings.rollback else 'promote'}-{settings.name}")
    with open_registry(settings.name) as registry:
        if settings.rollback:
            roll_back(registry)
        else:
            promote_best(settings, registry)


def promote_best(settings: PromoteSettings, registry: Registry) -> None:
    """Judge the runs, take the best that passes, register it, move the aliases; nothing is made before that."""
    candidates = read_candidates(settings.run_id, settings.from_run)
    require_comparable(candidates, settings.best_by)
    champion = registry.champion()
    verdicts = [judge(candidate, champion, settings.limits) for candidate in candidates]
    log_verdicts(verdicts, champion, off_gates(verdicts[0]))
    best = choose_best(verdicts, settings.best_by)
    if champion is not None and champion.tags.get("model_digest") != best.tags["model_digest"]:
        say(f"{settings.name}: not the checkpoint of the champion, version {champion.version}")

    card = model_card(settings.name, best, read_measurement(best))
    version = registry.register(best.model_ids[0], best.run_id, version_tags(best), card, family_description(best))
    log_promotion(settings.name, best, version, card)
    if settings.to == "challenger":
        registry.challenge(version)
        say(f"{settings.name}: version {version} of {best.label} is registered; champion stays as it is")
        return
    move = registry.promote(version)
    log_move(settings.name, move)
    say(f"{settings.name}: champion is version {move.champion} of {best.label}, previous {move.previous or 'none'}")


def roll_back(registry: Registry) -> None:
    """Make the previous version champion again; the champion becomes the previous one."""
    move = registry.roll_back()
    log_move(registry.name, move)
    say(f"{registry.name}: champion is version {move.champion} again, previous {move.previous}")


if __name__ == "__main__":
    run_entry_point("promote", PromoteSettings, promote)
