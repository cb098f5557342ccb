"""`loudmerge canary`: arguments in, the exit code out. What its extra brings is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loudmerge.command.arguments import Name, argument, output_options
from loudmerge.command.terminal import DONE, ENVIRONMENT, MISMATCH, Ending, Terminal, run
from loudmerge.errors import require
from loudmerge.planning.options import Progress


@click.command("canary", short_help="Check that upstream still keeps what must hold.")
@click.option(
    "--guards",
    type=Name(path_type=Path),
    help="The directory of the guard files. Default: canary/guards here, else those loudmerge ships.",
)
@click.option("--strict", is_flag=True, help="An upstream that cannot be asked fails.")
@click.option(
    "--source",
    "overrides",
    multiple=True,
    metavar="UPSTREAM=DIR_OR_ARCHIVE_OR_URL",
    help="Read an upstream or a package from there.",
)
@click.option(
    "--ref",
    "refs",
    multiple=True,
    metavar="UPSTREAM=REF",
    help="Judge its guards at this ref, not at their own.",
)
@click.option("--markdown", type=Name(dir_okay=False, path_type=Path), help="Write a report there.")
@click.option(
    "--annotations", is_flag=True, help="Annotate the guards' lines on GitHub. So it does in its workflows."
)
@output_options
def canary_command(
    *,
    guards: Path | None,
    strict: bool,
    overrides: tuple[str, ...],
    refs: tuple[str, ...],
    markdown: Path | None,
    annotations: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read upstream's source and say, guard by guard, what of it still holds."""

    def action(_: Progress | None) -> Ending:
        require("canary", "packaging", "requests", *(["tomli"] if sys.version_info < (3, 11) else []))
        from loudmerge.canary.guards import default_directory, load_guards
        from loudmerge.canary.report import Reports
        from loudmerge.canary.run import CanaryReport, at_refs, parse_ref
        from loudmerge.canary.run import run as run_canary
        from loudmerge.canary.upstream.sources import SourceOptions, parse_overrides

        with argument("--guards"):
            found = load_guards(guards or default_directory(Path()))
        with argument("--ref"):
            found = at_refs(found, [parse_ref(text) for text in refs])
        with argument("--source"):
            places = parse_overrides(overrides, {name for guard in found for name in guard.names})
        verdicts = run_canary(found, sources=SourceOptions.from_environment(places))
        report = CanaryReport(verdicts, strict)
        # To stderr: stdout is the result. GitHub's runner reads both.
        for line in Reports.from_environment(markdown, annotations=annotations).write(report, found):
            click.echo(line, err=True)
        return Ending(report, MISMATCH if report.missing else ENVIRONMENT if report.unasked else DONE)

    run(Terminal(as_json, quiet), action)
