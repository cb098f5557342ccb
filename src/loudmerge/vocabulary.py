"""Embedding and head: tied or apart, resized or not. What was trained on one must not leak into the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loudmerge.adapter import LoraPair
from loudmerge.draft import EMBEDDING, HEAD, Draft, wrong_shape
from loudmerge.errors import Problem
from loudmerge.experts import Slot
from loudmerge.layout import Axes, Span
from loudmerge.misplaced import missing_base
from loudmerge.plan import OutputTensor, Site, Term
from loudmerge.sites import Placed, dense_problem
from loudmerge.tensorfile import TensorEntry

_HEAD_BESIDE: Mapping[str, str] = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
}
"""Where transformers keeps the head of a model whose embedding has this key."""


def settle(draft: Draft, pairs: Sequence[LoraPair]) -> None:
    """Gives a tied model a head of its own where training parted the two, and follows a resized vocabulary.

    pairs: LoRA for a head that the base does not have on disk.
    """
    embedding, head = draft.names.find(EMBEDDING), draft.names.find(HEAD)
    wanted = [pair.a for pair in pairs] + ([draft.full_head] if draft.full_head else [])
    if wanted and (embedding is None or head is not None or not _tied(draft)):
        draft.problems.append(missing_base(str(wanted[0]), "what was trained on lm_head", HEAD))
        return
    if embedding is None:
        _refuse_unknown_embedding(draft)
        return
    added = None
    if _tied(draft) and not _stays_tied(draft, wanted):
        if wanted or (head is None and _trained_alone(draft, embedding)):
            added = _add_head(draft, embedding, pairs)
        touched = head is not None and (head.name in draft.terms or head.name in draft.changes)
        if added is not None or touched or _trained_alone(draft, embedding):
            draft.edit("tie_word_embeddings", False)
    _follow_size(draft, embedding, added or (draft.final(head) if head is not None else None))


def _refuse_unknown_embedding(draft: Draft) -> None:
    """A tied model whose embedding has another name: what was trained on it would reach the head too."""
    size = draft.base.config_values("vocab_size")
    trained = [site.pair.a for site in draft.sites if site.pair.embedding]
    trained += [
        full.entry for full in draft.adapter.full if full.saved_module and full.entry.shape[0] in size
    ]
    if trained and _tied(draft):
        draft.problems.append(
            Problem(
                "unsupported-base",
                str(trained[0]),
                "what was trained on a tied embedding that is not called embed_tokens",
                "a model whose head is a weight of its own, or whose embedding is called embed_tokens",
                "Untie the model before training: save it with tie_word_embeddings false.",
            )
        )


def _tied(draft: Draft) -> bool:
    """Whether the model ties its head: the config says so, or says nothing and there is no head on disk."""
    said = draft.base.config_values("tie_word_embeddings")
    return any(said) or (not said and draft.names.find(HEAD) is None)


def _stays_tied(draft: Draft, wanted: Sequence[TensorEntry]) -> bool:
    """With ensure_weight_tying PEFT trains one weight for both; where it saves both, both are written."""
    return bool(draft.adapter.config.raw.get("ensure_weight_tying")) and not wanted


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
    key = _HEAD_BESIDE.get(embedding.name)
    if key is None:
        draft.problems.append(missing_base(str(embedding), "a head of its own for a tied model", HEAD))
        return None
    final = draft.final(embedding)
    source = draft.full_head or (embedding if _trained_alone(draft, embedding) else final)
    if source.shape[1:] != embedding.shape[1:]:
        draft.problems.append(wrong_shape(str(source), source.shape, embedding))
        return None
    terms = tuple(term for pair in pairs if (term := _head_term(draft, source, pair)) is not None)
    replaced = source.name not in draft.base.entries
    draft.added[embedding.name] = OutputTensor(
        key, embedding.file.name, source, draft.dtype(embedding), source.shape, replaced=replaced, terms=terms
    )
    draft.replaced += replaced
    draft.dense += len(terms)
    draft.notes.append(f"{key} becomes a weight of its own: the base ties it to the embedding")
    return source


def _head_term(draft: Draft, source: TensorEntry, pair: LoraPair) -> Term | None:
    config = draft.adapter.config
    rank, scaling = config.rank_for(pair.module), config.scaling_for(pair.module)
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
        draft.edit("vocab_size", size)
        draft.notes.append(f"the vocabulary is resized to {size}; OUT keeps the base's tokenizer files")


def _sizes_differ(embedding: TensorEntry, head: TensorEntry) -> Problem:
    return Problem(
        "shape-mismatch",
        f"{embedding} and {head}",
        f"vocabularies of {embedding.shape[0]} and {head.shape[0]}",
        "one size for embedding and head",
        "Save the adapter with save_embedding_layers=True.",
    )
