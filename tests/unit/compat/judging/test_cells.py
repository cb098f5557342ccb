"""matrix.toml is read as it stands; what is missing, unknown or wrong in one is named with its cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from loudmerge.compat.inside import journey
from loudmerge.compat.judging.cells import LANES, MatrixError, load
from tests.unit.compat.made import EXPECT

ONE = 'transformers = "5.5.0", peft = "0.19.1", trl = "0.25.1"'
FUSED = 'path = "fused", orientation = "standard"'
SHIPPED = Path("matrix.toml")


def written(tmp_path: Path, lanes: str, expect: str = EXPECT) -> Path:
    file = tmp_path / "matrix.toml"
    file.write_text(f"{expect}\n[lanes]\n{lanes}\n", "utf-8")
    return file


def test_a_cell_is_one_line_and_named_by_its_versions(tmp_path: Path) -> None:
    cell = load(written(tmp_path, f"released = [{{ {ONE}, {FUSED} }}]")).cells[0]
    assert (cell.name, cell.lane, cell.optional) == ("tf5.5.0-peft0.19.1-trl0.25.1", "released", False)
    assert cell.versions == {"transformers": "5.5.0", "peft": "0.19.1", "trl": "0.25.1"}
    assert (cell.expects.path, cell.expects.orientation) == ("fused", "standard")
    assert cell.expects.kl_base_trained_at_least == 0.5


def test_a_cell_may_say_otherwise_than_the_defaults(tmp_path: Path) -> None:
    lanes = f"released = [{{ {ONE}, {FUSED}, samples = 2, kl_base_merged_within = 0.02 }}]"
    expects = load(written(tmp_path, lanes)).cells[0].expects
    assert (expects.samples, expects.kl_base_merged_within, expects.delta_kept_at_least) == (2, 0.02, 0.99)


@pytest.mark.parametrize(
    ("lanes", "says"),
    [
        ("nightly = []", "unknown key 'nightly', expected only released, latest, dev"),
        ("released = []", "found no cell"),
        (
            f"released = [{{ {ONE}, {FUSED}, peff = 1 }}]",
            r"\['5.5.0', '0.19.1', '0.25.1'\]: unknown key 'peff'",
        ),
        (f'released = [{{ transformers = "5.5.0", {FUSED} }}]', r"found versions of \['transformers'\]"),
        (
            f'latest = [{{ name = "latest", peft = "1", {FUSED} }}]',
            r"found versions of \['peft'\], expected of \[\]",
        ),
        (f'released = [{{ {ONE}, path = "dense" }}]', "path: found 'dense', expected one of"),
        (f'released = [{{ {ONE}, path = "fused" }}]', "orientation: found None, expected one of"),
        (
            f'released = [{{ {ONE}, path = "per-expert", orientation = "standard" }}]',
            r"orientation: found 'standard', expected one of \[None\]",
        ),
        (
            f'released = [{{ {ONE}, {FUSED}, samples = "most" }}]',
            "samples: found 'most', expected",
        ),
        (f"released = [{{ {ONE}, {FUSED}, delta_kept_at_least = true }}]", "found True, expected a number"),
        (f'released = [{{ {ONE}, {FUSED}, name = "a/b" }}]', "the name 'a/b' cannot be a file's"),
        (f"released = [{{ {ONE}, {FUSED} }}, {{ {ONE}, {FUSED} }}]", "is there twice"),
        (
            f'released = [{{ {ONE}, {FUSED}, name = "a" }}, {{ {ONE}, {FUSED}, name = "A" }}]',
            "the cell A is there twice",
        ),
        (
            f'released = [{{ {ONE}, {FUSED}, optional = "false" }}]',
            "optional: found 'false', expected",
        ),
        (f"released = [{{ {ONE}, {FUSED}, name = 5 }}]", "the name 5 cannot be a file's"),
        (f"released = [{{ {ONE}, {FUSED}, samples = 0 }}]", "samples: found 0, expected"),
        (f"released = [{{ {ONE}, {FUSED}, samples = -1 }}]", "samples: found -1, expected"),
        (f"released = [{{ {ONE}, {FUSED}, samples = nan }}]", "samples: found nan, expected"),
        (
            f"released = [{{ {ONE}, {FUSED}, merged = 9.5 }}]",
            "merged: found 9.5, expected a whole number from 1",
        ),
        (
            f"released = [{{ {ONE}, {FUSED}, tests_at_least = 0 }}]",
            "tests_at_least: found 0, expected a whole",
        ),
        (
            f"released = [{{ {ONE}, {FUSED}, top1_at_least = 2 }}]",
            "top1_at_least: found 2, expected a number",
        ),
        (
            f"released = [{{ {ONE}, {FUSED}, kl_float32_merge_at_most = inf }}]",
            r"'0.25.1'\]: kl_float32_merge_at_most: found inf, expected a finite number over 0",
        ),
        (
            f"released = [{{ {ONE}, {FUSED}, kl_base_trained_at_least = nan }}]",
            "kl_base_trained_at_least: found nan, expected a finite number over 0",
        ),
        (f"released = [{{ {ONE}, {FUSED}, kl_base_trained_at_least = -1 }}]", "found -1, expected a finite"),
        (
            f"released = [{{ {ONE}, {FUSED}, kl_trained_merged_share = 1e3 }}]",
            "kl_trained_merged_share: found 1000.0, expected a number over 0, 1 at most",
        ),
        (f'released = [{{ {ONE}, path = ["fused"] }}]', r"path: found \['fused'\], expected one of"),
        ('released = "x"', "lanes.released: found 'x', expected a list of tables"),
        ('released = ["x"]', "expected a list of tables"),
        (f"released = {{ {ONE}, {FUSED} }}", "expected a list of tables"),
        (
            f'released = [{{ transformers = "5.5.0", peft = 0.19, trl = "0.25.1", {FUSED} }}]',
            "matrix.toml: lanes.released .*: peft: found 0.19, expected one version, a string",
        ),
        (
            f'released = [{{ transformers = "5.5.0", peft = "0.19.*", trl = "0.25.1", {FUSED} }}]',
            r"peft: found '0.19.\*', expected one version",
        ),
        (
            f'dev = [{{ transformers = "transformers", peft = "h/peft", trl = "h/trl", {FUSED} }}]',
            "transformers: found 'transformers', expected OWNER/NAME",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, lanes: str, says: str) -> None:
    with pytest.raises(MatrixError, match=says):
        load(written(tmp_path, lanes))


def test_an_expectation_that_is_nowhere_is_named(tmp_path: Path) -> None:
    expect = EXPECT.replace("delta_kept_at_least = 0.99", "")
    with pytest.raises(MatrixError, match="delta_kept_at_least is missing, here and under"):
        load(written(tmp_path, f"released = [{{ {ONE}, {FUSED} }}]", expect))


def test_an_expectation_that_is_none_is_named(tmp_path: Path) -> None:
    """A misspelt bound that nothing looks at would be no bound."""
    expect = f"{EXPECT}delta_kept_atleast = 0.999\n"
    with pytest.raises(MatrixError, match=r"matrix.toml: \[expect\]: unknown key 'delta_kept_atleast'"):
        load(written(tmp_path, f"released = [{{ {ONE}, {FUSED} }}]", expect))


def test_no_file_and_no_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="no such file"):
        load(tmp_path / "matrix.toml")
    (tmp_path / "matrix.toml").write_text("[", "utf-8")
    with pytest.raises(MatrixError, match="no TOML"):
        load(tmp_path / "matrix.toml")
    (tmp_path / "matrix.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(MatrixError, match="no UTF-8"):
        load(tmp_path / "matrix.toml")


def test_the_shipped_matrix_holds_what_was_promised() -> None:
    """The four combinations of the original repair, the two other regimes of PEFT, and the lanes."""
    cells = {cell.name: cell for cell in load(SHIPPED).cells}
    assert {cell.lane for cell in cells.values()} == set(LANES)
    assert [cells[name].expects.orientation for name in cells if name.startswith("tf5")] == [
        *("standard", "swapped", "standard", "swapped", "standard"),
    ]
    assert all(cells[name].expects.path == "per-expert" for name in cells if name.startswith("tf4"))
    assert cells.keys() >= {
        "tf5.5.0-peft0.19.1-trl0.25.1",
        "tf5.5.0-peft0.18.1-trl0.25.1",
        "tf4.57.6-peft0.19.1-trl0.25.1",
        "tf5.5.0-peft0.19.1-trl1.4.0",
        "tf5.5.0-peft0.19.0-trl0.25.1",
        "tf4.57.6-peft0.17.1-trl0.25.1",
    }
    assert [name for name, cell in cells.items() if cell.optional] == ["dev"]
    assert all(cell.expects.kl_base_trained_at_least >= 0.5 for cell in cells.values())


def test_the_shipped_matrix_expects_what_its_recipe_makes() -> None:
    """The file is read without torch, the recipe is not."""
    recipe = journey.CELL_RECIPE
    for cell in load(SHIPPED).cells:
        assert cell.expects.merged == recipe.layers * recipe.experts * 3
        assert cell.expects.samples_of == journey.SAMPLES
        assert (cell.expects.suite_at_least, cell.expects.top1_at_least) == (52, 0.95)


def test_cells_are_chosen_by_name_in_the_matrix_s_order() -> None:
    matrix = load(SHIPPED)
    last, first = matrix.names[3], matrix.names[0]
    assert [cell.name for cell in matrix.chosen([last, first])] == [first, last]
    assert matrix.chosen(()) == matrix.cells
    with pytest.raises(MatrixError, match=r"no cell 'tf9'; it has: tf5\.5\.0"):
        matrix.chosen(["tf9"])


def test_a_workflow_gets_a_job_for_each_cell() -> None:
    matrix = load(SHIPPED)
    jobs = matrix.github()["include"]
    assert [job["cell"] for job in jobs] == list(matrix.names)
    assert jobs[0] == {
        "cell": "tf5.5.0-peft0.19.1-trl0.25.1",
        "lane": "released",
        "optional": False,
        "transformers": "5.5.0",
        "peft": "0.19.1",
        "trl": "0.25.1",
    }
    assert [job["cell"] for job in matrix.github(["dev"])["include"]] == ["dev"]
