"""A test that pytest's settings leave out guards nothing, nor one under what nothing says lets it run."""

from __future__ import annotations

import pytest

from loudmerge.canary.rules.rules import Finding, check
from tests.unit.canary_rules.code import found, holds

PATH = "tests/merge/test_lora.py"
TEST = "import pytest\n@pytest.mark.moe\ndef test_down():\n    assert f(1) == 2\n"
RULE = {"kind": "tests", "names": ["test_down"], "uses": ["f"]}
INI = "[pytest]\n"
TOML = "[tool.pytest.ini_options]\n"


def judged(settings: str, place: str, test: str = TEST, **more: str) -> Finding:
    return check(RULE, test, PATH, {place: settings, **more}.get)


@pytest.mark.parametrize(
    ("place", "head"),
    [
        ("pytest.ini", INI),
        ("tests/pytest.ini", INI),
        ("tests/merge/tox.ini", INI),
        ("setup.cfg", "[tool:pytest]\n"),
        ("pyproject.toml", TOML),
        ("pyproject.toml", "[tool.pytest]\n"),
    ],
)
def test_settings_are_read_where_pytest_finds_them(place: str, head: str) -> None:
    quote = '"' if place.endswith("toml") else ""
    assert judged(f"{head}addopts = {quote}-q{quote}\n", place).holds
    finding = judged(f"{head}addopts = {quote}-q --ignore=tests/merge{quote}\n", place)
    assert not finding.holds
    assert finding.detail == f"test_down is not run: {place} has '--ignore tests/merge' in addopts"


@pytest.mark.parametrize(
    "options",
    [
        "--ignore tests/merge/test_lora.py",
        "--ignore=./tests/",
        "--ignore-glob=*/test_lora.py",
        "--deselect=tests/merge/test_lora.py::test_down",
        "--deselect tests/merge/test_lora.py",
        "-k 'not down'",
        "-k up",
        "-k='up or left'",
        "-k 'lora and not test_down'",
        "-m 'not moe'",
        "-m slow",
        "-m'slow and moe'",
        "--collect-only",
    ],
)
def test_options_that_leave_a_test_out_are_seen(options: str) -> None:
    assert not judged(f"{INI}addopts = -ra {options} -q\n", "pytest.ini").holds


@pytest.mark.parametrize(
    "options",
    [
        "--ignore=tests/merge/test_lora.py2",
        "--ignore=merge",
        "--ignore-glob=test_lora.py",
        "--deselect=tests/merge/test_lora.py::test_do",
        "-k 'not up'",
        "-k 'DOWN or up'",
        "-k 'down and'",
        "-k 'a < b'",
        "-k 'not a[0]'",
        "-m 'moe and not slow'",
        "-m 'not slow'",
        "-n 2 --durations=3",
        "'--ignore=tests",
    ],
)
def test_options_that_leave_others_out_are_let_pass(options: str) -> None:
    finding = judged(f"{INI}addopts = -ra {options}\n", "pytest.ini")
    assert finding.holds, finding.detail


def test_which_files_and_functions_are_tests_is_read() -> None:
    assert judged(f"{INI}python_files = check_*.py test_*.py\n", "pytest.ini").holds
    assert judged(f"{INI}python_functions = test check\npython_classes = Check\n", "pytest.ini").holds
    for said in ("python_files = check_*.py", "python_functions = check"):
        finding = judged(f"{INI}{said}\n", "pytest.ini")
        assert finding.detail == f"test_down is not run: pytest.ini has {said}"
    assert not judged(f'{TOML}python_files = ["check_*.py"]\n', "pyproject.toml").holds


def test_settings_that_are_none_or_of_another_folder_are_let_pass() -> None:
    off = f"{INI}addopts = --collect-only\n"
    for place in ("docs/pytest.ini", "merge/pytest.ini", "tests/merge/other.ini"):
        assert judged(off, place).holds
    assert judged(off, "pytest.ini", **{"tests/pytest.ini": INI + "addopts = -q\n"}).holds
    assert not judged(off, "pytest.ini", **{"tests/tox.ini": "[tox]\n"}).holds
    assert judged("[pytest\n", "pytest.ini").holds
    assert judged("= [", "pyproject.toml").holds
    assert judged("[tool.black]\n", "pyproject.toml").holds


@pytest.mark.parametrize(
    "mark", ["@slow", "@zoo.requires(2)", "@zoo.MARKS[0]", "needs = slow(1)\n@needs", "pytestmark = slow\n"]
)
def test_a_decorator_from_elsewhere_may_keep_a_test_from_running(mark: str) -> None:
    source = f"from zoo import slow\n{mark}\ndef test_down():\n    assert f(1) == 2\n"
    finding = found(source, **RULE)
    assert not finding.holds
    assert "in the rule's `decorators` if the test still runs under it" in finding.detail
    assert holds(source, **RULE, decorators=["slow", "zoo.requires", "zoo.MARKS[0]"])


@pytest.mark.parametrize(
    "mark",
    [
        "@pytest.mark.slow",
        "@mark.slow",
        "@given(st.integers())",
        "@mock.patch('zoo.other', None)",
        "@own",
        "@needs",
        "@functools.cache",
    ],
)
def test_a_decorator_that_is_known_is_let_pass(mark: str) -> None:
    head = "from pytest import mark\nfrom hypothesis import given\nfrom unittest import mock\nimport pytest\n"
    own = "def own(g):\n    return g\nneeds = pytest.mark.skipif(a(), reason='x')\n"
    finding = found(f"{head}{own}{mark}\ndef test_down():\n    assert f(1) == 2\n", **RULE)
    assert finding.holds, finding.detail


@pytest.mark.parametrize(
    ("body", "replaces"),
    [
        ("monkeypatch.setattr(zoo, 'f', lambda x: 2)", True),
        ("monkeypatch.setattr('zoo.f', fake)", True),
        ("monkeypatch.setattr(zoo, 'f', mock.Mock(return_value=2))", True),
        ("monkeypatch.setattr(zoo, 'f', inner)\n    def inner(x):\n        return 2", True),
        ("with mock.patch('zoo.f') as f:\n        pass", True),
        ("with mock.patch.object(zoo, 'f', new=fake):\n        pass", True),
        ("monkeypatch.setattr(zoo, 'f', dict(a=1))", False),
        ("monkeypatch.setattr(zoo, 'f', counted(zoo.f))", False),
        ("monkeypatch.setattr(zoo, 'f', mock.Mock(wraps=zoo.f))", False),
        ("with mock.patch('zoo.f', wraps=zoo.f):\n        pass", False),
        ("monkeypatch.setattr(zoo, 'g', lambda x: 2)", False),
        ("monkeypatch.setattr(zoo, NAME, lambda x: 2)", False),
        ("monkeypatch.setenv('f', '1')", False),
    ],
)
def test_a_test_that_replaces_what_it_is_of_tests_nothing(body: str, *, replaces: bool) -> None:
    head = "def fake(x):\n    return 2\ndef test_down(monkeypatch):\n"
    finding = found(f"{head}    {body}\n    assert f(1) == 2\n", **RULE)
    assert finding.holds is not replaces, finding.detail
    assert ("test_down replaces f, which it is to test" in finding.detail) is replaces


def test_a_decorator_that_replaces_it_does_so_too() -> None:
    source = "from unittest import mock\n@mock.patch('zoo.f')\ndef test_down(f):\n    assert f(1) == 2\n"
    assert not holds(source, **RULE)
    assert holds(source.replace("zoo.f", "zoo.g"), **RULE)
