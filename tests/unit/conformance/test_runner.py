"""The runner against real commands: right ones, wrong ones, and such as do harm."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from loudmerge.conformance.cases import Suite
from loudmerge.conformance.judge import Verdict
from loudmerge.conformance.runner import Command, run, run_all
from tests.unit.conformance.world import TARGET, UNTOUCHED, line

VERDICTS: Mapping[str, tuple[str, str]] = {
    "right": ("right", ""),
    "in two shards": ("right", ""),
    "in float16": ("right", ""),
    "adds a tensor": ("right", "1 tensors more than expected"),
    "copies the base": ("wrong-silently", f"{TARGET}: unchanged, the base's"),
    "half the update": ("wrong-silently", f"{TARGET}: 0.5 of its update away"),
    "loses a tensor": ("wrong-silently", f"{UNTOUCHED} is not in OUT (1 of 3 lost)"),
    "moves an untouched tensor": ("wrong-silently", f"{UNTOUCHED}: changed, though nothing targets it"),
    "changes its input": ("wrong-silently", "it changed its input base/config.json"),
    "writes no safetensors": ("wrong-silently", "exit code 0, but OUT cannot be read"),
    "writes nothing": ("wrong-silently", "is not in OUT (3 of 3 lost)"),
    "renames a tensor": ("other-form", f"{UNTOUCHED} is not in OUT, norm.weight is: 1 names lost, 1 new"),
    "fails after writing": ("wrote-failed", "exit code 1, but model.safetensors is there"),
    "refuses": ("crashed", "error: I cannot do that"),
}


def verdict(suite: Suite, name: str, folder: Path, case: str = "plain", *, more: str = "") -> Verdict:
    (chosen,) = suite.select((case,))
    return run(chosen, Command(line(name, folder, more=more)))


@pytest.mark.parametrize("name", VERDICTS)
def test_what_a_tool_makes_of_a_merge(name: str, suite: Suite, tmp_path: Path) -> None:
    found = verdict(suite, name, tmp_path)
    assert found.verdict == VERDICTS[name][0]
    assert VERDICTS[name][1] in found.detail
    assert found.passed == (found.verdict == "right")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("right", "refused"),
        ("refuses", "refused"),
        ("copies the base", "wrong-silently"),
        ("fails after writing", "wrote-failed"),
    ],
)
def test_what_a_tool_makes_of_a_case_to_refuse(name: str, wanted: str, suite: Suite, tmp_path: Path) -> None:
    found = verdict(suite, name, tmp_path, "nan")
    assert found.verdict == wanted
    assert wanted != "wrong-silently" or "why nan matters." in found.detail


@pytest.mark.parametrize(
    ("name", "wanted"), [("right", "right"), ("refuses", "refused"), ("copies the base", "wrong-silently")]
)
def test_where_either_will_do_only_silence_is_wrong(
    name: str, wanted: str, suite: Suite, tmp_path: Path
) -> None:
    assert verdict(suite, name, tmp_path, "pickle").verdict == wanted


@pytest.mark.parametrize(
    ("name", "more", "wanted"),
    [
        ("follows its option", "{options}", "right"),
        ("follows its option", "--orientation {orientation}", "right"),
        ("follows its option", "", "wrong-silently"),
        ("refuses", "", "refused"),
        ("refuses", "{options}", "crashed"),
    ],
)
def test_a_tool_that_takes_no_options_may_refuse_where_one_is_needed(
    name: str, more: str, wanted: str, suite: Suite, tmp_path: Path
) -> None:
    assert verdict(suite, name, tmp_path, "told", more=more).verdict == wanted


def test_a_case_without_options_gives_none(suite: Suite, tmp_path: Path) -> None:
    command = Command("tool {base} {adapter} --to={out} {options} {lora_b_layout}")
    words = command.words(suite.cases[0], Path("b c"), Path("a"), tmp_path)
    assert words == ["tool", "b c", "a", f"--to={tmp_path}", "auto"]


def test_a_tool_that_never_ends_is_ended_with_its_children(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    command = Command(line("never ends", tmp_path), limit=3)
    found = run(suite.cases[0], command)
    assert (found.verdict, found.code) == ("timed-out", None)
    for pid in (tmp_path / "pids").read_text().split():
        assert not _runs(int(pid))


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait a moment for its parent to notice."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_a_tool_that_fails_on_the_undamaged_case_refuses_nothing(suite: Suite, tmp_path: Path) -> None:
    """A command that cannot start would else score on every case that is to be refused."""
    verdicts = run_all(suite.cases, Command(line("refuses", tmp_path)), jobs=2)
    assert [found.verdict for found in verdicts] == ["crashed", "refused", "moot", "refused"]
    assert verdicts[2].detail == "it fails on the undamaged plain, too"
    assert not verdicts[2].passed


def test_verdicts_come_in_the_order_of_the_cases_for_any_number_of_jobs(suite: Suite, tmp_path: Path) -> None:
    seen: list[str] = []
    command = Command(line("right", tmp_path))
    verdicts = run_all(suite.cases, command, jobs=3, progress=lambda found: seen.append(found.case))
    assert [found.case for found in verdicts] == seen == [case.id for case in suite.cases]


def test_the_suite_is_never_given_away(suite: Suite, tmp_path: Path) -> None:
    """Tools get copies: one that destroys its input changes nothing of the suite."""
    verdict(suite, "changes its input", tmp_path)
    assert suite.problems() == []


def test_what_a_tool_prints_is_kept_without_the_directory_of_the_run(suite: Suite, tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text("import sys; print('from', sys.argv[1]); sys.exit(1)")
    found = run(
        suite.cases[0], Command(f"{shlex.quote(sys.executable)} {script} {{base}} {{adapter}} {{out}}")
    )
    assert found.said == "from …/base\n"
    assert found.detail == "from …/base"


@pytest.mark.parametrize("name", ["{base}", "{adapter}", "{out}"])
def test_a_command_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"found no \{name[:-1]}\}}"):
        Command("tool {base} {adapter} {out}".replace(name, ""))
