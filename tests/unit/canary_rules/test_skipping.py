"""A test that something else skips, or that may fail, guards nothing; one that may be skipped does."""

from __future__ import annotations

import pytest

from tests.unit.canary_rules.code import found, holds

TEST = "def test_a():\n    assert f(1) == 2\n"
METHOD = "    def test_a(self):\n        assert f(1) == 2\n"
TAKES = "def test_a(model):\n    assert f(model) == 2\n"
RULE = {"kind": "tests", "names": ["test_a"], "uses": ["f"]}
MODEL = "@pytest.fixture\ndef model(device):\n    return 1\n"
DEVICE = "@pytest.fixture(name='device')\ndef _device():\n    pytest.skip('x')\n"


@pytest.mark.parametrize(
    "source",
    [
        f"@pytest.fixture(autouse=True)\ndef off():\n    pytest.skip('x')\n{TEST}",
        f"@pytest.fixture\ndef model():\n    pytest.skip('x')\n{TAKES}",
        f"@pytest.fixture\ndef model():\n    raise unittest.SkipTest('x')\n{TAKES}",
        f"@pytest.fixture\ndef model():\n    if True:\n        pytest.skip('x')\n{TAKES}",
        f"{MODEL}{DEVICE}{TAKES}",
        f"{DEVICE}@pytest.mark.usefixtures('device')\n{TEST}",
        f"{DEVICE}pytestmark = [pytest.mark.usefixtures('device')]\n{TEST}",
        f"def setup_module(module):\n    pytest.skip('x')\n{TEST}",
        f"def setup_function():\n    pytest.skip('x')\n{TEST}",
        f"class TestA:\n    def setup_method(self):\n        pytest.skip('x')\n{METHOD}",
        f"class A(unittest.TestCase):\n    def setUp(self):\n        self.skipTest('x')\n{METHOD}",
        f"class A(TestCase):\n    @unittest.expectedFailure\n{METHOD}",
        f"pytestmark: list = [pytest.mark.skip]\n{TEST}",
        f"pytestmark = [pytest.mark.skip] + [pytest.mark.slow]\n{TEST}",
        f"MARKS = [pytest.mark.skip]\npytestmark = [pytest.mark.slow, *MARKS]\n{TEST}",
        f"pytestmark = []\npytestmark.append(pytest.mark.skip)\n{TEST}",
        f"pytestmark = []\npytestmark.extend([pytest.mark.skip])\n{TEST}",
        f"if True:\n    pytest.skip('x', allow_module_level=True)\n{TEST}",
        f"with open('x'):\n    pytest.skip('x', allow_module_level=True)\n{TEST}",
        f"def off(fn):\n    return pytest.mark.skip(fn)\n@off\n{TEST}",
        f"def off(fn):\n    return pytest.mark.skip(reason='x')(fn)\n@off\n{TEST}",
        f"def off(fn):\n    return lambda: None\n@off\n{TEST}",
        f"def off(g):\n    def h():\n        pytest.skip('x')\n        g()\n    return h\n@off\n{TEST}",
        f"def off(x):\n    def mark(fn):\n        return lambda: x\n    return mark\n@off(1)\n{TEST}",
        f"@pytest.mark.skipif('True')\n{TEST}",
        f"@pytest.mark.parametrize('model', [pytest.param(1, marks=pytest.mark.skip)])\n{TAKES}",
        f"@pytest.mark.parametrize('model', [pytest.param(1, marks=[a, pytest.mark.xfail])])\n{TAKES}",
    ],
)
def test_a_test_that_is_skipped_by_something_else_guards_nothing(source: str) -> None:
    assert not holds(source, **RULE)


@pytest.mark.parametrize(
    "source",
    [
        f"@pytest.fixture(autouse=True)\ndef off():\n    if not cuda():\n        pytest.skip('x')\n{TEST}",
        f"@pytest.fixture(autouse=False)\ndef off():\n    pytest.skip('x')\n{TEST}",
        f"@pytest.fixture\ndef other():\n    pytest.skip('x')\n{TAKES}",
        f"{MODEL}{TAKES}",
        f"def setup_module(module):\n    if not cuda():\n        pytest.skip('x')\n{TEST}",
        f"class TestB:\n    def setup_method(self):\n        pytest.skip('x')\n{TEST}",
        f"def setup_function():\n    pytest.skip('x')\nclass TestA:\n{METHOD}",
        f"try:\n    import zoo\nexcept ImportError:\n    pytest.skip('x', allow_module_level=True)\n{TEST}",
        f"if sys.platform == 'win32':\n    pytest.skip('x', allow_module_level=True)\n{TEST}",
        f"pytestmark: list = [pytest.mark.slow]\npytestmark.append(pytest.mark.gpu)\n{TEST}",
        f"def on(fn):\n    def inner():\n        return fn()\n    return inner\n@on\n{TEST}",
        f"def on(fn):\n    return fn if cuda() else pytest.mark.skip(fn)\n@on\n{TEST}",
        f"def on(fn):\n    if cuda():\n        return fn\n    return pytest.mark.skip(fn)\n@on\n{TEST}",
        f"def on(x):\n    def mark(g):\n        return lambda: g(x)\n    return mark\n@on(1)\n{TEST}",
        f"@pytest.mark.skipif(\"sys.platform == 'win32'\")\n{TEST}",
        f"@pytest.mark.skipif('not code')\n{TEST}",
        f"@pytest.mark.parametrize('model', [1, pytest.param(2, marks=pytest.mark.skip)])\n{TAKES}",
        f"@pytest.mark.parametrize('model', [pytest.param(1, id='a')])\n{TAKES}",
    ],
)
def test_a_test_that_may_be_skipped_guards_all_the_same(source: str) -> None:
    finding = found(source, **RULE)
    assert finding.holds, finding.detail


@pytest.mark.parametrize(
    ("body", "fails"),
    [
        ("try:\n            g()\n        except Exception:\n            pass", False),
        ("with suppress(AssertionError):\n            g()", False),
        ("try:\n            g()\n        except OSError:\n            pass", True),
        ("try:\n            g()\n        except Exception:\n            g()", True),
    ],
)
def test_a_decorator_that_keeps_what_a_test_raises_leaves_it_nothing_to_say(
    body: str, *, fails: bool
) -> None:
    source = f"def on(g):\n    def h():\n        {body}\n    return h\n@on\n{TEST}"
    finding = found(source, **RULE)
    assert finding.holds is fails
    assert fails or finding.detail.startswith("test_a cannot fail: in the decorator on, ")


def test_what_skips_a_test_is_said_with_its_line() -> None:
    detail = found(f"{MODEL}{DEVICE}{TAKES}", **RULE).detail
    assert detail == "test_a is not run: the fixture _device skips it at line 6"
    source = f"def off(fn):\n    return pytest.mark.skip(fn)\n@off\n{TEST}"
    assert found(source, **RULE).detail == "test_a is marked skip by the decorator off"
