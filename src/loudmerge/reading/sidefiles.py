"""The files of a checkpoint directory that are not its shards: which OUT copies, and which it leaves out."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from loudmerge.errors import MergeRefused, Problem
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.system.jsonfile import parse, read_json
from loudmerge.system.placeholders import link_to_nothing, pointer_problem

WEIGHT_SUFFIXES = frozenset(
    {
        ".bin",
        ".ckpt",
        ".gguf",
        ".h5",
        ".mlmodel",
        ".msgpack",
        ".npz",
        ".onnx",
        ".onnx_data",
        ".ot",
        ".pickle",
        ".pkl",
        ".pt",
        ".pth",
        ".safetensors",
        ".tflite",
    }
)
"""Files that hold weights, mostly the model's once more: a loader may take them for the merged ones."""

MODULES = "modules.json"

OTHER_WEIGHTS = frozenset({"spk_dict.pt"})
"""Named as weights are, but none of the model's. spk_dict.pt: the voices of qwen2_5_omni, without which its
from_pretrained raises (transformers/models/qwen2_5_omni/modeling_qwen2_5_omni.py)."""

OF_TOKENIZERS = (
    *("*token*.json", "*tekken*.json", "*vocab*.json", "*vocab*.txt", "*vocab.*", "*.vocab", "*merges.txt"),
    *("*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe", "*.tokenizer", "bpe.codes", "dict.txt"),
    *("byte_maps.json", "emoji.json", "normalizer.json", "word_pronunciation.json", "word_shape.json"),
    *("*.jinja", "chat_template.json"),
)
"""Names of the files that tokenizers are made of: the VOCAB_FILES_NAMES of transformers 5.24
(models/*/tokenization_*.py), what its integrations/mistral reads before a tokenizer.json, the names that
mistral-common and sentencepiece give beside those, and chat templates."""

READ_BY_LOADERS = (
    *OF_TOKENIZERS,
    *("*config*.json", "params.json", "modules.json", "speaker_embeddings_path.json", "*.py"),
)
"""Names of files without weights that loaders read: an adapter_config.json puts an adapter on top, for one, a
config_sentence_transformers.json a prompt before every text, and params.json is Mistral's config.json."""

CONFIG, GENERATION, REPORT = "config.json", "generation_config.json", "merge_report.json"
REWRITTEN = frozenset({CONFIG, REPORT})

CARD = "README.md"
CARD_SECTION = "## Merge\n\nA LoRA adapter merged into its base model.\n"
"""With what a pushed model card begins, after its front matter; the base's own text follows."""

_FRONT = re.compile(r"\A---[ \t]*\n(?P<front>.*?)^---[ \t]*$\n?(?P<text>.*)\Z", re.DOTALL | re.MULTILINE)
_LITTER = (".", "__pycache__", "lost+found")


@dataclass(frozen=True)
class SideFiles:
    """Relative paths. copied: byte for byte into OUT. left_out: other weights, which OUT must not hold."""

    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]


def find_side_files(path: Path, used: Collection[str]) -> SideFiles:
    """used: names of the shards, and of the index where there is one.

    Raises MergeRefused `corrupt-file` for a modules.json that is no JSON, OSError for a folder that cannot
    be read.
    """
    folders = module_folders(path / MODULES) if (path / MODULES).is_file() else frozenset()
    copied, left_out, problems = [], [], []
    for file in sorted(walk(path)):
        name = file.relative_to(path).as_posix()
        if file.name.startswith(_LITTER) or name in REWRITTEN or name in used:
            continue
        if name == ADAPTER_CONFIG or (is_weights(name) and not is_other_weights(name, folders)):
            left_out.append(name)
        elif problem := _no_file(file) or _damaged(file):
            problems.append(problem)
        else:
            copied.append(name)
    return SideFiles(tuple(copied), tuple(left_out), tuple(problems))


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of this name, without its folder, is a part of a tokenizer, or a chat template."""
    return any(fnmatch(name, pattern) for pattern in OF_TOKENIZERS)


def is_read_by_loaders(name: str) -> bool:
    """Whether a loader may read a file of this name, without its folder, beside the weights."""
    return any(fnmatch(name, pattern) for pattern in READ_BY_LOADERS)


def walk(path: Path) -> Iterator[Path]:
    """What a directory and its folders hold, but for the folders and for what is in hidden ones.

    A link to a folder is yielded, not followed: it may lead anywhere, and back. Raises OSError for a folder
    that cannot be read.
    """
    for directory, folders, files in os.walk(path, onerror=_raise):
        links = [name for name in folders if Path(directory, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(_LITTER)]
        yield from (Path(directory, name) for name in (*files, *links))


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights in some format, or is an index of them."""
    lower = name.lower()
    return PurePosixPath(lower).suffix in WEIGHT_SUFFIXES or lower.endswith(".index.json")


def is_other_weights(name: str, folders: Collection[PurePosixPath]) -> bool:
    """Whether weights of this name are none of the model's. folders: those of `module_folders`."""
    return name in OTHER_WEIGHTS or any(PurePosixPath(name).is_relative_to(folder) for folder in folders)


def module_folders(file: Path) -> frozenset[PurePosixPath]:
    """The folders of what sentence-transformers puts after the model, by its modules.json.

    A Transformer in a folder of its own is a model, not what comes after it.
    """
    try:
        modules = parse(file.read_bytes())
    except ValueError as error:
        raise MergeRefused(
            Problem("corrupt-file", str(file), f"no JSON ({error})", "a list of modules", "Get it again.")
        ) from error
    listed = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    paths = (
        PurePosixPath(module["path"])
        for module in listed
        if isinstance(module.get("path"), str) and not str(module.get("type")).endswith(".Transformer")
    )
    # The model itself is in the folder "", which would hold every file.
    return frozenset(path for path in paths if path.parts)


def split_card(card: str) -> tuple[str, str]:
    """Front matter and text of a model card, both empty where it has none."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    match = _FRONT.match(card)
    return (match["front"], match["text"]) if match else ("", card)


def is_card_of(card: bytes, readme: bytes) -> bool:
    """Whether a push puts this in place of the base's README.md: its text, below the section "Merge"."""
    (_, pushed), (_, own) = (split_card(one.decode("utf-8", "replace")) for one in (card, readme))
    return pushed.lstrip().startswith(CARD_SECTION) and pushed.endswith(own.lstrip())


def _no_file(file: Path) -> Problem | None:
    try:
        mode = file.stat().st_mode
    except OSError:
        if (problem := link_to_nothing(file)) is None:
            raise
        return problem
    if stat.S_ISDIR(mode):
        return Problem(
            "unsafe-file",
            str(file),
            f"a link to the folder {file.readlink()}",
            "a folder of the checkpoint itself",
            "Put a copy of that folder in the link's place, or remove the link.",
        )
    if not stat.S_ISREG(mode):
        return Problem("unsafe-file", str(file), "a device, a pipe or a socket", "a file", "Remove it.")
    return None


def _damaged(file: Path) -> Problem | None:
    """What is there in name only, or what transformers passes over in silence: other damage it raises for.

    Of a generation_config.json that is no object it says nothing, and makes one up, without the ids that end
    a chat (transformers/modeling_utils.py, `from_pretrained`).
    """
    if is_read_by_loaders(file.name) and (problem := pointer_problem(file, "the file itself")):
        return problem
    if file.name == GENERATION:
        try:
            read_json(file, "corrupt-file", file.name)
        except MergeRefused as refused:
            return refused.problems[0]
    return None


def _raise(error: OSError) -> None:
    raise error
