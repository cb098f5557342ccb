"""The shipped guards over upstream's real past: they tell when each thing came, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from loudmerge.canary.guards import SDIST, Guard, load_guards
from loudmerge.canary.replay import Replay, replay_clone, replay_releases
from loudmerge.canary.upstream.fetch import Unreachable
from loudmerge.canary.upstream.packages import package_source
from loudmerge.canary.upstream.sources import SourceOptions

GUARDS = Path(__file__).parents[2] / "canary" / "guards"
REPAIR = "unslothai/unsloth-zoo#647"
LANDED = "2026.5.2"
ZOO = ("2026.5.1", LANDED, "2026.5.3", "2026.6.2", "2026.7.1", "2026.9.6", "2026.10.9")
"""unsloth_zoo's releases around the repair of its merge (the second has it) and up to the newest known."""


def not_reached(error: Unreachable) -> NoReturn:
    """Skips the test where the index cannot be asked; under CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(str(error))
    pytest.skip(str(error))


def guards(**wanted: str) -> list[Guard]:
    return [
        guard
        for guard in load_guards(GUARDS)
        if all(getattr(guard, name) == value for name, value in wanted.items())
    ]


def turns(found: Replay) -> set[tuple[str, str, str, str]]:
    """(guard, release, verdict before, verdict after)."""
    return {(one.guard, one.step.name, one.before, one.after) for one in found.turns}


def test_peft_turned_transposed_modules_in_0_19_0_and_all_in_0_19_1() -> None:
    names = {"peft-orientation-untransposed", "peft-orientation-transposed"}
    read = [guard for guard in guards(package="peft") if guard.id in names]
    try:
        found = replay_releases("peft", read, SourceOptions.from_environment(), first="0.17.1", last="0.21.2")
    except Unreachable as error:
        not_reached(error)
    assert [step.name for step in found.steps][:5] == ["0.17.1", "0.18.0", "0.18.1", "0.19.0", "0.19.1"]
    assert turns(found) == {
        ("peft-orientation-transposed", "0.19.0", "present", "pending"),
        ("peft-orientation-transposed", "0.19.1", "pending", "present"),
        ("peft-orientation-untransposed", "0.19.1", "pending", "present"),
    }
    (turned,) = [one for one in found.turns if one.step.name == "0.19.0"]
    assert "gave 'standard', expected 'swapped'" in turned.detail


def released(place: Path) -> Path:
    """A repository of unsloth_zoo's real files, one commit for each release, named as upstream's are."""
    place.mkdir()
    git(place, "init", "-q", "-b", "main")
    for version in ZOO:
        tree = package_source("unsloth-zoo", "unsloth_zoo", version, SDIST, SourceOptions.from_environment())
        for folder in ("unsloth_zoo", "tests"):
            shutil.rmtree(place / folder, ignore_errors=True)
            if (tree.tree / folder).is_dir():
                shutil.copytree(tree.tree / folder, place / folder)
        git(place, "add", "-A")
        change = " (#647)" if version == LANDED else ""
        git(place, "commit", "-q", "-m", f"{version}{change}")
    return place


def git(place: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, "-C", str(place), *arguments], check=True, capture_output=True)


def test_unsloth_zoo_is_pending_before_its_repair_and_present_from_there_on(tmp_path: Path) -> None:
    read = guards(since=REPAIR, package="unsloth_zoo")
    assert len(read) > 20
    try:
        clone = released(tmp_path / "clone")
    except Unreachable as error:
        not_reached(error)
    found = replay_clone(clone, read, upstream="unslothai/unsloth-zoo")
    assert {verdict.verdict for verdict in found.verdicts} == {"pending"}
    assert {(one.guard, one.step.subject, one.before, one.after) for one in found.turns} == {
        (guard.id, f"{LANDED} (#647)", "pending", "present") for guard in read
    }
