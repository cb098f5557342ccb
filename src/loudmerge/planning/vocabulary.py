"""Embedding and head: tied or apart, resized or not. What was trained on one must not leak into the other."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loudmerge.errors import Problem
from loudmerge.layout import Axes, Span
from loudmerge.planning.draft import EMBEDDING, HEAD, HEAD_BIAS, Draft, wrong_shape
from loudmerge.planning.misplaced import missing_base
from loudmerge.planning.plan import OutputTensor, Site, Term
from loudmerge.planning.sites import Placed, dense_problem
from loudmerge.planning.tiedrows import (
    HEAD_BESIDE,
    carry_rows,
    changed_shared,
    is_tied,
    rows_apart,
    rows_on_shared,
    rows_under_lora,
)
from loudmerge.reading.adapter import LoraPair
from loudmerge.reading.experts import Slot
from loudmerge.reading.names import NUMBER
from loudmerge.system.tensorfile import TensorEntry

_TIED_SINCE_5 = frozenset({"longt5", "mt5", "pop2piano", "t5", "udop", "umt5"})
"""model_types whose config says true in memory where config.json says false (configuration_t5.py, 5.24.0)."""

SAVE_BOTH = (
    "Save the adapter with save_embedding_layers=True, or merge the live model with save_pretrained_merged."
)
"""What helps where only one of a resized embedding and head is in the file."""

UNTIE_BASE = (
    "Set tie_word_embeddings to false in the base's config.json, for a model that has no head; else save the"
    " base untied, with the head as a weight of its own. Merge into that."
)
"""What helps where the base ties a head whose name it does not say."""


def settle(draft: Draft, pairs: Sequence[LoraPair]) -> None:
    """Gives a tied model a head of its own where training parted the two, and follows a resized vocabulary.

    pairs: LoRA for a head that the base does not have on disk.
    """
    embedding, head = draft.names.find(EMBEDDING), draft.names.find(HEAD)
    _require_bias(draft, head or embedding)
    draft.problems += [*rows_on_shared(draft), *changed_shared(draft), *rows_apart(draft, head)]
    if embedding is None and head is None:
        _take_second_copy(draft)
    wanted = [pair.a for pair in pairs] + ([draft.full_head] if draft.full_head else [])
    wanted += [draft.head_rows.entry] if draft.head_rows else []
    if wanted and (embedding is None or head is not None or not is_tied(draft.base, draft.names)):
        draft.problems.append(missing_base(str(wanted[0]), "what was trained on lm_head", HEAD))
        return
    if embedding is None:
        _refuse_unknown_embedding(draft, head)
        _follow_sizes(draft, head)
        return
    added = None
    if is_tied(draft.base, draft.names) and not _stays_tied(draft, embedding, wanted):
        if wanted or (head is None and _trained_alone(draft, embedding)):
            added = _add_head(draft, embedding, pairs)
        touched = head is not None and (head.name in draft.terms or head.name in draft.changes)
        if added is not None or touched or _trained_alone(draft, embedding):
            draft.edit("tie_word_embeddings", False, everywhere=True)
    if "token_rows" in draft.changes.get(embedding.name, {}):
        carry_rows(draft, embedding, head)
    _follow_size(draft, embedding, added or (draft.final(head) if head is not None else None))


def _take_second_copy(draft: Draft) -> None:
    """A tied matrix that PEFT saved twice, as embedding and as head, being resized or asked to.

    That both are equal is shown before a byte is written (`preflight.check_weights`).
    """
    saved = {full.entry for full in draft.adapter.full if not full.saved_module}
    if draft.full_head not in saved or not is_tied(draft.base, draft.names):
        return
    found = [changes.get("replacement") for changes in draft.changes.values()]
    same = [entry for entry in found if entry in saved and entry.is_like(draft.full_head)]
    if len(same) == 1:
        draft.take_copy(same[0], draft.full_head)
        draft.full_head = None


def _refuse_unknown_embedding(draft: Draft, head: TensorEntry | None) -> None:
    """A tied model whose embedding has another key: what was trained on either would reach both, or be lost.

    Token rows are for both, and PEFT trains them so: they need no head of their own.
    """
    if not is_tied(draft.base, draft.names):
        if head is not None and draft.base.model_type in _TIED_SINCE_5:
            draft.problems += [_tied_or_not(rows.entry, head) for rows in draft.adapter.rows]
        return
    for name in dict.fromkeys([*draft.terms, *draft.changes]):
        entry, changes = draft.base.entries[name], draft.changes.get(name, {})
        rows_alone = head is None and name not in draft.terms and changes.keys() == {"token_rows"}
        copied = any(first is changes.get("replacement") for first, _ in draft.adapter.copies)
        for_both = rows_alone or (copied and name not in draft.terms and changes.keys() == {"replacement"})
        if not for_both and _may_be_tied(draft, entry, head):
            draft.problems.append(
                Problem(
                    "unsupported-base",
                    str(entry),
                    "something trained on a matrix that embedding and head share, not stored as"
                    f" model.{EMBEDDING}",
                    "a head that is a weight of its own, or one matrix under that key",
                    "Untie the model before training: save it with tie_word_embeddings false.",
                )
            )


def _may_be_tied(draft: Draft, entry: TensorEntry, head: TensorEntry | None) -> bool:
    """Whether a tensor may be a tied embedding or head, by its rows: one for each token, and some to spare.

    Other embeddings are of positions or kinds, which are fewer.
    """
    embeds = embeds_tokens(draft, entry)
    if embeds is not None:
        return embeds
    inside = re.search(r"\.\d+\.", entry.name) is not None  # of a layer, whose sizes are the same by chance
    return entry is head or (
        len(entry.shape) == 2 and entry.shape[0] in draft.base.vocabulary_sizes and not inside
    )


def embeds_tokens(draft: Draft, entry: TensorEntry) -> bool | None:
    """Whether an embedding that a LoRA is for has rows for all tokens; None where no such LoRA is for it."""
    if not any(draft.sites[term.site].pair.embedding for term in draft.terms.get(entry.name, ())):
        return None
    return entry.shape[0] >= min(draft.base.vocabulary_sizes, default=0)


def _tied_or_not(rows: TensorEntry, head: TensorEntry) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(rows),
        f"trained token rows, and a {head} that PEFT gives the same rows under transformers 5, not under 4",
        "an adapter without token rows: it does not say under which transformers it was trained",
        "Train LoRA on the other modules.",
    )


def _stays_tied(draft: Draft, embedding: TensorEntry, wanted: Sequence[TensorEntry]) -> bool:
    """With ensure_weight_tying PEFT trains one weight for both; where it saves both, both are written.

    PEFT 0.18 tied what is in modules_to_save and token rows only, not a LoRA.
    """
    config = draft.adapter.config
    before = embedding.name in draft.terms and (config.peft_version or "").startswith("0.18.")
    return bool(config.raw.get("ensure_weight_tying")) and not wanted and not before


def _trained_alone(draft: Draft, embedding: TensorEntry) -> bool:
    """Whether training changed the embedding and left the head, which it was tied to, as it was.

    PEFT wraps the embedding's module only. A saved embedding that is not in modules_to_save was resized,
    together with the head; trained token rows are tied by PEFT itself.
    """
    final = draft.final(embedding)
    saved = any(full.entry is final and full.saved_module for full in draft.adapter.full)
    return saved or embedding.name in draft.terms


def _add_head(draft: Draft, embedding: TensorEntry, pairs: Sequence[LoraPair]) -> TensorEntry | None:
    """A head of its own, beside the embedding; returns the tensor that it is made from."""
    key = HEAD_BESIDE.get(embedding.name)
    if key is None:
        draft.problems.append(
            missing_base(str(embedding), "a head of its own for a tied model", HEAD, UNTIE_BASE)
        )
        return None
    final = draft.final(embedding)
    source = draft.full_head or (embedding if _trained_alone(draft, embedding) else final)
    if source.shape[1:] != embedding.shape[1:]:
        draft.problems.append(wrong_shape(str(source), source.shape, embedding))
        return None
    terms = tuple(term for pair in pairs if (term := _head_term(draft, source, pair)) is not None)
    replaced, rows = source.name not in draft.base.entries, _head_rows(draft, embedding, source)
    if rows is not None and pairs:
        draft.problems.append(rows_under_lora(rows[1]))
    draft.added[embedding.name] = OutputTensor(
        key,
        embedding.file.name,
        source,
        draft.dtype(embedding),
        source.shape,
        replaced=replaced,
        terms=terms,
        token_rows=rows,
        head=True,
    )
    draft.replaced += replaced + (rows is not None)
    draft.dense += len(terms)
    draft.notes.append(f"{key} becomes a weight of its own: the base ties it to the embedding")
    return source


def _head_rows(
    draft: Draft, embedding: TensorEntry, source: TensorEntry
) -> tuple[tuple[int, ...], TensorEntry] | None:
    """The trained token rows of a head that is added: its own, or the embedding's, to which PEFT ties it."""
    own = draft.head_rows
    if own is not None:
        return (own.indices, own.entry) if draft.fits(own, source) else None
    rows: tuple[tuple[int, ...], TensorEntry] | None = draft.changes.get(embedding.name, {}).get("token_rows")
    return rows


def _head_term(draft: Draft, source: TensorEntry, pair: LoraPair) -> Term | None:
    config = draft.adapter.config
    rank = config.rank_for(pair.module, pair.a.shape[:1])
    scaling = config.scaling_for(pair.module, rank)
    rows = Span(0, source.shape[0])
    problem = dense_problem(
        Placed(pair, HEAD, rank, scaling, Slot(source, -1, Axes.OUT_IN, rows), expert=False, wrapped=False)
    )
    if problem is None and (pair.magnitude is not None or pair.bias is not None):
        problem = Problem(
            "unsupported-adapter",
            str(pair.a),
            "DoRA or a LoRA bias on a head that the base ties to its embedding",
            "plain LoRA",
            "Untie the model before training: save it with tie_word_embeddings false.",
        )
    if problem is not None:
        draft.problems.append(problem)
        return None
    draft.sites.append(Site(pair, HEAD, 0, rank, scaling, True, None, None, peft_rounds_delta=False))
    return Term(len(draft.sites) - 1, -1, rows, -1, Axes.OUT_IN, rows)


def _follow_size(draft: Draft, embedding: TensorEntry, head: TensorEntry | None) -> None:
    """A resized vocabulary: embedding and head must agree, and config.json follows."""
    size = draft.final(embedding).shape[0]
    if (head is not None and head.shape[0] != size and size != embedding.shape[0]) or (
        head is not None and head.shape[0] != size and head.name not in draft.base.entries
    ):
        draft.problems.append(_sizes_differ(draft.final(embedding), head))
    elif size != embedding.shape[0]:
        _resize(draft, size)


def _follow_sizes(draft: Draft, head: TensorEntry | None) -> None:
    """A resized vocabulary, where the embedding has another name: what has a row for each token agrees."""
    sizes, canonical = draft.base.vocabulary_sizes, draft.names.canonical
    held = [
        entry
        for name, entry in draft.base.entries.items()
        if entry is head
        or (len(entry.shape) in (1, 2) and entry.shape[0] in sizes and not NUMBER.search(canonical[name]))
    ]
    resized = [draft.final(entry) for entry in held if draft.final(entry).shape[0] != entry.shape[0]]
    if not resized:
        return
    size = resized[0].shape[0]
    other = next((draft.final(entry) for entry in held if draft.final(entry).shape[0] != size), None)
    if other is not None:
        draft.problems.append(_sizes_differ(resized[0], other))
    else:
        _resize(draft, size)


def _resize(draft: Draft, size: int) -> None:
    draft.edit("vocab_size", size)
    draft.notes.append(f"the vocabulary is resized to {size}; OUT keeps the base's tokenizer files")


def _require_bias(draft: Draft, head: TensorEntry | None) -> None:
    """A resized head has a bias of its new size, if any."""
    bias = draft.names.find(HEAD_BIAS)
    if bias is None or head is None:
        return
    if not any("replacement" in draft.changes.get(entry.name, {}) for entry in (bias, head)):
        return
    final, rows = draft.final(bias), draft.final(head).shape[0]
    if final.shape != (rows,):
        expected = f"[{rows}], one for each row of {draft.final(head)}"
        draft.problems.append(
            Problem("shape-mismatch", str(final), f"{list(final.shape)}", expected, SAVE_BOTH)
        )


def _sizes_differ(embedding: TensorEntry, head: TensorEntry) -> Problem:
    return Problem(
        "shape-mismatch",
        f"{embedding} and {head}",
        f"vocabularies of {embedding.shape[0]} and {head.shape[0]}",
        "one size for embedding and head",
        SAVE_BOTH,
    )
