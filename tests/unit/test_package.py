"""The package's public names: loaded when they are used, and never mistaken for modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules

import pytest

import loudmerge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).parents[2]
FUNCTIONS = ("merge", "plan", "verify", "compare", "inspect", "detect_layout", "save_pretrained_merged")


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_importing_the_package_imports_no_heavy_package() -> None:
    loaded = python("import loudmerge, sys; print(*sys.modules)").split()
    assert "loudmerge" in loaded
    assert not {"torch", "transformers", "peft", "numpy", "safetensors", "click", "rich"} & set(loaded)


def test_the_names_of_the_contract_are_public() -> None:
    assert {*FUNCTIONS, "MergeRefused", "MergeReport", "MergePlan"} <= set(loudmerge.__all__)
    assert set(loudmerge.__all__) <= set(dir(loudmerge))


def test_every_public_name_is_there() -> None:
    assert [name for name in loudmerge.__all__ if not hasattr(loudmerge, name)] == []


def test_no_room_is_called_like_a_public_name() -> None:
    """Python binds an imported submodule in its package: `loudmerge.merge` would be no function any more."""
    rooms = {name for _, name, _ in iter_modules(loudmerge.__path__)}
    assert rooms & set(loudmerge.__all__) == set()


def test_submodules_that_are_no_public_name_are_attributes_as_usual() -> None:
    python("import loudmerge.errors\nassert loudmerge.errors.MergeRefused is loudmerge.MergeRefused")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'loudmerge' has no attribute 'merged'"):
        getattr(loudmerge, "merged")  # noqa: B009  # mypy knows that it is not there


@pytest.mark.parametrize(("ends", "code"), [("3", 3), ("None", 0), ("'text'", 1)])
def test_the_command_says_all_it_has_to_say_before_its_process_ends(ends: str, code: int) -> None:
    program = (
        "import sys, loudmerge.__main__ as command\n"
        f"def main():\n    sys.stdout.write('out'); sys.stderr.write('err'); sys.exit({ends})\n"
        "command.main = main\ncommand.run()"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=buffered)
    assert (done.stdout, done.stderr, done.returncode) == ("out", "err", code)


def test_a_defect_of_the_command_ends_in_a_traceback() -> None:
    program = "import loudmerge.__main__ as command\ncommand.main = lambda: 1 / 0\ncommand.run()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.skipif(not (CHECKOUT / ".git").exists(), reason="asks git what is tracked")
def test_the_sdist_has_all_that_is_tracked_and_nothing_else() -> None:
    """Tests read what lies beside them: what the list leaves out, they miss in the sdist alone."""
    targets = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"][
        "targets"
    ]
    command = ["git", "-C", str(CHECKOUT), "ls-files"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(targets["sdist"]["include"]) == sorted({f"/{Path(path).parts[0]}" for path in tracked})
