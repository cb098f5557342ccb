"""A PEFT adapter directory, read without PEFT: its config, and what each of its tensors is.

Knows nothing of checkpoints. Anything that is not understood is a problem, never ignored.
Source of the key names: peft/utils/save_and_load.py, `get_peft_model_state_dict`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loudmerge.errors import MergeRefused, Problem, plural
from loudmerge.reading.adapter_config import WEIGHTS, AdapterConfig, ends_with, read_config
from loudmerge.reading.beside import no_weights, restarted, weights_beside
from loudmerge.system.tensorfile import FLOAT_CODES, TensorEntry, read_header

PREFIX = "base_model.model."
"""Before each name, of a PeftModel's module as of a tensor that it saves."""

LEVELS = frozenset({"base_layer", "original_module", "token_adapter"})
"""The modules by which PEFT's wrappers nest."""

EMBEDDING_NAMES = (
    *("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embeddings", "embed_in", "embed_out"),
)
"""PEFT saves the weight of these, and a head's bias, beside the LoRA (`save_embedding_layers`).

It asks the model for its embeddings: these are the names that transformers 4.57 to 5.24 has for tokens' ones.
"""

ONE_SAVE = "Get the config and the weights of one and the same save."
"""What helps where adapter_config.json and the file do not agree."""

_LORA_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+?)(?P<nesting>(?:\.base_layer)*)"
    r"\.(?P<role>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|lora_velora_embed)$"
)
_ROWS_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")


@dataclass(frozen=True)
class LoraPair:
    """One LoRA on one module.

    module: the module's name in memory, without PEFT's `base_model.model.` prefix.
    depth: how many `base_layer` levels inside the module's outermost wrapper.
    a: (rows, a), b: (b, columns); for an embedding lora_embedding_A (rank, vocabulary) and
    lora_embedding_B (hidden, rank). bias: lora_B.bias. magnitude: DoRA's lora_magnitude_vector.
    """

    module: str
    depth: int
    a: TensorEntry
    b: TensorEntry
    bias: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    embedding: bool = False

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(entry for entry in (self.a, self.b, self.bias, self.magnitude) if entry is not None)


@dataclass(frozen=True)
class FullTensor:
    """A tensor that replaces one of the model's: `modules_to_save`, a trained bias, a saved embedding."""

    name: str
    entry: TensorEntry
    saved_module: bool


@dataclass(frozen=True)
class TokenRows:
    """Rows that replace rows of an embedding: `trainable_token_indices`."""

    module: str
    indices: tuple[int, ...]
    entry: TensorEntry


@dataclass(frozen=True)
class Adapter:
    """An adapter directory: every tensor of its file is in exactly one of the tuples.

    copies: (full tensor or token rows, another that must have the same bytes). unread: other files of weights
    in the directory. originals: the base's own weights, which PEFT saves, too, and what VeLoRA trained by.
    """

    path: Path
    config: AdapterConfig
    pairs: tuple[LoraPair, ...]
    full: tuple[FullTensor, ...]
    rows: tuple[TokenRows, ...]
    entries: Mapping[str, TensorEntry]
    copies: tuple[tuple[TensorEntry, TensorEntry], ...] = ()
    originals: tuple[TensorEntry, ...] = ()
    unread: tuple[str, ...] = ()


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter directory. Raises MergeRefused with every problem found."""
    config = read_config(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise MergeRefused(no_weights(path))
    entries, _ = read_header(weights)
    sorter = _Sorter(config)
    unread, sorter.problems = weights_beside((f.name for f in path.iterdir() if f.is_file()), str(path))
    sorter.problems += restarted(path)
    for entry in entries.values():
        sorter.add(entry)
    sorter.sort_full()
    sorter.sort_rows()
    pairs = sorter.pairs()
    if not entries:
        sorter.problems.append(
            Problem(
                "missing-adapter-tensor",
                str(weights),
                "no tensor at all",
                "a trained adapter's tensors",
                "Save the trained model again with PEFT's save_pretrained.",
            )
        )
    if sorter.problems:
        raise MergeRefused(sorter.problems)
    return Adapter(
        path=path,
        config=config,
        pairs=pairs,
        full=tuple(sorter.full),
        rows=tuple(sorter.rows),
        copies=tuple(sorter.copies),
        originals=tuple(sorter.originals),
        entries=entries,
        unread=tuple(unread),
    )


class _Sorter:
    """Sorts an adapter's tensors by their keys and collects what is wrong with them."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.problems: list[Problem] = []
        self.full: list[FullTensor] = []
        self.rows: list[TokenRows] = []
        self.copies: list[tuple[TensorEntry, TensorEntry]] = []
        self.originals: list[TensorEntry] = []
        self._unnamed_rows: list[TensorEntry] = []
        self._whole: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
        self._embeddings: set[tuple[str, int]] = set()
        self._linears: set[tuple[str, int]] = set()
        self._roles: dict[tuple[str, int], dict[str, TensorEntry]] = defaultdict(dict)

    def add(self, entry: TensorEntry) -> None:
        if entry.dtype not in FLOAT_CODES:
            self._refuse(
                "unsupported-adapter",
                entry,
                f"dtype {entry.dtype}",
                "one of F64, F32, F16, BF16",
                "Save the adapter again in one of these. A BatchNorm's counter is for merge_and_unload.",
            )
        elif match := _LORA_KEY.match(entry.name):
            self._add_role(match["module"], match["nesting"].count("base_layer"), match["role"], entry)
        elif match := _ROWS_KEY.match(entry.name):
            self._add_rows(match["module"], entry)
        else:
            self._add_full(entry)

    def _add_role(self, module: str, depth: int, role: str, entry: TensorEntry) -> None:
        roles = self._roles[module, depth]
        if "magnitude" not in role:
            (self._embeddings if "embedding" in role else self._linears).add((module, depth))
        role = role.removesuffix(".weight").replace("_embedding", "")
        if role in roles:
            self._refuse(
                "unconsumed-adapter-tensor",
                entry,
                f"a second {role}, beside {roles[role]}",
                "one",
                "Save the adapter again, from one training.",
            )
        roles[role] = entry

    def pairs(self) -> tuple[LoraPair, ...]:
        complete = []
        for (module, depth), roles in self._roles.items():
            pair = self._pair(module, depth, roles)
            if pair is not None:
                complete.append(pair)
        return tuple(complete)

    def _pair(self, module: str, depth: int, roles: Mapping[str, TensorEntry]) -> LoraPair | None:
        embedding = (module, depth) in self._embeddings
        if embedding and (module, depth) in self._linears:
            self._refuse(
                "missing-adapter-tensor",
                next(iter(roles.values())),
                f"half a LoRA of a Linear, and half of an embedding, on {module}",
                "both halves of the pair",
                ONE_SAVE,
            )
            return None
        for half in ("lora_A", "lora_B"):
            if half not in roles:
                other = next(iter(roles.values()))
                self._refuse(
                    "missing-adapter-tensor",
                    other,
                    f"no {half} beside it",
                    "both halves of the pair",
                    "The file is not complete: get it, or save the adapter again.",
                )
                return None
        self._check_extras(roles, embedding=embedding)
        if len(roles["lora_A"].shape) != 2 or len(roles["lora_B"].shape) != 2:
            self._refuse(
                "unsupported-adapter",
                roles["lora_A"],
                "factors that are not matrices",
                "two axes each",
                "Merge such LoRA with PEFT's merge_and_unload.",
            )
            return None
        extras = roles.get("lora_B.bias"), roles.get("lora_magnitude_vector")
        return LoraPair(module, depth, roles["lora_A"], roles["lora_B"], *extras, embedding)

    def _check_extras(self, roles: Mapping[str, TensorEntry], *, embedding: bool) -> None:
        """A pair has a bias and a magnitude where the config says so, and nowhere else."""
        bias, magnitude = roles.get("lora_B.bias"), roles.get("lora_magnitude_vector")
        projection = roles.get("lora_velora_embed")
        if projection is not None and self.config.raw.get("velora_config"):
            # VeLoRA stores activations compressed by it: peft/tuners/lora/velora.py, `VeloraFunction`.
            self.originals.append(projection)
        elif projection is not None:
            self._refuse(
                "unconsumed-adapter-tensor",
                projection,
                "what VeLoRA compresses activations by",
                "none: the config has no velora_config",
                ONE_SAVE,
            )
        if bias is not None and not self.config.lora_bias:
            self._refuse(
                "unconsumed-adapter-tensor",
                bias,
                "a LoRA bias",
                "none: the config has lora_bias false",
                ONE_SAVE,
            )
        if (magnitude is not None) != self.config.use_dora:
            at = magnitude or roles["lora_A"]
            found = "a DoRA magnitude" if magnitude is not None else "no lora_magnitude_vector beside it"
            code = "unconsumed-adapter-tensor" if magnitude is not None else "missing-adapter-tensor"
            self._refuse(
                code,
                at,
                found,
                f"what use_dora {str(self.config.use_dora).lower()} in the config says",
                ONE_SAVE,
            )
        if self.config.lora_bias and bias is None and not embedding:
            self._refuse(
                "missing-adapter-tensor",
                roles["lora_B"],
                "no bias beside it",
                "lora_bias's lora_B.bias",
                ONE_SAVE,
            )

    def _add_rows(self, module: str, entry: TensorEntry) -> None:
        indices = self._indices_of(module)
        if indices is None:
            self._unnamed_rows.append(entry)
        elif len(set(indices)) != len(indices):
            self._refuse(
                "unsupported-adapter",
                entry,
                f"rows for the indices {list(indices)}, one of them twice",
                "each index once",
                "Which of the rows counts, torch leaves open: train with each index once.",
            )
        elif len(entry.shape) != 2 or len(indices) != entry.shape[0]:
            self._refuse(
                "shape-mismatch",
                entry,
                f"{list(entry.shape)}",
                f"{plural(len(indices), 'row')}, one for each index",
                ONE_SAVE,
            )
        else:
            self.rows.append(TokenRows(module, indices, entry))

    def sort_rows(self) -> None:
        """Decides what the rows are for whose module the config does not name, once all others are known.

        Where PEFT saves a tied model's embedding and head whole, it saves the embedding's rows under the
        head's name again: `save_embedding_layers`, or a resized vocabulary.
        """
        for entry in self._unnamed_rows:
            same = [rows.entry for rows in self.rows if rows.entry.is_like(entry)]
            if len(same) == 1:
                self.copies.append((same[0], entry))
                continue
            self._refuse(
                "unconsumed-adapter-tensor",
                entry,
                "trained token rows",
                "trainable_token_indices in the config",
                ONE_SAVE,
            )

    def _indices_of(self, module: str) -> tuple[int, ...] | None:
        spec = self.config.raw.get("trainable_token_indices")
        if isinstance(spec, list):
            # A plain list means the input embedding, whatever its name is.
            return tuple(spec)
        if isinstance(spec, dict):
            for name, indices in spec.items():
                if ends_with(module, name):
                    return tuple(indices)
        return None

    def _add_full(self, entry: TensorEntry) -> None:
        name = entry.name.removeprefix(PREFIX)
        if name == entry.name or "lora_" in name:
            self._refuse(
                "unconsumed-adapter-tensor",
                entry,
                "a tensor that no known part of LoRA is named like",
                f"{PREFIX}<module>.lora_A.weight and the other names PEFT saves",
                "If another tool wrote it, convert the adapter to PEFT's names first.",
            )
            return
        kind = next((kind for kind in ("modules_to_save", "original_module") if f".{kind}." in name), "")
        for part in ("modules_to_save", "original_module", "token_adapter", "base_layer"):
            name = name.replace(f".{part}.", ".")
        if kind in self._whole[name]:
            self._refuse(
                "unconsumed-adapter-tensor",
                entry,
                f"a second tensor for {name}",
                "one",
                "Save the adapter again, from one training.",
            )
        self._whole[name][kind] = entry

    def sort_full(self) -> None:
        """Decides what the full tensors are for, once all of them are known."""
        for name, kinds in self._whole.items():
            entry = kinds.get("") or kinds.get("modules_to_save")
            if entry is None or not (self._is_saved(name) or self._is_kept(name)):
                self._refuse(
                    "unconsumed-adapter-tensor",
                    entry or kinds["original_module"],
                    "a full tensor",
                    "one of modules_to_save, a trained bias, or a saved embedding",
                    f"{ONE_SAVE} This one does not name it, so what it is for is unknown.",
                )
                continue
            self._check_not_nested(name, entry)
            self.full.append(FullTensor(name, entry, self._is_saved(name)))
            # With a resized vocabulary PEFT saves modules_to_save three times, and reads the plain name.
            if "" in kinds and "modules_to_save" in kinds:
                self.copies.append((entry, kinds["modules_to_save"]))
            if "original_module" in kinds:
                self.originals.append(kinds["original_module"])

    def _check_not_nested(self, name: str, entry: TensorEntry) -> None:
        """Of a module to save within another, PEFT trains and saves a copy that no forward uses."""
        saved = self.config.saved_around(name.rpartition(".")[0])
        if len(saved) > 1:
            self._refuse(
                "unsupported-adapter",
                entry,
                f"modules_to_save names {saved[-1]}, and {saved[0]}: PEFT saves a copy that is not used",
                "no module to save within another; PEFT cannot load such an adapter, either",
                "Train with the outer one alone in modules_to_save.",
            )

    def _is_saved(self, name: str) -> bool:
        return self.config.saves_module(name.rpartition(".")[0])

    def _is_kept(self, name: str) -> bool:
        """An embedding or head that was saved because it was resized or wrapped, or a trained bias."""
        module, _, leaf = name.rpartition(".")
        trained = self.config.bias
        bias = "bias" in name if trained == "all" else leaf == "bias" and trained == "lora_only"
        whole = leaf == "weight" or (leaf == "bias" and f"{module}.weight" in self._whole)
        return bias or (whole and module.rpartition(".")[2] in EMBEDDING_NAMES)

    def _refuse(self, code: str, entry: TensorEntry, found: str, expected: str, hint: str) -> None:
        self.problems.append(Problem(code, str(entry), found, expected, hint))
