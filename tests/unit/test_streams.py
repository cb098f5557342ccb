"""What is wrong with stdout and stderr changes no exit code but that of a result that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest

COMMAND = [sys.executable, "-m", "loudmerge"]
USAGE = ["merge", "--json"]


def shell(redirection: str, command: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command with its streams redirected."""
    line = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    environment = {**os.environ, **environment}
    return subprocess.run(line, capture_output=True, check=False, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("redirection", "arguments", "code"),
    [
        (">&-", ["--version"], 0),
        (">&-", USAGE, 2),
        ("2>&-", ["--version"], 0),
        ("2>&-", USAGE, 2),
        ("2>/dev/full", USAGE, 2),
        (">&- 2>&- <&-", USAGE, 2),
    ],
)
def test_a_stream_that_is_closed_changes_no_exit_code(
    redirection: str, arguments: list[str], code: int
) -> None:
    done = shell(redirection, [*COMMAND, *arguments])
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    if arguments == USAGE and redirection.startswith("2"):
        assert json.loads(done.stdout)["status"] == "usage"


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (USAGE, 2)])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_closes_early_changes_no_exit_code(stream: str, arguments: list[str], code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
    done = subprocess.run([*COMMAND, *arguments], check=False, timeout=120, **streams)  # type: ignore[call-overload]
    os.close(write)
    assert done.returncode == code
    assert b"Traceback" not in (done.stderr or b"")


def test_a_stderr_that_would_have_to_wait_changes_no_exit_code() -> None:
    """A pipe that nobody empties, and that does not block: as some programs make it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while os.write(write, b"x" * 4096):
            pass
    done = subprocess.run([*COMMAND, *USAGE], check=False, timeout=120, stdout=subprocess.PIPE, stderr=write)
    os.close(read)
    os.close(write)
    assert done.returncode == 2
    assert json.loads(done.stdout)["status"] == "usage"


@pytest.mark.parametrize("arguments", [["--version"], USAGE])
def test_a_full_disk_under_stdout_is_a_failure_of_the_environment(arguments: list[str]) -> None:
    done = shell(">/dev/full", [*COMMAND, *arguments])
    assert done.returncode == 5
    assert done.stderr.endswith(b"the environment failed: stdout: [Errno 28] No space left on device\n")
    assert b"Traceback" not in done.stderr


def ends(main: str) -> list[str]:
    """The command with another body."""
    program = (
        f"import os, click, loudmerge.__main__ as command\ndef main():\n    {main}\n    raise SystemExit(4)\n"
    )
    return [sys.executable, "-c", f"{program}command.main = main\ncommand.run()"]


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", b"\\u65e5"), ("utf-8", "日".encode())])
def test_what_the_encoding_has_not_is_escaped(encoding: str, shown: bytes) -> None:
    """A name that is not UTF-8 has lone surrogates, which no encoding has."""
    main = "click.echo('a\\u65e5\\udce9'); click.echo('b\\u65e5\\udce9', err=True)"
    done = shell("", ends(main), PYTHONIOENCODING=encoding)
    assert done.returncode == 4
    assert (done.stdout, done.stderr) == (b"a" + shown + b"\\udce9\n", b"b" + shown + b"\\udce9\n")


def test_no_file_gets_the_number_of_a_stream_that_is_closed() -> None:
    """What a library writes to its stderr would be in that file."""
    done = shell(">&- 2>&- <&-", ends("assert os.open(os.devnull, os.O_RDONLY) > 2"))
    assert done.returncode == 4


def test_a_semaphore_is_released_at_the_end() -> None:
    """Else Python says on stderr that it leaked. tqdm makes one; from Python 3.14 on of this kind."""
    lines = [
        "import multiprocessing",
        "from loudmerge import __main__",
        "lock = multiprocessing.get_context('spawn').RLock()",
        "def main(): raise SystemExit(0)",
        "__main__.main = main",
        "__main__.run()",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")
