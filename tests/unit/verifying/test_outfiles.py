"""Which files are a tokenizer's, and which a loader reads, by their names."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest
import transformers

from loudmerge.merging import origin
from loudmerge.reading.sidefiles import READ_BY_LOADERS


def tokenizer_files() -> set[str]:
    """The names in every VOCAB_FILES_NAMES of the installed transformers."""
    named: set[str] = set()
    for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and "VOCAB_FILES_NAMES" in map(ast.unparse, node.targets):
                named |= {str(name.value) for name in ast.walk(node.value) if isinstance(name, ast.Constant)}
    return {name for name in named if "." in name}


def test_every_file_that_a_tokenizer_of_transformers_reads_is_known_as_one() -> None:
    """To verify, and to a live merge that is given a tokenizer in place of the base's."""
    names = tokenizer_files() | {"tekken.json", "special_tokens_map.json", "added_tokens.json"}
    assert len(names) > 10
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in READ_BY_LOADERS)} == set()
    assert {name for name in names if not origin._TOKENIZER_FILE.search(name)} == set()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "spk_dict.txt", "modeling_x.py"])
def test_what_is_no_tokenizer_s_stays_beside_another_one(name: str) -> None:
    assert not origin._TOKENIZER_FILE.search(name)
