"""The adapters that PEFT makes, each in its own environment: data only."""

from __future__ import annotations

from typing import Any

from conformance.make.recipes import MIDDLE, NEW, OLD, Made

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
BOTH = [GATE_UP, DOWN]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
APART = ["gate_proj", "up_proj", "down_proj"]
ORIENTATION, LAYOUT, LINEARS = "orientation", "disk layout", "per-expert Linears"
SCALING, DENSE, VOCABULARY = "scaling", "dense parts", "vocabulary"
ROUNDING, UNKNOWABLE, KINDS = "low precision", "cannot be told", "other kinds"

UNGATED = (
    "No gate; backbone on disk is model in memory; the shapes of up and down do not tell the orientation."
)
FUSED_ERAS = ((MIDDLE, "0.18.1"), (MIDDLE, "0.19.0"), (MIDDLE, "0.19.1"), (NEW, "0.21.2"))
"""Environments in which every family's experts are fused, and PEFT's orientations."""


def fused(*parameters: str, modules: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A LoRA on fused parameters, beside Linears."""
    return {"target_parameters": list(parameters), "target_modules": modules or [], **more}


def linears(*modules: str, **more: Any) -> dict[str, Any]:
    """A LoRA on Linears by name."""
    return {"target_modules": list(modules), **more}


def _each_era() -> list[Made]:
    """The same three targets, under every PEFT that fuses."""
    says = {
        "0.18.1": "PEFT <= 0.18.1 writes fused experts swapped: lora_A reads the out axis.",
        "0.19.0": "PEFT 0.19.0 still writes them swapped, where the class is not is_transposed.",
        "0.19.1": "PEFT 0.19.1 turned them round: lora_A reads the in axis.",
        "0.21.2": "PEFT 0.21.2: as 0.19.1. lora_B's columns are rank-major.",
    }
    return [
        Made(
            f"qwen3_moe-fused-{peft}",
            "qwen3_moe",
            version,
            peft,
            ORIENTATION,
            says[peft] + " The base holds each expert apart.",
            fused(*BOTH, modules=["q_proj"]),
        )
        for version, peft in FUSED_ERAS
    ]


def _alone() -> list[Made]:
    """One parameter: nothing in the keys says which, only shapes and target_parameters do."""
    why = "One parameter alone: its keys are those of the other. The shapes say which, and which way round."
    return [
        Made(f"qwen3_moe-{name}-alone-{peft}", "qwen3_moe", version, peft, ORIENTATION, why, fused(parameter))
        for name, parameter in (("gate_up", GATE_UP), ("down", DOWN))
        for version, peft in (FUSED_ERAS[0], FUSED_ERAS[3])
    ]


def _square() -> list[Made]:
    """Square parameters: the shapes fit both ways, and peft_version is what is left."""
    made = []
    for version, peft in (FUSED_ERAS[0], FUSED_ERAS[1], FUSED_ERAS[3]):
        for base, parameter in (("qwen3_moe-2I-is-H", GATE_UP), ("qwen3_moe-I-is-H", DOWN)):
            why = "A square parameter alone fits both ways: only peft_version says which."
            made.append(Made(f"{base}-alone-{peft}", base, version, peft, ORIENTATION, why, fused(parameter)))
    for version, peft in (FUSED_ERAS[0], FUSED_ERAS[2]):
        why = "One of two parameters is square: the other's shapes decide for both."
        made.append(
            Made(
                f"qwen3_moe-2I-is-H-both-{peft}",
                "qwen3_moe-2I-is-H",
                version,
                peft,
                ORIENTATION,
                why,
                fused(*BOTH),
            )
        )
    return made


def _layouts() -> list[Made]:
    """Each family in several environments."""
    rows: tuple[tuple[str, str, list[str], tuple[tuple[str, str], ...]], ...] = (
        (
            "mixtral",
            "w1 is gate, w3 is up, w2 is down; block_sparse_moe on disk is mlp in memory.",
            BOTH,
            FUSED_ERAS,
        ),
        (
            "qwen3_moe-12-experts",
            "More than ten experts: sorted as text, 10 and 11 come before 2.",
            BOTH,
            (FUSED_ERAS[3],),
        ),
        (
            "gpt_oss",
            "Gate and up alternate in the last axis; is_transposed since transformers 5.",
            BOTH,
            ((OLD, "0.17.1"), (OLD, "0.19.1"), (MIDDLE, "0.18.1"), (MIDDLE, "0.19.0"), (NEW, "0.21.2")),
        ),
        (
            "llama4_text",
            "(E, in, out) without is_transposed: PEFT's orientation is the other one.",
            BOTH,
            ((OLD, "0.17.1"), (OLD, "0.18.1"), (MIDDLE, "0.19.0"), (NEW, "0.21.2")),
        ),
        (
            "qwen3_vl_moe-4",
            "Saved by transformers 4: (E, in, out). Transformers 5 transposes it on loading.",
            BOTH,
            ((OLD, "0.18.1"), (OLD, "0.19.1"), (MIDDLE, "0.18.1")),
        ),
        (
            "qwen3_vl_moe-5",
            "Saved by transformers 5: (E, out, in).",
            BOTH,
            ((MIDDLE, "0.19.0"), (NEW, "0.21.2")),
        ),
        ("nemotron_h-5.5", UNGATED, ["experts.up_proj", DOWN], ((MIDDLE, "0.18.1"), (MIDDLE, "0.19.1"))),
        ("nemotron_h-5.24", UNGATED, ["experts.up_proj", DOWN], ((NEW, "0.21.2"),)),
        ("gemma4_text", "Fused on disk as in memory.", BOTH, ((NEW, "0.21.2"),)),
        (
            "granitemoe",
            "Named input_linear and output_linear in memory, too, until transformers 5.13.",
            ["input_linear.weight", "output_linear.weight"],
            ((OLD, "0.17.1"), (MIDDLE, "0.18.1"), (MIDDLE, "0.19.1")),
        ),
        (
            "granitemoe",
            "input_linear and output_linear on disk, gate_up_proj and down_proj in memory.",
            BOTH,
            ((NEW, "0.21.2"),),
        ),
        (
            "aria_text",
            "fc1 and fc2 in memory until transformers 5.18; is_transposed came with the new names.",
            ["experts.fc1.weight", "experts.fc2.weight"],
            ((OLD, "0.17.1"), (MIDDLE, "0.19.1")),
        ),
        ("aria_text", "fc1 and fc2 on disk, gate_up_proj and down_proj in memory.", BOTH, ((NEW, "0.21.2"),)),
        (
            "jetmoe",
            "Attention has experts, too: input_linear and output_linear twice in a layer.",
            ["mlp.input_linear.weight", "mlp.output_linear.weight"],
            ((OLD, "0.18.1"),),
        ),
        (
            "step3p7",
            "One tensor for all experts and each projection; gate and up are one parameter in memory.",
            BOTH,
            ((NEW, "0.21.2"),),
        ),
        (
            "inkling2_text",
            "Rows of gate and up alternate on disk, and follow each other in memory.",
            BOTH,
            ((NEW, "0.21.2"),),
        ),
        ("minimax_m2", "w1, w3, w2 under block_sparse_moe.", BOTH, ((NEW, "0.21.2"),)),
        (
            "qwen3_moe-sharded",
            "The experts of one layer lie in several shards: a shard's experts are not all.",
            BOTH,
            ((MIDDLE, "0.18.1"), (NEW, "0.21.2")),
        ),
        (
            "qwen3_moe-fused",
            "A family of per-expert checkpoints, saved with fused experts.",
            BOTH,
            ((MIDDLE, "0.18.1"), (NEW, "0.21.2")),
        ),
    )
    return [
        Made(f"{base}-{version}-{peft}", base, version, peft, LAYOUT, why, fused(*parameters))
        for base, why, parameters, eras in rows
        for version, peft in eras
    ]


def _linears() -> list[Made]:
    """Adapters of transformers 4's per-expert Linears."""
    old = [
        Made(
            f"qwen3_moe-linears-{peft}",
            "qwen3_moe",
            OLD,
            peft,
            LINEARS,
            "One LoRA for each Linear of each expert, as transformers 4 has them.",
            linears(*APART, "q_proj"),
        )
        for peft in ("0.17.1", "0.18.1", "0.19.1")
    ]
    rows: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("qwen3_moe-linears-down", "qwen3_moe", "down_proj alone.", linears("down_proj")),
        (
            "qwen3_moe-linears-gate",
            "qwen3_moe",
            "gate_proj alone: PEFT >= 0.19 on transformers 5 cannot load it.",
            linears("gate_proj"),
        ),
        (
            "qwen3_moe-linears-some-experts",
            "qwen3_moe",
            "Experts 0 and 2 only, by an expression.",
            {"target_modules": r".*experts\.[02]\.(gate|up|down)_proj"},
        ),
        (
            "qwen3_moe-linears-rslora",
            "qwen3_moe",
            (
                "rslora: PEFT's conversion for transformers 5 makes gate and up too large by the "
                "square root of 2."
            ),
            linears(*APART, use_rslora=True),
        ),
        (
            "qwen3_moe-linears-patterns",
            "qwen3_moe",
            "Ranks and alphas that differ between experts and projections.",
            linears(
                *APART,
                rank_pattern={r"experts\.1\.up_proj": 3, "down_proj": 1},
                alpha_pattern={"gate_proj": 5},
            ),
        ),
        (
            "qwen3_moe-linears-one-layer",
            "qwen3_moe-2-layers",
            "The second of two layers.",
            linears(*APART, layers_to_transform=[1]),
        ),
        (
            "qwen3_moe-linears-dora",
            "qwen3_moe",
            "DoRA: the update depends on the base's weight.",
            linears(*APART, use_dora=True),
        ),
        (
            "qwen3_moe-linears-on-shards",
            "qwen3_moe-sharded",
            "Onto a base whose layer lies in several shards.",
            linears(*APART),
        ),
        (
            "mixtral-linears",
            "mixtral",
            "w1, w2 and w3, under block_sparse_moe in memory as on disk.",
            linears("w1", "w2", "w3"),
        ),
        (
            "phimoe-linears",
            "phimoe",
            "With the router and attention: PEFT on transformers 5 drops the experts' LoRA.",
            linears("w1", "w2", "w3", "q_proj"),
        ),
        (
            "qwen2_moe-linears",
            "qwen2_moe",
            "Routed and shared experts by one name: PEFT on transformers 5 drops one or the other.",
            linears(*APART),
        ),
        (
            "deepseek_v3-linears",
            "deepseek_v3",
            (
                "A dense layer, shared and routed experts by one name: PEFT >= 0.19 on transformers "
                "5 drops the first two."
            ),
            linears(*APART, "kv_b_proj"),
        ),
        ("glm4_moe-linears", "glm4_moe", "As deepseek_v3.", linears(*APART, "o_proj")),
        ("olmoe-linears", "olmoe", "Every projection, with attention.", linears(*APART, *ATTENTION)),
    )
    converted = [
        Made(
            f"qwen3_moe-linears-converted-{peft}",
            "qwen3_moe",
            version,
            peft,
            LINEARS,
            "Loaded and saved again by a PEFT that fuses it: rank 2r by rank_pattern, and "
            "peft_version still says 0.18.1.",
            of="qwen3_moe-linears-0.18.1",
        )
        for version, peft in ((MIDDLE, "0.19.1"), (NEW, "0.21.2"))
    ]
    return [
        *old,
        *(Made(name, base, OLD, "0.18.1", LINEARS, why, lora) for name, base, why, lora in rows),
        *converted,
    ]


def _scaling() -> list[Made]:
    rows = (
        (
            "fused-rslora-0.18.1",
            MIDDLE,
            "0.18.1",
            "alpha over the square root of the rank.",
            fused(*BOTH, use_rslora=True),
        ),
        (
            "fused-rslora-0.21.2",
            NEW,
            "0.21.2",
            "alpha over the square root of the rank.",
            fused(*BOTH, use_rslora=True),
        ),
        (
            "fused-patterns-0.19.1",
            MIDDLE,
            "0.19.1",
            "Patterns match the parameter's full name, not the module's.",
            fused(
                *BOTH,
                modules=["q_proj"],
                rank_pattern={"experts.gate_up_proj": 3, r"layers\.0\..*q_proj": 1},
                alpha_pattern={"down_proj": 7},
            ),
        ),
        (
            "fused-patterns-rslora-0.21.2",
            NEW,
            "0.21.2",
            "Patterns under rslora.",
            fused(*BOTH, use_rslora=True, rank_pattern={"down_proj": 4}, alpha_pattern={"gate_up_proj": 1}),
        ),
    )
    return [
        Made(f"qwen3_moe-{name}", "qwen3_moe", version, peft, SCALING, why, lora)
        for name, version, peft, why, lora in rows
    ]


def _dense() -> list[Made]:
    shared = [f"mlp.shared_expert.{name}.weight" for name in APART]
    router = "mlp.gate.weight"
    rows = (
        (
            "qwen2_moe-everything-0.21.2",
            "qwen2_moe",
            NEW,
            "0.21.2",
            (
                "Experts, router, shared expert, its gate and attention at once; the router is a "
                "parameter of two axes."
            ),
            fused(*BOTH, router, *shared, modules=[*ATTENTION, "shared_expert_gate"]),
        ),
        (
            "qwen2_moe-everything-0.18.1",
            "qwen2_moe",
            MIDDLE,
            "0.18.1",
            "As the other, in the older orientation.",
            fused(*BOTH, router, modules=[*ATTENTION, "shared_expert_gate", "shared_expert.up_proj"]),
        ),
        ("qwen3_moe-attention-0.17.1", "qwen3_moe", OLD, "0.17.1", "Attention alone.", linears(*ATTENTION)),
        ("qwen3_moe-attention-0.21.2", "qwen3_moe", NEW, "0.21.2", "Attention alone.", linears(*ATTENTION)),
        (
            "qwen3_moe-router-0.21.2",
            "qwen3_moe",
            NEW,
            "0.21.2",
            "The router alone: saved as if it were a Linear.",
            fused(router),
        ),
        (
            "qwen3_moe-router-linear-0.18.1",
            "qwen3_moe",
            OLD,
            "0.18.1",
            "The router, a Linear in transformers 4.",
            linears("mlp.gate"),
        ),
        (
            "qwen2_moe-router-to-save-0.18.1",
            "qwen2_moe",
            OLD,
            "0.18.1",
            "modules_to_save: the router is replaced.",
            linears("q_proj", modules_to_save=["mlp.gate"]),
        ),
        (
            "qwen2_moe-biases-0.21.2",
            "qwen2_moe",
            NEW,
            "0.21.2",
            "bias='all': trained biases replace the base's.",
            linears("q_proj", bias="all"),
        ),
        (
            "qwen3_moe-dora-0.19.1",
            "qwen3_moe",
            MIDDLE,
            "0.19.1",
            "DoRA on attention.",
            linears(*ATTENTION, use_dora=True),
        ),
    )
    return [
        Made(name, base, version, peft, DENSE, why, lora) for name, base, version, peft, why, lora in rows
    ]


def _vocabulary() -> list[Made]:
    embeddings = {"save_embedding_layers": False}
    return [
        Made(
            "qwen3_moe-head-to-save",
            "qwen3_moe",
            OLD,
            "0.18.1",
            VOCABULARY,
            "modules_to_save: head and embedding are replaced.",
            linears("q_proj", modules_to_save=["lm_head", "embed_tokens"]),
        ),
        Made(
            "qwen3_moe-head-and-embedding",
            "qwen3_moe",
            NEW,
            "0.21.2",
            VOCABULARY,
            "LoRA on head and embedding: lora_embedding_A and _B are transposed.",
            linears("lm_head", "embed_tokens"),
            save=embeddings,
        ),
        Made(
            "qwen3_moe-tied-head",
            "qwen3_moe-tied",
            OLD,
            "0.18.1",
            VOCABULARY,
            "The base ties the head to the embedding, training parts them: OUT needs a head of its own.",
            linears("q_proj", "lm_head"),
            save=embeddings,
            parted=True,
            config={"tie_word_embeddings": False},
        ),
        Made(
            "qwen3_moe-token-rows",
            "qwen3_moe",
            NEW,
            "0.21.2",
            VOCABULARY,
            "trainable_token_indices: the rows replace the base's, they are not added.",
            linears("q_proj", trainable_token_indices=[3, 7, 11]),
            save=embeddings,
        ),
    ]


def _low_precision() -> list[Made]:
    why = "A base in half precision: the sum is rounded, either neighbour will do."
    return [
        Made(
            "qwen3_moe-bf16-fused-0.21.2",
            "qwen3_moe-bf16",
            NEW,
            "0.21.2",
            ROUNDING,
            why,
            fused(*BOTH, modules=["q_proj"]),
        ),
        Made("qwen3_moe-bf16-fused-0.18.1", "qwen3_moe-bf16", MIDDLE, "0.18.1", ROUNDING, why, fused(*BOTH)),
        Made("qwen3_moe-fp16-linears", "qwen3_moe-fp16", OLD, "0.18.1", ROUNDING, why, linears(*APART)),
        Made(
            "mixtral-bf16-sharded-0.19.1",
            "mixtral-bf16-sharded",
            MIDDLE,
            "0.19.1",
            ROUNDING,
            why,
            fused(*BOTH),
        ),
    ]


def _unknowable() -> list[Made]:
    return [
        Made(
            "gpt_oss-I-is-H-both-0.21.2",
            "gpt_oss-I-is-H",
            NEW,
            "0.21.2",
            ORIENTATION,
            "gpt-oss has H = I = 2880: down is square, gate_up's shapes decide for both.",
            fused(*BOTH),
        ),
        Made(
            "gpt_oss-I-is-H-alone-0.18.1",
            "gpt_oss-I-is-H",
            MIDDLE,
            "0.18.1",
            ORIENTATION,
            "Square, but PEFT <= 0.18.1 knows one orientation only.",
            fused(DOWN),
        ),
        Made(
            "gpt_oss-I-is-H-alone-0.19.1",
            "gpt_oss-I-is-H",
            MIDDLE,
            "0.19.1",
            UNKNOWABLE,
            "Square, from PEFT >= 0.19.1: the orientation depends on transformers' version, "
            "which no file records.",
            fused(DOWN),
            expect="refuse",
            refusal="ambiguous-layout",
        ),
        Made(
            "qwen3_moe-I-is-H-saved-again",
            "qwen3_moe-I-is-H",
            MIDDLE,
            "0.19.1",
            UNKNOWABLE,
            "A square adapter of 0.18.1, loaded and saved again by 0.19.1: peft_version still "
            "says 0.18.1, the "
            "other fields say 0.19, and either may be how it was trained.",
            of="qwen3_moe-I-is-H-alone-0.18.1",
            expect="refuse",
            refusal="ambiguous-layout",
        ),
    ]


def _kinds() -> list[Made]:
    return [
        Made(
            "mixtral-1-expert-0.19.1",
            "mixtral-1-expert",
            MIDDLE,
            "0.19.1",
            ORIENTATION,
            "One expert: PEFT takes the path of a plain Linear.",
            fused(*BOTH),
        ),
        Made(
            "qwen3_moe-pissa",
            "qwen3_moe",
            OLD,
            "0.18.1",
            UNKNOWABLE,
            "PiSSA, saved without conversion: it belongs to a base that is nowhere on disk.",
            linears("q_proj", "v_proj", init_lora_weights="pissa"),
            expect="refuse",
            refusal="unsupported-adapter",
        ),
        Made(
            "qwen3_moe-pickle",
            "qwen3_moe",
            OLD,
            "0.18.1",
            KINDS,
            "Weights in a pickle: to be refused, or to be merged.",
            linears("q_proj"),
            save={"safe_serialization": False},
            expect="either",
            refusal="unsafe-file",
        ),
        Made(
            "qwen3_moe-layers-replicated",
            "qwen3_moe",
            OLD,
            "0.18.1",
            KINDS,
            "layer_replication: the merged model has a layer more than the base.",
            linears("q_proj", layer_replication=[[0, 1], [0, 1]]),
            parted=True,
            config={"num_hidden_layers": 2},
            expect="either",
            refusal="unsupported-adapter",
        ),
        Made(
            "qwen3_moe-loha",
            "qwen3_moe",
            OLD,
            "0.18.1",
            KINDS,
            "LoHa, not LoRA.",
            {"target_modules": ["q_proj"]},
            method="LOHA",
            expect="either",
            refusal="unsupported-adapter",
        ),
    ]


MADE: tuple[Made, ...] = (
    *_each_era(),
    *_alone(),
    *_square(),
    *_layouts(),
    *_linears(),
    *_scaling(),
    *_dense(),
    *_vocabulary(),
    *_low_precision(),
    *_unknowable(),
    *_kinds(),
)
