"""Reports: what was read, what is missing, on the guard's line; and nothing that upstream can spoil."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from loudmerge.canary.guards import Guard
from loudmerge.canary.report import headline, load, markdown, workflow_commands
from loudmerge.canary.run import CanaryReport, Verdict, at_refs, inert
from tests.support import upstream_server as server
from tests.support.command import run_inside
from tests.support.upstream_server import UpstreamServer
from tests.unit.canary.test_plugin import Project
from tests.unit.canary.world import GONE, GUARD, KEPT, PATH, UPSTREAM, guard_file, guards

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PRESENT = Verdict("zoo-guarded", UPSTREAM, "main", PATH, "present", "is defined", 3, COMMIT, True)
MISSING = replace(
    PRESENT, verdict="missing", detail="guarded has changed\n--- known\n+++ read\n@@ -1 +1 @@\n-x"
)
PENDING = replace(PRESENT, verdict="pending", detail="owner/zoo#7 has not landed")
DOWN = replace(PRESENT, verdict="unreachable", detail="HTTP 500", line=0, version="", evaluated=False)
STALE = replace(DOWN, stale=True, detail="stale, not read for 49 h")


def test_missing_comes_first_with_its_diff_and_every_version_is_named(tmp_path: Path) -> None:
    text = markdown(CanaryReport((PRESENT, PENDING, DOWN, STALE, MISSING)), guards(tmp_path))
    lines = text.splitlines()
    assert lines[0] == "## Canary: 1 missing, 1 stale"
    assert lines[2] == "canary: 3 of 5 guards evaluated (1 present, 1 missing, 1 pending, 2 unreachable)"
    heads = [line.split(":")[0] for line in lines if line.startswith("### ")]
    assert heads == ["### Missing", "### Stale", "### Pending", "### Unreachable", "### Read"]
    assert "```diff\nguarded has changed\n--- known" in text
    assert f"- read: `owner/zoo@main`, `{COMMIT}`, `{PATH}:3`" in text
    assert "- why: `the test needs it`" in text
    assert f"- guard: `{tmp_path.as_posix()}/guards/zoo.toml:2`, since `owner/zoo#7`" in text
    assert f"| `owner/zoo` | `main` | `{COMMIT}` | 3 of 3 |" in text
    assert "<details><summary>1 present</summary>" in text


@pytest.mark.parametrize(
    ("verdicts", "not_run", "line"),
    [
        ((PRESENT, PENDING), (), "Canary: every guard is present or pending"),
        ((PRESENT, DOWN), (), "Canary: 1 unreachable"),
        ((PRESENT,), ("a@main",), "Canary: not all guards were run"),
        ((DOWN, STALE, MISSING, MISSING), (), "Canary: 2 missing, 1 stale"),
    ],
)
def test_the_headline_says_the_worst(
    verdicts: tuple[Verdict, ...], not_run: tuple[str, ...], line: str
) -> None:
    assert headline(CanaryReport(verdicts, not_run=not_run)) == line


@pytest.mark.parametrize(
    "evil",
    [
        "```\n</details>\n# EVIL",
        "`@EVIL` @EVIL",
        "EVIL/zoo#1 <!-- EVIL",
        "````diff\n@@ -1 @@\n```` | EVIL\n```\nEVIL",
        "EVIL`",
        "EVIL\n\n# EVIL\n```",
    ],
)
@pytest.mark.parametrize("verdict", [MISSING, PENDING, DOWN, STALE, PRESENT])
def test_upstreams_words_stay_inside_code(evil: str, verdict: Verdict) -> None:
    """By a parser of CommonMark with GitHub's tables."""
    text = markdown(CanaryReport((replace(verdict, detail=evil, version="`EVIL|1"),)))
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    every = [child for token in tokens for child in (token.children or [token])]
    inside = [token for token in every if token.type in {"code_inline", "fence"}]
    assert sum("EVIL" in token.content for token in inside) >= 2
    assert not [token for token in every if token not in inside and "EVIL" in token.content]


def test_whole_parts_are_left_out_above_the_limit() -> None:
    report = CanaryReport(tuple(replace(MISSING, guard=f"guard-{number}") for number in range(50)))
    text = markdown(report, limit=3_000)
    assert len(text.encode()) <= 3_000
    assert re.search(r"_\d+ more parts do not fit here", text)
    assert text.count("```") % 2 == 0
    assert len(markdown(report).encode()) > 3_000


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    report = CanaryReport((PRESENT, MISSING, STALE), not_run=("a@main",))
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report.to_json()))
    assert load(file) == report


def test_an_annotation_lies_on_the_guards_line(tmp_path: Path) -> None:
    (line,) = workflow_commands(CanaryReport((PRESENT, MISSING)), guards(tmp_path), tmp_path)
    assert line == (
        "::error file=guards/zoo.toml,line=2,title=zoo-guarded@main is missing::"
        "guarded has changed%0A--- known%0A+++ read%0A@@ -1 +1 @@%0A-x%0Awhy: the test needs it%0A"
        f"read: owner/zoo@main ({COMMIT}), {PATH}:3"
    )


@pytest.mark.parametrize(
    ("verdict", "strict", "level"),
    [
        (DOWN, False, "warning"),
        (DOWN, True, "error"),
        (STALE, False, "error"),
        (PENDING, True, "notice"),
        (MISSING, False, "error"),
    ],
)
def test_the_level_of_an_annotation_is_what_the_run_makes_of_it(
    tmp_path: Path, verdict: Verdict, strict: bool, level: str
) -> None:
    (line,) = workflow_commands(CanaryReport((verdict,), strict), guards(tmp_path), tmp_path)
    assert line.startswith(f"::{level} file=guards/zoo.toml,line=2,title=zoo-guarded@main is ")


def test_an_annotation_cannot_be_broken_out_of(tmp_path: Path) -> None:
    guard = replace(guards(tmp_path)[0], file=tmp_path / "a,b:c%.toml", line=0)
    evil = replace(MISSING, detail="50%\r\n::add-mask::x", ref="a,b:c")
    (line,) = workflow_commands(CanaryReport((evil,)), (guard,), tmp_path)
    assert "\n" not in line
    properties, _, message = line.removeprefix("::error ").partition("::")
    assert properties == "file=a%2Cb%3Ac%25.toml,line=1,title=zoo-guarded@a%2Cb%3Ac is missing"
    assert message.startswith("50%25%0D%0A::add-mask::x%0Awhy: ")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n::error::x", "a\n: :error::x"),
        ("a\n  ::error::x\n\t::x", "a\n  : :error::x\n\t: :x"),
        ("a ##[error]x", "a ## [error]x"),
        ("\x1b[2Jgone\r", "\\x1b[2Jgone\\r"),
        ("A::b stays, é too\n", "A::b stays, é too\n"),
    ],
)
def test_upstreams_words_are_no_command_to_the_terminal_or_the_runner(text: str, shown: str) -> None:
    assert inert(text) == shown
    assert shown in str(replace(MISSING, detail=text))


class Command:
    """`loudmerge canary`, with the local server for GitHub."""

    def __init__(self, place: Path, upstream: UpstreamServer, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.upstream, self.capsys = place, upstream, capsys
        self.repository = upstream.repository(UPSTREAM)
        guard_file(place / "canary" / "guards")

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        return run_inside(self.capsys, "canary", *arguments)


@pytest.fixture
def canary(
    tmp_path: Path,
    upstream: UpstreamServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOUDMERGE_GITHUB_API_URL", upstream.api)
    monkeypatch.setenv("LOUDMERGE_GITHUB_RAW_URL", upstream.raw)
    monkeypatch.setenv("LOUDMERGE_CANARY_CACHE", str(tmp_path / "cache"))
    return Command(tmp_path, upstream, capsys)


def test_the_command_writes_the_report_and_keeps_stdout_for_the_document(canary: Command) -> None:
    commit = canary.repository.commit({PATH: GONE}, pull=7)
    code, stdout, stderr = canary("--json", "--markdown", "out/report.md", "--annotations", "--quiet")
    assert code == 4
    assert json.loads(stdout)["verdicts"][0]["verdict"] == "missing"
    assert stderr.startswith("::error file=canary/guards/zoo.toml,line=2,title=zoo-guarded@main is missing::")
    report = (canary.place / "out" / "report.md").read_text()
    assert report.startswith("## Canary: 1 missing")
    assert commit in report


def test_without_being_asked_the_command_annotates_nothing(canary: Command) -> None:
    canary.repository.commit({PATH: GONE}, pull=7)
    assert "::error" not in "".join(canary()[1:])


def test_in_githubs_workflow_the_command_annotates_and_adds_to_the_summary(
    canary: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = canary.place / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(canary.place / "canary"))
    canary.repository.commit({PATH: GONE}, pull=7)
    assert canary()[2].startswith("::error file=guards/zoo.toml,line=2")
    assert summary.read_text().startswith("before\n## Canary: 1 missing")


def test_a_report_that_cannot_be_written_is_the_environments_failure(canary: Command) -> None:
    canary.repository.commit({PATH: KEPT})
    (canary.place / "out").write_text("a file")
    assert canary("--markdown", "out/report.md")[0] == 5


def test_guards_are_judged_at_another_ref_and_a_wrong_one_is_a_slip(canary: Command) -> None:
    canary.repository.commit({PATH: KEPT})
    commit = canary.repository.commit({PATH: GONE}, ref="v2", pull=7)
    code, stdout, _ = canary("--json", "--ref", f"{UPSTREAM}=v2")
    (verdict,) = json.loads(stdout)["verdicts"]
    assert (code, verdict["ref"], verdict["version"]) == (4, "v2", commit)
    for bad, message in (("v2", "expected UPSTREAM=REF"), ("a/b=v2", "no guard reads a/b")):
        code, _, stderr = canary("--ref", bad)
        assert (code, message in stderr) == (2, True)


@pytest.mark.parametrize(
    ("fields", "ref", "fits"),
    [
        ('upstream = "owner/zoo"', "v2", True),
        ('upstream = "owner/zoo"', "1.0", True),
        ('upstream = "owner/zoo"', ">=1.0", False),
        ('upstream = "owner/zoo"', "latest", False),
        ('package = "zoo"', ">=1.0,<2", True),
        ('package = "zoo"', "main", False),
        ('upstream = "owner/zoo"\npackage = "zoo"', "main", True),
    ],
)
def test_a_ref_must_be_one_of_what_the_guard_reads(tmp_path: Path, fields: str, ref: str, fits: bool) -> None:
    text = GUARD.replace('upstream = "owner/zoo"', fields).replace('"main"', '"1.0"')
    name = "owner/zoo" if "upstream" in fields else "zoo"
    found: tuple[Guard, ...] = guards(tmp_path, text)
    if fits:
        assert at_refs(found, [(name, ref)])[0].refs == (ref,)
    else:
        with pytest.raises(ValueError, match=f"expected a re.* of it, found '{re.escape(ref)}'"):
            at_refs(found, [(name, ref)])


@pytest.fixture
def project(tmp_path: Path, upstream: UpstreamServer) -> Project:
    return Project(tmp_path, upstream)


FOUR = "".join(
    GUARD.replace("zoo-guarded", name).replace("owner/zoo", f"owner/{name}")
    for name in ("present", "missing", "pending", "unreachable")
)


def four(project: Project) -> None:
    """Guards of four upstreams, one for each verdict."""
    guard_file(project.place / "guards", FOUR)
    for name in ("present", "missing", "pending"):
        repository = project.upstream.repository(f"owner/{name}")
        repository.commit({PATH: KEPT if name == "present" else GONE})
        repository.pulls[7] = None if name == "pending" else repository.refs["main"]
    project.upstream.fail("owner/unreachable/commits", server.status(401))


def test_another_projects_pytest_shows_each_outcome_and_writes_the_reports(project: Project) -> None:
    four(project)
    reports = ("--canary-markdown", "out/report.md", "--canary-json", "out/report.json")
    output = project.pytest("--canary-guards", "guards", *reports, "--canary-annotations")
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed" in output
    assert output.endswith("exit 1")
    for name, outcome in (("present", "PASSED"), ("missing", "FAILED"), ("pending", "XFAIL")):
        assert re.search(rf"(?m)^{outcome} .*{name}@main", output)
    assert re.search(r"(?m)^SKIPPED .*unreachable .*HTTP 401", output)
    found = load(project.place / "out" / "report.json")
    assert [one.verdict for one in found.verdicts] == ["present", "missing", "pending", "unreachable"]
    assert "#### `missing`" in (project.place / "out" / "report.md").read_text()
    noted = re.findall(r"(?m)^::(\w+) file=guards/zoo.toml,line=(\d+)", output)
    assert noted == [("error", "11"), ("notice", "20"), ("warning", "29")]


def test_pytest_in_githubs_workflow_annotates_and_adds_to_the_summary(project: Project) -> None:
    four(project)
    summary = project.place / "summary.md"
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary), "CI": "true"}
    output = project.pytest("--canary-guards", "guards", **github)
    assert "2 failed, 1 passed, 1 xfailed" in output
    assert len(re.findall(r"(?m)^::error ", output)) == 2
    assert summary.read_text().startswith("## Canary: 1 missing")


def test_what_pytest_did_not_run_is_in_the_report(project: Project) -> None:
    four(project)
    project.pytest("--canary-guards", "guards", "--canary-json", "report.json", "-k", "present")
    found = load(project.place / "report.json")
    assert [one.guard for one in found.verdicts] == ["present"]
    assert found.not_run == ("missing@main", "pending@main", "unreachable@main")
    assert "### Not run\n\n- `missing@main`" in markdown(found)


def test_the_report_of_several_processes_is_that_of_one(project: Project) -> None:
    pytest.importorskip("xdist")
    four(project)
    written = []
    for arguments in ((), ("-n", "2")):
        file = project.place / f"report{len(arguments)}.md"
        plugins = "xdist.plugin,loudmerge.canary.plugin"
        project.pytest(
            "--canary-guards", "guards", "--canary-markdown", str(file), *arguments, plugins=plugins
        )
        written.append(file.read_text())
    assert written[0] == written[1]


def test_a_report_without_guard_files_is_a_usage_error(project: Project) -> None:
    output = project.pytest("--canary-json", "report.json")
    assert "found no guard file" in output
    assert output.endswith("exit 4")
    assert not (project.place / "report.json").exists()
