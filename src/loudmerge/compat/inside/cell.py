"""What runs inside one cell's environment: `python -m loudmerge.compat.inside.cell JOB.json OUT.json`.

One process for each part, so that a crash of one leaves the others' results: tests (unit and property tests,
the 52-case suite among them), journey (train, merge, reload, compare), families (every family that this
transformers can build), cross (the adapters of other cells, merged here).
"""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import loudmerge
from loudmerge.compat.environments.environment import SHOWN
from loudmerge.compat.inside import junit
from loudmerge.demo import training
from loudmerge.demo.training import ADAPTER, BASE
from loudmerge.errors import require
from loudmerge.reading.sidefiles import REPORT

TESTS, JOURNEY, FAMILIES, CROSS = "tests", "journey", "families", "cross"
PARTS = (TESTS, JOURNEY, FAMILIES, CROSS)

ASIDE = tuple(f"tests/unit/{room}" for room in ("canary", "canary_rules", "compat", "conformance"))
"""They are about upstream's source, this matrix and other tools, whatever is installed."""
UNIT_TESTS = ("tests/unit", *(f"--ignore={room}" for room in ASIDE))
FAMILY_TESTS = ("tests/e2e/test_families.py",)
MODULES = ("**/*.py",)
APART = ("canary", "conformance")
"""Rooms that no cell runs."""
TESTED = (
    *("pyproject.toml", "tests/*.py", "tests/unit/**/*", "tests/support/**/*"),
    *("tests/e2e/conftest.py", *FAMILY_TESTS),
)
"""Files that `source` reads: of loudmerge, and of the checkout."""
PYTEST = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:loudmerge.canary.plugin"),
    *("-p", "loudmerge.compat.inside.counted"),
)


INTERRUPTED = 2
"""pytest's exit code, also where a module cannot be imported: then it is a case, and no test runs."""


@dataclass(frozen=True)
class Job:
    """One part. root: the checkout. directory: the cell's own. others: other cells', by name."""

    part: str
    root: Path
    directory: Path
    others: Mapping[str, Path]

    def to_json(self) -> dict[str, Any]:
        others = {name: str(directory) for name, directory in self.others.items()}
        return {"part": self.part, "root": str(self.root), "directory": str(self.directory), "others": others}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        others = {name: Path(directory) for name, directory in document["others"].items()}
        return cls(document["part"], Path(document["root"]), Path(document["directory"]), others)


def source(root: Path) -> str:
    """SHA-256, hexadecimal, of what decides what a part shows: what others showed says nothing of these.

    The modules that merge, those of the matrix (the recipe among them), and the tests of `root` that it runs.
    """
    found = hashlib.sha256()
    for where, patterns in ((Path(loudmerge.__file__).parent, MODULES), (root, TESTED)):
        files = {file for pattern in patterns for file in where.glob(pattern) if file.is_file()}
        for file in sorted(files):
            place = file.relative_to(where)
            if "__pycache__" not in place.parts and not any(map(place.is_relative_to, (*ASIDE, *APART))):
                found.update(f"{place}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return found.hexdigest()


def digest(out: Path) -> dict[str, str]:
    """SHA-256, hexadecimal, of a merged checkpoint's weights, and of its report's counts."""
    weights = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        weights.update(file.name.encode() + b"\0" + file.read_bytes())
    report = json.loads((out / REPORT).read_text("utf-8"))
    counts = json.dumps([report["counts"], report["adapter_tensors"]], sort_keys=True)
    return {"weights": weights.hexdigest(), "counts": hashlib.sha256(counts.encode()).hexdigest()}


def running() -> dict[str, str]:
    """The versions of what this process runs on: an environment may hold others than it was made with."""
    return {**{name: version(name) for name in SHOWN}, "python": platform.python_version()}


def run_tests(job: Job) -> dict[str, Any]:
    """Unit and property tests: counts, the reasons of skips, the names of failures."""
    return {"tests": asdict(junit.tests(_pytest(job.root, UNIT_TESTS)))}


def run_families(job: Job) -> dict[str, Any]:
    """By family "ok" or the reason why not; and what failed that is of no one family."""
    families, other = junit.families(_pytest(job.root, FAMILY_TESTS))
    return {"families": families, "failures": list(other)}


def _pytest(root: Path, arguments: Sequence[str]) -> tuple[junit.Case, ...]:
    """The tests; a module that cannot be imported is one that failed. RuntimeError where pytest did not end.

    https://docs.pytest.org/en/stable/reference/exit-codes.html
    """
    with tempfile.TemporaryDirectory() as scratch:
        file, counts = Path(scratch, "junit.xml"), Path(scratch, "counts.json")
        command = [sys.executable, *PYTEST, f"--counted={counts}", f"--junitxml={file}", *arguments]
        code = subprocess.run(command, cwd=root, check=False).returncode  # noqa: S603 - a line made here
        cases = junit.read(file) if code in (0, 1, 2) else ()
        if not cases or (code and junit.FAILED not in {case.outcome for case in cases}):
            raise RuntimeError(f"pytest ended with exit code {code}: see the log")
        counted = json.loads(counts.read_text("utf-8"))
        if code != INTERRUPTED and counted["ended"] != counted["collected"]:
            raise RuntimeError(
                f"pytest ended after {counted['ended']} of {counted['collected']} tests: see the log"
            )
        return cases


def run_journey(job: Job) -> dict[str, Any]:
    """Figures, path, orientation and counts of the end-to-end run, and what its merge wrote."""
    # What is imported stays: looking for garbage in it, again and again, takes a fifth of this part's time.
    gc.disable()
    from loudmerge.compat.inside import journey  # noqa: PLC0415 - it imports torch, which the runner has not

    require("demo", *training.PACKAGES)
    gc.freeze()
    gc.enable()
    shown = journey.run(job.directory / JOURNEY)
    return {
        "figures": asdict(shown.figures),
        "path": shown.path,
        "orientation": shown.orientation,
        "merged": list(shown.merged),
        "losses": list(shown.losses),
        "unmoved": shown.unmoved,
        "digest": digest(shown.out),
    }


def run_cross(job: Job) -> dict[str, Any]:
    """By the cell that trained it: "ok" where the merge here writes what the merge there wrote."""
    return {"crossed": {name: _crossed(directory) for name, directory in job.others.items()}}


def _crossed(directory: Path) -> str:
    wanted = json.loads((directory / "journey.json").read_text("utf-8"))["digest"]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        try:
            loudmerge.merge(directory / JOURNEY / BASE, directory / JOURNEY / ADAPTER, out)
        except (loudmerge.MergeRefused, loudmerge.Mismatch) as error:
            return str(error).splitlines()[0]
        found = digest(out)
    other = [what for what, value in wanted.items() if found[what] != value]
    return f"other {' and '.join(other)} than where it was trained" if other else "ok"


RUNS: Mapping[str, Callable[[Job], dict[str, Any]]] = MappingProxyType(
    {TESTS: run_tests, JOURNEY: run_journey, FAMILIES: run_families, CROSS: run_cross}
)


def main(arguments: Sequence[str]) -> None:
    """Runs the job of the first file and writes what it showed into the second, and of which source.

    That is looked at in the end: where a file was edited meanwhile it is another than the run began with.
    """
    job_file, out = map(Path, arguments)
    job = Job.from_json(json.loads(job_file.read_text("utf-8")))
    shown = {**RUNS[job.part](job), "versions": running(), "source": source(job.root)}
    out.write_text(json.dumps(shown, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
