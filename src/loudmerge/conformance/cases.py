"""The cases as data: conformance/manifest.json.

A case is a base, an adapter, and what a merge of the two must do:

    merge   OUT holds the expected tensors
    refuse  the command fails and leaves no weights: nothing says what the merge would be
    either  one of the two: merging it right is possible, but nobody is asked to

`expected` holds the tensors that change, in float32 and under their names on disk; all others are to be the
base's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loudmerge.errors import plural
from loudmerge.system.jsonfile import parse

MERGE, REFUSE, EITHER = "merge", "refuse", "either"
MANIFEST = "manifest.json"

OWN = Path("conformance")
SHIPPED = Path(__file__).with_name("shipped")
CHECKOUT = Path(__file__).parents[3] / OWN
"""Where the data is: of the project, of the installed package, of a source tree that is installed for
development.
"""


class DataError(ValueError):
    """The suite's data is not there, or not what its manifest says."""


@dataclass(frozen=True)
class Case:
    """One case.

    topic: what it is about; scorecards sum by it. why: in a sentence. layout: how the base holds its experts.
    base, adapter: directories. expected: a safetensors file, None where only a refusal will do.
    refusal: the code with which loudmerge refuses. options: what the user says beside the files, by the
    option's name.
    config: fields of config.json that the merge changes, and their values.
    made: the libraries that wrote the adapter. of, edit: the case it was made from, and by which edit.
    """

    id: str
    topic: str
    why: str
    layout: str
    base: Path
    adapter: Path
    expect: str
    expected: Path | None = None
    refusal: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    of: str = ""
    edit: str = ""


@dataclass(frozen=True)
class Suite:
    """All cases. layouts: every disk layout, and its keys. files: relative path to sha256."""

    root: Path
    cases: tuple[Case, ...]
    layouts: Mapping[str, str]
    files: Mapping[str, str]

    def select(self, names: tuple[str, ...]) -> tuple[Case, ...]:
        """The named cases in the suite's order, all where none is named. Raises DataError for an unknown
        name.
        """
        known = {case.id for case in self.cases}
        unknown = sorted(set(names) - known)
        if unknown:
            raise DataError(f"found no case {unknown[0]!r}, expected one of the {len(known)} of {self.root}")
        return tuple(case for case in self.cases if not names or case.id in names)

    def control(self, case: Case) -> Case | None:
        """The merge that a tool has to manage before its failure on `case` is a refusal: what the case was
        made from by an edit, else the first plain one on the same base. None for a case without.
        """
        if case.edit:
            return next((other for other in self.cases if other.id == case.of), None)
        plain = (other for other in self.cases if other.expect == MERGE and not other.options)
        return next((other for other in plain if other.base == case.base and other != case), None)

    def problems(self) -> list[str]:
        """What of the files is not as the manifest says: missing, changed, or not in it."""
        there = {
            file.relative_to(self.root).as_posix()
            for folder in ("bases", "adapters", "expected")
            for file in (self.root / folder).rglob("*")
            if file.is_file()
        }
        changed = [
            name
            for name in sorted(there & self.files.keys())
            if hashlib.sha256((self.root / name).read_bytes()).hexdigest() != self.files[name]
        ]
        asked = {
            case.expected.relative_to(self.root).as_posix()
            for case in self.cases
            if case.expected is not None
        }
        return [
            *(f"{name}: found no file" for name in sorted((self.files.keys() | asked) - there)),
            *(
                f"{name}: found a file that the manifest does not name"
                for name in sorted(there - self.files.keys())
            ),
            *(f"{name}: found another sha256 than the manifest's" for name in changed),
        ]


def default_directory(project: Path) -> Path:
    """The project's data; where it has none, that which loudmerge ships."""
    return next(
        (place for place in (project / OWN, SHIPPED, CHECKOUT) if (place / MANIFEST).is_file()), project / OWN
    )


def load(directory: Path) -> Suite:
    """Reads the manifest. Raises DataError where it is missing or damaged, or a file of it was changed."""
    file = directory / MANIFEST
    if not file.is_file():
        raise DataError(f"{file}: found no manifest, expected the conformance suite's data")
    try:
        document = parse(file.read_text(encoding="utf-8"))
    except ValueError as error:
        found = f"found no JSON ({error}), expected a manifest. Fetch the data again."
        raise DataError(f"{file}: {found}") from error
    if document.get("schema") != 1:
        raise DataError(f"{file}: found schema {document.get('schema')!r}, expected 1: update loudmerge")
    cases = tuple(_case(directory, values) for values in document["cases"])
    files = {name: entry["sha256"] for name, entry in document["files"].items()}
    suite = Suite(directory, cases, document["layouts"], files)
    problems = suite.problems()
    if problems:
        found = f"{problems[0]}; {plural(len(problems), 'problem')} in all"
        raise DataError(f"{directory}: {found}. Fetch the data again.")
    return suite


def _case(directory: Path, values: Mapping[str, Any]) -> Case:
    expected = values["expected"]
    return Case(
        id=values["id"],
        topic=values["topic"],
        why=values["why"],
        layout=values["layout"],
        base=directory / "bases" / values["base"],
        adapter=directory / "adapters" / values["adapter"],
        expect=values["expect"],
        expected=directory / "expected" / f"{expected}.safetensors" if expected else None,
        refusal=values["refusal"],
        options=values["options"],
        config=values.get("config", {}),
        made=values["made"],
        of=values["of"],
        edit=values["edit"],
    )
