"""The project's chores: `nox -l` lists them, `nox -s NAME` runs one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

# Environments have no bytecode but what is made as modules are first imported: torch's takes ten seconds,
# and who forbids to write it pays them in each of the many processes that the tests start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# As at Ctrl-C nox ends what it runs: without, that goes on alone.
signal.signal(signal.SIGTERM, signal.default_int_handler)

# Seconds until nox kills what it has told to end: what an installer had unpacked is removed first.
GRACE = 10

PINS: dict[str, Any] = nox.project.load_toml("pyproject.toml")["tool"]["loudmerge"]["pins"]

# Checks every annotation of loudmerge at every call; an int may stand where a float is expected.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

# What has transformers or PEFT as its oracle, but for the long run on a real model.
ASK_THE_LIBRARIES = ["tests/e2e", "tests/unit/comparing/test_relay.py", "--ignore=tests/e2e/test_smollm2.py"]


def install(session: nox.Session, versions: str = "newest", *, seeded: bool = True) -> None:
    """Installs loudmerge for development, with the pins of pyproject.toml.

    seeded: another session's torch of this version will do, whichever index it came from.
    """
    torch = os.environ.get("LOUDMERGE_TORCH") or PINS["torch"]
    index = os.environ.get("LOUDMERGE_TORCH_INDEX")
    beside = ["--extra-index-url", index] if index else []
    # Their torch is the same 700 MB: taken from another, before and after.
    environments = [str(one) for one in Path(session.virtualenv.location).parent.iterdir() if one.is_dir()]
    share = (
        "python",
        "-m",
        "loudmerge.compat.environments.links",
        session.virtualenv.location,
        *environments,
    )
    if seeded:
        session.run(*share, torch, env={"PYTHONPATH": "src"})
    # Most of what is installed is never imported.
    session.install("--no-compile", *beside, "-e", ".[dev]", torch, *PINS[versions])
    session.run(*share)


def make_bytecode(session: nox.Session) -> None:
    """Of torch: the canary's probes import it, and write nothing."""
    session.run("python", "-c", "import torch")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types: ruff check, ruff format --check, mypy --strict."""
    install(session)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
@nox.parametrize("versions", ["transformers-4", "newest"], ids=["transformers-4", "newest"])
def tests(session: nox.Session, versions: str) -> None:
    """Run the tests; with transformers 4 those that ask it or PEFT. Arguments after -- go to pytest."""
    install(session, versions)
    # Our own plugins would import loudmerge before its annotations can be checked.
    ours = ("-p", "no:loudmerge.canary.plugin", "-p", "no:loudmerge.conformance.plugin")
    pytest = ["pytest", "-n", "auto", "--durations=20", *ours]
    # With every call checked tests take three times as long: unit tests do, on few examples of a property.
    checked = [*pytest, f"--jaxtyping-packages=loudmerge,{CHECKER}"]
    if session.posargs:
        session.run(*checked, *session.posargs)
    elif versions == "transformers-4":
        session.run(*pytest, *ASK_THE_LIBRARIES)
    else:
        # They reach every branch that counts. Tracing the others, too, would take half of their time again.
        session.run(*checked, "tests/unit", "--hypothesis-profile=dev", "--cov", "--cov-report=")
        session.run("coverage", "report", "--fail-under=100")
        for rest in (["tests/e2e"], ["tests/unit", "-m", "hypothesis"]):
            session.run(*pytest, *rest)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a tiny MoE adapter, then merge, verify and compare it (`loudmerge demo`)."""
    install(session)
    session.run("loudmerge", "demo", *session.posargs)


@nox.session
def canary(session: nox.Session) -> None:
    """Check that upstream still keeps what must hold; needs the package index. Arguments go to pytest."""
    install(session)
    make_bytecode(session)
    session.run("pytest", "tests/canary", *session.posargs)


@nox.session
def drills(session: nox.Session) -> None:
    """Take each guard out of upstream's real files, and require the canary to notice; arguments after --."""
    install(session)
    make_bytecode(session)
    session.run("python", "-m", "tests.drills", *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Train, merge, reload, compare in every cell of matrix.toml; arguments after -- (see --help)."""
    # Nothing is installed here: each cell has an environment of its own.
    session.install("tomli>=2.0; python_version < '3.11'")
    command = ["python", "-m", "loudmerge.compat", *session.posargs]
    session.run(*command, env={"PYTHONPATH": "src"}, terminate_timeout=GRACE)


@nox.session
def bisect(session: nox.Session) -> None:
    """Name the release that changed something: --package peft --good 0.18.1 --bad 0.19.1 after --."""
    # Nothing else is installed here: each version has an environment of its own.
    session.install("packaging>=24.0", "requests>=2.32", "tomli>=2.0; python_version < '3.11'")
    command = ["python", "-m", "loudmerge.compat.bisect", *session.posargs]
    session.run(*command, env={"PYTHONPATH": "src"}, terminate_timeout=GRACE)


@nox.session
def releases(session: nox.Session) -> None:
    """Ask the package index what is newer than the matrix's cells; --json, --markdown, --lag after --."""
    session.install("packaging>=24.0", "requests>=2.32", "tomli>=2.0; python_version < '3.11'")
    # Exit code 4: something is newer, which is an answer.
    command = ["python", "-m", "loudmerge.compat.releases", *session.posargs]
    session.run(*command, env={"PYTHONPATH": "src"}, success_codes=[0, 4])


@nox.session
def e2e_gpu(session: nox.Session) -> None:
    """Qwen3-30B-A3B end to end on a GPU; arguments after -- (see --help)."""
    # Another session's torch may be a build for CPU alone: an installer takes its version for this one's.
    install(session, seeded=False)
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    session.run(
        "python", "-m", "loudmerge.compat.gpu", *session.posargs, env={"CUDA_VISIBLE_DEVICES": device}
    )
