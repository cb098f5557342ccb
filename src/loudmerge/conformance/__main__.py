"""The suite against a merge command: `python -m loudmerge.conformance --command "mytool merge {base}
{adapter} {out}"`.

Exit codes: 0 every case passed, 4 one did not, 2 the arguments are wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import click
from rich.console import Console

from loudmerge.command.terminal import DONE, MISMATCH
from loudmerge.conformance.cases import Case, DataError, Suite, default_directory, load
from loudmerge.conformance.judge import Verdict
from loudmerge.conformance.page import markdown
from loudmerge.conformance.runner import TIME_LIMIT, Command, Tool, run_all
from loudmerge.conformance.scorecard import Scorecard, show
from loudmerge.conformance.server import Served, ServerError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--command", "line", metavar="LINE", help="Placeholders: {base} {adapter} {out} {options}.")
@click.option(
    "--server", metavar="LINE", help="A command that serves: it starts once (loudmerge.conformance.server)."
)
@click.option(
    "--case", "names", multiple=True, metavar="ID", help="Only this case; may be given several times."
)
@click.option("--list", "as_list", is_flag=True, help="Name the cases and run nothing.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="The suite's data. Default: conformance/, else shipped."
)
@click.option(
    "--name", default="", help="The tool's name in the scorecard. Default: the command's first word."
)
@click.option(
    "--version", "versions", multiple=True, metavar="NAME=VERSION", help="A version to note in the scorecard."
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Cases at a time.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=TIME_LIMIT,
    show_default=True,
    help="Seconds for one case.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the scorecard there.")
@click.option("--brief", is_flag=True, help="Leave out of --json what the tool printed.")
@click.option(
    "--markdown", "markdown_file", type=click.Path(path_type=Path), help="Write the scorecard there."
)
def main(
    *,
    line: str | None,
    server: str | None,
    names: tuple[str, ...],
    as_list: bool,
    data: Path | None,
    name: str,
    versions: tuple[str, ...],
    jobs: int,
    time_limit: float,
    json_file: Path | None,
    brief: bool,
    markdown_file: Path | None,
) -> None:
    """Run the conformance suite against any merge command, and print a scorecard."""
    try:
        suite = load(data or default_directory(Path()))
        cases = suite.select(names)
    except DataError as error:
        raise click.UsageError(str(error)) from error
    if as_list:
        for case in cases:
            click.echo(f"{case.id}  {case.topic}, {case.expect}: {case.why}")
        sys.exit(DONE)
    noted = _pairs(versions)
    for file in (json_file, markdown_file):
        if file is not None and not file.parent.is_dir():
            raise click.BadParameter(f"found no directory {file.parent}", param_hint="--json, --markdown")
    with _tool(line, server, time_limit) as tool:
        try:
            verdicts = _run(tool, cases, suite, jobs)
        except ServerError as error:
            raise click.ClickException(str(error)) from error
        if isinstance(tool, Served):
            noted = {**tool.versions, **noted}
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        card = Scorecard(name or _name(tool, line), date, line or server or "", verdicts, noted)
    show(card, Console(file=sys.stderr, soft_wrap=True))
    if json_file:
        json_file.write_text(
            json.dumps(card.to_json(brief=brief), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    if markdown_file:
        markdown_file.write_text(markdown([card], suite), encoding="utf-8")
    sys.exit(DONE if card.ok else MISMATCH)


@contextmanager
def _tool(line: str | None, server: str | None, limit: float) -> Iterator[Tool]:
    if bool(line) == bool(server):
        raise click.UsageError("Give --command, or --server.")
    if line:
        try:
            yield Command(line, limit)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--command") from error
        return
    try:
        served = Served(server or "", limit)
    except (OSError, ValueError, ServerError) as error:
        raise click.BadParameter(str(error), param_hint="--server") from error
    try:
        yield served
    finally:
        served.close()


def _name(tool: Tool, line: str | None) -> str:
    return tool.tool if isinstance(tool, Served) else (line or "").split()[0]


def _pairs(versions: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in versions]
    bad = [name for name, equals, version in pairs if not (name and equals and version)]
    if bad:
        raise click.BadParameter(f"found {bad[0]!r}, expected NAME=VERSION", param_hint="--version")
    return {name: version for name, _, version in pairs}


def _run(tool: Tool, cases: tuple[Case, ...], suite: Suite, jobs: int) -> tuple[Verdict, ...]:
    def progress(verdict: Verdict) -> None:
        click.echo(f"{verdict.verdict:14} {verdict.case}", err=True)

    jobs = 1 if isinstance(tool, Served) else jobs
    return run_all(cases, tool, suite, jobs=jobs, progress=progress)


if __name__ == "__main__":
    main(prog_name="python -m loudmerge.conformance")
