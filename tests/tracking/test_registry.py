"""Versions and aliases: what is left after every move, after a kill at every write, and with two processes at once."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlflow
import pytest

from quantrack.errors import QuantrackError
from quantrack.tracking.registry import MOVE_TAG, Move, Registry, open_registry

TAGS = {"evaluation_digest": "e1", "mAP50-95": "0.5"}
WRITES = (
    "create_registered_model", "update_registered_model", "_create_model_version", "update_model_version",
    "set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias",
    "set_registered_model_tag", "delete_registered_model_tag",
)  # fmt: skip
names = itertools.count()


@pytest.fixture(scope="module")
def registry_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for this file, as making its tables takes seconds; each test has a name of its own."""
    folder = tmp_path_factory.mktemp("registry")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("registry", artifact_location=(folder / "artifacts").as_uri())
    return folder


@pytest.fixture
def name(registry_store: Path) -> Iterator[str]:
    mlflow.set_tracking_uri(f"sqlite:///{registry_store}/mlflow.db")
    yield f"model {next(names)}"
    while mlflow.active_run():
        mlflow.end_run()


def measured_run() -> tuple[str, str]:
    """A finished run with a LoggedModel: (model id, run id)."""
    experiment = mlflow.get_experiment_by_name("registry")
    assert experiment is not None
    with mlflow.start_run(experiment_id=experiment.experiment_id) as run:
        model = mlflow.create_external_model(name="tiny", source_run_id=run.info.run_id)
    return model.model_id, run.info.run_id


def promote(name: str, run: tuple[str, str]) -> str:
    with open_registry(name) as registry:
        version = registry.register(*run, TAGS, "card", "family")
        registry.promote(version)
    return version


def roll_back(name: str) -> None:
    with open_registry(name) as registry:
        registry.roll_back()


def aliases(name: str) -> dict[str, str]:
    return Registry(name).aliases()


def versions(name: str) -> list[str]:
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return sorted((str(version.version) for version in found), key=int)


def test_first_promotion_makes_the_champion(name: str) -> None:
    run = measured_run()
    assert promote(name, run) == "1"
    assert aliases(name) == {"champion": "1"}
    version = mlflow.MlflowClient().get_model_version_by_alias(name, "champion")
    assert (version.run_id, version.source, version.description) == (run[1], f"models:/{run[0]}", "card")
    assert version.tags == TAGS
    assert mlflow.MlflowClient().get_registered_model(name).description == "family"


def test_second_promotion_moves_the_aliases(name: str) -> None:
    first, second = measured_run(), measured_run()
    promote(name, first)
    promote(name, second)
    assert aliases(name) == {"champion": "2", "previous": "1"}
    promote(name, first)  # an older one again: no new version
    assert aliases(name) == {"champion": "1", "previous": "2"}
    assert versions(name) == ["1", "2"]


def test_promoting_twice_changes_nothing(name: str) -> None:
    first, second = measured_run(), measured_run()
    promote(name, first)
    promote(name, second)
    promote(name, second)
    assert aliases(name) == {"champion": "2", "previous": "1"}
    assert versions(name) == ["1", "2"]


def test_words_written_by_hand_stay(name: str) -> None:
    run = measured_run()
    promote(name, run)
    mlflow.MlflowClient().update_model_version(name, "1", "by hand")
    mlflow.MlflowClient().set_model_version_tag(name, "1", "mAP50-95", "0.6")
    promote(name, run)
    version = mlflow.MlflowClient().get_model_version(name, "1")
    assert (version.description, version.tags["mAP50-95"]) == ("by hand", "0.6")


def test_a_version_registered_by_hand_is_taken_and_described(name: str) -> None:
    run = measured_run()
    mlflow.register_model(f"models:/{run[0]}", name)
    assert promote(name, run) == "1"
    version = mlflow.MlflowClient().get_model_version(name, "1")
    assert (version.description, version.tags) == ("card", TAGS)


def test_challenger_waits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = measured_run(), measured_run(), measured_run()
    promote(name, first)
    with open_registry(name) as registry:
        registry.challenge(registry.register(*second, TAGS, "card", "family"))
    assert aliases(name) == {"champion": "1", "challenger": "2"}
    with open_registry(name) as registry:
        registry.challenge("1")  # the champion does not challenge itself
        registry.challenge(registry.register(*third, TAGS, "card", "family"))
    assert aliases(name) == {"champion": "1", "challenger": "3"}
    promote(name, third)
    assert aliases(name) == {"champion": "3", "previous": "1"}


def test_champion_is_read_with_its_runs_facts(name: str) -> None:
    with open_registry(name) as registry:
        assert registry.champion() is None
    run = measured_run()
    mlflow.MlflowClient().set_tag(run[1], "head", "one2one")
    mlflow.MlflowClient().log_metric(run[1], "mAP50-95", 0.25)
    mlflow.register_model(f"models:/{run[0]}", name)
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", "1")
    champion = Registry(name).champion()
    assert champion is not None
    assert (champion.version, champion.tags["head"], champion.tags["mAP50-95"]) == ("1", "one2one", "0.25")


def test_rollback_swaps(name: str) -> None:
    with pytest.raises(QuantrackError, match="has no previous version"):
        roll_back(name)
    assert versions(name) == []
    promote(name, measured_run())
    with pytest.raises(QuantrackError, match="has no previous version"):
        roll_back(name)
    promote(name, measured_run())
    roll_back(name)
    assert aliases(name) == {"champion": "1", "previous": "2"}
    roll_back(name)
    assert aliases(name) == {"champion": "2", "previous": "1"}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_at(write: int, work: Callable[[], object]) -> bool:
    """Do the work, but die right before the given write to the registry; False where it has fewer."""
    seen = itertools.count()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            if next(seen) == write:
                raise Killed
            return real(*values, **named)

        return call

    client = mlflow.MlflowClient
    patches = [patch.object(client, method, counted(getattr(client, method))) for method in WRITES]
    for one in patches:
        one.start()
    try:
        work()
    except Killed:
        return True
    finally:
        for one in patches:
            one.stop()
    return False


def test_a_promotion_killed_at_any_write_is_completed_by_the_same_command(registry_store: Path, name: str) -> None:
    first, second, third = measured_run(), measured_run(), measured_run()
    for write in itertools.count():
        each = f"{name} {write}"
        promote(each, first)
        promote(each, second)
        killed = killed_at(write, lambda each=each: promote(each, third))
        found = aliases(each)
        assert found["champion"] in ("2", "3")  # valid at every moment
        assert "2" in (found["champion"], found["previous"])  # and the former one is not lost
        promote(each, third)
        assert aliases(each) == {"champion": "3", "previous": "2"}, write
        assert versions(each) == ["1", "2", "3"]
        model = mlflow.MlflowClient().get_registered_model(each)
        assert MOVE_TAG not in model.tags
        assert mlflow.MlflowClient().get_model_version(each, "3").description == "card"
        if not killed:
            break
    assert write > 6


def test_the_first_promotion_killed_at_any_write(registry_store: Path, name: str) -> None:
    run = measured_run()
    for write in itertools.count():
        each = f"{name} {write}"
        killed = killed_at(write, lambda each=each: promote(each, run))
        promote(each, run)
        assert aliases(each) == {"champion": "1"}
        assert versions(each) == ["1"]
        if not killed:
            break
    assert write > 6


def test_a_rollback_killed_at_any_write_is_completed_by_the_same_command(name: str) -> None:
    promote(name, measured_run())
    promote(name, measured_run())
    champion, previous = "2", "1"
    for write in itertools.count():
        killed = killed_at(write, lambda: roll_back(name))
        assert aliases(name)["champion"] in (champion, previous)
        if killed:
            roll_back(name)
        champion, previous = previous, champion
        assert aliases(name) == {"champion": champion, "previous": previous}, write
        if not killed:
            break
    assert write == 4


def test_a_killed_promotion_is_finished_before_a_rollback(name: str) -> None:
    promote(name, measured_run())
    promote(name, measured_run())
    move = Move("promotion", "1", "2")
    mlflow.MlflowClient().set_registered_model_tag(name, MOVE_TAG, json.dumps(vars(move)))
    roll_back(name)
    assert aliases(name) == {"champion": "2", "previous": "1"}


def test_an_interrupted_move_to_a_deleted_version_is_dropped(name: str) -> None:
    promote(name, measured_run())
    move = Move("promotion", "9", "1")
    mlflow.MlflowClient().set_registered_model_tag(name, MOVE_TAG, json.dumps(vars(move)))
    promote(name, measured_run())
    assert aliases(name) == {"champion": "2", "previous": "1"}


def test_an_interrupted_move_does_not_undo_what_was_decided_since(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        promote(name, measured_run())
    move = Move("promotion", "2", "1")
    mlflow.MlflowClient().set_registered_model_tag(name, MOVE_TAG, json.dumps(vars(move)))
    with open_registry(name):
        pass
    assert aliases(name) == {"champion": "3", "previous": "2"}
    assert MOVE_TAG not in mlflow.MlflowClient().get_registered_model(name).tags
    assert "an interrupted promotion to version 2 is dropped: champion is version 3 by now" in capsys.readouterr().err


def test_a_promotion_overtaken_on_a_shared_server_says_so(name: str) -> None:
    promote(name, measured_run())
    real = mlflow.MlflowClient.delete_registered_model_tag

    def overtaken(client: mlflow.MlflowClient, model: str, key: str) -> None:
        real(client, model, key)
        client.set_registered_model_alias(model, "champion", "1")

    with (
        patch.object(mlflow.MlflowClient, "delete_registered_model_tag", overtaken),
        pytest.raises(QuantrackError, match="another promotion came between; champion is version 1"),
    ):
        promote(name, measured_run())


def test_what_mlflow_refuses_is_one_line(name: str) -> None:
    with pytest.raises(QuantrackError, match=f"^name={name}: MLflow at sqlite") as refusal, open_registry(name) as one:
        one.client.get_model_version(name, "7")
    assert "\n" not in str(refusal.value)


# Slow between reading and writing: without the lock, both would register every run.
PROGRAM = """
import sys, time, mlflow
from quantrack.tracking.registry import Registry, open_registry
uri, name, *runs = sys.argv[1:]
look_up = Registry._version_of
def slow_look_up(self, run_id):
    found = look_up(self, run_id)
    time.sleep(0.2)
    return found
Registry._version_of = slow_look_up
mlflow.set_tracking_uri(uri)
Registry(name).aliases()  # connecting takes seconds: done before both start
print("ready", flush=True)
input()
for run in runs:
    model_id, run_id = run.split(",")
    with open_registry(name) as registry:
        registry.promote(registry.register(model_id, run_id, {}, "card", "family"))
"""


def other_process(program: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, f"sqlite:///{folder}/mlflow.db", *arguments],
        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_at_once_lose_nothing(registry_store: Path, name: str) -> None:
    runs = [measured_run() for _ in range(4)]
    texts = [",".join(run) for run in runs]
    processes = [other_process(PROGRAM, registry_store, name, *texts) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.wait(timeout=120) == 0
    found = aliases(name)
    assert versions(name) == ["1", "2", "3", "4"]
    assert set(found) == {"champion", "previous"}
    client = mlflow.MlflowClient()
    assert found["champion"] == "4"  # what either process promoted last
    assert client.get_model_version(name, "4").run_id == runs[-1][1]
    assert found["previous"] in ("1", "2", "3")
    assert MOVE_TAG not in client.get_registered_model(name).tags


def test_a_dead_process_leaves_no_lock(registry_store: Path, name: str) -> None:
    program = PROGRAM.replace("input()", "with open_registry(name):\n    print('holding', flush=True)\n    input()")
    process = other_process(program, registry_store, name)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "holding\n"]
    process.kill()
    process.wait()
    promote(name, measured_run())
    assert aliases(name) == {"champion": "1"}
