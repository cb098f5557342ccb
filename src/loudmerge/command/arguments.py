"""Options and arguments that several commands take, and what is checked of them before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from loudmerge.hub.client import resolve
from loudmerge.planning.options import CHOICES
from loudmerge.reading.families import major_minor
from loudmerge.system import device

Command = TypeVar("Command", bound=Callable[..., object])


class Name(click.Path):
    """A path or a Hub id. An empty one is an unset variable: as a Path it would be the current directory."""

    def __init__(self, **options: Any) -> None:
        # A directory that may not be read is no wrong argument, but a failure of the environment.
        super().__init__(**options, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty, expected a name.", param, ctx)
        return super().convert(value, param, ctx)


@contextmanager
def argument(hint: str) -> Iterator[None]:
    """A value that turns out to be wrong is a usage error."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint=hint) from error


def local_directory(name: str, hint: str) -> Path:
    """The local directory of BASE or ADAPTER, downloaded if need be."""
    with argument(hint):
        return resolve(name)


def check_device(_: click.Context, parameter: click.Parameter, value: str) -> str:
    """A callback: cpu, cuda, cuda:N or auto."""
    with argument(parameter.opts[0]):
        device.check_device(value)
    return value


def check_transformers(_: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A callback: a version, such as 5.24."""
    with argument(parameter.opts[0]):
        if value is not None:
            major_minor(value)
    return value


def choice(name: str, description: str) -> Callable[[Command], Command]:
    """One of the options of `planning.options`."""
    words = CHOICES[name.removeprefix("--").replace("-", "_")]
    return click.option(name, type=click.Choice(words), default=words[0], show_default=True, help=description)


def output_options(command: Command) -> Command:
    """--json and --quiet, which every command takes."""
    command = click.option("--quiet", is_flag=True, help="Nothing on stderr but errors.")(command)
    return click.option("--json", "as_json", is_flag=True, help="stdout is one JSON document.")(command)


def details_option(command: Command) -> Command:
    """--details, which merge and verify take."""
    described = "Say of each merged tensor what it keeps of its update, and how it was rounded."
    return click.option("--details", is_flag=True, help=described)(command)


def layout_options(command: Command) -> Command:
    """--orientation and --lora-b-layout, which everything takes that may refuse an ambiguous layout."""
    packing = "How the columns of a fused lora_B are packed."
    command = choice("--lora-b-layout", packing)(command)
    reads = "Which axis of a fused expert parameter lora_A reads."
    return choice("--orientation", reads)(command)


def input_options(command: Command) -> Command:
    """OUT, --base and --adapter, which verify and compare take."""
    command = click.option(
        "--adapter", required=True, type=Name(), metavar="ADAPTER", help="What was merged."
    )(command)
    described = "What it was merged into."
    command = click.option("--base", required=True, type=Name(), metavar="BASE", help=described)(command)
    return click.argument("out", type=Name(exists=True, file_okay=False, path_type=Path))(command)
