"""Code that probes of a guard file share: each gets it as if it stood there; a slip in a name is an error."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from loudmerge.canary.guards import GuardError
from loudmerge.canary.rules.rules import check
from tests.unit.canary.wheelhouse import CHECKOUT
from tests.unit.canary.world import GUARD, KEPT, guards

CODE = "two = 2\n"
SHARED = f'[shared]\nnumbers = """\n{CODE}"""\n'
SYMBOL = '{ kind = "symbol", name = "guarded" }'
PROBE = (
    """{ kind = "probe", extract = ["guarded"], cases = [{ call = "guarded(two)", equals = 3 }], FIELD }"""
)


def text(field: str, shared: str = SHARED) -> str:
    """A guard file: its probe has this field."""
    return shared + GUARD.replace(SYMBOL, PROBE.replace("FIELD", field))


@pytest.mark.parametrize("field", ["prelude", "setup"])
def test_a_guard_that_shares_its_code_is_the_guard_that_has_it_itself(field: str, tmp_path: Path) -> None:
    (shares,) = guards(tmp_path / "shares", text(f'{field} = {{ shared = "numbers" }}'))
    (has,) = guards(tmp_path / "has", text(f'{field} = "two = 2\\n"', shared=""))
    assert dict(shares.rule) == dict(has.rule)
    assert shares.rule[field] == CODE
    assert check(shares.rule, KEPT, "zoo/saving.py").holds
    assert not check(shares.rule, KEPT.replace("+ 1", "+ 2"), "zoo/saving.py").holds


def test_probes_inside_other_rules_share_too(tmp_path: Path) -> None:
    probe = PROBE.replace("FIELD", 'setup = { shared = "numbers" }')
    nested = f'{{ kind = "any", rules = [{SYMBOL}, {{ kind = "all", rules = [{probe}] }}] }}'
    (guard,) = guards(tmp_path, SHARED + GUARD.replace(SYMBOL, nested))
    assert guard.rule["rules"][1]["rules"][0]["setup"] == CODE


def test_code_is_never_taken_for_a_name(tmp_path: Path) -> None:
    """A name is code, too: only the table refers."""
    names = 'prelude = "numbers = 1", setup = { shared = "numbers" }'
    (guard,) = guards(tmp_path, text(names))
    assert (guard.rule["prelude"], guard.rule["setup"]) == ("numbers = 1", CODE)
    with pytest.raises(GuardError, match=r"shared\.numbers: no probe takes it"):
        guards(tmp_path, text('setup = "numbers"'))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            text('setup = { shared = "number" }'),
            r"guard zoo-guarded: field rule: probe\.setup: \[shared\] has no 'number'; it has numbers",
        ),
        (
            text('setup = { shared = "numbers" }', shared=""),
            r"probe\.setup: \[shared\] has no 'numbers'; it has nothing",
        ),
        (text('setup = "two = 2"'), r"zoo\.toml: shared\.numbers: no probe takes it, remove it"),
        (
            text('setup = { shared = "numbers", more = 1 }'),
            r"""probe\.setup is .*'more': 1.*; it must be code, or \{ shared = "NAME" \}""",
        ),
        (text("setup = { shared = 1 }"), "it must be code, or"),
        (text('setup = { share = "numbers" }'), "it must be code, or"),
        (
            text('cpu_s = { shared = "numbers" }'),
            r"probe\.cpu_s is \{'shared': 'numbers'\}, which is not a int",
        ),
        (text('setup = ""', shared='shared = "two = 2"\n'), "shared: found 'two = 2', expected a table"),
        (
            text('setup = { shared = "numbers" }', shared="[shared]\nnumbers = 2\n"),
            r"shared\.numbers: found 2",
        ),
        (
            text('setup = { shared = "numbers" }', shared='[shared]\nnumbers = " "\n'),
            r"shared\.numbers: found",
        ),
        (
            SHARED + GUARD.replace(SYMBOL, SYMBOL.replace(" }", ', setup = { shared = "numbers" } }')),
            "a symbol rule has no field 'setup'",
        ),
    ],
)
def test_a_slip_is_an_error_of_the_file(given: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=message) as error:
        guards(tmp_path, given)
    assert "zoo.toml" in str(error.value)


def test_each_file_has_its_own(tmp_path: Path) -> None:
    guards(tmp_path, text('setup = { shared = "numbers" }'))
    shutil.move(tmp_path / "guards" / "zoo.toml", tmp_path / "guards" / "other.toml")
    other = text('setup = { shared = "numbers" }', shared="").replace("zoo-guarded", "zoo-other")
    with pytest.raises(GuardError, match=r"zoo\.toml: guard zoo-other: .* has no 'numbers'"):
        guards(tmp_path, other)


@pytest.mark.parametrize(
    "file", sorted((CHECKOUT / "canary" / "guards").glob("*.toml")), ids=lambda file: file.stem
)
def test_loudmerge_s_own_guards_say_nothing_twice(file: Path) -> None:
    code = re.findall(r'(?ms)^\w+ = """\n(.*?)"""$', file.read_text("utf-8"))
    assert [text for text, count in Counter(code).items() if count > 1] == []
