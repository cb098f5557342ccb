"""A virtual environment for each cell, with this project installed from its checkout: made, stamped, reused.

pip runs with the user's own configuration (mirrors, constraints, credentials), or uv in its place. Standard
library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loudmerge.compat import links
from loudmerge.compat.cells import DEV, LATEST, PACKAGES, Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TORCH, TORCH_INDEX, GITHUB = "LOUDMERGE_TORCH", "LOUDMERGE_TORCH_INDEX", "LOUDMERGE_GITHUB"
SHOWN = (*PACKAGES, "torch")
STAMP = "stamp.json"
EXTRA = "dev"

LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "CI")
"""Environment variables that are not seen inside. CI would have property tests try many times as many inputs:
its own run does that. Without bytecode every process would compile torch and transformers."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

INSTALL_SECONDS, ASK_SECONDS = 1800, 300
"""How long an installation, and a question to an index or a host, may take."""

_VERSIONS = f"""
import json, platform
from importlib.metadata import version
print(json.dumps({{**{{name: version(name) for name in {SHOWN}}}, "python": platform.python_version()}}))
"""

_UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|NewConnectionError|NameResolutionError|ProxyError|ReadTimeout|SSLError"
    r"|from versions: none|Could not resolve|unable to access|Failed to fetch|error sending request|dns error"
)
"""How pip, uv and git say that a host did not answer."""


class NotInstalled(RuntimeError):
    """The environment could not be made; the message is what the installer said."""


class Unreachable(RuntimeError):
    """The package index or the host of the heads did not answer."""


@dataclass(frozen=True)
class Installer:
    """What installs. torch: its requirement. index: a further one, which has it. uv: in place of pip."""

    torch: str
    index: str | None = None
    uv: bool = False

    @classmethod
    def of(cls, root: Path, environ: Mapping[str, str], *, uv: bool = False) -> Installer:
        """As pyproject.toml's [tool.loudmerge.pins] and the environment variables say."""
        pin = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["loudmerge"]["pins"][
            "torch"
        ]
        index = environ.get(TORCH_INDEX) or None
        return cls(environ.get(TORCH) or pin, index, uv or bool(environ.get("LOUDMERGE_UV")))

    def beside(self) -> list[str]:
        """The options that name torch's further index. uv looks for a package in one index alone."""
        strategy = ["--index-strategy", "unsafe-best-match"] if self.uv else []
        return ["--extra-index-url", self.index, *strategy] if self.index else []

    def create(self, directory: Path) -> list[str]:
        """The command that makes an empty environment of this Python."""
        if self.uv:
            return ["uv", "venv", "--quiet", "--python", sys.executable, str(directory)]
        return [sys.executable, "-m", "venv", "--without-pip", str(directory)]

    def install(self, python: Path, wanted: Sequence[str]) -> list[str]:
        """The command that installs all of `wanted` at once, so that the resolver sees every pin.

        It is this Python's pip: the one that a new environment would have is as old as its Python, and those
        of 2023 take twice as long. https://pip.pypa.io/en/stable/topics/python-option/
        Bytecode is made when a module is first imported: most of what is installed never is.
        """
        index = self.beside()
        if self.uv:
            return ["uv", "pip", "install", "--python", str(python), *index, *wanted]
        line = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-input",
            "--no-color",
            "--disable-pip-version-check",
        ]
        return [*line, "--no-compile", "--progress-bar=off", *index, *wanted]


@dataclass(frozen=True)
class Stamp:
    """What an environment was made of. project: a hash of pyproject.toml's [project], which has the extra."""

    requirements: tuple[str, ...]
    index: str | None
    python: str
    root: str
    project: str

    @classmethod
    def of(cls, root: Path, requirements: Sequence[str], installer: Installer) -> Stamp:
        """What an environment made now would have."""
        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
        text = json.dumps(project, sort_keys=True).encode()
        python = platform.python_version()
        return cls(
            (installer.torch, *requirements),
            installer.index,
            python,
            str(root),
            hashlib.sha256(text).hexdigest(),
        )


@dataclass(frozen=True)
class Environment:
    """A directory with a virtual environment."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def is_of(self, stamp: Stamp) -> bool:
        """Whether it was made, to the end, of exactly this."""
        try:
            found = json.loads((self.directory / STAMP).read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        wanted = json.loads(json.dumps(asdict(stamp)))
        return self.python.exists() and bool(found.get("stamp") == wanted)

    def versions(self) -> dict[str, str]:
        """Of transformers, peft, trl, torch and python, as they were installed."""
        found = json.loads((self.directory / STAMP).read_text("utf-8"))["versions"]
        return {str(name): str(version) for name, version in found.items()}

    def make(self, root: Path, requirements: Sequence[str], installer: Installer, log: Path) -> bool:
        """Makes it, unless it is there with the same stamp; says whether it did.

        root: the checkout. log: what the installer says is kept there. Raises NotInstalled, Unreachable.
        """
        stamp = Stamp.of(root, requirements, installer)
        if self.is_of(stamp):
            return False
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        wanted = ["-e", f"{root}[{EXTRA}]", *stamp.requirements]
        log.write_text("", "utf-8")
        _logged(installer.create(self.directory), log)
        seeded = self._seed(stamp)
        _logged(installer.install(self.python, wanted), log)
        _share(self.directory, log)
        document = {
            "stamp": asdict(stamp),
            "seeded": {name: str(other) for name, other in seeded.items()},
            "versions": json.loads(_said([str(self.python), "-c", _VERSIONS])),
        }
        (self.directory / STAMP).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        return True

    def _seed(self, stamp: Stamp) -> dict[str, Path]:
        """With what the environments beside it that torch came to from the same place have of its pins."""
        alike = [place for place, index in _complete(self.directory.parent).items() if index == stamp.index]
        return links.seed(self.directory, alike, stamp.requirements)

    def share_bytecode(self) -> None:
        """Takes what the environments it was seeded from have compiled since."""
        seeded = json.loads((self.directory / STAMP).read_text("utf-8")).get("seeded", {})
        links.share_bytecode(self.directory, {name: Path(other) for name, other in seeded.items()})


def _complete(folder: Path) -> dict[Path, str | None]:
    """The environments in a folder that were made to the end, and the index of each one's torch."""
    found: dict[Path, str | None] = {}
    for file in sorted(folder.glob(f"*/{STAMP}")):
        with contextlib.suppress(FileNotFoundError):  # made anew just now
            found[file.parent] = json.loads(file.read_text("utf-8"))["stamp"]["index"]
    return found


def _share(directory: Path, log: Path) -> None:
    """With the environments beside it that are complete: eight of their own do not fit on every disk."""
    others = list(_complete(directory.parent))
    try:
        said = f"{links.share(directory, others) >> 20} MiB shared with the other environments, {len(others)}"
    except OSError as error:
        said = f"not shared with the other environments: {error}"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{said}\n")


def sealed(environ: Mapping[str, str]) -> dict[str, str]:
    """One thread for each process, nothing of the Hub's, and no package from outside the environment."""
    kept = {name: value for name, value in environ.items() if name not in LEFT_OUT}
    return {**kept, **dict.fromkeys(THREADS, "1"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def pins(cell: Cell, installer: Installer, environ: Mapping[str, str]) -> dict[str, str]:
    """Package -> version of a cell: pinned, newest on the index (latest), or a head on GitHub, a URL (dev).

    Raises Unreachable.
    """
    if cell.lane == LATEST:
        return newest(installer)
    if cell.lane == DEV:
        return heads(cell.versions, environ.get(GITHUB) or "https://github.com")
    return dict(cell.versions)


def requirements(pinned: Mapping[str, str]) -> tuple[str, ...]:
    """What an installer takes for `pins`."""
    return tuple(f"{name} @ {pin}" if "://" in pin else f"{name}=={pin}" for name, pin in pinned.items())


def newest(installer: Installer) -> dict[str, str]:
    """transformers, peft and trl that this Python gets today where nothing but torch is pinned.

    Raises Unreachable. https://pip.pypa.io/en/stable/reference/installation-report/
    """
    wanted = [*PACKAGES, installer.torch]
    if installer.uv:
        return _newest_by_uv(wanted, installer)
    index = installer.beside()
    line = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    report = json.loads(_said([*line, "--dry-run", "--ignore-installed", "--report", "-", *index, *wanted]))
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    return {name: str(found[name]) for name in PACKAGES}


def _newest_by_uv(wanted: Sequence[str], installer: Installer) -> dict[str, str]:
    index = installer.beside()
    line = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", sys.executable]
    found = _said([*line, *index, "-"], "\n".join(wanted)).split()
    return {name: pin for name, _, pin in (line.partition("==") for line in found) if name in PACKAGES}


def heads(repositories: Mapping[str, str], base: str) -> dict[str, str]:
    """Package -> URL of its repository's default branch at the commit it has now. Raises Unreachable."""
    found = {}
    for name, repository in repositories.items():
        url = f"{base.rstrip('/')}/{repository}"
        commit = _said(["git", "ls-remote", url, "HEAD"]).split()[:1]
        if not commit:
            raise Unreachable(f"git ls-remote: {repository} has no HEAD")
        found[name] = f"git+{url}@{commit[0]}"
    return found


def _said(command: Sequence[str], asked: str = "") -> str:
    """What a question's answer is. Raises Unreachable with the last line of what went wrong."""
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(  # noqa: S603 - lines made here
            command, input=asked, capture_output=True, text=True, check=False, timeout=ASK_SECONDS, env=quiet
        )
    except FileNotFoundError as error:
        raise Unreachable(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{command[0]} had no answer after {ASK_SECONDS} s") from error
    if done.returncode:
        raise Unreachable(said(done.stderr))
    return done.stdout


def _logged(command: Sequence[str], log: Path) -> None:
    """Runs a command, its words into `log`. Raises NotInstalled or Unreachable with the last of them."""
    with log.open("a", encoding="utf-8") as file:
        start = file.tell()
        heading = f"$ {' '.join(command)}\n"
        file.write(heading)
        file.flush()
        try:
            code = subprocess.run(  # noqa: S603 - lines made here
                command, stdout=file, stderr=file, check=False, timeout=INSTALL_SECONDS
            ).returncode
        except FileNotFoundError as error:
            raise NotInstalled(f"{command[0]} is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise NotInstalled(f"{command[0]} was not done after {INSTALL_SECONDS} s") from error
    if code:
        text = log.read_text("utf-8")[start + len(heading) :]
        raise (Unreachable if _UNREACHABLE.search(text) else NotInstalled)(said(text))


def said(text: str) -> str:
    """The line that says what is wrong, without addresses, which may hold credentials."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|error|fatal)\b", line)]
    telling = [line for line in errors if "ResolutionImpossible" not in line]
    line = (telling or errors or lines or ["it said nothing"])[-1]
    return re.sub(r"[a-z+]+://\S+", "…", re.sub(r"host='[^']*'", "host=…", line))[:400]
