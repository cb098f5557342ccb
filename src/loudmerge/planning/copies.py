"""Other tensors of a checkpoint that are its embedding: the same matrix, under the name of a tied module.

transformers ties modules whose weights are equal on disk, and keeps them apart where they are not: so what
becomes of one copy must become of all. The embedding and head of a causal model are for `vocabulary.py`.
Source: transformers/modeling_utils.py, `tie_weights`, 5.24.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from loudmerge.errors import Problem
from loudmerge.planning.draft import EMBEDDING, HEAD, Draft
from loudmerge.planning.siblings import is_extra_layer
from loudmerge.planning.tiedrows import ties_rows
from loudmerge.planning.vocabulary import embeds_tokens
from loudmerge.system.tensorfile import FileReader, TensorEntry

_EMBEDS = re.compile(r"emb|shared|wte")
"""In the name of an embedding; without it a copy is a head, of which the config says if it is tied."""


def settle_copies(draft: Draft) -> None:
    """Trained token rows of a tied embedding go to its copies, too; what else is trained on one is refused.

    PEFT ties token rows as transformers ties the modules, where the model's config says so. A LoRA, and a
    module that it saves whole, it trains on the one module that is named.
    """
    said = [value for value in draft.base.config_values("tie_word_embeddings") if value is not None]
    tied = ties_rows(draft.base)
    for entry in [draft.base.entries[name] for name in dict.fromkeys([*draft.terms, *draft.changes])]:
        changes = draft.changes.get(entry.name, {})
        copies = list(_copies(draft, entry)) if _is_embedding(draft, entry) else []
        copies = [copy for copy in copies if tied or not said or _EMBEDS.search(copy.name)]
        rows_alone = entry.name not in draft.terms and changes.keys() == {"token_rows"}
        if rows_alone:
            copies = [copy for copy in copies if draft.changes.get(copy.name) != changes]
        if copies and not (rows_alone and tied and not any(_trained(draft, copy) for copy in copies)):
            draft.problems.append(_stored_again(entry, copies[0]))
            continue
        for copy in copies:
            draft.changes[copy.name]["token_rows"] = changes["token_rows"]
            draft.replaced += 1


def _is_embedding(draft: Draft, entry: TensorEntry) -> bool:
    """Whether something trained is for an embedding of tokens, of which it has a row for each."""
    changes = draft.changes.get(entry.name, {})
    if "token_rows" in changes:
        return True
    embeds = embeds_tokens(draft, entry)
    if embeds is not None:
        return embeds
    if not changes or len(entry.shape) != 2 or _EMBEDS.search(entry.name) is None:
        return False
    return entry.shape[0] in draft.base.vocabulary_sizes


def _copies(draft: Draft, entry: TensorEntry) -> Iterator[TensorEntry]:
    """The other tensors with the entry's bytes, which are read only where dtype and shape are the same."""
    canonical = draft.names.canonical
    with FileReader() as reader:
        for other in draft.base.entries.values():
            if other is entry or not other.is_like(entry):
                continue
            both = {canonical[entry.name], canonical[other.name]}
            if both == {EMBEDDING, HEAD} or _on_disk_only(draft, canonical[other.name]):
                continue
            if reader.same_bytes(entry, other):
                yield other


def _on_disk_only(draft: Draft, canonical: str) -> bool:
    """Whether it is a part that predicts further tokens, which transformers does not load."""
    return is_extra_layer(draft.base, canonical) or canonical.startswith("mtp")


def _trained(draft: Draft, entry: TensorEntry) -> bool:
    return entry.name in draft.terms or bool(draft.changes.get(entry.name))


def _stored_again(entry: TensorEntry, copy: TensorEntry) -> Problem:
    return Problem(
        "unsupported-base",
        str(entry),
        f"something trained on an embedding that lies in the base again, as {copy}",
        "one matrix, or token rows alone and tie_word_embeddings true in config.json",
        "Load the base and save it with transformers, which writes a tied matrix once.",
    )
