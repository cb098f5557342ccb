"""The command line: arguments in, exit codes out (loudmerge.command.terminal); no logic.

torch and what needs it are imported when a command runs, so that `loudmerge --help` does not wait for them.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from loudmerge import __version__
from loudmerge.canary.command import canary_command
from loudmerge.command.arguments import (
    Name,
    argument,
    check_device,
    check_transformers,
    choice,
    details_option,
    input_options,
    layout_options,
    local_directory,
    output_options,
)
from loudmerge.command.terminal import (
    DONE,
    MISMATCH,
    USAGE,
    Ending,
    Failure,
    Result,
    Terminal,
    run,
)
from loudmerge.errors import MergeRefused
from loudmerge.planning.options import Progress

if TYPE_CHECKING:
    from loudmerge.executing.report import HasDetails


def _ending(result: Result, *, ok: bool) -> Ending:
    return Ending(result, DONE if ok else MISMATCH)


def _shown(result: HasDetails, *, details: bool) -> Result:
    if not details:
        return result
    from loudmerge.executing.report import Detailed

    return Detailed(result)


def _check_merge(*, resume: bool, dry_run: bool, details: bool, push_to: str | None, no_verify: bool) -> None:
    if resume and dry_run:
        raise click.UsageError("--dry-run writes nothing, so there is nothing for --resume to go on with.")
    if details and dry_run:
        raise click.UsageError(
            "--dry-run merges nothing that --details could tell of; `loudmerge inspect ADAPTER --base BASE` "
            "predicts what is kept."
        )
    if push_to and no_verify:
        raise click.UsageError("--push-to uploads only what was verified: leave out --no-verify.")
    if push_to and dry_run:
        raise click.UsageError("--dry-run writes nothing, so there is nothing for --push-to to upload.")


@click.group(
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 usage, 3 refused, 4 mismatch, 5 the environment failed, 130 interrupted "
    "(143 by SIGTERM), 1 a defect.",
)
@click.version_option(__version__, prog_name="loudmerge")
@click.pass_context
def commands(context: click.Context) -> None:
    """Merge LoRA adapters of mixture-of-experts models into their base checkpoint, or refuse.

    BASE and ADAPTER are a local directory or a Hub id, owner/name[@revision].
    """
    if context.invoked_subcommand is None:
        # click 8.1 would take it for a request for help, and end with 0.
        click.echo(context.get_help(), err=True)
        context.exit(USAGE)


@commands.command("merge", short_help="Merge an adapter into its base, or refuse.")
@click.argument("base", type=Name())
@click.argument("adapter", type=Name())
@click.argument("out", type=Name(path_type=Path))
@layout_options
@choice("--dtype", "The dtype of the floating-point tensors of OUT.")
@choice(
    "--rounding",
    "How a sum is rounded. auto: what disturbs the output least; peft: as merge_and_unload does.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda[:N]|auto",
    callback=check_device,
    help="Where the sums are computed.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads that compute. Default: as many as cores, 8 at most; one for an OUT under 64 MiB.",
)
@click.option("--dry-run", is_flag=True, help="Plan only: nothing is written.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with an interrupted merge into the same OUT; leave what is finished, if this one is.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is complete.")
@click.option(
    "--push-to", type=Name(), metavar="REPO", help="Upload OUT to this Hub repository once it is verified."
)
@click.option("--no-verify", is_flag=True, help="Do not read OUT back and check it.")
@details_option
@output_options
def merge_command(
    *,
    base: str,
    adapter: str,
    out: Path,
    dry_run: bool,
    resume: bool,
    push_to: str | None,
    no_verify: bool,
    details: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge ADAPTER into BASE: plan, refuse or merge, verify, then publish OUT in one step."""
    _check_merge(resume=resume, dry_run=dry_run, details=details, push_to=push_to, no_verify=no_verify)
    terminal = Terminal(as_json, quiet)

    def action(progress: Progress | None) -> Ending:
        from loudmerge.hub.upload import push, push_target
        from loudmerge.merging.merge import merge, planned

        if push_to:
            with argument("--push-to"):
                push_target(push_to)
        found = local_directory(base, "BASE"), local_directory(adapter, "ADAPTER")
        if dry_run:
            return Ending(planned(*found, out, **options), DONE)
        report = merge(*found, out, **options, verify=not no_verify, progress=progress, resume=resume)
        if push_to:
            terminal.note(f"pushed to {push(out, push_to, base=base, adapter=adapter)}")
        return Ending(_shown(report, details=details), DONE)

    def refused(error: MergeRefused) -> Result:
        from loudmerge.executing.report import refused_report

        return refused_report(base, adapter, str(out), error)

    run(terminal, action, refused)


@commands.command("inspect", short_help="Say what an adapter is, and by what evidence.")
@click.argument("adapter", type=Name())
@click.option("--base", type=Name(), metavar="BASE", help="The checkpoint the adapter belongs to.")
@layout_options
@click.option("--html", type=Name(dir_okay=False, path_type=Path), help="Write it as a page, too.")
@output_options
def inspect_command(
    *, adapter: str, base: str | None, html: Path | None, as_json: bool, quiet: bool, **laid: Any
) -> None:
    """Say what ADAPTER is: sites, ranks, layout, and the evidence for it."""

    def action(_: Progress | None) -> Ending:
        from loudmerge.inspecting.inspect import inspect

        found = local_directory(base, "--base") if base else None
        result = inspect(local_directory(adapter, "ADAPTER"), found, **laid)
        if html is not None:
            from loudmerge.inspecting.inspect_page import render

            html.write_text(render(result), encoding="utf-8", errors="backslashreplace")
        return Ending(result, DONE)

    run(Terminal(as_json, quiet), action)


@commands.command("convert", short_help="Rewrite an adapter into another layout.")
@click.argument("adapter", type=Name())
@click.argument("out", type=Name(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["peft-0.18", "peft-0.19", "grouped-by-expert", "per-expert"]),
    help="The layout of OUT. docs/layouts.md says which one PEFT, vLLM and SGLang read.",
)
@click.option(
    "--base",
    type=Name(),
    metavar="BASE",
    help="The checkpoint it belongs to; the shapes tell the layout. Default: the directory its config names.",
)
@layout_options
@click.option("--transformers", metavar="VERSION", callback=check_transformers, help="OUT is for this one.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is complete.")
@output_options
def convert_command(
    *,
    adapter: str,
    out: Path,
    to: str,
    base: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Rewrite ADAPTER into another layout: the same function, or a refusal."""

    def action(_: Progress | None) -> Ending:
        from loudmerge.converting.convert import convert

        found = local_directory(base, "--base") if base else None
        return Ending(convert(local_directory(adapter, "ADAPTER"), out, to, base=found, **options), DONE)

    run(Terminal(as_json, quiet), action)


@commands.command("verify", short_help="Recompute a merged checkpoint and compare.")
@input_options
@layout_options
@details_option
@output_options
def verify_command(
    *, out: Path, base: str, adapter: str, details: bool, as_json: bool, quiet: bool, **laid: Any
) -> None:
    """Recompute every tensor of OUT by a second way, and compare."""

    def action(progress: Progress | None) -> Ending:
        from loudmerge.verifying.verify import verify

        found = local_directory(base, "--base"), local_directory(adapter, "--adapter")
        result = verify(out, *found, progress=progress, **laid)
        return _ending(_shown(result, details=details), ok=result.ok)

    run(Terminal(as_json, quiet), action)


@commands.command("compare", short_help="Compare the behaviour of base, adapter and merge.")
@input_options
@click.option("--adapter-only", is_flag=True, help="OUT is ADAPTER converted: compare base with either.")
@layout_options
@output_options
def compare_command(
    *, out: Path, base: str, adapter: str, adapter_only: bool, as_json: bool, quiet: bool, **laid: Any
) -> None:
    """Load BASE, BASE with ADAPTER, and OUT; report KL, top-1 agreement and greedy samples.

    With --adapter-only OUT is what `convert` made of ADAPTER: BASE with ADAPTER against BASE with OUT.
    """

    def action(_: Progress | None) -> Ending:
        inputs = local_directory(base, "--base"), local_directory(adapter, "--adapter")
        if adapter_only:
            from loudmerge.comparing.equivalence import compare_adapters

            same = compare_adapters(out, *inputs, **laid)
            return _ending(same, ok=same.ok)
        from loudmerge.comparing.compare import compare

        result = compare(out, *inputs, **laid)
        return _ending(result, ok=result.ok)

    run(Terminal(as_json, quiet), action)


@commands.command("demo", short_help="Train, merge, verify and compare, offline.")
@click.option("--dir", "directory", type=Name(path_type=Path), help="Keep the files here.")
@output_options
def demo_command(*, directory: Path | None, as_json: bool, quiet: bool) -> None:
    """Train a tiny MoE adapter, then merge, verify and compare it. Offline."""

    def action(progress: Progress | None) -> Ending:
        from loudmerge.demo.demo import run as run_demo

        result = run_demo(directory, progress=progress)
        return _ending(result, ok=result.ok)

    run(Terminal(as_json, quiet), action)


commands.add_command(canary_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script. `arguments` are the process's own by default. Exits with the code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    received = [signal.SIGINT]
    try:
        with _sigterm_interrupts(received):
            code = commands.main(given, prog_name="loudmerge", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        if "--json" in given:
            Terminal(as_json=True, quiet=True).result(Failure("usage", error.format_message()))
        sys.exit(USAGE)
    except (click.Abort, KeyboardInterrupt):  # click makes an Abort of one only within a command
        Terminal("--json" in given, quiet=True).failure("interrupted", Failure("interrupted", "interrupted"))
        sys.exit(128 + received[-1])
    sys.exit(code)


@contextmanager
def _sigterm_interrupts(received: list[signal.Signals]) -> Iterator[None]:
    """Has SIGTERM, which batch systems send, end a command as Ctrl-C does; a second one ends it at once."""

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
