"""What the index has that no cell has: through the real pip, and an index in a directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.version import Version

from loudmerge.compat import releases, table
from loudmerge.compat.judging.cells import FILE, PACKAGES, Matrix, load
from loudmerge.compat.releases import News, PipIndex, lag, main, newer, newest_pins
from loudmerge.errors import EnvironmentFailed
from tests.unit.compat.local_index import LocalIndex, ask
from tests.unit.compat.made import EXPECT

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Shelf:
    """An Index that is a dictionary."""

    has: dict[str, list[str]]

    def versions(self, package: str) -> tuple[str, ...]:
        return tuple(sorted(self.has[package], key=Version))


@pytest.fixture
def matrix() -> Matrix:
    return load(ROOT / FILE)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix) -> LocalIndex:
    """pip's index: it has what the cells have."""
    found = LocalIndex(tmp_path)
    for cell in matrix.cells:
        for package in PACKAGES if cell.is_pinned else ():
            found.offer(package, cell.versions[package])
    found.use(monkeypatch)
    monkeypatch.chdir(ROOT)
    return found


def shelf(matrix: Matrix, **more: list[str]) -> Shelf:
    return Shelf({package: [pin, *more.get(package, [])] for package, pin in newest_pins(matrix).items()})


def test_the_newest_pin_of_a_package_is_by_version_not_by_text_or_place(matrix: Matrix) -> None:
    pins = newest_pins(matrix)
    for package in PACKAGES:
        versions = [Version(cell.versions[package]) for cell in matrix.cells if cell.is_pinned]
        assert Version(pins[package]) == max(versions)
    assert list(pins) == list(PACKAGES)


def test_nothing_is_newer_where_the_index_has_what_the_cells_have(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert [item.newer for item in newer(matrix, shelf(matrix))] == [(), (), ()]
    assert main([], shelf(matrix)) == 0
    assert capsys.readouterr().out.startswith("Nothing is newer than the cells: transformers ")


def test_prereleases_and_yanked_releases_are_left_out_those_for_another_python_are_not(
    index: LocalIndex, matrix: Matrix
) -> None:
    for version in ("99.0.0", "99.10.0", "99.9.0", "99.11.0rc1"):
        index.offer("peft", version)
    index.offer("peft", "99.9.1", yanked=True)
    index.offer("peft", "99.13.0", yanked=True)
    index.offer("peft", "99.10.1", python=">=9")
    index.offer("trl", "99.0.0", yanked=True)
    post = f"{newest_pins(matrix)['transformers']}.post1"
    index.offer("transformers", post)
    found = {item.package: item.newer for item in newer(matrix, PipIndex())}
    assert found == {"transformers": (post,), "peft": ("99.0.0", "99.9.0", "99.10.0", "99.10.1"), "trl": ()}


def test_all_released_versions_are_listed_oldest_first(index: LocalIndex) -> None:
    index.offer("peft", "0.2.0")
    index.offer("peft", "0.3.0")
    index.offer("peft", "0.4.0rc1")
    found = PipIndex().versions("peft")
    assert found[:2] == ("0.2.0", "0.3.0")
    assert list(found) == sorted(found, key=Version)
    assert "0.4.0rc1" not in found


def test_an_index_that_does_not_answer_is_an_error_not_nothing_new(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(monkeypatch, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.chdir(ROOT)
    with pytest.raises(EnvironmentFailed, match="Check the network"):
        PipIndex().versions("peft")
    assert main(["--markdown"]) == 5
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: transformers")


@pytest.mark.parametrize("served", [["0.1.0"], []])
def test_an_index_that_lacks_what_a_cell_pins_is_an_error_not_nothing_new(
    served: list[str], matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mirror that lags, or a folder of old wheels."""
    monkeypatch.chdir(ROOT)
    pins = newest_pins(matrix)
    stale = Shelf({**shelf(matrix).has, "peft": served})
    assert main([], stale) == 5
    shown = capsys.readouterr()
    assert shown.out == ""
    newest = served[0] if served else "none"
    assert f"peft: the newest release on the index is {newest}, expected at least {pins['peft']}" in shown.err
    newer_only = Shelf({**shelf(matrix).has, "peft": ["99.0.0"]})
    assert main([], newer_only) == 4, "the pinned one was yanked, and there is news"


def test_a_matrix_without_a_released_cell_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lanes = 'latest = [{ name = "latest", path = "fused", orientation = "standard" }]'
    (tmp_path / FILE).write_text(f"{EXPECT}[lanes]\nreleased = []\n{lanes}\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([], Shelf({}))
    assert caught.value.code == 2
    assert "matrix.toml: found no cell in lanes.released" in capsys.readouterr().err


def test_the_line_to_add_is_one_that_matrix_toml_takes(matrix: Matrix, tmp_path: Path) -> None:
    """The newest release of each package, also of those that the matrix already has."""
    news = newer(matrix, shelf(matrix, peft=["99.1.0", "99.0.0"]))
    text = (ROOT / FILE).read_text("utf-8")
    changed = tmp_path / FILE
    added = releases.line(matrix, news)
    changed.write_text(text.replace("released = [", f"released = [\n{added}", 1), "utf-8")
    (cell,) = [cell for cell in load(changed).cells if cell.name not in matrix.names]
    pins = newest_pins(matrix)
    assert cell.versions == {**pins, "peft": "99.1.0"}
    newest = max(
        (cell for cell in matrix.cells if cell.is_pinned),
        key=lambda cell: [Version(cell.versions[package]) for package in PACKAGES],
    )
    assert cell.expects == newest.expects


def test_the_summary_names_what_is_newer_and_the_line(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    known = newest_pins(matrix)["trl"]
    assert main([], shelf(matrix, trl=["99.0.0", "99.2.0"])) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"trl: 99.0.0, 99.2.0 (newest cell: {known})",
        "Add to [lanes] released in matrix.toml:",
    ]
    assert 'trl = "99.2.0"' in lines[2]


def test_the_issue_is_empty_where_nothing_is_newer(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weekly workflow closes its issue then."""
    monkeypatch.chdir(ROOT)
    assert main(["--markdown"], shelf(matrix)) == 0
    assert capsys.readouterr().out == ""
    assert main(["--markdown"], shelf(matrix, peft=["99.0.0"])) == 4
    text = capsys.readouterr().out
    pins = newest_pins(matrix)
    assert f"| peft | {pins['peft']} | 99.0.0 |" in text
    assert f"| trl | {pins['trl']} | – |" in text
    news = newer(matrix, shelf(matrix, peft=["99.0.0"]))
    assert f"```toml\n{releases.line(matrix, news).strip()}\n```" in text


def test_json_is_one_document(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--json"], shelf(matrix)) == 0
    current = json.loads(capsys.readouterr().out)
    assert (current["status"], current["lag"], current["add"]) == ("current", {}, None)
    assert main(["--json"], shelf(matrix, peft=["99.0.0"])) == 4
    found = json.loads(capsys.readouterr().out)
    pin = newest_pins(matrix)["peft"]
    assert (found["schema"], found["status"], found["lag"]) == (1, "newer", {"peft": "99.0.0"})
    assert found["packages"][1] == {"package": "peft", "cell": pin, "newest": "99.0.0", "newer": ["99.0.0"]}
    assert 'peft = "99.0.0"' in found["add"]


def test_the_table_takes_the_lag_as_it_is_printed(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--lag"], shelf(matrix, peft=["99.0.0"], trl=["99.1.0"])) == 4
    lines = capsys.readouterr().out.splitlines()
    given = table._arguments(["results", *(f"--lag={line}" for line in lines)])
    assert dict(given.lag) == {"peft": "99.0.0", "trl": "99.1.0"}
    assert main(["--lag"], shelf(matrix)) == 0
    assert capsys.readouterr().out == ""


def test_a_matrix_that_cannot_be_read_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([], Shelf({}))
    assert caught.value.code == 2
    assert "matrix.toml: no such file" in capsys.readouterr().err


def test_only_packages_with_news_lag(matrix: Matrix) -> None:
    assert lag(newer(matrix, shelf(matrix, peft=["99.0.0", "99.1.0"]))) == {"peft": "99.1.0"}


def test_the_newest_of_a_package_without_news_is_the_known_one() -> None:
    assert News("peft", "0.21.2", ()).newest == "0.21.2"
    assert News("peft", "0.21.2", ("0.22.0", "0.23.0")).newest == "0.23.0"
