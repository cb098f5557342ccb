"""What is trained on a tied embedding: which heads have the same rows by PEFT, and what no forward calls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loudmerge.errors import Problem
from loudmerge.planning.draft import HEAD, Draft
from loudmerge.reading.adapter import PREFIX
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.names import Names
from loudmerge.system.arrays import read_array
from loudmerge.system.tensorfile import FileReader, TensorEntry

HEAD_BESIDE: Mapping[str, str] = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",  # of EXAONE: GPT-2's is none that its row calls embed_tokens
}
"""Where transformers keeps the head of a model whose embedding has this key."""

_IN_MEMORY: Mapping[str, str] = {
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
}
"""Where transformers since 4.52 has an embedding that older files keep under this key."""

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


_TIES_NOTHING = re.compile(
    r"(?<!^T5)(?<!^MT5)(?<!^UMT5)ForQuestionAnswering$|For(Sequence|Token)Classification$|^MarianModel$"
)
"""Classes of encoder-decoders that name nothing as tied to `shared` (transformers 5.24.0)."""

_TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""The task_type under which PEFT wraps a class that may not be the one of the base's config.json."""


def is_tied(base: Checkpoint, names: Names) -> bool:
    """Whether the model ties its head: the config says so, or says nothing and there is no head on disk."""
    said = base.config_values("tie_word_embeddings")
    return any(said) or (not said and names.find(HEAD) is None)


def ties_rows(base: Checkpoint) -> bool:
    """Whether PEFT ties token rows: it asks the whole model's config, whatever its text part says."""
    said = any(base.config_values("tie_word_embeddings"))
    return bool(base.config.get("tie_word_embeddings", said))


def carry_rows(draft: Draft, embedding: TensorEntry, head: TensorEntry | None) -> None:
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
        draft.problems.append(rows_under_lora(rows[1]))
    elif tied and not draft.changes.get(head.name):
        draft.changes[head.name]["token_rows"] = rows
        draft.replaced += 1


def rows_on_shared(draft: Draft) -> Iterator[Problem]:
    """A problem for token rows of an encoder-decoder's `shared`, under a class where PEFT leaves them there.

    Encoder and decoder have modules of their own with the same matrix, and call those. PEFT gives them the
    rows only where the class of the whole model says what is tied (peft/utils/other.py,
    `_get_module_names_tied_with_embedding`); in transformers 4 more classes did.
    """
    named = draft.base.config.get("architectures")
    name = _TASKS.get(str(draft.adapter.config.raw.get("task_type")))
    name = name or (str(named[0]) if isinstance(named, list) and named else "")
    for rows in draft.adapter.rows if _TIES_NOTHING.search(name) else ():
        if _is_shared(rows.module):
            yield Problem(
                "unsupported-adapter",
                str(rows.entry),
                f"trained token rows of {rows.module}, which no forward of {name} calls: with transformers 5"
                " they have no effect, merged they would",
                "rows of a model that PEFT ties to its encoder and decoder, such as one for generation",
                "Train without trainable_token_indices, or with embed_tokens in modules_to_save.",
            )


def changed_shared(draft: Draft) -> Iterator[Problem]:
    """A problem for a LoRA on an encoder-decoder's `shared`, or a whole copy of it, that changes it.

    Encoder and decoder call embeddings of their own, which are that same matrix: no forward calls `shared`
    itself (transformers 4.57.6 and 5.24.0, all classes that have one). PEFT wraps the module that is named,
    and only with ensure_weight_tying those tied to it. So training leaves such a LoRA at zero and such a copy
    as it was. One that is not, merged, would give a function that was never trained.
    """
    base, adapter = draft.base, draft.adapter
    apart = any(name.endswith("encoder.embed_tokens.weight") for name in base.entries)
    if apart or not base.config.get("is_encoder_decoder") or is_tied(base, draft.names):
        return
    if adapter.config.raw.get("ensure_weight_tying"):
        return
    with FileReader() as reader:
        for pair in adapter.pairs:
            if _is_shared(pair.module) and all(read_array(reader, half).any() for half in (pair.a, pair.b)):
                yield _uncalled(pair.module, pair.a)
        for full in adapter.full:
            module, held = full.name.removesuffix(".weight"), draft.names.find(full.name)
            if not full.saved_module or not _is_shared(module) or held is None:
                continue
            if held.is_like(full.entry) and not reader.same_bytes(held, full.entry):
                yield _uncalled(module, full.entry)


def _is_shared(module: str) -> bool:
    return module.rpartition(".")[2] == "shared"


def _uncalled(module: str, trained: TensorEntry) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(trained),
        f"a change of {module}, which no forward calls: encoder and decoder have embeddings with that matrix,"
        " and PEFT trains neither",
        "a LoRA that is zero, or a copy that is the base's",
        "It has no effect in the model that was trained: leave it out of target_modules and modules_to_save.",
    )


def rows_apart(draft: Draft, head: TensorEntry | None) -> Iterator[Problem]:
    """A problem for token rows of an embedding that OUT ties to a head to which PEFT may not have tied them.

    PEFT does where the config of the model that it wraps says so and the model's class names the head.
    Source: peft/utils/other.py, `set_additional_trainable_modules`, `_get_module_names_tied_with_embedding`.
    """
    base, config = draft.base, draft.base.config
    parted = head is not None and config.get("tie_word_embeddings") is False
    if parted or base.model_type.removesuffix("_text_model") in _HEADLESS or not is_tied(base, draft.names):
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
    module = rows.name.removeprefix(PREFIX).partition(".token_adapter.")[0]
    for name in (embedding.name, _IN_MEMORY.get(embedding.name, "")):
        path = name.removesuffix(f"{module}.weight")
        if path != name and path.endswith(".") and not HEAD_BESIDE.get(name, "").startswith(path):
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


def rows_under_lora(rows: TensorEntry) -> Problem:
    """Token rows of both, and a LoRA on the head."""
    return Problem(
        "unsupported-adapter",
        str(rows),
        "trained token rows of a tied embedding, and a LoRA on the head that PEFT lays over the same rows",
        "one of the two",
        "Train it on a model saved with tie_word_embeddings false, or with the head in modules_to_save.",
    )
