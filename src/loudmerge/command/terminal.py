"""How a command ends: its result to stdout, all else to stderr, an exit code.

0  done
1  a defect in loudmerge: the traceback is shown
2  usage: the arguments are wrong
3  refused: the inputs cannot be merged correctly
4  a mismatch: the output is not what it should be
5  the environment failed: disk, permission, host, memory
130  interrupted by the user; 143 by SIGTERM
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

import click

from loudmerge import __version__
from loudmerge.errors import EnvironmentFailed, MergeRefused, Mismatch, is_out_of_memory
from loudmerge.planning.options import Progress

DONE, USAGE, REFUSED, MISMATCH, ENVIRONMENT = 0, 2, 3, 4, 5


@runtime_checkable
class Result(Protocol):
    """What every command ends with: one JSON document, and the same in words."""

    def to_json(self) -> dict[str, object]: ...

    def summary(self) -> str: ...


class Ending(NamedTuple):
    """A result and the exit code that it means."""

    result: Result
    code: int


@dataclass(frozen=True)
class Failure:
    """A command that ended without a result of its own."""

    status: str
    message: str
    refusal: Mapping[str, object] | None = None

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {"schema": 1, "loudmerge": __version__, "status": self.status}
        return {**document, "error": self.message, "refusal": self.refusal}

    def summary(self) -> str:
        return self.message


@dataclass(frozen=True)
class Terminal:
    """Where a command writes: the result to stdout, all else to stderr."""

    as_json: bool
    quiet: bool

    def result(self, result: Result) -> None:
        """Prints a result that is there."""
        text = json.dumps(result.to_json(), indent=2, allow_nan=False) if self.as_json else result.summary()
        click.echo(text)

    def failure(self, message: str, result: Result) -> None:
        """Prints why there is no result: to stderr, and as JSON to stdout if that was asked for."""
        click.echo(message, err=True)
        if self.as_json:
            self.result(result)

    def note(self, text: str) -> None:
        if not self.quiet:
            click.echo(text, err=True)

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """A progress bar for each stage, where somebody sees it."""
        if self.quiet:
            # Bars and warnings of huggingface_hub, which reads these as it is imported.
            for name, value in {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}.items():
                os.environ.setdefault(name, value)
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield advance


def run(
    terminal: Terminal,
    action: Callable[[Progress | None], Ending],
    refused: Callable[[MergeRefused], Result] | None = None,
) -> NoReturn:
    """Runs a command to its exit code. While it runs, what libraries print to stdout goes to stderr."""
    try:
        with redirect_stdout(sys.stderr), terminal.progress() as progress:
            outcome = action(progress)
    except MergeRefused as error:
        terminal.failure(
            str(error), refused(error) if refused else Failure("refused", str(error), error.to_json())
        )
        raise click.exceptions.Exit(REFUSED) from error
    except Mismatch as error:
        terminal.failure(f"mismatch: {error}", Failure("mismatch", str(error)))
        raise click.exceptions.Exit(MISMATCH) from error
    except (EnvironmentFailed, OSError, MemoryError, RuntimeError) as error:
        message = _environment(error)
        if message is None:
            raise
        terminal.failure(message, Failure("failed", message))
        raise click.exceptions.Exit(ENVIRONMENT) from error
    terminal.result(outcome.result)
    raise click.exceptions.Exit(outcome.code)


def _environment(error: Exception) -> str | None:
    """The message of a failure of the environment; None for a defect."""
    if isinstance(error, (EnvironmentFailed, OSError)):
        hint = _HINTS.get(error.errno or 0) if isinstance(error, OSError) else None
        return f"the environment failed: {error}" + (f". {hint}" if hint else "")
    if is_out_of_memory(error):
        return f"out of memory: {str(error) or type(error).__name__}. Give fewer --threads, or more memory."
    return None


_FULL = "Make room, or give an OUT on another disk."
_HINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "Allow larger files (ulimit -f), or give an OUT on a file system that does.",
    errno.EMFILE: "Allow more open files: ulimit -n.",
}
