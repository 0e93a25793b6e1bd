"""Folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from quantrack.files import atomic_folder


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "kept"
    for text in ("first", "second"):
        with atomic_folder(place) as temporary:
            (temporary / text).write_text(text)
            assert not (place / text).exists()
        assert [path.name for path in place.iterdir()] == [text]
    assert list(tmp_path.iterdir()) == [place]


def write_and_fail(place: Path) -> None:
    with atomic_folder(place) as temporary:
        (temporary / "second").touch()
        raise RuntimeError


def test_a_failure_leaves_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "kept"
    with atomic_folder(place) as temporary:
        (temporary / "first").touch()
    with pytest.raises(RuntimeError):
        write_and_fail(place)
    assert [path.name for path in place.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [place]


def test_of_two_at_once_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, replace = tmp_path / "kept", os.replace

    def just_after_another(source: Path, target: Path) -> None:
        place.mkdir()
        (place / "others").touch()
        replace(source, target)

    monkeypatch.setattr(os, "replace", just_after_another)
    with atomic_folder(place) as temporary:
        (temporary / "own").touch()
    assert [path.name for path in place.iterdir()] == ["others"]
    assert list(tmp_path.iterdir()) == [place]
