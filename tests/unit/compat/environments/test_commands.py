"""What a failed command says, and whether a host is to blame: by the last error, of the real pip and git."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from loudmerge.compat.environments import commands
from loudmerge.compat.environments.children import Children
from loudmerge.compat.environments.commands import NotInstalled, Unreachable
from tests.unit.compat.environments.test_children import command, ends
from tests.unit.compat.local_index import LocalIndex, ask

NEVER_HEARD_OF = "this-is-no-package-of-anyones"
PIP = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "--disable-pip-version-check"]
RETRY = "WARNING: Retrying (Retry(total=4)) after connection broken by 'ReadTimeoutError(...)': /simple/peft/"


NO_ANSWER = (
    "CONNECT tunnel failed, response 403",
    "Received HTTP code 403 from proxy after CONNECT",
    "SSL certificate problem: unable to get local issuer certificate",
    "server certificate verification failed. CAfile: none CRLfile: none",
    "Empty reply from server",
    "GnuTLS recv error (-110): The TLS connection was non-properly terminated.",
    "Resolving timed out after 300000 milliseconds",
    "The requested URL returned error: 429",
)
"""What git says of a host or a proxy that let nobody through, as curl worded it."""


def runs(words: str) -> list[str]:
    """A command that says this and fails."""
    return [sys.executable, "-c", f"import sys; sys.stderr.write({words!r}); sys.exit(1)"]


@pytest.mark.parametrize(
    ("words", "raised"),
    [
        (f"{RETRY}\nCollecting peft\nERROR: Failed building wheel for peft", NotInstalled),
        (f"{RETRY}\nERROR: No matching distribution found for peft==0.1", NotInstalled),
        (f"{RETRY}\nKilled", NotInstalled),
        ("", NotInstalled),
        ("fatal: repository 'https://h/o/pfet/' not found", NotInstalled),
        ("fatal: unable to access 'https://h/o/peft/': The requested URL returned error: 403", NotInstalled),
        ("fatal: unable to access 'https://h/o/peft/': The requested URL returned error: 503", Unreachable),
        ("fatal: unable to access 'https://h/o/peft/': Could not resolve host: h", Unreachable),
        *((f"fatal: unable to access 'https://h/o/peft/': {why}", Unreachable) for why in NO_ANSWER),
        (
            "fatal: unable to connect to h:\nh[0: 140.82.121.4]: errno=Network is unreachable",
            Unreachable,
        ),
        (
            "ERROR: Exception:\nTraceback (most recent …):\nReadTimeoutError: Read timed out.",
            Unreachable,
        ),
        (
            "ERROR: no\nerror: Failed to fetch: `h`\n  Caused by: error sending request (h)",
            Unreachable,
        ),
        ("error: Failed to fetch: `h`\n  Caused by: HTTP status client error (404 Not Found)", NotInstalled),
    ],
)
def test_the_last_error_decides_whether_a_host_is_to_blame(
    tmp_path: Path, words: str, raised: type[Exception]
) -> None:
    with pytest.raises(raised):
        commands.answer(runs(words), Children())
    log = tmp_path / "log.txt"
    log.write_text("ERROR: Read timed out.\n", "utf-8")
    with pytest.raises(raised):
        commands.logged(runs(words), Children(), log)


def test_a_package_that_the_index_has_not_is_no_fault_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's last error is the same where the index does not answer; here with no retries to be seen."""
    monkeypatch.setenv("PIP_RETRIES", "0")
    index = LocalIndex(tmp_path)
    index.offer("peft", "0.19.1")
    index.use(monkeypatch)
    monkeypatch.setenv("PIP_RETRIES", "0")
    for wanted in (NEVER_HEARD_OF, "peft==0.2"):
        with pytest.raises(NotInstalled, match=f"No matching distribution found for {wanted}"):
            commands.answer([*PIP, wanted], Children())
        with pytest.raises(NotInstalled):
            commands.logged([*PIP, wanted], Children(), tmp_path / "log.txt")
    ask(monkeypatch, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(Unreachable, match=f"No matching distribution found for {NEVER_HEARD_OF}"):
        commands.answer([*PIP, NEVER_HEARD_OF], Children())
    with pytest.raises(Unreachable):
        commands.logged([*PIP, NEVER_HEARD_OF], Children(), tmp_path / "log.txt")


def test_a_head_that_pip_s_git_cannot_fetch_is_unreachable_only_where_its_host_is(tmp_path: Path) -> None:
    commit = "0" * 40
    with pytest.raises(Unreachable):
        commands.answer([*PIP, f"peft @ git+http://127.0.0.1:9/h/peft@{commit}"], Children())
    with pytest.raises(NotInstalled):
        commands.answer([*PIP, f"peft @ git+{tmp_path.as_uri()}/h/peft@{commit}"], Children())


@pytest.mark.parametrize(
    ("ssh", "raised"),
    [
        ("ssh: connect to host h port 22: Connection timed out", Unreachable),
        ("git@h: Permission denied (publickey).", NotInstalled),
    ],
)
def test_git_s_ssh_says_why_before_git_says_that_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ssh: str, raised: type[Exception]
) -> None:
    script = tmp_path / "ssh"
    script.write_text(f"#!/bin/sh\necho '{ssh}' >&2\nexit 255\n", "utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")  # pip sets GIT_SSH_COMMAND
    monkeypatch.delenv("GIT_SSH_COMMAND", raising=False)
    with pytest.raises(raised, match=r"^fatal: Could not read from remote repository"):
        commands.answer(["git", "ls-remote", "ssh://git@h/o/peft", "HEAD"], Children())
    with pytest.raises(raised):
        commands.answer([*PIP, f"peft @ git+ssh://git@h/o/peft@{'0' * 40}"], Children())


def test_a_command_that_is_not_done_in_time_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it was given to unpack into is removed."""
    monkeypatch.chdir(tmp_path)
    for seconds in ("ASK_SECONDS", "INSTALL_SECONDS"):
        monkeypatch.setattr(commands, seconds, 2)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "scratch").mkdir()
    python, option, code = command(60)
    unpacking = [python, option, f"import tempfile\ntempfile.mkdtemp()\n{code}"]
    with pytest.raises(Unreachable, match="had no answer after 2 s"):
        commands.answer(unpacking, Children())
    assert ends(tmp_path)
    with pytest.raises(NotInstalled, match="was not done after 2 s"):
        commands.logged(unpacking, Children(), tmp_path / "log.txt")
    assert ends(tmp_path)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("Collecting peft\nERROR: no such thing\nmore", "ERROR: no such thing"),
        (
            "ERROR: Cannot install a and b\n\nThe conflict\nERROR: ResolutionImpossible: for help visit https://p.io/x",
            "ERROR: Cannot install a and b",
        ),
        ("just this\n\n", "just this"),
        ("", "it said nothing"),
        ("ERROR: https://me:secret@index.invalid/simple failed", "ERROR: … failed"),
    ],
)
def test_the_telling_line_of_an_installer(words: str, line: str) -> None:
    assert commands.said(words) == line
