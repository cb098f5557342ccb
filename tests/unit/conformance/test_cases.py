"""The manifest: what of it is checked, and where the data is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from loudmerge.conformance import cases as module
from loudmerge.conformance.cases import DataError, Suite, default_directory, load
from tests.unit.conformance.world import case, make_suite, write_manifest


def test_a_changed_file_is_found_before_anything_is_run(suite: Suite) -> None:
    file = suite.root / "bases/b/config.json"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"bases/b/config\.json: found another sha256"):
        load(suite.root)


def test_a_missing_file_is_found(suite: Suite) -> None:
    (suite.root / "adapters/nan/adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"adapters/nan/adapter_model\.safetensors: found no file"):
        load(suite.root)


def test_a_file_that_the_manifest_does_not_name_is_found(suite: Suite) -> None:
    (suite.root / "bases/b/more.txt").write_text("?")
    with pytest.raises(DataError, match=r"more\.txt: found a file that the manifest does not name"):
        load(suite.root)


def test_expected_tensors_that_are_not_there_are_found(suite: Suite) -> None:
    write_manifest(suite.root, [case("plain", expected="other")])
    with pytest.raises(DataError, match=r"expected/other\.safetensors: found no file"):
        load(suite.root)


def test_a_manifest_of_another_schema_is_refused(suite: Suite) -> None:
    write_manifest(suite.root, [case("plain")], schema=2)
    with pytest.raises(DataError, match=r"found schema 2, expected 1"):
        load(suite.root)


@pytest.mark.parametrize("content", [b'{"schema": 1, ', b"\xff"])
def test_a_damaged_manifest_is_refused(content: bytes, suite: Suite) -> None:
    (suite.root / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: found no JSON .* Fetch the data again\."):
        load(suite.root)


def test_no_manifest_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no manifest"):
        load(tmp_path)


def test_an_unknown_case_is_named(suite: Suite) -> None:
    with pytest.raises(DataError, match=r"found no case 'other', expected one of the 4"):
        suite.select(("plain", "other"))


def test_cases_come_in_the_suites_order(suite: Suite) -> None:
    assert [found.id for found in suite.select(("nan", "plain"))] == ["plain", "nan"]


def test_the_control_is_a_merge_that_needs_no_option(suite: Suite) -> None:
    """A tool may fail on others, and its failure here would be moot. Of an edited case it is the unedited."""
    told, either = case("told", options={"orientation": "swapped"}), case("pickle", expect="either")
    edited = case("bent", expect="refuse", expected=None, of="again", edit="bend")
    write_manifest(suite.root, [told, either, case("plain"), case("again"), edited])
    found = load(suite.root)
    controls = [found.control(one) for one in found.cases]
    assert [one and one.id for one in controls] == ["plain", "plain", "again", "plain", "again"]


def test_a_projects_own_data_comes_first_then_what_is_shipped(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(module, "SHIPPED", shipped)
    monkeypatch.setattr(module, "CHECKOUT", suite.root)
    assert default_directory(tmp_path) == suite.root
    make_suite(shipped)
    assert default_directory(tmp_path) == shipped
    make_suite(tmp_path / "conformance")
    assert default_directory(tmp_path) == tmp_path / "conformance"
