"""The guards that this repository keeps, on the libraries that are installed."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

from loudmerge.canary.guards import Guard, is_range, is_version, load_guards, specifiers
from loudmerge.canary.rules.rules import check

GUARDS = load_guards(Path(__file__).parents[3] / "canary" / "guards")
INSTALLED = ("peft", "safetensors", "transformers", "trl")


def test_there_are_enough_guards_and_each_says_why_and_since_when() -> None:
    assert len(GUARDS) >= 60
    assert all(len(guard.why) > 20 and guard.since for guard in GUARDS)


def watched(guard: Guard, installed: str) -> bool:
    """Whether a guard is about this release: its change has landed in it, and a ref may mean it."""
    if guard.since_version and Version(installed) < Version(guard.since_version):
        return False
    return any(_means(ref, installed) for ref in guard.refs)


def _means(ref: str, installed: str) -> bool:
    """Whether a ref means this release; `latest` and branches may mean any."""
    if is_version(ref):
        return Version(ref) == Version(installed)
    return specifiers(ref).contains(installed) if is_range(ref) else True


def text_of(guard: Guard) -> tuple[str, str] | None:
    """A guard's file in the installed package; None where it is not about that version."""
    package = str(guard.package)
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    if not watched(guard, version(package)):
        return None
    folder = Path(spec.origin).parents[1]
    path = next(path for path in guard.paths if (folder / path).is_file())
    return (folder / path).read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "guard", [guard for guard in GUARDS if guard.package in INSTALLED], ids=lambda guard: guard.id
)
def test_a_guard_holds_on_the_installed_library(guard: Guard) -> None:
    found = text_of(guard)
    if found is None:
        pytest.skip(f"it is not about {guard.package} {version(str(guard.package))}")
    finding = check(guard.rule, *found)
    assert finding.holds, finding.detail
