"""A conftest.py that skips a test, marks it, or leaves it out, is seen; one that only may is left alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from loudmerge.canary.rules.rules import Finding, RuleError, check

PATH = "tests/merge/test_lora.py"
TEST = "import pytest\n@pytest.mark.moe\ndef test_down():\n    assert f(1) == 2\n"
TAKES = TEST.replace("test_down()", "test_down(model)")
ITEMS = "import pytest\ndef pytest_collection_modifyitems(config, items):\n"
EACH = f"{ITEMS}    for item in items:\n"
MARK = "item.add_marker(pytest.mark.skip)"
AUTOUSE = "import pytest\n@pytest.fixture(autouse=True)\ndef off(request):\n"


def judged(conftest: str, test: str = TEST, place: str = "tests/conftest.py", **more: str) -> Finding:
    files: Mapping[str, str] = {place: conftest, **more}
    return check({"kind": "tests", "names": ["test_down"], "uses": ["f"]}, test, PATH, files.get)


@pytest.mark.parametrize(
    "conftest",
    [
        f"{EACH}        {MARK}",
        f"{EACH}        item.add_marker('skip')",
        f"{EACH}        item.add_marker(pytest.mark.xfail(reason='x'))",
        f"{EACH}        item.own_markers.append(pytest.mark.skip)",
        f"{ITEMS}    off = pytest.mark.skip(reason='x')\n    for i in items:\n        i.add_marker(off)",
        f"{EACH}        if 'test_down' in item.nodeid:\n            {MARK}",
        f"{EACH}        if item.name == 'test_down':\n            {MARK}",
        f"OFF = {{'test_up', 'test_down'}}\n{EACH}        if item.name in OFF:\n            {MARK}",
        f"{EACH}        if 'merge/' in str(item.path):\n            {MARK}",
        f"{EACH}        if 'moe' in item.keywords:\n            {MARK}",
        f"{EACH}        moe = item.get_closest_marker('moe')\n        if moe:\n            {MARK}",
        f"{EACH}        if a:\n            continue\n        if 'moe' in item.keywords:\n{12 * ' '}{MARK}",
        f"{EACH}        off(item)\ndef off(item):\n    {MARK}",
        f"{ITEMS}    items[:] = []",
        f"{ITEMS}    items.clear()",
        f"{ITEMS}    del items[:]",
        f"{ITEMS}    items[:] = [i for i in items if 'test_down' not in i.nodeid]",
        f"{EACH}        if item.name == 'test_down':\n            items.remove(item)",
        "def pytest_runtest_setup(item):\n    pytest.skip('x')",
        "def pytest_runtest_setup(item):\n    if 'moe' in item.keywords:\n        pytest.skip('x')",
        "def pytest_itemcollected(item):\n    item.add_marker('xfail')",
        "def pytest_ignore_collect(collection_path):\n    return True",
        "def pytest_ignore_collect(collection_path):\n    return collection_path.name == 'test_lora.py'",
        "def pytest_ignore_collect(path):\n    if 'lora' in path.name:\n        return True",
        f"{AUTOUSE}    pytest.skip('x')",
        "collect_ignore = ['merge/test_lora.py']",
        "collect_ignore = ['merge']",
        "collect_ignore = []\ncollect_ignore.append('merge/')",
        "collect_ignore = []\ncollect_ignore += ['merge/test_lora.py']",
        "collect_ignore_glob = ['merge/*_lora.py']",
        "collect_ignore_glob = ['*.py']",
    ],
)
def test_a_test_that_a_conftest_keeps_out_guards_nothing(conftest: str) -> None:
    assert not judged(conftest).holds
    assert judged(conftest, place="other/conftest.py").holds


@pytest.mark.parametrize(
    "conftest",
    [
        f"{EACH}        if 'slow' in item.keywords:\n            {MARK}",
        f"{EACH}        if 'slow' not in item.keywords:\n            continue\n        {MARK}",
        f"{EACH}        if 'lora' in item.keywords:\n            {MARK}",
        f"{EACH}        if not cuda():\n            {MARK}",
        f"{EACH}        if 'test_up' in item.nodeid:\n            {MARK}",
        f"{EACH}        item.add_marker(pytest.mark.timeout(9))",
        f"{EACH}        item.add_marker('tier1')",
        f"{ITEMS}    items[:] = sorted(items, key=str)",
        f"{ITEMS}    items[:] = [i for i in items if 'slow' not in i.keywords]",
        f"{ITEMS}    items.sort()",
        "def pytest_runtest_setup(item):\n    if 'slow' in item.keywords:\n        pytest.skip('x')",
        "def pytest_ignore_collect(collection_path):\n    return collection_path.name == 'test_up.py'",
        "def pytest_ignore_collect(collection_path):\n    return None",
        f"{AUTOUSE}    if not cuda():\n        pytest.skip('x')",
        f"{AUTOUSE}    yield",
        "import pytest\n@pytest.fixture\ndef other():\n    pytest.skip('x')",
        "collect_ignore = ['merge/test_up.py', 'test_lora.py', 'mer']",
        "collect_ignore = []\nif not cuda():\n    collect_ignore.append('merge')",
        "collect_ignore_glob = ['*_up.py']",
    ],
)
def test_a_conftest_that_may_leave_it_alone_does(conftest: str) -> None:
    finding = judged(conftest)
    assert finding.holds, finding.detail


def test_a_fixture_of_a_conftest_is_that_of_a_test_unless_one_nearer_has_its_name() -> None:
    skipping = "import pytest\n@pytest.fixture\ndef model():\n    pytest.skip('x')\n"
    making = skipping.replace("pytest.skip('x')", "return 1")
    nearer = {"tests/merge/conftest.py": making}
    assert not judged(skipping, TAKES).holds
    assert judged(skipping, TAKES, **nearer).holds
    assert judged(skipping, making + TAKES).holds
    assert not judged(making, TAKES, **{"tests/merge/conftest.py": skipping}).holds
    assert judged(skipping).holds


def test_where_a_conftest_keeps_a_test_out_is_said() -> None:
    assert judged(f"{EACH}        {MARK}").detail == "test_down is skipped by tests/conftest.py at line 4"
    detail = judged("collect_ignore = ['merge']", place="tests/conftest.py").detail
    assert detail == "test_down is not run: its file is left out by tests/conftest.py at line 1"
    assert judged(f"{ITEMS}    items.clear()", place="conftest.py").detail.endswith(
        "out by conftest.py at line 3"
    )
    fixture = judged(f"{AUTOUSE}    pytest.skip('x')").detail
    assert fixture == "test_down is not run: the fixture off of its conftest.py skips it at line 4"


def test_a_conftest_that_cannot_be_read_says_nothing_of_its_tests() -> None:
    with pytest.raises(RuleError, match=r"tests/conftest.py: not readable as Python"):
        judged("def (")


@pytest.mark.parametrize(
    ("test", "runs"),
    [
        ("zoo = pytest.importorskip('zoo.saving')\n", True),
        ("zoo = pytest.importorskip('zoo')\n", True),
        ("pytest.importorskip('zoo.fast')\n", True),
        ("pytest.importorskip('elsewhere.saving')\n", True),
        ("zoo = pytest.importorskip('zoo.gone')\n", False),
        ("from pytest import importorskip as need\nneed('zoo.gone')\n", False),
        ("if sys.platform == 'win32':\n    pytest.importorskip('zoo.gone')\n", True),
        ("@pytest.fixture(autouse=True)\ndef zoo():\n    return pytest.importorskip('zoo.gone')\n", False),
    ],
)
def test_a_file_that_wants_a_module_which_its_source_no_longer_has_is_skipped(
    test: str, *, runs: bool
) -> None:
    for folder in ("", "src/"):
        names = ("zoo/__init__.py", "zoo/saving.py", "zoo/fast/__init__.py")
        files = {f"{folder}{name}": "" for name in names}
        assert judged("", f"import pytest\n{test}{TEST}", **files).holds is runs


def test_a_test_that_wants_such_a_module_itself_is_skipped() -> None:
    test = TEST.replace("    assert", "    pytest.importorskip('zoo.gone')\n    assert")
    assert not judged("", test, **{"zoo/__init__.py": ""}).holds
    assert judged("", test, **{"zoo/__init__.py": "", "zoo/gone.py": ""}).holds
