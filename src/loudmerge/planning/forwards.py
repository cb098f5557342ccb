"""Modules whose output is more than weight times input: no weight holds what LoRA, or rows, trained there.

PEFT adds a LoRA to the output of the module that it wraps, and computes an embedding's trained rows without
the module. Where the module scales, norms or shifts, this is not what changed rows of its weight would do.
Sources: the subclasses of nn.Linear and nn.Embedding with a `forward` of their own in transformers 4.57.6 and
5.24.0; peft/tuners/lora/layer.py, `Embedding.forward`; peft/tuners/trainable_tokens/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loudmerge.errors import Problem
from loudmerge.evidence.provenance import knows_embed_scale
from loudmerge.planning.draft import Draft
from loudmerge.planning.sites import Placement
from loudmerge.reading.adapter import Adapter
from loudmerge.reading.checkpoint import Checkpoint, config_parts
from loudmerge.reading.names import NUMBER
from loudmerge.system.arrays import read_array
from loudmerge.system.tensorfile import FLOAT_CODES, FileReader, TensorEntry

SCALED = frozenset({"embed_tokens", "embed_tokens_per_layer", "shared"})
"""Embeddings that multiply their rows by `embed_scale` in the models below."""

SCALING = frozenset({"gemma3", "gemma3_text", "gemma3n", "gemma3n_text"})
"""model_types with such embeddings in transformers 4, the only one in which PEFT before 0.18 runs."""

SCALING_WHERE_SAID = frozenset(
    {
        *("bart", "bigbird_pegasus", "biogpt", "blenderbot", "m2m_100", "mbart", "nllb-moe", "pegasus_x"),
        *("plbart", "seamless_m4t", "seamless_m4t_v2", "trocr", "xglm"),
    }
)
"""The same, where `scale_embedding` of the config is true; the factor is 1 where it is false."""

_NORMED = {"embed_tokens": "norms its rows"}
_END_OF_IMAGE = {"embed_tokens": "has a row of its own for the end of an image"}
_COMPUTED = "computes its indices from other inputs"
_POSITIONS = {"embed_positions": _COMPUTED}

BEYOND_WEIGHT: Mapping[str, Mapping[str, str]] = {
    "inkling_text": _NORMED,
    "inkling2_text": _NORMED,
    "inkling2_loop_text": _NORMED,
    "muse_glimmer_text": _NORMED,
    "muse_spark_text": _NORMED,
    "dory": {"lm_head": "multiplies its output by logit_scale"},
    "autoformer": _POSITIONS,
    "bart": _POSITIONS,
    "bigbird_pegasus": _POSITIONS,
    "biogpt": _POSITIONS,
    "blenderbot": _POSITIONS,
    "blenderbot-small": _POSITIONS,
    "fsmt": _POSITIONS,
    "informer": _POSITIONS,
    "led": _POSITIONS,
    "marian": _POSITIONS,
    "mbart": _POSITIONS,
    "mvp": _POSITIONS,
    "opt": _POSITIONS,
    "pegasus": _POSITIONS,
    "plbart": _POSITIONS,
    "pp_formulanet_text": _POSITIONS,
    "prophetnet": {"position_embeddings": _COMPUTED},
    "roformer": _POSITIONS,
    "t5gemma2_decoder": _END_OF_IMAGE,
    "t5gemma2_text": _END_OF_IMAGE,
    "time_series_transformer": _POSITIONS,
    "trocr": _POSITIONS,
    "whisper": _POSITIONS,
}
"""model_type -> the last part of a module's name -> what the module does besides."""

BIAS_APART: Mapping[str, str] = {
    "bridgetower": "mlm_score.bias",
    "deberta": "lm_predictions.lm_head.bias",
    "deberta-v2": "lm_predictions.lm_head.bias",
    "esm": "lm_head.bias",
    "lxmert": "cls.predictions.bias",
    "perceiver": "embedding_decoder.bias",
}
"""model_type -> a bias that the module around a head adds behind it, whatever PEFT makes of the head."""


def beyond_weight(base: Checkpoint, adapter: Adapter, placement: Placement) -> list[Problem]:
    """A problem for each LoRA, and each module's token rows, that no weight of the base can hold."""
    parts = [part for _, part in config_parts(base.config)]
    scales = not knows_embed_scale(adapter.config) and any(map(_scales, parts))
    if not scales and BEYOND_WEIGHT.keys().isdisjoint(map(_model_type, parts)):
        return []
    modules = [(item.pair.module, item.pair.a) for item in placement.dense if not item.wrapped]
    modules += [(pair.module, pair.a) for pair in placement.untied_head]
    modules += [(rows.module, rows.entry) for rows in adapter.rows]
    problems = []
    for module, trained in modules:
        leaf = module.rpartition(".")[2]
        does = [why for part in parts if (why := BEYOND_WEIGHT.get(_model_type(part), {}).get(leaf))]
        if does:
            problems.append(more_than_weight(str(trained), module, does[0]))
        elif scales and leaf in SCALED:
            problems.append(_unscaled(trained, module))
    return problems


def lost_biases(draft: Draft) -> Iterator[Problem]:
    """A problem for each head's bias, not all zero, that PEFT's live model computes without.

    Where a head has token rows, its own or those of the embedding that it is tied to, PEFT multiplies by the
    weight alone; the head that ensure_weight_tying makes of a saved embedding has no bias, either.
    Sources: peft/tuners/trainable_tokens/layer.py, `forward_adapters`; peft/utils/other.py,
    `ModulesToSaveWrapper.update`.
    """
    with FileReader() as reader:
        for trained, bias in _computed_without(draft):
            entry = draft.final(bias)
            changed = "bias" in draft.changes.get(bias.name, {})
            if changed or entry.dtype not in FLOAT_CODES or read_array(reader, entry).any():
                yield _lost_bias(trained, entry)


def _computed_without(draft: Draft) -> Iterator[tuple[TensorEntry, TensorEntry]]:
    """(what was trained on a head or on an embedding, a bias of that head)."""
    base, adapter = draft.base, draft.adapter
    said = [value for value in base.config_values("tie_word_embeddings") if value is not None]
    apart = BIAS_APART.get(base.model_type)
    biases = [entry for key, entry in base.entries.items() if key.endswith(".bias") and key != apart]
    for name, entry, saved in _of_heads(adapter):
        weight, canonical = draft.names.find(name), draft.family.canonical(name)
        for bias in biases:
            if weight is not None and bias.shape != weight.shape[:1]:
                continue
            # BERT's decoder has its bias under the name of the module around it, too.
            if canonical.startswith(draft.names.canonical[bias.name].removesuffix("bias")):
                lost = draft.final(bias) is bias if saved is not None else True
            else:
                tied = weight is not None and (any(said) or not said)
                lost = tied and saved is not False and not NUMBER.search(bias.name)
            if lost:
                yield entry, bias


def _of_heads(adapter: Adapter) -> Iterator[tuple[str, TensorEntry, bool | None]]:
    """(weight's name, what was trained on it, whether modules_to_save names it); None for token rows.

    With ensure_weight_tying PEFT on transformers 4 gives even an untied model a head without a bias: the
    file has its weight, which modules_to_save does not name.
    """
    yield from ((f"{rows.module}.weight", rows.entry, None) for rows in adapter.rows)
    if adapter.config.raw.get("ensure_weight_tying"):
        yield from ((full.name, full.entry, full.saved_module) for full in adapter.full)


def more_than_weight(where: str, module: str, does: str) -> Problem:
    """What was trained on a module that does more than multiply by its weight."""
    return Problem(
        "unsupported-adapter",
        where,
        f"something trained on {module}, which {does}: no weight of it computes the same",
        "a module whose output is its weight times its input",
        "Train LoRA on the other modules, or this one whole, in modules_to_save.",
    )


def _lost_bias(trained: TensorEntry, bias: TensorEntry) -> Problem:
    return Problem(
        "unsupported-adapter",
        f"{trained} and {bias}",
        "something trained on a head, or on the embedding that it is tied to, and a bias of the head that"
        " PEFT leaves out where it has token rows or ensure_weight_tying",
        "a head without a bias, or with one that is all zero",
        "Train the head whole, in modules_to_save and without ensure_weight_tying, or LoRA on it.",
    )


def _unscaled(trained: TensorEntry, module: str) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(trained),
        f"something trained on {module}, which multiplies by its embed_scale, and no peft_version >= 0.18.0",
        "an adapter of PEFT >= 0.18.0: before, it was trained without that factor",
        "If it was trained with PEFT >= 0.18.0, write that peft_version in adapter_config.json.",
    )


def _scales(part: Mapping[str, Any]) -> bool:
    said = part.get("scale_embedding") is not False
    return _model_type(part) in SCALING or (_model_type(part) in SCALING_WHERE_SAID and said)


def _model_type(part: Mapping[str, Any]) -> str:
    return str(part.get("model_type", ""))
