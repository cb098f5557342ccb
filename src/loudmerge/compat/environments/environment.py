"""A virtual environment for each cell, with this project installed from its checkout: made, stamped, reused.

pip runs with the user's own configuration (mirrors, constraints, credentials), or uv in its place. Standard
library only.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loudmerge.compat.environments import links
from loudmerge.compat.environments.children import Children
from loudmerge.compat.environments.commands import NotInstalled, answer, logged
from loudmerge.compat.judging import document
from loudmerge.compat.judging.cells import DEV, LATEST, PACKAGES, Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TORCH, TORCH_INDEX, GITHUB = "LOUDMERGE_TORCH", "LOUDMERGE_TORCH_INDEX", "LOUDMERGE_GITHUB"
SHOWN = (*PACKAGES, "torch")
STAMP = "stamp.json"
EXTRA = "dev"

LEFT_OUT = ("VIRTUAL_ENV", "CI")
LEFT_OUT_WITH = ("PYTHON", "PYTEST_", "HYPOTHESIS_")
"""Environment variables, and how the names of others begin, that are not seen inside. CI would have property
tests try many times as many inputs: its own run does that. Python's would bring in other packages, switch
assertions off or, without bytecode, have every process compile torch and transformers; pytest's and
Hypothesis's choose which tests run, and what is an error."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_VERSIONS = f"""
import json, platform
from importlib.metadata import version
print(json.dumps({{**{{name: version(name) for name in {SHOWN}}}, "python": platform.python_version()}}))
"""


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
        wanted = json.loads(json.dumps(asdict(stamp)))
        return self.python.exists() and bool(self.stamped().get("stamp") == wanted)

    def stamped(self) -> dict[str, Any]:
        """What the stamp's file says; empty where there is none, or none that was written to its end."""
        try:
            found = document.read(self.directory / STAMP)
        except ValueError:
            return {}
        whole = isinstance(found.get("stamp"), dict) and isinstance(found.get("versions"), dict)
        return found if whole else {}

    def versions(self) -> dict[str, str]:
        """Of transformers, peft, trl, torch and python, as they were installed; none without a stamp."""
        return {str(name): str(version) for name, version in self.stamped().get("versions", {}).items()}

    def running(self, children: Children) -> dict[str, str]:
        """Of the same, as they are there now: it may have been changed since. Raises NotInstalled."""
        found: dict[str, str] = json.loads(answer([str(self.python), "-I", "-c", _VERSIONS], children))
        return found

    def make(
        self, root: Path, requirements: Sequence[str], installer: Installer, children: Children, log: Path
    ) -> bool:
        """Makes it, unless it is there with the same stamp; says whether it did.

        root: the checkout. log: what the installer says is kept there. Raises NotInstalled, Unreachable.
        """
        stamp = Stamp.of(root, requirements, installer)
        if self.is_of(stamp):
            return False
        (self.directory / STAMP).unlink(missing_ok=True)  # first: what is half removed is of no pins
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        wanted = ["-e", f"{root}[{EXTRA}]", *stamp.requirements]
        log.write_text("", "utf-8")
        logged(installer.create(self.directory), children, log)
        seeded = self._seed(stamp)
        logged(installer.install(self.python, wanted), children, log)
        _share(self.directory, log)
        versions = self.running(children)
        pinned = {name: pin for name, pin in pins_of(stamp.requirements).items() if "://" not in pin}
        others = differing(versions, pinned)
        if others:
            raise NotInstalled(f"the installer left {others}: see the log")
        origins = {name: str(other) for name, other in seeded.items()}
        document.write(
            self.directory / STAMP, {"stamp": asdict(stamp), "seeded": origins, "versions": versions}
        )
        return True

    def _seed(self, stamp: Stamp) -> dict[str, Path]:
        """With what the environments beside it that torch came to from the same place have of its pins."""
        alike = [place for place, index in _complete(self.directory.parent).items() if index == stamp.index]
        return links.seed(self.directory, alike, stamp.requirements)

    def share_bytecode(self) -> None:
        """Takes what the environments it was seeded from have compiled since."""
        seeded = self.stamped().get("seeded", {})
        links.share_bytecode(self.directory, {name: Path(other) for name, other in seeded.items()})


def _complete(folder: Path) -> dict[Path, str | None]:
    """The environments in a folder that were made to the end, and the index of each one's torch."""
    stamps = {file.parent: Environment(file.parent).stamped() for file in sorted(folder.glob(f"*/{STAMP}"))}
    return {place: found["stamp"].get("index") for place, found in stamps.items() if found}


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
    """One thread for each process, nothing of the Hub's, and nothing from outside that changes what runs."""
    kept = {
        name: value
        for name, value in environ.items()
        if name not in LEFT_OUT and not name.startswith(LEFT_OUT_WITH)
    }
    return {**kept, **dict.fromkeys(THREADS, "1"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def pins(cell: Cell, installer: Installer, environ: Mapping[str, str], children: Children) -> dict[str, str]:
    """Package -> version of a cell: pinned, newest on the index (latest), or a head on GitHub, a URL (dev).

    Raises Unreachable, NotInstalled.
    """
    if cell.lane == LATEST:
        return newest(installer, children)
    if cell.lane == DEV:
        return heads(cell.versions, environ.get(GITHUB) or "https://github.com", children)
    return dict(cell.versions)


def differing(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """`peft 0.21.2, expected 0.19.1`, for each version that is not the wanted one; empty where all are.

    What follows a `+` says how a version was built, and zeros at the end say nothing.
    """
    names = [name for name in wanted if _plain(found.get(name, "none")) != _plain(wanted[name])]
    return ", ".join(f"{name} {found.get(name, 'none')}, expected {wanted[name]}" for name in names)


def _plain(version: str) -> str:
    return re.sub(r"(\.0)+$", "", version.partition("+")[0])


def requirements(pinned: Mapping[str, str]) -> tuple[str, ...]:
    """What an installer takes for `pins`."""
    return tuple(f"{name} @ {pin}" if "://" in pin else f"{name}=={pin}" for name, pin in pinned.items())


def pins_of(wanted: Sequence[str]) -> dict[str, str]:
    """Package -> version or URL, of the requirements that name just one: the way back of `requirements`."""
    found = (re.fullmatch(r"([\w.-]+)(?:==([\w.!+-]+)| @ (\S+))", one) for one in wanted)
    return {pin[1]: pin[2] or pin[3] for pin in found if pin}


def newest(installer: Installer, children: Children) -> dict[str, str]:
    """transformers, peft and trl that this Python gets today where nothing but torch is pinned.

    Raises Unreachable, NotInstalled. https://pip.pypa.io/en/stable/reference/installation-report/
    """
    wanted = [*PACKAGES, installer.torch]
    if installer.uv:
        return _newest_by_uv(wanted, installer, children)
    index = installer.beside()
    line = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--quiet"]
    # With a log pip draws its bars into the report, however quiet it is to be.
    line += ["--progress-bar=off", "--dry-run", "--ignore-installed", "--report", "-"]
    report = json.loads(answer([*line, *index, *wanted], children))
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    return {name: str(found[name]) for name in PACKAGES}


def _newest_by_uv(wanted: Sequence[str], installer: Installer, children: Children) -> dict[str, str]:
    index = installer.beside()
    line = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", sys.executable]
    found = answer([*line, *index, "-"], children, "\n".join(wanted)).split()
    return {name: pin for name, _, pin in (line.partition("==") for line in found) if name in PACKAGES}


def heads(repositories: Mapping[str, str], base: str, children: Children) -> dict[str, str]:
    """Package -> URL of its repository's default branch at the commit it has now.

    Raises Unreachable, NotInstalled.
    """
    found = {}
    for name, repository in repositories.items():
        url = f"{base.rstrip('/')}/{repository}"
        commit = answer(["git", "ls-remote", url, "HEAD"], children).split()[:1]
        if not commit:
            raise NotInstalled(f"git ls-remote: {repository} has no HEAD")
        found[name] = f"git+{url}@{commit[0]}"
    return found
