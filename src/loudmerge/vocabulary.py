"""Embedding and head: tied or apart, resized or not. What was trained on one must not leak into the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loudmerge.adapter import LoraPair
from loudmerge.checkpoint import Checkpoint
from loudmerge.draft import EMBEDDING, HEAD, HEAD_BIAS, Draft, wrong_shape
from loudmerge.errors import Problem
from loudmerge.experts import Slot
from loudmerge.layout import Axes, Span
from loudmerge.misplaced import missing_base
from loudmerge.names import NUMBER, Names
from loudmerge.plan import OutputTensor, Site, Term
from loudmerge.sites import Placed, dense_problem
from loudmerge.tensorfile import TensorEntry

_HEAD_BESIDE: Mapping[str, str] = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
}
"""Where transformers keeps the head of a model whose embedding has this key."""

_IN_MEMORY: Mapping[str, str] = {
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
}
"""Where transformers since 4.52 has an embedding that older files keep under this key."""

_TIED_SINCE_5 = frozenset({"longt5", "mt5", "pop2piano", "t5", "udop", "umt5"})
"""model_types whose config says true in memory where config.json says false (configuration_t5.py, 5.24.0)."""

TIES_ROWS = frozenset(
    {
        *("aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "ernie4_5_vl_moe"),
        *("fun_asr_nano", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "glmasr", "got_ocr2"),
        *("granite_docling", "granite_speech", "granite_speech_plus", "hunyuan_vl"),
        *("hyperclovax_vision_v2", "internvl", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr"),
        *("minicpm_ocr", "mistral3", "moss_transcribe_diarize", "mpt", "ovis2", "paddleocr_vl"),
        *("paligemma", "qwen3_asr", "voxtral_realtime"),
    }
)
"""model_types of nested configs whose class names the head as tied, and whose config says so by default."""

TIES_ROWS_WHERE_SAID = frozenset(
    {
        *("apertus1p5", "aria", "chameleon", "cohere_compass", "cosmos3_omni", "dbrx", "deepseek_ocr2"),
        *("dots3_note", "emu3", "exaone4_5", "fast_vlm", "fuyu", "glm46v", "glm4v", "glm4v_moe"),
        *("glm5_next", "glm_ocr", "granite4_vision", "hy_v4_vl", "idefics", "idefics2", "idefics3"),
        *("llava", "llava_next", "llava_next_video", "llava_onevision", "minicpmv4_6", "minicpmv4_7"),
        *("minimax_m3_vl", "mistral_large4", "muse_glimmer", "perception_lm", "phi4_multimodal"),
        *("qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe"),
        *("qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "smolvlm", "step3p7"),
        *("ultravbert", "unlimited_ocr", "vibevoice", "video_llama_3", "video_llava", "vipllava"),
    }
)
"""The same, where the whole model's config.json says so. Source of both: transformers 5.24.0."""

_HEADLESS = frozenset(
    {
        *("align", "altclip", "chinese_clip", "clap", "clip", "clipseg", "grounding-dino", "groupvit"),
        *("metaclip_2", "mm-grounding-dino", "owlv2", "owlvit", "siglip", "siglip2", "tipsv2"),
        *("vision-text-dual-encoder", "xclip"),
    }
)
"""model_types of towers without any head to carry rows to; their text models add `_text_model`."""

SAVE_BOTH = (
    "Save the adapter with save_embedding_layers=True, or merge the live model with save_pretrained_merged."
)
"""What helps where only one of a resized embedding and head is in the file."""


def settle(draft: Draft, pairs: Sequence[LoraPair]) -> None:
    """Gives a tied model a head of its own where training parted the two, and follows a resized vocabulary.

    pairs: LoRA for a head that the base does not have on disk.
    """
    embedding, head = draft.names.find(EMBEDDING), draft.names.find(HEAD)
    _require_bias(draft, head or embedding)
    draft.problems += _rows_apart(draft, head)
    wanted = [pair.a for pair in pairs] + ([draft.full_head] if draft.full_head else [])
    wanted += [draft.head_rows.entry] if draft.head_rows else []
    if wanted and (embedding is None or head is not None or not _tied(draft)):
        draft.problems.append(missing_base(str(wanted[0]), "what was trained on lm_head", HEAD))
        return
    if embedding is None:
        _refuse_unknown_embedding(draft, head)
        _follow_sizes(draft, head)
        return
    added = None
    if _tied(draft) and not _stays_tied(draft, embedding, wanted):
        if wanted or (head is None and _trained_alone(draft, embedding)):
            added = _add_head(draft, embedding, pairs)
        touched = head is not None and (head.name in draft.terms or head.name in draft.changes)
        if added is not None or touched or _trained_alone(draft, embedding):
            draft.edit("tie_word_embeddings", False, everywhere=True)
    if "token_rows" in draft.changes.get(embedding.name, {}):
        _carry_rows(draft, embedding, head)
    _follow_size(draft, embedding, added or (draft.final(head) if head is not None else None))


def _refuse_unknown_embedding(draft: Draft, head: TensorEntry | None) -> None:
    """A tied model whose embedding has another key: what was trained on either would reach both, or be lost.

    Token rows are for both, and PEFT trains them so: they need no head of their own.
    """
    if not _tied(draft):
        if head is not None and draft.base.model_type in _TIED_SINCE_5:
            draft.problems += [_tied_or_not(rows.entry, head) for rows in draft.adapter.rows]
        return
    for name in dict.fromkeys([*draft.terms, *draft.changes]):
        entry, changes = draft.base.entries[name], draft.changes.get(name, {})
        rows_alone = head is None and name not in draft.terms and changes.keys() == {"token_rows"}
        if not rows_alone and _may_be_tied(draft, entry, head):
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
    return entry is head or (len(entry.shape) == 2 and entry.shape[0] in draft.base.vocabulary_sizes)


def embeds_tokens(draft: Draft, entry: TensorEntry) -> bool | None:
    """Whether an embedding that a LoRA is for has rows for all tokens; None where no such LoRA is for it."""
    if not any(draft.sites[term.site].pair.embedding for term in draft.terms.get(entry.name, ())):
        return None
    return entry.shape[0] >= min(draft.base.vocabulary_sizes, default=0)


def ties_rows(base: Checkpoint) -> bool:
    """Whether PEFT ties token rows: it asks the whole model's config, whatever its text part says."""
    said = any(base.config_values("tie_word_embeddings"))
    return bool(base.config.get("tie_word_embeddings", said))


def _carry_rows(draft: Draft, embedding: TensorEntry, head: TensorEntry | None) -> None:
    """Token rows of a tied embedding are the head's, too: a head that is on disk gets the same.

    Source: peft/utils/other.py, `set_additional_trainable_modules`: the head's wrapper has the embedding's.
    """
    rows = draft.changes[embedding.name]["token_rows"]
    if head is None:
        return
    tied = ties_rows(draft.base)
    if not draft.base.config_values("tie_word_embeddings"):
        draft.problems.append(_unsaid(rows[1], head))
    elif tied and head.name in draft.terms:
        draft.problems.append(_rows_under_lora(rows[1]))
    elif tied and not draft.changes.get(head.name):
        draft.changes[head.name]["token_rows"] = rows
        draft.replaced += 1


def _rows_apart(draft: Draft, head: TensorEntry | None) -> Iterator[Problem]:
    """A problem for token rows of an embedding that OUT ties to a head to which PEFT may not have tied them.

    PEFT does where the config of the model that it wraps says so and the model's class names the head.
    Source: peft/utils/other.py, `set_additional_trainable_modules`, `_get_module_names_tied_with_embedding`.
    """
    base, config = draft.base, draft.base.config
    parted = head is not None and config.get("tie_word_embeddings") is False
    if parted or base.model_type.removesuffix("_text_model") in _HEADLESS or not _tied(draft):
        return
    held = [(rows.entry, draft.names.find(f"{rows.module}.weight")) for rows in draft.adapter.rows]
    if draft.head_rows is not None or any(entry is not None and entry is head for _, entry in held):
        return  # rows of its own
    for rows, entry in held:
        if entry is None:
            continue
        if (path := _above(rows, entry)) is not None:
            yield _untied_rows(
                rows, entry, head, f"a key without {path!r}: they were trained in a part that has no head"
            )
        elif _nested(base) and not _shown(base):
            said = config.get("tie_word_embeddings", "nothing")
            where = f"a config.json that nests another and says tie_word_embeddings {said} itself"
            yield _untied_rows(rows, entry, head, f"{where}, for model_type {base.model_type!r}")


def _above(rows: TensorEntry, embedding: TensorEntry) -> str | None:
    """What the rows' key lacks of the embedding's path, if the head lies outside of the part that has it."""
    module = rows.name.removeprefix("base_model.model.").partition(".token_adapter.")[0]
    for name in (embedding.name, _IN_MEMORY.get(embedding.name, "")):
        path = name.removesuffix(f"{module}.weight")
        if path != name and path.endswith(".") and not _HEAD_BESIDE.get(name, "").startswith(path):
            return path
    return None


def _nested(base: Checkpoint) -> bool:
    """Whether the config has another model's config in it."""
    parts = [part for part in base.config.values() if isinstance(part, dict)]
    return len(base.text_parts) > 1 or any(
        {"model_type", "tie_word_embeddings"} & set(part) for part in parts
    )


def _shown(base: Checkpoint) -> bool:
    """Whether PEFT is known to tie token rows of this model, whose config is nested."""
    if base.model_type in TIES_ROWS:
        return base.config.get("tie_word_embeddings", True) is True
    return base.model_type in TIES_ROWS_WHERE_SAID and base.config.get("tie_word_embeddings") is True


def _untied_rows(rows: TensorEntry, entry: TensorEntry, head: TensorEntry | None, found: str) -> Problem:
    return Problem(
        "unsupported-base",
        f"{rows} for {entry}",
        f"trained token rows of an embedding that {head or HEAD} is tied to, and {found}; PEFT may have left"
        " the head without the rows, which a tied head has",
        "rows that PEFT is known to tie to the head, or a head that is not tied",
        "Untie the base before training: save it with tie_word_embeddings false in all parts of the config"
        " and a head of its own.",
    )


def _unsaid(rows: TensorEntry, head: TensorEntry) -> Problem:
    return Problem(
        "unsupported-base",
        f"{rows} and {head}",
        "trained token rows of the embedding, and a config.json that does not say if the head is tied to it",
        "tie_word_embeddings in the base's config.json: a tied head has these rows, too",
        "Write it there: true, or false where embedding and head were trained apart.",
    )


def _tied_or_not(rows: TensorEntry, head: TensorEntry) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(rows),
        f"trained token rows, and a {head} that PEFT gives the same rows under transformers 5, not under 4",
        "an adapter without token rows: it does not say under which transformers it was trained",
        "Train LoRA on the other modules.",
    )


def _rows_under_lora(rows: TensorEntry) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(rows),
        "trained token rows of a tied embedding, and a LoRA on the head that PEFT lays over the same rows",
        "one of the two",
        "Train it on a model saved with tie_word_embeddings false, or with the head in modules_to_save.",
    )


def is_tied(base: Checkpoint, names: Names) -> bool:
    """Whether the model ties its head: the config says so, or says nothing and there is no head on disk."""
    said = base.config_values("tie_word_embeddings")
    return any(said) or (not said and names.find(HEAD) is None)


def _tied(draft: Draft) -> bool:
    return is_tied(draft.base, draft.names)


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
    replaced, rows = source.name not in draft.base.entries, _head_rows(draft, embedding, source)
    if rows is not None and pairs:
        draft.problems.append(_rows_under_lora(rows[1]))
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
