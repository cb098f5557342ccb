"""The search for the release that changed something, and what is asked of each."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from loudmerge.compat.bisect import Finding, Search, bases, between, main, search
from loudmerge.compat.environments.alone import alone
from loudmerge.compat.environments.commands import NotInstalled, Unreachable
from loudmerge.compat.environments.environment import STAMP, Environment, Installer, Stamp, requirements
from loudmerge.compat.inside import observe
from loudmerge.compat.judging.cells import FILE, PACKAGES, Matrix, load, name_of
from loudmerge.compat.judging.result import OK, CellResult, Figures
from loudmerge.compat.running.questions import Answer, Check, Checks, Expected, Node
from loudmerge.errors import EnvironmentFailed
from tests.unit.compat.made import EXPECT

ROOT = Path(__file__).parents[3]
RELEASES = ("0.17.1", "0.18.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0", "0.21.2")


@dataclass
class Bench:
    """A Trial: versions from `changed` on are other; those of `broken` cannot be tried."""

    changed: str
    broken: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.tried: list[str] = []

    def __call__(self, version: str) -> Finding:
        self.tried.append(version)
        if version in self.broken:
            return Finding(version, None, "pip said no")
        new = Version(version) >= Version(self.changed)
        return Finding(version, ("new",) if new else ("old",), f"it is {'new' if new else 'old'}")


def found(outcome: Search) -> tuple[str, str | None, list[str]]:
    first = outcome.first.version if outcome.first else None
    return outcome.last.version, first, [each.version for each in outcome.skipped]


def test_the_first_changed_release_is_named_with_the_one_before() -> None:
    bench = Bench("0.19.1")
    assert found(search(RELEASES, bench)) == ("0.19.0", "0.19.1", [])
    assert bench.tried[:2] == ["0.17.1", "0.21.2"]


@pytest.mark.parametrize(
    ("broken", "answer"),
    [
        (["0.19.0"], ("0.18.1", "0.19.1", ["0.19.0"])),
        (["0.18.1", "0.19.0"], ("0.18.0", "0.19.1", ["0.18.1", "0.19.0"])),
        (["0.19.1", "0.20.0"], ("0.19.0", "0.21.2", ["0.19.1", "0.20.0"])),
        (["0.18.0", "0.18.1", "0.20.0"], ("0.19.0", "0.19.1", [])),
        (list(RELEASES[1:-1]), ("0.17.1", "0.21.2", list(RELEASES[1:-1]))),
    ],
)
def test_releases_that_cannot_be_tried_widen_the_answer_only_where_the_change_is_among_them(
    broken: list[str], answer: tuple[str, str, list[str]]
) -> None:
    assert found(search(RELEASES, Bench("0.19.1", broken))) == answer


@given(st.data())
def test_the_answer_is_as_narrow_as_what_can_be_tried_allows(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 40))
    versions = [f"1.{number}" for number in range(count)]
    changed = data.draw(st.integers(1, count - 1))
    broken = data.draw(st.sets(st.integers(1, max(1, count - 2)).filter(lambda n: 0 < n < count - 1)))
    bench = Bench(versions[changed], [versions[number] for number in broken])
    able = [number for number in range(count) if number not in broken]
    last = max(number for number in able if number < changed)
    first = min(number for number in able if number >= changed)
    assert found(search(versions, bench)) == (versions[last], versions[first], versions[last + 1 : first])
    assert len(bench.tried) == len(set(bench.tried))
    if not broken:
        assert len(bench.tried) <= 2 + math.ceil(math.log2(count))


def test_ends_that_do_not_differ_are_no_search() -> None:
    bench = Bench("0.22.0")
    assert found(search(RELEASES, bench)) == ("0.17.1", None, [])
    assert bench.tried == ["0.17.1", "0.21.2"]


def test_a_third_outcome_counts_as_changed() -> None:
    outcomes = {"1.0": "a", "1.1": "a", "1.2": "c", "1.3": "b", "1.4": "b"}
    answer = search(tuple(outcomes), lambda version: Finding(version, (outcomes[version],), ""))
    assert found(answer) == ("1.1", "1.2", [])


@pytest.mark.parametrize("end", ["0.17.1", "0.21.2"])
def test_an_end_that_cannot_be_tried_is_an_error(end: str) -> None:
    with pytest.raises(EnvironmentFailed, match=f"{end} cannot be tried: pip said no"):
        search(RELEASES, Bench("0.19.1", [end]))


def test_between_is_in_order_of_release_whichever_end_is_good() -> None:
    shuffled = ["0.19.1", "0.9.0", "0.18.1", "0.10.0", "0.19.0", "0.20.0"]
    assert between(shuffled, "0.18.1", "0.19.1") == ("0.18.1", "0.19.0", "0.19.1")
    assert between(shuffled, "0.19.1", "0.9.0") == ("0.9.0", "0.10.0", "0.18.1", "0.19.0", "0.19.1")


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (("0.18.2", "0.19.1"), r"0\.18\.2: no such release .*The newest are 0\.21\.2, 0\.20\.0, 0\.19\.1"),
        (("0.18.1", "0.19.1rc1"), r"0\.19\.1rc1: no such release \(yanked and pre-releases are not tried\)"),
        (("0.18.1", "0.18.1"), r"found 0\.18\.1 for both ends, expected two versions"),
        (("0.18.1", "main"), r"Invalid version: 'main'"),
    ],
)
def test_ends_must_be_two_releases(ends: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        between(RELEASES, *ends)


MATRIX = (
    EXPECT
    + """
[lanes]
released = [
    { transformers = "4.57.6", peft = "0.17.1", trl = "0.25.1", path = "per-expert" },
    { transformers = "4.57.6", peft = "0.19.1", trl = "0.25.1", path = "per-expert" },
    { transformers = "5.5.0", peft = "0.18.1", trl = "0.25.1", path = "fused", orientation = "swapped" },
    { transformers = "5.5.0", peft = "0.19.1", trl = "0.25.1", path = "fused", orientation = "standard" },
    { transformers = "5.24.0", peft = "0.21.2", trl = "1.16.0", path = "fused", orientation = "standard" },
]
latest = [{ name = "latest", path = "fused", orientation = "standard" }]
"""
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with five cells, and this one's pins."""
    (tmp_path / FILE).write_text(MATRIX, "utf-8")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def matrix(root: Path) -> Matrix:
    return load(root / FILE)


def test_pins_with_which_the_matrix_has_both_ends_come_first_then_the_newest(matrix: Matrix) -> None:
    """0.17.1 does not import on transformers 5: its cells are on 4.57.6."""
    names = [cell.name for cell in bases(matrix, "peft", ("0.18.1", "0.19.1"))]
    assert names == [
        "tf5.5.0-peft0.18.1-trl0.25.1",
        "tf5.24.0-peft0.21.2-trl1.16.0",
        "tf4.57.6-peft0.19.1-trl0.25.1",
    ]
    assert bases(matrix, "peft", ("0.17.1", "0.19.1"))[0].name == "tf4.57.6-peft0.17.1-trl0.25.1"


def test_each_set_of_other_pins_is_tried_once(matrix: Matrix) -> None:
    names = [cell.name for cell in bases(matrix, "transformers", ("4.57.6", "5.5.0"))]
    assert names == [
        "tf4.57.6-peft0.19.1-trl0.25.1",
        "tf5.24.0-peft0.21.2-trl1.16.0",
        "tf5.5.0-peft0.18.1-trl0.25.1",
        "tf4.57.6-peft0.17.1-trl0.25.1",
    ]


@pytest.mark.parametrize(
    ("text", "value", "state"),
    [
        ("orientation", "swapped", "swapped"),
        ("orientation", None, "none"),
        ("orientation=swapped", "swapped", "met"),
        ("orientation=swapped", "standard", "not met"),
        ("orientation=none", None, "met"),
        ("samples=3/3", {"matched": 3, "total": 3}, "met"),
        ("samples=3/3", {"matched": 1, "total": 3}, "not met"),
        ("kl_trained_merged<=1e-3", 1e-3, "met"),
        ("kl_trained_merged <= 1e-3", 2e-3, "not met"),
        ("kl_trained_merged<=1e-3", float("nan"), "not met"),
        ("kl_trained_merged<=1e-3", "nan", "not met"),
        ("delta_kept>=0.99", 0.995, "met"),
        ("delta_kept>=0.99", 0.98, "not met"),
    ],
)
def test_a_check_is_met_or_not_or_what_was_found(text: str, value: object, state: str) -> None:
    assert Check.parse(text).state(value) == state


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("orientatoin=swapped", "expected NAME, NAME=VALUE, .* one of path, orientation"),
        ("orientation==swapped", "expected NAME"),
        ("", "expected NAME"),
        ("kl_trained_merged", "expected kl_trained_merged<=NUMBER .* no two runs are equal"),
        ("kl_trained_merged=0", "no two runs are equal"),
        ("kl_trained_merged<=low", "expected a number after its relation"),
        ("orientation<=1", "expected orientation or orientation=VALUE: it is no number"),
        ("orientation=swaped", r"found 'orientation=swaped', expected one of standard\|swapped\|none"),
        ("path=dense", "expected one of"),
        ("lora_b_layout=grouped", r"expected one of rank_major\|grouped_by_expert\|none"),
        ("merged=all", "expected one of"),
        ("samples=3", "expected one of"),
        ("kl_trained_merged<=nan", "expected a number after its relation"),
        ("kl_trained_merged>=inf", "expected a number after its relation"),
    ],
)
def test_a_check_that_is_not_understood_is_said_to_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Check.parse(text)


def observed(scratch: Path, **values: object) -> Path:
    (scratch / "found.json").write_text(json.dumps(values), "utf-8")
    return scratch


def test_only_checks_of_the_layout_need_no_training(tmp_path: Path) -> None:
    cheap = Checks((Check.parse("orientation=swapped"), Check.parse("path")))
    dear = Checks((Check.parse("orientation=swapped"), Check.parse("kl_float32_merge<=1e-8")))
    mixed = Checks((Check.parse("lora_b_layout=rank_major"), Check.parse("kl_base_trained>=0.5")))
    assert "layout" in cheap.command(tmp_path)
    assert "journey" in dear.command(tmp_path)
    assert "both" in mixed.command(tmp_path)
    assert dear.text == "orientation=swapped, kl_float32_merge<=1e-8"


def test_the_answer_to_checks_has_the_evidence(tmp_path: Path) -> None:
    asked = Checks((Check.parse("orientation=swapped"), Check.parse("path")))
    place = observed(tmp_path, orientation="standard", path="fused", evidence="lora_A [6, 16]")
    assert asked.read(place, 0) == Answer(
        ("not met", "fused"), "orientation standard, path fused (lora_A [6, 16])"
    )
    assert asked.read(place, 1) is None, "it crashed: what it left says nothing"


FIGURES = Figures(2e-4, 1.0, 1.0, 1e-9, 2e-3, 2e-4, 0.99, (3, 3), 0.995)


def test_a_cells_expectation_is_asked_of_its_figures_not_of_tests_that_did_not_run(
    tmp_path: Path, matrix: Matrix
) -> None:
    cell = next(cell for cell in matrix.cells if cell.expects.orientation == "swapped")
    asked = Expected(cell.name, cell.expects)
    good = CellResult("", "", OK, {}, path="fused", orientation="swapped", merged=(192, 192), figures=FIGURES)
    assert asked.read(observed(tmp_path, **good.to_json()), 0) == Answer((), "all as expected")
    bad = CellResult("", "", OK, {}, path="fused", orientation="standard", merged=(191, 192), figures=FIGURES)
    answer = asked.read(observed(tmp_path, **bad.to_json()), 0)
    assert answer is not None
    assert answer.state == ("merged", "orientation")
    assert "orientation: found standard, expected swapped" in answer.shown


TESTS = """
import os, pytest

def test_of_the_version():
    mark = os.environ["MARK"]
    assert mark != "0.19.1", "it is the new one"

@pytest.mark.skipif(os.environ["MARK"] == "skip", reason="not here")
def test_skipped():
    pass

if os.environ["MARK"] == "crash":
    raise ImportError("no HybridCache")
"""


@pytest.mark.parametrize(
    ("mark", "node", "answer"),
    [
        ("0.19.0", "test_of_the_version", Answer(("passed",), "1 passed")),
        ("skip", "test_skipped", Answer(("skipped",), "1 skipped: test_skipped: not here")),
        ("0.19.0", "test_missing", None),
        ("crash", "test_of_the_version", None),
        ("crash", "", None),
    ],
)
def test_a_pytest_node_is_passed_skipped_or_never_run(
    tmp_path: Path, mark: str, node: str, answer: Answer | None
) -> None:
    """A module that cannot be imported is no failed test: it says nothing of what the test is about."""
    assert ask_node(tmp_path, mark, node) == answer


def test_a_failed_node_says_what_failed(tmp_path: Path) -> None:
    answer = ask_node(tmp_path, "0.19.1", "test_of_the_version")
    assert answer is not None
    assert answer.state == ("failed", "test_it.py::test_of_the_version")
    assert answer.shown.startswith("1 failed: test_of_the_version: AssertionError: it is the new one")


def test_a_node_of_several_tests_is_other_where_others_of_them_fail(tmp_path: Path) -> None:
    """Else one that fails at both ends would hide what broke in between."""
    states = []
    for failing in ("a", "ab", "ba"):
        text = "".join(f"def test_{name}(): assert {name not in failing}\n" for name in "abc")
        (tmp_path / "test_it.py").write_text(text, "utf-8")
        asked = Node("test_it.py")
        line = [sys.executable, *asked.command(tmp_path)]
        done = subprocess.run(line, cwd=tmp_path, check=False, capture_output=True)
        answer = asked.read(tmp_path, done.returncode)
        assert answer is not None
        states.append(answer.state)
    assert states[0] != states[1] == states[2]


def ask_node(directory: Path, mark: str, node: str) -> Answer | None:
    (directory / "test_it.py").write_text(TESTS, "utf-8")
    asked = Node(f"test_it.py::{node}" if node else "test_it.py")
    line = [sys.executable, *asked.command(directory)]
    environ = {**os.environ, "MARK": mark}
    done = subprocess.run(line, cwd=directory, env=environ, check=False, capture_output=True)
    return asked.read(directory, done.returncode)


@dataclass(frozen=True)
class Bed:
    """Puts environments in place, finished and stamped: all but the installation is as it is in use."""

    root: Path

    def put(
        self, version: str, script: str, transformers: str = "5.5.0", trl: str = "0.25.1", **held: str
    ) -> None:
        """An environment of a peft version whose Python is this shell script. held: what it holds instead."""
        pins = {"transformers": transformers, "peft": version, "trl": trl}
        made = Environment(self.root / ".compat" / "env" / name_of(pins))
        made.python.parent.mkdir(parents=True)
        says = f"""if [ "$2" = -c ]; then echo '{json.dumps({**pins, **held})}'; exit; fi"""
        made.python.write_text(f"#!/bin/sh\n{says}\n{script}\n", "utf-8")
        made.python.chmod(0o755)
        stamp = Stamp.of(self.root, requirements(pins), Installer.of(self.root, os.environ))
        document = {"stamp": asdict(stamp), "versions": {"peft": version}}
        (made.directory / STAMP).write_text(json.dumps(document), "utf-8")

    def says(self, version: str, orientation: str, **held: str) -> None:
        """An environment that has observed this."""
        self.put(version, f"""echo '{{"orientation": "{orientation}"}}' > "$4" """, **held)

    def crashes(self, version: str, **pins: str) -> None:
        """An environment whose packages cannot be imported."""
        self.put(version, "echo Traceback >&2; echo 'ImportError: HybridCache' >&2; exit 1", **pins)


@pytest.fixture
def bed(root: Path) -> Bed:
    return Bed(root)


@dataclass(frozen=True)
class Shelf:
    """An Index of one package's releases."""

    releases: tuple[str, ...] = RELEASES

    def versions(self, package: str) -> tuple[str, ...]:
        return self.releases if package == "peft" else ()


ENDS = ["--package", "peft", "--good", "0.18.1", "--bad", "0.19.1"]
ASKED = [*ENDS, "--expect", "orientation=swapped"]


def test_the_first_changed_release_is_answered_with_what_was_found(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    for version, orientation in (("0.18.1", "swapped"), ("0.19.0", "swapped"), ("0.19.1", "standard")):
        bed.says(version, orientation)
    assert main(ASKED, Shelf()) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "peft 0.19.1 is the first version where it changes.",
        "asked: orientation=swapped; with transformers 5.5.0, trl 0.25.1 (tf5.5.0-peft0.18.1-trl0.25.1)",
        "  0.19.0  orientation swapped [transformers 5.5.0, peft 0.19.0, trl 0.25.1]",
        "  0.19.1  orientation standard [transformers 5.5.0, peft 0.19.1, trl 0.25.1]",
        "tried: 0.18.1, 0.19.1, 0.19.0",
    ]
    assert shown.err.count("…\n") == 3, "each is tried once"
    assert main([*ASKED, "--json"], Shelf()) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["first"], document["after"], document["skipped"]) == ("0.19.1", "0.19.0", [])
    assert (document["cell"], document["question"]) == ("tf5.5.0-peft0.18.1-trl0.25.1", "orientation=swapped")
    assert [each["version"] for each in document["tried"]] == ["0.18.1", "0.19.1", "0.19.0"]


def test_a_version_that_crashes_is_named_and_the_answer_is_a_range(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    bed.says("0.18.1", "swapped")
    bed.crashes("0.19.0")
    bed.says("0.19.1", "standard")
    assert main(ASKED, Shelf()) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == (
        "peft: the first version where it changes is after 0.18.1, and 0.19.1 at the latest; "
        "0.19.0 cannot be tried."
    )
    assert "  0.19.0  not tried: crashed (1): ImportError: HybridCache" in text
    assert main([*ASKED, "--json"], Shelf()) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["first"], document["at_the_latest"], document["skipped"]) == (None, "0.19.1", ["0.19.0"])


def test_ends_that_do_not_differ_end_with_3_and_say_so(bed: Bed, capsys: pytest.CaptureFixture[str]) -> None:
    bed.says("0.18.1", "standard")
    bed.says("0.19.1", "standard")
    assert main(ASKED, Shelf()) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("peft 0.18.1 and 0.19.1 do not differ in this: there is nothing to search")
    assert lines[2:4] == [
        f"  {version}  orientation standard [transformers 5.5.0, peft {version}, trl 0.25.1]"
        for version in ("0.18.1", "0.19.1")
    ]


def test_beside_another_run_in_the_checkout_nothing_is_tried(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(bed.root / ".compat"):
        assert main(ASKED, Shelf()) == 5
    said = capsys.readouterr().err
    assert "Wait for its end, or use another one." in said
    assert "…" not in said


def test_an_environment_that_was_changed_since_it_was_made_is_not_tried(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answer would be another version's. One that does not say what it holds is none either."""
    bed.says("0.18.1", "swapped", trl="0.25.1")
    bed.says("0.19.0", "swapped", peft="0.21.2")
    bed.says("0.19.1", "standard")
    assert main(ASKED, Shelf()) == 0
    text = capsys.readouterr().out
    assert "0.19.0 cannot be tried" in text
    changed = "  0.19.0  not tried: its environment was changed since: peft 0.21.2, expected 0.19.0"
    assert changed in text
    silent = Environment(bed.root / ".compat" / "env" / "tf5.5.0-peft0.19.1-trl0.25.1").python
    silent.write_text("#!/bin/sh\necho ModuleNotFoundError: torch >&2\nexit 1\n", "utf-8")
    assert main([*ASKED, "--cell", "tf5.5.0-peft0.18.1-trl0.25.1"], Shelf()) == 5
    assert "does not say what it holds: ModuleNotFoundError" in capsys.readouterr().err


def test_a_cell_in_which_an_end_cannot_be_tried_gives_way_to_the_next(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = ["--package", "peft", "--good", "0.18.1", "--bad", "0.21.2", "--expect", "orientation"]
    bed.crashes("0.18.1", transformers="5.24.0", trl="1.16.0")
    for version in between(RELEASES, "0.18.1", "0.21.2"):
        bed.says(version, "swapped" if Version(version) < Version("0.19.1") else "standard")
    assert main(ends, Shelf()) == 0
    text = capsys.readouterr().out
    assert text.startswith("peft 0.19.1 is the first version")
    assert "not in tf5.24.0-peft0.21.2-trl1.16.0: peft 0.18.1  not tried: crashed (1)" in text
    assert main([*ends, "--cell", "tf5.24.0-peft0.21.2-trl1.16.0"], Shelf()) == 5
    assert "no cell's pins suit both ends" in capsys.readouterr().err


def test_a_version_that_cannot_be_installed_is_skipped(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bed.says("0.18.1", "swapped")
    bed.says("0.19.1", "standard")
    make = Environment.make

    def refuse(self: Environment, *arguments: Any) -> bool:
        if "peft0.19.0" in self.directory.name:
            raise NotInstalled("ERROR: No matching distribution found for peft==0.19.0")
        return make(self, *arguments)

    monkeypatch.setattr(Environment, "make", refuse)
    assert main(ASKED, Shelf()) == 0
    assert "  0.19.0  not tried: not installed: ERROR: No matching distribution" in capsys.readouterr().out


def test_an_index_that_is_not_reached_while_installing_ends_with_5(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says nothing of the version: skipping it would give a wider answer than the truth."""

    bed.says("0.18.1", "swapped")
    bed.says("0.19.1", "standard")
    make = Environment.make

    def fail(self: Environment, *arguments: Any) -> bool:
        if "peft0.19.0" in self.directory.name:
            raise Unreachable("the index did not answer")
        return make(self, *arguments)

    monkeypatch.setattr(Environment, "make", fail)
    assert main(ASKED, Shelf()) == 5
    assert "the index did not answer" in capsys.readouterr().err


def test_a_pytest_node_is_run_in_each_environment(bed: Bed, capsys: pytest.CaptureFixture[str]) -> None:
    (bed.root / "test_it.py").write_text(TESTS, "utf-8")
    for version in ("0.18.1", "0.19.0", "0.19.1"):
        bed.put(version, f'export MARK={version}\nexec {shlex.quote(sys.executable)} "$@"')
    assert main([*ENDS, "--node", "test_it.py::test_of_the_version"], Shelf()) == 0
    text = capsys.readouterr().out
    assert text.startswith("peft 0.19.1 is the first version where it changes.")
    assert "  0.19.0  1 passed [transformers 5.5.0, peft 0.19.0, trl 0.25.1]" in text
    assert "  0.19.1  1 failed: test_of_the_version: AssertionError: it is the new one" in text


def test_an_end_may_be_written_otherwise_than_it_was_released(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cell of the first end is still found by it."""
    for version, orientation in (("0.18.1", "swapped"), ("0.19.0", "swapped"), ("0.19.1", "standard")):
        bed.says(version, orientation)
    ends = ["--package", "peft", "--good", "0.18.1.0", "--bad", "0.19.1.0"]
    assert main([*ends, "--expect", "orientation=swapped"], Shelf()) == 0
    text = capsys.readouterr().out
    assert text.startswith("peft 0.19.1 is the first version where it changes.")
    assert "(tf5.5.0-peft0.18.1-trl0.25.1)" in text


def test_a_matrix_without_a_pinned_cell_is_a_usage_error(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lanes = 'latest = [{ name = "latest", path = "fused", orientation = "standard" }]'
    (root / FILE).write_text(f"{EXPECT}[lanes]\n{lanes}\n", "utf-8")
    with pytest.raises(SystemExit) as caught:
        main(ASKED, Shelf())
    assert caught.value.code == 2
    assert "found no cell that pins versions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--package", "torch", "--good", "1", "--bad", "2"], "invalid choice: 'torch'"),
        (["--package", "peft", "--good", "0.18.1", "--bad", "0.18.2"], "0.18.2: no such release"),
        ([*ASKED, "--cell", "tf1"], "matrix.toml has no cell 'tf1'; it has: tf4.57.6"),
        ([*ASKED, "--expect", "orientated"], "--expect: found 'orientated', expected NAME, NAME=VALUE"),
        ([*ENDS, "--expect", "orientation=swaped"], "expected one of standard|swapped|none after"),
        ([*ASKED, "--node", "x"], "not allowed with argument"),
        ([*ENDS, "--node", "tests/test_x.py::test_a"], "--node: found no tests/test_x.py, expected a pytest"),
        ([*ENDS, "--node", ".::test_a"], "--node: found no ., expected a pytest"),
        ([*ENDS, "--node", "test_it.py::test_of[a]"], "--node: found no test_of in test_it.py"),
        ([*ASKED, "--cell", "latest"], "expected a cell that pins"),
    ],
)
def test_wrong_arguments_end_with_2_before_anything_is_made(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "test_it.py").write_text(TESTS, "utf-8")
    with pytest.raises(SystemExit) as caught:
        main(arguments, Shelf())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (root / ".compat").exists()


def test_observe_says_what_the_installed_peft_writes_for_fused_experts(tmp_path: Path) -> None:
    """huggingface/peft#3165, in 0.19.1, turned those of modules that are not `is_transposed`."""
    assert observe.main(["layout", str(tmp_path / "found.json")]) == 0
    shown = json.loads((tmp_path / "found.json").read_text("utf-8"))
    if Version(installed_version("transformers")) < Version("5"):
        assert (shown["path"], shown["orientation"]) == ("per-expert", None)
        return
    swapped = Version(installed_version("peft")) < Version("0.19.1")
    assert (shown["path"], shown["lora_b_layout"]) == ("fused", "rank_major")
    assert shown["orientation"] == ("swapped" if swapped else "standard")
    experts, rank = observe.EXPERTS, observe.RANK
    rows, columns = observe.FUSED_SHAPES["gate_up_proj"]
    a, b = (rows, columns) if swapped else (columns, rows)
    assert f"gate_up_proj: lora_A {[experts * rank, a]}, lora_B {[b, experts * rank]}" in shown["evidence"]


def test_observe_says_both_where_both_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cheap, and what a training shows: as a mixed question reads it."""
    shown = CellResult(
        "", "", OK, {}, path="fused", orientation="swapped", merged=(192, 192), figures=FIGURES
    )
    monkeypatch.setattr(observe, "travelled", lambda _: shown.to_json())
    asked = Checks((Check.parse("lora_b_layout"), Check.parse("kl_base_trained>=0.5"), Check.parse("merged")))
    (what,) = {"layout", "journey", "both"} & set(asked.command(tmp_path))
    assert observe.main([what, str(tmp_path / "found.json")]) == 0
    answer = asked.read(tmp_path, 0)
    assert answer is not None
    assert answer.state == (observe.layout(tmp_path / "again")["lora_b_layout"] or "none", "met", "192/192")


def test_observe_does_not_answer_where_the_file_and_the_live_module_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Version(installed_version("transformers")) < Version("5"):
        pytest.skip("no fused experts on transformers 4")
    monkeypatch.setattr(observe, "detect_layout", lambda *_: ("sideways", observe.RANK))
    with pytest.raises(EnvironmentFailed, match=r"writes .*sideways.* but computes"):
        observe.layout(tmp_path)


def test_the_packages_that_can_be_searched_are_those_that_cells_pin(matrix: Matrix) -> None:
    for package in PACKAGES:
        assert bases(matrix, package, ("0", "1"))
