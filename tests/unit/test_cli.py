"""The command line: which arguments reach which function, and which exit code an outcome has.

The functions behind the commands are replaced here; tests/e2e/test_cli.py runs the real ones.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import pytest
import torch

from loudmerge import __version__, cli
from loudmerge.command.terminal import Failure, Terminal
from loudmerge.errors import EnvironmentFailed, MergeRefused, Mismatch, Problem
from tests.support.command import Ended, run_apart, run_inside

REFUSAL = MergeRefused(
    Problem("shape-mismatch", "gate_up_proj", "lora_A [64, 40]", "[64, 48]", "Pass the right base.")
)
COMMANDS = {
    "merge": ["merge", "BASE", "ADAPTER", "OUT"],
    "inspect": ["inspect", "ADAPTER"],
    "verify": ["verify", "MERGED", "--base", "BASE", "--adapter", "ADAPTER"],
    "compare": ["compare", "MERGED", "--base", "BASE", "--adapter", "ADAPTER"],
    "convert": ["convert", "ADAPTER", "OUT", "--to", "peft-0.19"],
    "demo": ["demo"],
}
DEFAULTS = {
    "orientation": "auto",
    "lora_b_layout": "auto",
    "dtype": "keep",
    "rounding": "auto",
    "device": "cpu",
    "threads": None,
    "overwrite": False,
}


@dataclass(frozen=True)
class Answer:
    """A result of any command."""

    ok: bool = True
    name: str = "answer"

    def to_json(self) -> dict[str, object]:
        return {"ok": self.ok, "name": self.name}

    def summary(self) -> str:
        return f"the {self.name} in words"


class Call(NamedTuple):
    function: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Library:
    """Stands for everything behind the commands: records the calls, and answers or raises."""

    answer: Answer = field(default_factory=Answer)
    error: BaseException | None = None
    before: Callable[[], None] = lambda: None
    calls: list[Call] = field(default_factory=list)

    def act(self, function: str, *arguments: Any, **options: Any) -> Any:
        options.pop("progress", None)
        self.calls.append(Call(function, arguments, options))
        self.before()
        if self.error is not None:
            raise self.error
        return self.answer


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    """The modules that the commands import, replaced; the working directory holds BASE, ADAPTER, MERGED."""
    library = Library()

    def acting(name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: library.act(name, *arguments, **options)

    def planned(*arguments: Any, **options: Any) -> Answer:
        library.act("planned", *arguments, **options)
        return Answer(name="plan")

    def refused_report(*arguments: Any) -> Answer:
        library.calls.append(Call("refused_report", arguments, {}))
        return Answer(ok=False, name="refusal")

    functions: dict[str, dict[str, Callable[..., Any]]] = {
        "merging.merge": {"merge": acting("merge"), "planned": planned},
        "inspecting.inspect": {"inspect": acting("inspect")},
        "converting.convert": {"convert": acting("convert")},
        "verifying.verify": {"verify": acting("verify")},
        "comparing.compare": {"compare": acting("compare")},
        "comparing.equivalence": {"compare_adapters": acting("compare_adapters")},
        "demo.demo": {"run": acting("demo")},
        "executing.report": {"refused_report": refused_report},
    }
    for name, members in functions.items():
        module = ModuleType(f"loudmerge.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for directory in ("BASE", "ADAPTER", "MERGED"):
        (tmp_path / directory).mkdir()
    monkeypatch.chdir(tmp_path)
    return library


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the command line to its exit code."""
    return partial(run_inside, capsys)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_result_goes_to_stdout(name: str, run: Callable[..., Ended]) -> None:
    assert run(*COMMANDS[name]) == (0, "the answer in words\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_document_on_stdout_whatever_libraries_print(
    name: str, library: Library, run: Callable[..., Ended]
) -> None:
    library.before = lambda: print("{'loss': 3.1}")  # noqa: T201  # as trl and transformers do
    ended = run(*COMMANDS[name], "--json")
    assert ended.document == {"ok": True, "name": "answer"}
    assert ended.stderr == "{'loss': 3.1}\n"


@pytest.mark.parametrize("name", ["verify", "compare", "demo"])
def test_a_result_that_is_not_ok_exits_4_and_is_printed(
    name: str, library: Library, run: Callable[..., Ended]
) -> None:
    library.answer = Answer(ok=False)
    assert run(*COMMANDS[name]) == (4, "the answer in words\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refusal_exits_3_and_its_message_is_all_of_stderr(
    name: str, library: Library, run: Callable[..., Ended]
) -> None:
    library.error = REFUSAL
    assert run(*COMMANDS[name], "--quiet") == (3, "", f"{REFUSAL}\n")


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"merge"}))
def test_a_refusal_is_one_json_document_too(name: str, library: Library, run: Callable[..., Ended]) -> None:
    library.error = REFUSAL
    document = run(*COMMANDS[name], "--json").document
    assert document["status"] == "refused"
    assert document["refusal"] == {
        "code": "shape-mismatch",
        "where": "gate_up_proj",
        "hint": "Pass the right base.",
        "message": str(REFUSAL),
        "problems": [asdict(REFUSAL.problems[0])],
    }


def test_the_json_of_a_refused_merge_is_its_report(library: Library, run: Callable[..., Ended]) -> None:
    library.error = REFUSAL
    assert run(*COMMANDS["merge"], "--json").document == {"ok": False, "name": "refusal"}
    assert library.calls[-1] == ("refused_report", ("BASE", "ADAPTER", "OUT", REFUSAL), {})


def failed_allocation() -> RuntimeError:
    """What torch really raises when the CPU's memory does not suffice: a plain RuntimeError."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Mismatch("3 of 48 tensors differ"), 4, "mismatch: 3 of 48 tensors differ"),
        (EnvironmentFailed("no peft: pip install peft"), 5, "the environment failed: no peft"),
        (
            OSError(errno.ENOSPC, "No space left on device", "OUT/x"),
            5,
            "No space left on device: 'OUT/x'. Make room",
        ),
        (OSError(errno.EFBIG, "File too large", "OUT/x"), 5, "File too large: 'OUT/x'. Allow larger files"),
        (OSError(errno.EMFILE, "Too many open files", "x"), 5, "'x'. Allow more open files"),
        (PermissionError(errno.EACCES, "Permission denied", "OUT"), 5, "Permission denied: 'OUT'"),
        (RuntimeError("can't start new thread"), 5, "out of memory: can't start new thread. Give fewer"),
        (MemoryError("too big"), 5, "out of memory: too big. Give"),
        (MemoryError(), 5, "out of memory: MemoryError. Give"),
        (torch.OutOfMemoryError("CUDA out of memory"), 5, "out of memory: CUDA out of memory"),
        (failed_allocation(), 5, "out of memory: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_kind_of_failure_has_its_exit_code(
    error: Exception, code: int, said: str, library: Library, run: Callable[..., Ended]
) -> None:
    library.error = error
    ended = run(*COMMANDS["merge"], "--json")
    assert ended.code == code
    assert said in ended.stderr
    document = ended.document
    assert document["status"] == ("mismatch" if code == 4 else "failed")
    assert said in document["error"] or document["error"] in said


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), RuntimeError("shapes cannot be multiplied")])
def test_a_defect_is_not_caught_so_that_python_shows_its_traceback_and_exits_1(
    error: Exception, library: Library
) -> None:
    library.error = error
    with pytest.raises(type(error), match=str(error)):
        cli.main(COMMANDS["merge"])


def test_an_interrupt_exits_as_shells_expect(library: Library, run: Callable[..., Ended]) -> None:
    library.error = KeyboardInterrupt()
    assert run(*COMMANDS["merge"]) == (130, "", "\ninterrupted\n")
    ended = run(*COMMANDS["merge"], "--json")
    assert (ended.code, ended.document["status"]) == (130, "interrupted")


def test_sigterm_ends_a_command_as_an_interrupt_does(library: Library, run: Callable[..., Ended]) -> None:
    """So do batch systems and containers: what is staged is removed, and --json has its document."""
    library.before = lambda: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    ended = run(*COMMANDS["merge"], "--json")
    assert (ended.code, ended.document["status"]) == (143, "interrupted")
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_before_a_command_has_begun_is_an_interrupt_too(
    run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """click catches an interrupt only once it has read the arguments."""
    monkeypatch.setattr(cli.commands, "main", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    ended = run(*COMMANDS["merge"], "--json")
    assert (ended.code, ended.document["status"]) == (143, "interrupted")


def test_merge_has_the_defaults_of_the_contract(library: Library, run: Callable[..., Ended]) -> None:
    run(*COMMANDS["merge"])
    assert library.calls == [
        ("merge", (Path("BASE"), Path("ADAPTER"), Path("OUT")), DEFAULTS | {"verify": True, "resume": False})
    ]


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("--orientation=standard", {"orientation": "standard"}),
        ("--orientation=swapped", {"orientation": "swapped"}),
        ("--lora-b-layout=rank_major", {"lora_b_layout": "rank_major"}),
        ("--lora-b-layout=grouped_by_expert", {"lora_b_layout": "grouped_by_expert"}),
        *((f"--dtype={dtype}", {"dtype": dtype}) for dtype in ("keep", "bfloat16", "float16", "float32")),
        *((f"--rounding={how}", {"rounding": how}) for how in ("auto", "nearest", "stochastic", "peft")),
        *((f"--device={device}", {"device": device}) for device in ("cpu", "cuda", "cuda:1", "auto")),
        ("--threads=2", {"threads": 2}),
        ("--overwrite", {"overwrite": True}),
        ("--no-verify", {"verify": False}),
        ("--resume", {"resume": True}),
    ],
)
def test_every_option_of_merge_reaches_it(
    argument: str, options: dict[str, object], library: Library, run: Callable[..., Ended]
) -> None:
    assert run(*COMMANDS["merge"], argument).code == 0
    assert library.calls[0].options == DEFAULTS | {"verify": True, "resume": False} | options


def test_convert_has_the_bases_shapes_to_go_by(library: Library, run: Callable[..., Ended]) -> None:
    assert run(*COMMANDS["convert"], "--base", "BASE", "--transformers", "5.24", "--overwrite").code == 0
    options = {"orientation": "auto", "lora_b_layout": "auto", "overwrite": True, "base": Path("BASE")}
    options["transformers"] = "5.24"
    assert library.calls == [("convert", (Path("ADAPTER"), Path("OUT"), "peft-0.19"), options)]


def test_a_transformers_that_is_no_version_is_a_usage_error(
    library: Library, run: Callable[..., Ended]
) -> None:
    ended = run(*COMMANDS["convert"], "--transformers", "new")
    assert (ended.code, library.calls) == (2, [])
    assert "'new' is no version of transformers" in ended.stderr


def test_a_dry_run_plans_and_does_not_merge(library: Library, run: Callable[..., Ended]) -> None:
    assert run(*COMMANDS["merge"], "--dry-run", "--dtype=float32") == (0, "the plan in words\n", "")
    options = DEFAULTS | {"dtype": "float32"}
    assert library.calls == [("planned", (Path("BASE"), Path("ADAPTER"), Path("OUT")), options)]


def test_inspect_takes_a_base_or_none(library: Library, run: Callable[..., Ended]) -> None:
    run("inspect", "ADAPTER")
    run("inspect", "ADAPTER", "--base", "BASE")
    assert [call.arguments for call in library.calls] == [
        (Path("ADAPTER"), None),
        (Path("ADAPTER"), Path("BASE")),
    ]


@pytest.mark.parametrize("name", ["verify", "compare"])
def test_verify_and_compare_get_out_base_and_adapter(
    name: str, library: Library, run: Callable[..., Ended]
) -> None:
    run(*COMMANDS[name])
    (call,) = library.calls
    assert call[:2] == (name, (Path("MERGED"), Path("BASE"), Path("ADAPTER")))


LAYOUTS = {"--orientation": "swapped", "--lora-b-layout": "grouped_by_expert"}


@pytest.mark.parametrize("name", ["merge", "inspect", "verify", "compare"])
def test_what_refuses_an_ambiguous_layout_takes_the_options_that_its_hint_names(
    name: str, library: Library, run: Callable[..., Ended]
) -> None:
    run(*COMMANDS[name])
    run(*COMMANDS[name], *(f"{option}={value}" for option, value in LAYOUTS.items()))
    names = ("orientation", "lora_b_layout")
    assert [tuple(call.options[one] for one in names) for call in library.calls] == [
        ("auto", "auto"),
        ("swapped", "grouped_by_expert"),
    ]


@pytest.mark.parametrize("option", LAYOUTS)
def test_the_options_of_the_layout_are_the_same_for_every_command(option: str) -> None:
    texts = {
        found.get_help_record(click.Context(cli.commands.commands[name]))
        for name in ("merge", "inspect", "verify", "compare")
        for found in cli.commands.commands[name].params
        if option in found.opts
    }
    assert len(texts) == 1


def test_the_help_says_of_auto_that_it_disturbs_the_output_least() -> None:
    """It does not keep the whole update: a head goes to the nearest, however little that keeps."""
    text = " ".join(run_apart("merge", "--help").stdout.split())
    assert "auto: what disturbs the output least; peft: as merge_and_unload does" in text


def test_compare_of_a_converted_adapter_is_another_comparison(
    library: Library, run: Callable[..., Ended]
) -> None:
    """It takes what was told to convert."""
    run(*COMMANDS["compare"], "--adapter-only")
    run(*COMMANDS["compare"], "--adapter-only", "--orientation=swapped", "--lora-b-layout=rank_major")
    inputs = (Path("MERGED"), Path("BASE"), Path("ADAPTER"))
    assert library.calls == [
        ("compare_adapters", inputs, {"orientation": "auto", "lora_b_layout": "auto"}),
        ("compare_adapters", inputs, {"orientation": "swapped", "lora_b_layout": "rank_major"}),
    ]


def test_demo_takes_a_directory_or_none(library: Library, run: Callable[..., Ended]) -> None:
    run("demo")
    run("demo", "--dir", "here")
    assert [call.arguments for call in library.calls] == [(None,), (Path("here"),)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "BASE", "ADAPTER"], "Missing argument 'OUT'"),
        ([*COMMANDS["merge"], "--orientation=sideways"], "'sideways' is not one of"),
        ([*COMMANDS["merge"], "--device=tpu"], "device is 'tpu', expected one of cpu, cuda, cuda:N, auto"),
        ([*COMMANDS["merge"], "--device=cuda:"], "device is 'cuda:', expected one of"),
        ([*COMMANDS["merge"], "--threads=0"], "0 is not in the range"),
        ([*COMMANDS["merge"], "--resume", "--dry-run"], "nothing for --resume to go on with"),
        ([*COMMANDS["merge"], "--details", "--dry-run"], "predicts what is kept"),
        ([*COMMANDS["merge"], "--push-to=a/b", "--no-verify"], "leave out --no-verify"),
        ([*COMMANDS["merge"], "--push-to=a/b", "--dry-run"], "nothing for --push-to to upload"),
        ([*COMMANDS["merge"], "--push-to=nowhere"], "Invalid value for --push-to: nowhere"),
        (["merge", "no such base", "ADAPTER", "OUT"], "Invalid value for BASE: no such base"),
        (["merge", "BASE", "./nowhere", "OUT"], "Invalid value for ADAPTER: ./nowhere"),
        (["inspect", "./nowhere"], "Invalid value for ADAPTER: ./nowhere"),
        (["inspect", "ADAPTER", "--base", "./nowhere"], "Invalid value for --base: ./nowhere"),
        (["verify", "./nowhere", "--base", "BASE", "--adapter", "ADAPTER"], "'./nowhere' does not exist"),
        (["verify", "MERGED", "--base", "BASE"], "Missing option '--adapter'"),
        ([*COMMANDS["verify"], "--orientation=sideways"], "'sideways' is not one of"),
        (["convert", "ADAPTER", "OUT"], "Missing option '--to'"),
        (["convert", "ADAPTER", "OUT", "--to", "peft-1"], "'peft-1' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_exit_2_before_anything_is_done(
    arguments: list[str], said: str, library: Library, run: Callable[..., Ended]
) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.stdout) == (2, "")
    assert said in ended.stderr
    assert library.calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            [*command[:place], "", *command[place + 1 :]]
            for command in COMMANDS.values()
            for place, word in enumerate(command)
            if word in {"BASE", "ADAPTER", "OUT", "MERGED"}
        ),
        ["inspect", "ADAPTER", "--base", ""],
        ["inspect", "ADAPTER", "--html", ""],
        ["convert", "ADAPTER", "OUT", "--to", "peft-0.19", "--base="],
        [*COMMANDS["merge"], "--push-to="],
        ["demo", "--dir", ""],
        ["canary", "--guards", ""],
        ["canary", "--markdown", ""],
    ],
    ids=" ".join,
)
def test_an_empty_name_is_an_unset_variable_and_not_the_current_directory(
    arguments: list[str], library: Library, run: Callable[..., Ended]
) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.stdout, library.calls) == (2, "", [])
    assert "it is empty, expected a name" in ended.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_what_may_not_be_read_is_no_wrong_argument(
    name: str, library: Library, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening it says so, and that is a failure of the environment."""
    monkeypatch.setattr("os.access", lambda *_: False)
    library.error = PermissionError(errno.EACCES, "Permission denied", "BASE")
    assert run(*COMMANDS[name]).code == 5


def test_a_usage_error_under_json_is_one_json_document_too(run: Callable[..., Ended]) -> None:
    ended = run("merge", "BASE", "--json")
    assert ended.code == 2
    assert ended.document == {
        "schema": 1,
        "loudmerge": __version__,
        "status": "usage",
        "error": "Missing argument 'ADAPTER'.",
        "refusal": None,
    }


def test_a_number_that_json_has_not_is_a_defect_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(as_json=True, quiet=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        terminal.result(Failure("failed", "x", {"kl": float("nan")}))
    assert capsys.readouterr().out == ""


class Screen(io.StringIO):
    """A stderr that somebody looks at."""

    def isatty(self) -> bool:
        return True


def shown(*, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command with two stages shows on a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    with redirect_stderr(Screen()) as screen, Terminal(as_json=False, quiet=quiet).progress() as progress:
        if progress is not None:
            progress("merging", 50, 100)
            progress("verifying", 1, 2)
    return screen.getvalue()


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(quiet=False, monkeypatch=monkeypatch)
    assert "merging" in text
    assert "verifying" in text


def test_quiet_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(quiet=True, monkeypatch=monkeypatch) == ""


def test_no_progress_where_stderr_is_no_terminal() -> None:
    with Terminal(as_json=False, quiet=False).progress() as progress:
        assert progress is None


@pytest.mark.parametrize(("quiet", "said"), [(False, "pushed\n"), (True, "")])
def test_quiet_drops_notes(quiet: bool, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(as_json=False, quiet=quiet).note("pushed")
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_any_other_heavy_package(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from loudmerge.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "print(*(name for name in sys.modules if '.' not in name), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    heavy = {"torch", "transformers", "peft", "numpy", "safetensors", "huggingface_hub", "rich"}
    assert not heavy & set(done.stderr.split())


def test_help_takes_less_than_a_quarter_second_of_cpu() -> None:
    """At least once in five times: the first may have to compile the modules, and others load the machine."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_apart("--help").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 0.25 for _ in range(5))


def test_help_names_every_command_and_exit_code() -> None:
    text = run_apart("--help").stdout
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert all(f"{code} " in text for code in (*range(6), 130))


def test_a_command_is_needed() -> None:
    done = run_apart()
    assert (done.code, done.stdout) == (2, "")
    assert "Usage: loudmerge" in done.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert run_apart("--version").stdout == f"loudmerge, version {__version__}\n"
