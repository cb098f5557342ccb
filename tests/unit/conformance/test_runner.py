"""The runner against real commands: right ones, wrong ones, and such as do harm."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from loudmerge.conformance.cases import Suite
from loudmerge.conformance.judge import Verdict
from loudmerge.conformance.runner import Command, run, run_all
from tests.unit.conformance.world import START, TARGET, UNTOUCHED, line

VERDICTS: Mapping[str, tuple[str, str]] = {
    "right": ("right", ""),
    "in two shards": ("right", ""),
    "in float16": ("right", ""),
    "adds a tensor": ("right", "1 tensor more than expected"),
    "copies the base": ("wrong-silently", f"{TARGET}: unchanged, the base's"),
    "half the update": ("wrong-silently", f"{TARGET}: 0.5 of its update away"),
    "loses a tensor": ("wrong-silently", f"{UNTOUCHED} is not in OUT (1 of 3 lost)"),
    "moves an untouched tensor": ("wrong-silently", f"{UNTOUCHED}: changed, though nothing targets it"),
    "changes its input": ("wrong-silently", "it changed its input base/config.json"),
    "writes no safetensors": ("wrong-silently", "exit code 0, but OUT cannot be read"),
    "writes nothing": ("wrong-silently", "is not in OUT (3 of 3 lost)"),
    "renames a tensor": ("other-form", f"{UNTOUCHED} is not in OUT, norm.weight is: 1 name lost, 1 new"),
    "fails after writing": ("wrote-failed", "exit code 1, but model.safetensors is there"),
    "refuses": ("crashed", "error: I cannot do that"),
    "a config of another transformers": ("right", ""),
    "a folder named like a shard": ("right", ""),
    "in a shard that no index names": ("wrong-silently", "lm_head.weight is not in OUT (1 of 3 lost)"),
    "an index of other shards": (
        "wrong-silently",
        "index.json: lm_head.weight is not in model-00001-of-00002.safetensors, as it says",
    ),
    "an index that is none": ("wrong-silently", "index.json holds no JSON object"),
    "under another file name": ("other-form", "merged.safetensors is there, no loader looks for it"),
    "beside the base's file": (
        "wrong-silently",
        f"{TARGET}: model.safetensors and model-new.safetensors hold other values",
    ),
    "with the adapter": ("wrong-silently", "adapter_config.json is in OUT"),
    "without a config": ("wrong-silently", "config.json is not in OUT"),
    "with a broken config": ("wrong-silently", "config.json cannot be read"),
    "with a config without end": ("wrong-silently", "config.json cannot be read"),
    "another activation": ("wrong-silently", "config.json: found hidden_act 'relu', expected 'silu'"),
    "another model": ("wrong-silently", "config.json: found model_type 'other', expected 'any'"),
    "a config with nothing in it": ("wrong-silently", "config.json: found no num_experts, expected 7"),
    "another size": ("wrong-silently", "config.json: found sizes.hidden_size 5, expected 4"),
    "without a generation config": ("wrong-silently", "generation_config.json is not in OUT"),
    "one file instead of a folder": ("wrote-failed", "exit code 1, but out is there"),
    "in float8": ("wrong-silently", "found torch.float8_e4m3fn"),
    "writes into its input": ("wrong-silently", "it wrote into its input base/new.json"),
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
    command = Command("env {base} {adapter} --to={out} {options} {lora_b_layout}")
    words = command.words(suite.cases[0], Path("b c"), Path("a"), tmp_path)
    assert words == ["env", "b c", "a", f"--to={tmp_path}", "auto"]


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
    verdicts = run_all(suite.cases, Command(line("refuses", tmp_path)), suite, jobs=2)
    assert [found.verdict for found in verdicts] == ["crashed", "moot", "moot", "moot"]
    assert verdicts[2].detail == "it fails on plain, too, which it has to merge"
    assert not verdicts[2].passed


@pytest.mark.parametrize(("name", "wanted"), [("refuses", "moot"), ("right", "refused")])
def test_the_undamaged_case_is_run_where_only_the_damaged_one_is_asked_for(
    name: str, wanted: str, suite: Suite, tmp_path: Path
) -> None:
    (found,) = run_all(suite.select(("nan",)), Command(line(name, tmp_path)), suite)
    assert found.verdict == wanted


def test_a_tool_that_leaves_weights_and_fails_refuses_nothing(suite: Suite, tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(f"{START}\nif np.isfinite(lora['q_proj.lora_A']).all(): write(held)\nsys.exit(1)")
    command = Command(f"{shlex.quote(sys.executable)} {script} {{base}} {{adapter}} {{out}}")
    verdicts = run_all(suite.select(("plain", "nan")), command, suite)
    assert [found.verdict for found in verdicts] == ["wrote-failed", "moot"]


def test_a_case_that_needs_an_option_may_be_refused_by_who_merges_without(
    suite: Suite, tmp_path: Path
) -> None:
    (found,) = run_all(suite.select(("told",)), Command(line("right", tmp_path)), suite)
    assert found.verdict == "right"
    assert suite.control(suite.select(("told",))[0]) == suite.select(("plain",))[0]


def test_what_the_merge_changes_in_the_config_has_to_be_there(suite: Suite, tmp_path: Path) -> None:
    tied = replace(suite.cases[0], config={"tie_word_embeddings": True})
    found = run(tied, Command(line("right", tmp_path)))
    assert found.verdict == "wrong-silently"
    assert found.detail == "config.json: found tie_word_embeddings False, expected True"
    more = replace(suite.cases[0], config={"head": 2})
    assert run(more, Command(line("right", tmp_path))).detail == "config.json: found head None, expected 2"


def test_of_what_a_tool_prints_the_end_is_kept(suite: Suite, tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text("import sys; print('x' * 10**6 + 'ä' * 10**4 + 'the end'); sys.exit(1)")
    found = run(
        suite.cases[0], Command(f"{shlex.quote(sys.executable)} {script} {{base}} {{adapter}} {{out}}")
    )
    assert found.said == "ä" * 1992 + "the end\n"


def test_verdicts_come_in_the_order_of_the_cases_for_any_number_of_jobs(suite: Suite, tmp_path: Path) -> None:
    seen: list[str] = []
    command = Command(line("right", tmp_path))
    verdicts = run_all(suite.cases, command, suite, jobs=3, progress=lambda found: seen.append(found.case))
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
        Command("env {base} {adapter} {out}".replace(name, ""))


def test_a_command_that_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("echo")
    for program in ("no-such-tool", str(tmp_path / "tool")):
        with pytest.raises(ValueError, match="found no program"):
            Command(f"{program} {{base}} {{adapter}} {{out}}")
