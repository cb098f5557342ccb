"""Why a LoRA pair has no place in the base: the refusals of `sites.py`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from loudmerge.errors import WHICH_BASE, Problem, plural
from loudmerge.reading.adapter import LoraPair
from loudmerge.reading.experts import ExpertGroup
from loudmerge.system.tensorfile import TensorEntry

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""The modules by which torch.compile, FSDP, its checkpointing, and DDP wrap others."""

PART = (
    "In the base it is a part of another tensor: merge with PEFT's merge_and_unload, and have transformers"
    " save the model."
)
_ONE_EXPERTS_GATE_UP = re.compile(r"\.experts\.\d{1,9}\.gate_up_proj\.")


def missing_base(where: str, found: str, name: str, hint: str = WHICH_BASE) -> Problem:
    """The base has no tensor that `name`, in memory, could mean."""
    around = [wrapper for wrapper in WRAPPERS if wrapper in name.split(".")]
    if around:
        hint = f"{around[0]} is a wrapper's name: save the adapter from the model without it. {hint}"
    if _ONE_EXPERTS_GATE_UP.search(name):
        # mcore_bridge/bridge/gpt_bridge.py (1.6.5), which warns that such LoRA may be of no use elsewhere.
        hint = (
            "ms-swift exports a training with Megatron so, where a model's experts are fused: export it with"
            " --merge_lora true."
        )
    return Problem(
        "missing-base-tensor",
        where,
        found,
        f"a tensor that {name} in memory means, in the base",
        hint,
    )


def nested(pairs: Sequence[LoraPair]) -> Problem:
    """LoRA inside LoRA where no fused experts are."""
    return Problem(
        "unsupported-adapter",
        str(pairs[-1].a),
        "nested LoRA (base_layer) on a module whose parameters are not fused experts",
        "one LoRA on each Linear, or target_parameters that name the experts' parameters",
        "target_parameters in adapter_config.json must name them as the model did in training.",
    )


def not_targeted(pair: LoraPair) -> Problem:
    """PEFT puts no LoRA on this module when it loads the adapter, and drops the tensors without a word."""
    return Problem(
        "unconsumed-adapter-tensor",
        str(pair.a),
        f"a LoRA on {pair.module}, which the adapter's config does not target",
        "target_modules, layers_to_transform and exclude_modules that have this module targeted",
        "Get the config and the weights of one and the same save. If they are, name the module in"
        " target_modules as its tensors are named: NeMo AutoModel has names of its own for shared experts.",
    )


def several_alphas(where: str, name: str, found: Sequence[float]) -> Problem:
    """Keys of alpha_pattern that say different things: by their order in training, or the release of PEFT."""
    return Problem(
        "unsupported-adapter",
        where,
        f"an alpha of {' or '.join(f'{alpha:g}' for alpha in found)} for {name}, by which key of"
        " alpha_pattern counts: PEFT saves them in another order than training had, and its releases differ",
        "keys that say one thing",
        "Leave the key in adapter_config.json that was trained, or merge the live model with"
        " save_pretrained_merged.",
    )


def mixed(pair: LoraPair, leaves: Sequence[str]) -> Problem:
    """Fused and other parameters of one module, targeted together."""
    return Problem(
        "unsupported-adapter",
        str(pair.a),
        f"one module with fused and other parameters targeted together: {', '.join(leaves)}",
        "fused experts alone",
        "Train one adapter for the fused experts, and another for the other parameters.",
    )


def not_fused(
    module: str, pairs: Sequence[LoraPair], fused: Sequence[str], *, use_dora: bool
) -> Problem | None:
    """Whether pairs, the outermost first, are not plain LoRA on each targeted parameter of fused experts."""
    if [pair.depth for pair in pairs] != list(range(len(fused))):
        return _wrong_nesting(module, pairs, fused)
    odd = [pair for pair in pairs if pair.magnitude is not None or pair.bias is not None or use_dora]
    return dora_on_experts(odd[0]) if odd else None


def _wrong_nesting(module: str, pairs: Sequence[LoraPair], fused: Sequence[str]) -> Problem:
    """Not one wrapper for each targeted parameter."""
    many = len(pairs) > len(fused)
    depths = ", ".join(str(pair.depth) for pair in pairs)
    return Problem(
        "unconsumed-adapter-tensor" if many else "missing-adapter-tensor",
        str(pairs[-1].a),
        f"LoRA on {module} inside {depths} base_layer levels",
        f"levels 0 to {len(fused) - 1}, one for each of its targeted parameters: {', '.join(fused)}",
        "Save the adapter again: the file or target_parameters is not complete.",
    )


def dora_on_experts(pair: LoraPair) -> Problem:
    """What PEFT trains on no fused experts."""
    return Problem(
        "unsupported-adapter",
        str(pair.magnitude or pair.bias or pair.a),
        "DoRA or a LoRA bias on fused experts",
        "plain LoRA: PEFT trains nothing else on them",
        "Train it without use_dora and lora_bias, or without LoRA on the experts.",
    )


def dora_on_a_part(pair: LoraPair, entry: TensorEntry) -> Problem:
    """DoRA on a Linear that is some rows of a tensor on disk."""
    return Problem(
        "unsupported-adapter",
        str(pair.magnitude),
        f"DoRA on {pair.module}, a part of {entry}",
        "plain LoRA, or DoRA on a weight of its own",
        PART,
    )


def several_counts(module: str, counts: Collection[int]) -> Problem:
    """Parameters of one module with different numbers of experts."""
    return Problem(
        "num-experts-mismatch",
        module,
        f"expert counts {sorted(counts)}",
        "one count in a module",
        "Get the checkpoint again.",
    )


def no_projection(name: str, projection: str, group: ExpertGroup) -> Problem:
    """A LoRA for a projection that the experts lack."""
    return Problem(
        "missing-base-tensor",
        name,
        f"a LoRA for {projection}",
        f"one of {', '.join(sorted(group.dims))}, which the base's experts have",
        WHICH_BASE,
    )


def unknown_family(name: str, pair: LoraPair) -> Problem:
    """Gate and up fused in an order that is not known."""
    return Problem(
        "unsupported-base",
        str(pair.a),
        f"a fused LoRA for {name}, experts stored apart, and a model_type that families.py lacks",
        "a known family: the order of gate and up in memory decides, and no file says it",
        "Add the family; CONTRIBUTING says how.",
    )


def no_target_parameters(pair: LoraPair) -> Problem:
    """A LoRA on experts that the config does not name."""
    return Problem(
        "unsupported-adapter",
        str(pair.a),
        "a LoRA on an experts module that target_parameters does not name",
        "target_parameters in adapter_config.json with the experts' parameters",
        "Get the config that was saved with these weights, or name them there: nothing else tells.",
    )


def no_matrix(entry: TensorEntry, pair: LoraPair) -> Problem:
    """A LoRA on what is no matrix."""
    return Problem(
        "unsupported-adapter",
        str(pair.a),
        f"a LoRA on {entry}, which has {plural(len(entry.shape), 'axis', 'axes')}",
        "a Linear or an Embedding",
        f"{WHICH_BASE} LoRA on other modules is for merge_and_unload.",
    )


def linear_or_conv1d(entry: TensorEntry, pair: LoraPair, *, known: bool) -> Problem:
    """A square weight of a model that has Linears and Conv1Ds, or of one not known."""
    if not known:
        return Problem(
            "ambiguous-layout",
            str(pair.a),
            f"a LoRA on the square {entry} with fan_in_fan_out true, and a model_type that families.py lacks",
            "fan_in_fan_out false, as PEFT sets it for a Linear",
            "Set fan_in_fan_out in adapter_config.json to false if this weight is a Linear's, no Conv1D's.",
        )
    return Problem(
        "ambiguous-layout",
        str(pair.a),
        f"a LoRA on the square {entry} with fan_in_fan_out false, in a model that has Linears and Conv1Ds",
        "fan_in_fan_out true, as PEFT sets it for a Conv1D",
        "Set fan_in_fan_out in adapter_config.json to true if this weight is a Conv1D's.",
    )
