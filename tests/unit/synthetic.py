"""Synthetic models and adapters, described: model families, a `Case`, and the JSON files that go with it.

Imports nothing from loudmerge. `reference.py` turns a case into files and into what their merge must be.
Axis names: E experts, r rank, H hidden, I expert intermediate; matrices of projections are (out, in).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 11


@dataclass(frozen=True, repr=False)
class Family:
    """How one model stores its experts on disk, and names them in memory.

    disk: per_expert | fused_oi | fused_io (2D matrices after E are (out, in) or (in, out)).
    disk_names: of gate, up, down (per_expert) or gate_up, down (fused), after `disk_moe`.
    memory_module: module of gate_up and of down in memory; memory_names: the parameters' names.
    memory_axes: order of the axes in memory, oi or io. interleaved: gate and up alternate.
    transposed: the class sets `is_transposed` in no ("never") or some ("varies") versions of transformers;
    "memory": even the axes in memory depend on the version. old_moe: the parent of experts in 4.57.
    """

    name: str
    model_type: str
    disk: str
    disk_layers: str
    disk_moe: str
    disk_names: tuple[str, ...]
    memory_layers: str
    memory_modules: tuple[str, str]
    memory_names: tuple[str, str]
    router: tuple[str, str]
    experts_key: str
    memory_axes: str = "oi"
    gated: bool = True
    interleaved: bool = False
    transposed: str = "never"
    old_moe: str = ""
    nested_config: bool = False

    def __repr__(self) -> str:
        return f"NAMED[{self.name!r}]"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))  # in hypothesis's failing examples

    @property
    def old_names(self) -> tuple[str, ...]:
        """One expert's Linears in memory under transformers 4.57, after `old_moe`."""
        return self.disk_names if self.disk == "per_expert" else _GUD

    @property
    def first(self) -> str:
        """The name of the first expert parameter: gate_up, or up where there is no gate."""
        return "gate_up" if self.gated else "up"


_GUD = ("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight")
_W132 = ("experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight")
_FUSED = ("experts.gate_up_proj", "experts.down_proj")
_GRANITE = ("input_linear.weight", "output_linear.weight")
_MLP = ("mlp.experts", "mlp.experts")
_NAMES = ("gate_up_proj", "down_proj")
_GATE = ("mlp.gate", "mlp.gate")
_VL = "model.language_model.layers"

FAMILIES = (
    Family("qwen3_moe", "qwen3_moe", "per_expert", "model.layers", "mlp", _GUD,
           "model.layers", _MLP, _NAMES, _GATE, "num_experts", old_moe="mlp"),
    Family("qwen3_moe_fused", "qwen3_moe", "fused_oi", "model.layers", "mlp", _FUSED,
           "model.layers", _MLP, _NAMES, _GATE, "num_local_experts", old_moe="mlp"),
    Family("mixtral", "mixtral", "per_expert", "model.layers", "block_sparse_moe", _W132,
           "model.layers", _MLP, _NAMES, ("block_sparse_moe.gate", "mlp.gate"), "num_local_experts",
           old_moe="block_sparse_moe"),
    Family("nemotron_h", "nemotron_h", "per_expert", "backbone.layers", "mixer", _GUD[1:],
           "model.layers", ("mixer.experts", "mixer.experts"), ("up_proj", "down_proj"),
           ("mixer.gate", "mixer.gate"), "n_routed_experts", gated=False),
    Family("qwen3_vl_moe", "qwen3_vl_moe", "fused_oi", _VL, "mlp", _FUSED,
           _VL, _MLP, _NAMES, _GATE, "num_local_experts", transposed="memory", nested_config=True),
    Family("qwen3_vl_moe_457", "qwen3_vl_moe", "fused_io", _VL, "mlp", _FUSED, _VL, _MLP, _NAMES, _GATE,
           "num_experts", memory_axes="io", transposed="memory", nested_config=True),
    Family("llama4_text", "llama4_text", "fused_io", "model.layers", "feed_forward", _FUSED,
           "model.layers", ("feed_forward.experts", "feed_forward.experts"), _NAMES,
           ("feed_forward.router", "feed_forward.router"), "num_local_experts", memory_axes="io"),
    Family("gpt_oss", "gpt_oss", "fused_io", "model.layers", "mlp", _FUSED, "model.layers", _MLP, _NAMES,
           ("mlp.router", "mlp.router"), "num_local_experts", memory_axes="io", interleaved=True,
           transposed="varies"),
    Family("granitemoe", "granitemoe", "fused_oi", "model.layers", "block_sparse_moe", _GRANITE,
           "model.layers", ("block_sparse_moe.experts", "block_sparse_moe.experts"), _NAMES,
           ("block_sparse_moe.router.layer", "block_sparse_moe.router"), "num_local_experts"),
    Family("granitemoe_55", "granitemoe", "fused_oi", "model.layers", "block_sparse_moe", _GRANITE,
           "model.layers", ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
           ("weight", "weight"), ("block_sparse_moe.router.layer",) * 2, "num_local_experts"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A synthetic model and adapter.

    fused: which of (family.first, "down") carry a fused LoRA, in the layers `fused_layers`.
    per_expert: projections that carry one Linear LoRA for each expert (names of transformers 4.57).
    dense: of "q_proj", "o_proj", "router", "lm_head". flipped: down is the inner wrapper.
    peft: the version that adapter_config.json pretends, or "none": newer fields, no version (no evidence).
    marker: "", "top", "nested" or "auto_mapping". extra: further fields of adapter_config.json.
    """

    family: Family
    seed: int = 0
    num_experts: int = 4
    layers: int = 1
    hidden: int = 6
    intermediate: int = 4
    rank: int = 2
    alpha: float = 3
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    orientation: str = "standard"
    packing: str = "rank_major"
    flipped: bool = False
    fused: tuple[str, ...] = ()
    fused_layers: tuple[int, ...] = (0,)
    per_expert: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    replaced: bool = False
    base_dtype: str = "float32"
    adapter_dtype: str = "float32"
    shards: int = 1
    peft: str = "0.19.1"
    marker: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    delta_scale: float = 1.0

    @property
    def projections(self) -> tuple[str, ...]:
        return ("gate", "up", "down") if self.family.gated else ("up", "down")

    def size(self, projection: str) -> tuple[int, int]:
        """(out, in) of a projection or of a fused parameter, as a Linear's weight."""
        if projection == "down":
            return self.hidden, self.intermediate
        return (2 if projection == "gate_up" else 1) * self.intermediate, self.hidden


def effective(case: Case, name: str) -> tuple[int, float]:
    """(rank, scaling) of a module or parameter: the first pattern in order that matches `(.*\\.)?(key)$`."""

    def matched(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), default)

    rank = int(matched(case.rank_pattern, case.rank))
    alpha = float(matched(case.alpha_pattern, case.alpha))
    return rank, alpha / (math.sqrt(rank) if case.rslora else rank)


def parameter_name(case: Case, layer: int, parameter: str) -> str:
    """The full name in memory of a fused parameter."""
    which = 1 if parameter == "down" else 0
    family = case.family
    module = f"{family.memory_layers}.{layer}.{family.memory_modules[which]}"
    return f"{module}.{family.memory_names[which]}"


def fused_key(case: Case, layer: int, parameter: str) -> str:
    """Where PEFT saves the LoRA of a fused parameter: nested when two parameters share a module."""
    name = parameter_name(case, layer, parameter).rpartition(".")[0]
    shared = len(case.fused) == 2 and len(set(case.family.memory_modules)) == 1
    inner = "down" if case.flipped else case.family.first
    return f"{name}.base_layer" if shared and parameter == inner else name


def memory_size(case: Case, parameter: str) -> tuple[int, int]:
    """(d1, d2) of a fused parameter in memory."""
    size = case.size(parameter)
    return size if case.family.memory_axes == "oi" else size[::-1]


def dense_names(case: Case) -> dict[str, tuple[str, str, tuple[int, int]]]:
    """Each dense target's module: (on disk, in memory, shape of the weight)."""
    family, hidden = case.family, case.hidden
    found = {"lm_head": ("lm_head", "lm_head", (VOCABULARY, hidden))}
    attention = "mixer" if family.name == "nemotron_h" else "self_attn"
    for layer in range(case.layers):
        number = case.layers + layer if family.name == "nemotron_h" else layer
        for name, out in (("q_proj", 2 * hidden), ("k_proj", hidden), ("o_proj", hidden)):
            suffix = f".{number}.{attention}.{name}"
            shape = (out, 2 * hidden if name == "o_proj" else hidden)
            found[f"{name}.{layer}"] = (family.disk_layers + suffix, family.memory_layers + suffix, shape)
        disk, memory = (f"{family.disk_layers}.{layer}.", f"{family.memory_layers}.{layer}.")
        shape = (case.num_experts, hidden)
        found[f"router.{layer}"] = (disk + family.router[0], memory + family.router[1], shape)
    return found


def router_parameter(case: Case) -> bool:
    """Whether the router's LoRA comes from `target_parameters` (its class is no Linear in transformers 5)."""
    return bool(case.fused)


BEFORE_018: Mapping[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none",
    "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
    "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None, "target_modules": None,
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip
ADDED: Mapping[str, Mapping[str, Any]] = {
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False},
    "0.19": {"lora_ga_config": None, "use_bdlora": None},
    "0.20": {"monteclora_config": None, "velora_config": None},
    "0.21": {"kasa_config": None},
}
"""Fields that LoraConfig gained, by the version of PEFT that first writes them."""


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def config_fields(peft: str) -> dict[str, Any]:
    """The field set that a version of PEFT writes; "none": the newest set without `peft_version`."""
    fields = dict(BEFORE_018)
    for version, added in ADDED.items():
        if peft == "none" or version_of(peft) >= version_of(version):
            fields.update(added)
    if peft != "none" and version_of(peft) >= (0, 18):
        fields["peft_version"] = peft
    return fields


def adapter_config(case: Case) -> dict[str, Any]:
    """adapter_config.json as PEFT would write it."""
    fields = config_fields(case.peft)
    parameters = [parameter_name(case, layer, p) for layer in case.fused_layers for p in case.fused]
    if len(case.fused_layers) == case.layers:
        # all layers: the short names that users give
        parameters = sorted({".".join(name.split(".")[-3:]) for name in parameters})
    modules = {d for d in case.dense if d != "router"}
    router = case.family.router[1].rpartition(".")[2]
    if "router" in case.dense and router_parameter(case):
        parameters.append(f"{router}.weight")
    elif "router" in case.dense:
        modules.add(router)
    for projection in case.per_expert:
        template = case.family.old_names[case.projections.index(projection)]
        modules.add(template.split(".")[2])
    fields |= {
        "r": case.rank,
        "lora_alpha": int(case.alpha) if float(case.alpha).is_integer() else case.alpha,
        "use_rslora": case.rslora,
        "rank_pattern": dict(case.rank_pattern),
        "alpha_pattern": dict(case.alpha_pattern),
        "target_modules": sorted(modules) if modules else None,
        "target_parameters": parameters or None,
        "modules_to_save": ["lm_head"] if case.replaced else None,
    }
    marker = _marker(case)
    if case.marker == "auto_mapping":
        fields["auto_mapping"] = {"base_model_class": "AnyForCausalLM", "unsloth_fixed": True, **marker}
    else:
        fields |= marker
    return fields | dict(case.extra)


def _marker(case: Case) -> dict[str, Any]:
    if not case.marker:
        return {}
    if case.marker == "top":
        return {"lora_B_layout": case.packing}
    names = {f: case.family.memory_names[1 if f == "down" else 0] for f in case.fused}
    inner = {n: {"lora_B_layout": case.packing, "num_experts": case.num_experts} for n in names.values()}
    detail = {
        "lora_A_layout": "grouped_by_expert", "lora_B_layout": case.packing, "parameters": inner,
    }  # fmt: skip
    return {"lora_B_layout": case.packing, "unsloth_fused_expert_lora": detail}


def model_config(case: Case) -> dict[str, Any]:
    """config.json with the fields that matter."""
    layers = case.layers * (2 if case.family.name == "nemotron_h" else 1)
    inner: dict[str, Any] = {
        "hidden_size": case.hidden, "intermediate_size": case.intermediate, "num_hidden_layers": layers,
        "moe_intermediate_size": case.intermediate, case.family.experts_key: case.num_experts,
        "num_experts_per_tok": 1, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    model_type = case.family.model_type
    top = {"architectures": ["AnyForCausalLM"], "model_type": model_type, "torch_dtype": case.base_dtype}
    if case.family.nested_config:
        return {**top, "text_config": {"model_type": f"{model_type}_text", **inner}}
    return {**top, **inner}


SIDE_FILES: Mapping[str, str] = {
    "generation_config.json": '{"eos_token_id": [7, 2]}\n',
    "tokenizer.json": '{"version":  "1.0"}',
    "LICENSE": "as is\n",
    "modeling_any.py": "raise RuntimeError('not to be run')\n",
}
