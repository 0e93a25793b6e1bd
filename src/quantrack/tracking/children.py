"""Nested runs of other entry points: found finished, or made; one that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Callable

from quantrack.errors import QuantrackError
from quantrack.progress import say
from quantrack.settings import SharedSettings, setting_texts
from quantrack.tracking.run import tracked_run
from quantrack.tracking.run_digest import find_finished


def find_or_run(name: str, entry: str, settings: SharedSettings, digest: str, pipeline: Callable[[], None]) -> str:
    """The id of the finished run with this digest, or of a new nested run of that entry point."""
    found = find_finished(digest)
    if found is not None:
        say(f"{name}: reusing run {found.info.run_id}")
        return str(found.info.run_id)
    say(f"{name}: measuring")
    with tracked_run(entry, setting_texts(settings), nested=True) as run:
        pipeline()
    return str(run.info.run_id)


class Children:
    """The runs of a parent's children, in the order in which they were asked for, and what failed."""

    def __init__(self) -> None:
        self._run_ids: list[str] = []
        self._failures: dict[str, str] = {}

    def find_or_run(
        self, name: str, entry: str, settings: SharedSettings, digest: str, pipeline: Callable[[], None]
    ) -> None:
        """Take the finished run with this digest, or run the pipeline; what fails is kept for later."""
        try:
            self._run_ids.append(find_or_run(name, entry, settings, digest, pipeline))
        except Exception as error:  # out of memory, a broken library: none of it is the other children's
            reason = str(error) if isinstance(error, QuantrackError) else f"{type(error).__name__}: {error}"
            say(f"{name}: failed: {reason}")
            self._failures[name] = reason

    @property
    def run_ids(self) -> tuple[str, ...]:
        """The finished runs.

        Raises:
            QuantrackError: all have failed.
        """
        if not self._run_ids:
            self.require_all_finished()
        return tuple(self._run_ids)

    def require_all_finished(self) -> None:
        """Fail, naming the children that did.

        Raises:
            QuantrackError: at least one child failed.
        """
        if self._failures:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self._failures.items())
            others = "the others are compared" if self._run_ids else "there is nothing to compare"
            raise QuantrackError(f"{len(self._failures)} of the modes failed, {others}: {listed}")
