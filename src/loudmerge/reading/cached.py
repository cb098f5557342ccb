"""A snapshot in the Hub's cache: it holds what was asked for, which may be less than the repository has.

models--OWNER--NAME holds snapshots/COMMIT, and beside it .no_exist/COMMIT, with what was asked for and is not
there (huggingface_hub's documentation, "Understand caching"). From huggingface_hub 2 on trees/COMMIT.json
lists the whole repository, once it was downloaded as one (huggingface_hub/_tree_cache.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loudmerge.errors import MergeRefused, Problem, some
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.sidefiles import GENERATION, is_of_tokenizer, is_read_by_loaders, is_weights
from loudmerge.system.jsonfile import parse

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
"""What every loader of a tokenizer asks for."""


def notes_on_snapshot(path: Path) -> list[str]:
    """What a merge of this base may lose without a word; nothing where it is no snapshot of the cache.

    Raises MergeRefused `corrupt-file` where the cache itself lists what loaders read and the snapshot lacks.
    """
    if not _is_snapshot(path):
        return []
    repo = path.absolute().parent.parent.name.removeprefix("models--").replace("--", "/")
    get = f"`hf download {repo} --revision {path.name}`"
    if missing := sorted(_missing(path)):
        raise MergeRefused(
            Problem(
                "corrupt-file",
                str(path),
                f"no {some(missing)}",
                f"what loaders read of {repo}, by the list of its files in the Hub's cache",
                f"Get the rest: {get}. To merge without, give a copy of the folder (cp -rL).",
            )
        )
    doubtful = doubtful_names(path)
    names = [GENERATION] * (GENERATION in doubtful) + ["tokenizer"] * (TOKENIZER[0] in doubtful)
    if not names:
        return []
    lacks = f"OUT has no {' and no '.join(names)}: the Hub's cache has none of {repo}, and does not say"
    return [f"{lacks} whether the repository has. {get} gets what there is"]


def doubtful_names(path: Path) -> list[str]:
    """What a snapshot lacks of what most repositories have, where the cache does not say that its has not."""
    if not _is_snapshot(path) or _listed(path) is not None:
        return []
    wanted = [GENERATION] * (not (path / GENERATION).is_file())
    # Who has one asks for both: one of them may well not be there.
    if not any(is_of_tokenizer(file.name) for file in path.iterdir()):
        wanted += [] if all(_is_known_absent(path, name) for name in TOKENIZER) else TOKENIZER
    return [name for name in wanted if not _is_known_absent(path, name)]


def _is_snapshot(path: Path) -> bool:
    folder = path.absolute().parent
    return folder.name == "snapshots" and folder.parent.name.startswith("models--")


def _is_known_absent(path: Path, name: str) -> bool:
    return (path.absolute().parent.parent / ".no_exist" / path.name / name).exists()


def _listed(path: Path) -> list[str] | None:
    """The files of the whole repository, None where the cache has no list of them."""
    file = path.absolute().parent.parent / "trees" / f"{path.name}.json"
    if not file.is_file():
        return None
    try:
        tree = parse(file.read_bytes())
    except ValueError:
        return None  # It is another program's, and makes what it needs anew.
    files = tree.get("files") if isinstance(tree, dict) else None
    return [*files] if isinstance(files, dict) else None


def _missing(path: Path) -> Iterator[str]:
    """Not those in folders: they are mostly other formats of the same, which are often left out."""
    for name in _listed(path) or ():
        wanted = "/" not in name and is_read_by_loaders(name) and not is_weights(name)
        if wanted and name != ADAPTER_CONFIG and not (path / name).is_file():
            yield name
