"""What a cell says of its tests is what pytest's JUnit file says, which pytest itself writes here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loudmerge.compat.inside import junit
from loudmerge.compat.judging.verdict import SUITE

FAMILY_TESTS = """
import pytest
FAMILIES = ["mixtral", "qwen3_vl_moe", "qwen3_vl_moe_text", "nllb-moe", "longcat_flash", "dbrx", "olmoe"]

@pytest.mark.parametrize("model_type", FAMILIES)
def test_out_is_what_peft_makes_of_the_live_model(model_type, record_property):
    if model_type == "longcat_flash":
        record_property("refused", "experts-incomplete")
    if model_type == "olmoe":
        pytest.skip("olmoe is not built here")

@pytest.mark.parametrize("which", ["gate_up", "down"])
@pytest.mark.parametrize("model_type", FAMILIES[:4])
def test_one_projection_alone(model_type, which):
    if model_type == "nllb-moe":
        pytest.skip("nllb-moe has no fused experts")
    assert (model_type, which) != ("qwen3_vl_moe_text", "down"), "a weight differs"

def test_stacked_experts_of_dbrx():
    raise ValueError("three of one shape\\nand more words")

def test_nothing_of_a_family():
    assert False, "of none"
"""

ONE = "test_one_projection_alone"

UNIT_TESTS = """
import pytest

def test_passes(): pass

def test_fails(): assert 1 == 2

@pytest.mark.parametrize("n", [1, 2])
def test_skips(n): pytest.skip("no such thing here")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("cannot clean up")

def test_fails_to_clean_up(broken): pass

def test_fails_twice(broken): assert 3 == 4

@pytest.mark.xfail(reason="known", strict=True)
def test_known(): assert False
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[junit.Case, ...]]:
    """What pytest found in each text, in a process of its own."""
    root = tmp_path_factory.mktemp("tests")
    found = {}
    for name, text in {"families": FAMILY_TESTS, "unit": UNIT_TESTS}.items():
        (root / f"test_{name}.py").write_text(text, "utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_{name}.py"]
        command += ["--junitxml=out.xml", "--rootdir=.", "-c", "/dev/null", "--import-mode=importlib"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        found[name] = junit.read(root / "out.xml")
    return found


def test_counts_reasons_and_names(cases: dict[str, tuple[junit.Case, ...]]) -> None:
    tests = junit.tests(cases["unit"])
    assert (tests.passed, tests.failed, tests.skipped) == (1, 3, 3)
    assert tests.skips == {"no such thing here": 2, "known": 1}
    failed = ("test_fails", "test_fails_to_clean_up", "test_fails_twice")
    assert tests.failures == tuple(f"test_unit.py::{name}" for name in failed)


def test_the_suite_of_the_original_repair_is_counted_where_it_passed() -> None:
    suite = [
        junit.Case(SUITE, f"test_{n}", outcome) for n, outcome in enumerate(("passed", "passed", "skipped"))
    ]
    others = [junit.Case("tests.unit.test_delta", "test_a", "passed")]
    assert junit.tests([*suite, *others]).suite == 2
    assert Path(f"{SUITE.replace('.', '/')}.py").is_file()


def test_a_family_has_its_worst(cases: dict[str, tuple[junit.Case, ...]]) -> None:
    families, _ = junit.families(cases["families"])
    assert families == {
        "dbrx": "test_stacked_experts_of_dbrx: ValueError: three of one shape",
        "longcat_flash": "refused by design: experts-incomplete",
        "mixtral": "ok",
        "nllb-moe": "ok",
        "olmoe": "skipped: olmoe is not built here",
        "qwen3_vl_moe": "ok",
        "qwen3_vl_moe_text": f"{ONE}[qwen3_vl_moe_text-down]: AssertionError: a weight differs",
    }


def test_a_family_whose_name_begins_with_another_s_has_its_own_cases() -> None:
    one = junit.OF_A_FAMILY
    cases = [junit.Case("m", f"{one}[nllb]", "passed"), junit.Case("m", f"{one}[nllb-moe]", "failed", "no")]
    assert junit.families(cases) == ({"nllb": "ok", "nllb-moe": f"{one}[nllb-moe]: no"}, ())


def test_a_failure_of_no_family_is_not_lost(cases: dict[str, tuple[junit.Case, ...]]) -> None:
    assert junit.families(cases["families"])[1] == ("test_families.py::test_nothing_of_a_family",)


def test_the_cases_that_name_the_families_are_there() -> None:
    """`OF_A_FAMILY` is the name of a test in the file that the cells run."""
    text = Path("tests/e2e/test_families.py").read_text("utf-8")
    assert f"def {junit.OF_A_FAMILY}(\n    model_type: str" in text
