"""Versions and aliases of a registered model, moved so that `champion` is valid at every moment.

One promotion of a name at a time: a file lock in Quantrack's cache holds off every other process of
this machine and user, and ends with its process. MLflow's registry has no compare-and-swap, so
between machines that share a server nothing can hold the other off; there, aliases are read again
after they were written, and a promotion that another one overtook fails and says so.

A move is written down in a tag of the registered model first, then done, then crossed out. One that
was killed in between is finished by whatever promotes or rolls back the name next.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from quantrack.cache import writable_folder
from quantrack.comparison.gates import Champion
from quantrack.errors import QuantrackError
from quantrack.files import combined_digest
from quantrack.progress import say
from quantrack.tracking.read import ABSENT, one_line, without_credentials

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
MOVE_TAG = "quantrack.move"


@dataclass(frozen=True)
class Move:
    """Where `champion` and `previous` shall point; `previous` is None where there was no champion."""

    kind: str
    champion: str
    previous: str | None


class Registry:
    """The versions and aliases of one name; `finished` is an interrupted move that was found and done.

    Opened by `open_registry`, which holds off others.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = mlflow.MlflowClient()
        self.finished: Move | None = None

    def aliases(self) -> dict[str, str]:
        """Version by alias; empty where the name is not registered."""
        model = self._model()
        return {} if model is None else {alias: str(version) for alias, version in model.aliases.items()}

    def champion(self) -> Champion | None:
        """The version behind `champion`: its tags, over those and the metrics of the run that it came from."""
        number = self.aliases().get(CHAMPION)
        if number is None:
            return None
        version = self.client.get_model_version(self.name, number)
        return Champion(number, _run_facts(version.run_id) | version.tags)

    def register(self, model_id: str, run_id: str, tags: Mapping[str, str], description: str, family: str) -> str:
        """The version of a run: the one that is there, or a new one; what it lacks in tags and text is added.

        Raises:
            QuantrackError: MLflow did not make the version ready.
        """
        version = self._version_of(run_id)
        if version is None:
            version = mlflow.register_model(f"models:/{model_id}", self.name, tags=dict(tags))
        number = str(version.version)
        if version.status != "READY":
            raise QuantrackError(f"name={self.name}: version {number} is {version.status}; delete it and run again")
        for key in tags.keys() - version.tags.keys():
            self.client.set_model_version_tag(self.name, number, key, tags[key])
        if not version.description:
            self.client.update_model_version(self.name, number, description)
        model = self._model()
        if model is not None and not model.description:
            self.client.update_registered_model(self.name, family)
        return number

    def challenge(self, version: str) -> None:
        """Point `challenger` at a version; a champion does not challenge itself."""
        aliases = self.aliases()
        if version == aliases.get(CHAMPION):
            say(f"{self.name}: version {version} is the champion already; challenger stays as it is")
            return
        waiting = aliases.get(CHALLENGER)
        if waiting not in (None, version):
            say(f"{self.name}: version {waiting} is no longer challenger")
        self.client.set_registered_model_alias(self.name, CHALLENGER, version)

    def promote(self, version: str) -> Move:
        """Point `challenger`, then `champion` at a version; the former champion becomes `previous`.

        `challenger` is gone afterwards. The champion itself stays what it is.

        Raises:
            QuantrackError: another promotion moved the aliases at the same time.
        """
        aliases = self.aliases()
        if version == aliases.get(CHAMPION):
            self._dismiss_challenger()
            return Move("unchanged", version, aliases.get(PREVIOUS))
        self.challenge(version)
        return self._carry_out(Move("promotion", version, aliases.get(CHAMPION)))

    def roll_back(self) -> Move:
        """Swap `champion` and `previous`; an interrupted rollback that was just finished is not done twice.

        Raises:
            QuantrackError: there is no previous version, or another promotion came between.
        """
        if self.finished is not None and self.finished.kind == "rollback":
            return self.finished
        aliases = self.aliases()
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if champion is None or previous is None or champion == previous:
            raise QuantrackError(f"name={self.name}: has no previous version to return to; promote a run instead")
        return self._carry_out(Move("rollback", previous, champion))

    def _carry_out(self, move: Move) -> Move:
        self.client.set_registered_model_tag(self.name, MOVE_TAG, json.dumps(asdict(move)))
        # The former champion gets its new alias before it loses the old one; champion itself moves in one write.
        if move.previous is not None:
            self.client.set_registered_model_alias(self.name, PREVIOUS, move.previous)
        self.client.set_registered_model_alias(self.name, CHAMPION, move.champion)
        self._dismiss_challenger()
        self.client.delete_registered_model_tag(self.name, MOVE_TAG)
        self._require(move)
        return move

    def _require(self, move: Move) -> None:
        aliases = self.aliases()
        if aliases.get(CHAMPION) != move.champion or move.previous not in (None, aliases.get(PREVIOUS)):
            raise QuantrackError(
                f"name={self.name}: another promotion came between; champion is version {aliases.get(CHAMPION)}, "
                f"previous {aliases.get(PREVIOUS)}, not {move.champion} and {move.previous}; run it again"
            )

    def _dismiss_challenger(self) -> None:
        aliases = self.aliases()
        if CHALLENGER in aliases and aliases[CHALLENGER] == aliases.get(CHAMPION):
            self.client.delete_registered_model_alias(self.name, CHALLENGER)

    def finish_interrupted(self) -> None:
        """Do what a killed promotion or rollback had written down but not crossed out.

        It is dropped where the registry is no longer as the kill left it: somebody has decided otherwise since.
        """
        model = self._model()
        if model is None or MOVE_TAG not in model.tags:
            return
        move = Move(**json.loads(model.tags[MOVE_TAG]))
        if obstacle := self._obstacle(move):
            say(f"{self.name}: an interrupted {move.kind} to version {move.champion} is dropped: {obstacle}")
            self.client.delete_registered_model_tag(self.name, MOVE_TAG)
            return
        say(f"{self.name}: finishing an interrupted {move.kind}: champion becomes version {move.champion}")
        self.finished = self._carry_out(move)

    def _obstacle(self, move: Move) -> str:
        """What happened since that an interrupted move must not undo; empty if nothing did."""
        if not all(self._exists(version) for version in (move.champion, move.previous) if version is not None):
            return "it names a version that is deleted"
        champion = self.aliases().get(CHAMPION)
        if champion not in (move.previous, move.champion):
            return f"champion is version {champion} by now" if champion else "there is no champion any more"
        return ""

    def _model(self) -> RegisteredModel | None:
        try:
            return self.client.get_registered_model(self.name)
        except mlflow.MlflowException as error:
            if error.error_code == ABSENT:
                return None
            raise

    def _exists(self, version: str) -> bool:
        try:
            self.client.get_model_version(self.name, version)
        except mlflow.MlflowException as error:
            if error.error_code == ABSENT:
                return False
            raise
        return True

    def _version_of(self, run_id: str) -> ModelVersion | None:
        """The first version that was registered from a run."""
        found = self.client.search_model_versions(f"name = '{self.name}' and run_id = '{run_id}'")
        return min(found, key=lambda version: int(version.version)) if found else None


def _run_facts(run_id: str | None) -> dict[str, str]:
    """A run's metrics and tags as texts; empty where the run was deleted for good, or there is none."""
    if not run_id:
        return {}
    try:
        data = mlflow.get_run(run_id).data
    except mlflow.MlflowException as error:
        if error.error_code == ABSENT:
            return {}
        raise
    return {name: repr(value) for name, value in data.metrics.items()} | data.tags


@contextmanager
def open_registry(name: str) -> Iterator[Registry]:
    """The registry of one name, for this process alone until the block ends; waits for another one's.

    Raises:
        QuantrackError: MLflow refuses something or cannot be reached.
    """
    path = writable_folder("locks") / f"promote-{combined_digest([_store(), name])[:32]}.lock"
    # The file stays: were it deleted, a waiting process would hold the lock of a file that no other one opens.
    with path.open("a") as stream:
        _lock(stream, name)
        try:
            registry = Registry(name)
            registry.finish_interrupted()
            yield registry
        except mlflow.MlflowException as error:
            address = without_credentials(str(mlflow.get_registry_uri()))
            raise QuantrackError(f"name={name}: MLflow at {address}: {one_line(error)}") from error


def _lock(stream: TextIO, name: str) -> None:
    """Take the lock, which the system gives back when this process ends, however it ends."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"{name}: waiting for another promotion of it")
        fcntl.flock(stream, fcntl.LOCK_EX)


def _store() -> str:
    """The registry's address, the same one from every working directory."""
    uri = str(mlflow.get_registry_uri())
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite":
        return f"sqlite:///{Path(path).resolve()}"
    return uri if separator or "://" in uri else str(Path(uri).resolve())
