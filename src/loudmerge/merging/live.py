"""A live `peft.PeftModel`: its base written as it is in memory, its adapter saved, and the two merged.

Going through files keeps one merge for everything: the same plan, the same refusals, the same verification.
"""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from loudmerge.errors import MergeRefused, Problem, some
from loudmerge.executing.outpath import make_parents, refuse_existing, remove_parents
from loudmerge.executing.report import MergeReport
from loudmerge.merging.blueprint import (
    Blueprint,
    Tied,
    blueprint_of,
    refuse_left_out,
    saved_apart,
    taken_out,
    ties_of,
    unlike_its_class,
)
from loudmerge.merging.count import other_counts
from loudmerge.merging.merge import Pathish, check_values, merge, merge_named
from loudmerge.merging.origin import keep_disk_layout
from loudmerge.merging.unsaved import unsaved
from loudmerge.merging.unused import unused_rows
from loudmerge.merging.wrappers import (
    Wrapper,
    other_adapters,
    own_forwards,
    plain_attribute,
    settle_scalings,
    unwrapped,
    wrappers,
)
from loudmerge.planning.options import Options
from loudmerge.reading.adapter import LEVELS, PREFIX, read_adapter
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.adapter_config import OTHER_KINDS, WEIGHTS
from loudmerge.reading.checkpoint import open_checkpoint
from loudmerge.reading.initialisations import CHANGING_INITS

if TYPE_CHECKING:
    from torch import Tensor, nn


def save_pretrained_merged(model: Any, out: Pathish, tokenizer: Any = None, **options: Any) -> MergeReport:
    """Merges a live PeftModel's active adapter into its base and publishes the result as `out`.

    model: a peft.PeftModel with one active LoRA adapter; it is not changed. tokenizer: saved beside the
    weights when given. options: those of `loudmerge.merge`, but for `resume`: all is written anew each time.
    The base is taken from memory, so what was changed since it was loaded is in the file; so are the LoRA's
    scalings, as set_scale left them. Where the base was loaded from a local checkpoint and is still the same,
    byte for byte, OUT keeps that checkpoint's shards, side files, and tensors that the model's class does not
    have. The report's notes name what OUT cannot hold: hooks, forwards and numbers that its class has not.

    Raises MergeRefused like `merge`, and for a base that is quantised, offloaded, has merged adapters, or not
    the tensors of its class, for modules whose active adapter is not the model's, and for what was trained
    where no forward looks; TypeError for what is no PeftModel, and for an option that there is not;
    ValueError when there is not exactly one active adapter, adapters are disabled, or an option's value does
    not exist, or is resume=True.
    """
    _check_values(options)
    name = _active_adapter(model)
    found = tuple(wrappers(model))
    _refuse_others(found, name)
    base = model.get_base_model()
    tensors = base_state_dict(base)
    _refuse_base(model, base, tensors)
    _refuse_meta(model, name)
    blueprint, bare = blueprint_of(base), _bare(base)
    tied = ties_of(bare, tensors, blueprint)
    _refuse((*own_forwards(found, name), *unused_rows(model, found, name, tensors, tied)))
    target = Path(out).absolute()
    refuse_existing(target, overwrite=bool(options.get("overwrite", False)))
    with ExitStack() as left:
        left.callback(remove_parents, make_parents(target))
        folder = tempfile.TemporaryDirectory(prefix=".loudmerge.live-", dir=target.parent)
        scratch = Path(left.enter_context(folder))
        weights, saved = scratch / "base", scratch / "adapter"
        adapter = saved if name == "default" else saved / name
        memory = {adapter: f"the live model's adapter {name!r}", weights: "the live model's base"}
        with _named_as_in_memory(memory):
            with _own_copy(model, name):
                # Embeddings are written with the base: what is in memory is what was trained on.
                model.save_pretrained(saved, selected_adapters=[name], save_embedding_layers=False)
            _settle_adapter(adapter, tensors, found, name)
            _refuse(list(unlike_its_class(bare, tensors, blueprint)))
            _save_base(bare, weights, tensors, tied)
            if tokenizer is not None:
                tokenizer.save_pretrained(weights)
            source = keep_disk_layout(weights, base, tensors, blueprint, with_tokenizer=tokenizer is None)
            shown = _shown(base, memory[weights]) if source is None else str(source)
            notes = _notes(model, bare, tensors, blueprint)
            return merge_named(weights, adapter, target, (shown, memory[adapter]), notes, **options)


def _notes(model: Any, bare: Any, tensors: Mapping[str, Tensor], blueprint: Blueprint | None) -> list[str]:
    """What the live model computes with, and OUT has not."""
    gone = set() if blueprint is None else taken_out(bare, tensors, blueprint)
    made_up = [f"the live model has no {some(gone)}: what loads OUT makes them up"] if gone else []
    return [*made_up, *unsaved(model, bare, None if blueprint is None else blueprint.model)]


def base_state_dict(base: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors, under the names they had before PEFT wrapped its modules; not copied."""
    return {
        plain: tensor for key, tensor in base.state_dict().items() if (plain := _plain_name(key)) is not None
    }


def _check_values(options: Mapping[str, Any]) -> None:
    """As `merge` does, which is only called once the model is written."""
    known = inspect.signature(merge).parameters.keys() - {"base", "adapter", "out"}
    if unknown := options.keys() - known:
        raise TypeError(f"save_pretrained_merged() has no option {min(unknown)!r}")
    if options.get("resume"):
        raise ValueError("resume is True, expected False: a live model is written anew each time")
    names = {field.name for field in fields(Options)}
    chosen = Options(**{name: value for name, value in options.items() if name in names})
    check_values(chosen, options.get("device", "cpu"), options.get("threads"))


def _active_adapter(model: Any) -> str:
    if not _is_peft_model(model):
        raise TypeError(f"found a {type(model).__name__}, expected a peft.PeftModel")
    # X-LoRA has several LoRAs active, and what mixes them beside.
    kind = getattr(model, "peft_type", "LORA")
    if (kind := getattr(kind, "value", kind)) != "LORA":
        _refuse(
            [Problem("unsupported-adapter", "peft_type of the live model", repr(kind), "'LORA'", OTHER_KINDS)]
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"found the active adapters {active}, expected exactly one: call set_adapter first")
    return str(active[0])


def _is_peft_model(model: object) -> bool:
    return any(cls.__name__ == "PeftModel" for cls in type(model).__mro__)


def _refuse_others(found: Sequence[Wrapper], name: str) -> None:
    if found and all(wrapper.disabled for wrapper in found):
        raise ValueError("the adapters are disabled: call enable_adapter_layers first")
    _refuse(list(other_adapters(found, name)))


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise MergeRefused(problems)


def _refuse_base(model: Any, base: Any, tensors: Mapping[str, Tensor]) -> None:
    hint = "Save the adapter, and merge it into the unquantised checkpoint with loudmerge.merge."
    if getattr(base, "is_quantized", False) or getattr(base, "hf_quantizer", None) is not None:
        found, expected = "a quantised base in memory", "full weights"
    elif _is_peft_model(base):
        found, expected = "a PeftModel within another", "one around the model itself"
        hint = "Save both adapters, merge the inner one with loudmerge.merge, and the outer one into its OUT."
    elif any(plain_attribute(module, "merged_adapters") for module in model.modules()):
        found, expected = "adapters that are merged into the base in memory", "the base without them"
        hint = "Call unmerge_adapter first."
    elif any("_orig_mod" in key.split(".") for key in tensors):
        # Its names are in no checkpoint: what loads OUT would begin with random weights in their place.
        found, expected = "modules that torch.compile wrapped", "the modules themselves"
        hint = "Compile in place (model.compile()), or put each module's _orig_mod back in its place first."
    elif any(key.endswith("._checkpoint_wrapped_module") for key, _ in base.named_modules()):
        found, expected = "modules that torch's checkpoint_wrapper wrapped", "the modules themselves"
        hint = (
            "Put each module's _checkpoint_wrapped_module back in its place first;"
            " gradient_checkpointing_enable() wraps none."
        )
    elif any(tensor.is_meta for tensor in tensors.values()):
        found, expected = "weights that are not in memory (offloaded)", "all weights in memory"
        hint = "Save the adapter, and merge it into the checkpoint on disk with loudmerge.merge."
    else:
        _refuse(list(other_counts(model)))
        return
    raise MergeRefused(Problem("unsupported-base", type(base).__name__, found, expected, hint))


def _refuse_meta(model: Any, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if name in key.split(".") and tensor.is_meta:
            raise MergeRefused(
                Problem(
                    "unsupported-adapter",
                    f"{key.removeprefix(PREFIX)} of the live model",
                    "a tensor that is not in memory (on the meta device)",
                    f"all of the adapter {name!r} in memory",
                    "Load the adapter's weights into the model first (load_adapter).",
                )
            )


@contextmanager
def _own_copy(model: Any, name: str) -> Iterator[None]:
    """Saving writes into the adapter's config (base_model_name_or_path): it gets a copy."""
    adapter = model.peft_config[name]
    try:
        model.peft_config[name] = copy.deepcopy(adapter)
        yield
    finally:
        model.peft_config[name] = adapter


def _bare(base: nn.Module) -> Any:
    """What the base is saved by. transformers looks parameters up by the names that they have unwrapped.

    Saving writes into the configs (dtype, architectures): it has copies.
    """
    bare = unwrapped(base)
    for field in ("config", "generation_config"):
        if getattr(base, field, None) is not None:
            setattr(bare, field, copy.deepcopy(getattr(base, field)))
    return bare


def _settle_adapter(
    adapter: Path, tensors: Mapping[str, Tensor], found: Sequence[Wrapper], name: str
) -> None:
    """What PEFT saved, as the live model computes with it. Raises MergeRefused for what cannot be read."""
    _add_lost_biases(adapter, tensors)
    _forget_initialisation(adapter)
    settle_scalings(adapter, found, name)
    read_adapter(adapter)


def _save_base(bare: Any, weights: Path, tensors: Mapping[str, Tensor], tied: Tied) -> None:
    _save_generation_config(bare, weights)
    written = saved_apart(tensors, tied)
    bare.save_pretrained(weights, state_dict=dict(written))  # it takes them out
    refuse_left_out(bare, written, open_checkpoint(weights))


def _save_generation_config(bare: Any, weights: Path) -> None:
    """As `save_pretrained` does it, which fails for a model without one, and on what transformers rejects."""
    if not bare.can_generate():
        return
    if getattr(bare, "generation_config", None) is None:
        bare.can_generate = lambda: False
        return
    try:
        bare.generation_config.save_pretrained(weights)
    except ValueError as error:
        raise MergeRefused(
            Problem(
                "unsupported-base",
                "generation_config of the live model",
                f"what transformers does not save: {error}",
                "one that it does",
                "Change or unset those fields of model.generation_config first, or set it to None.",
            )
        ) from error


@contextmanager
def _named_as_in_memory(memory: Mapping[Path, str]) -> Iterator[None]:
    """A refusal names what was in memory; the directories that it was written to are gone when it is read."""
    try:
        yield
    except MergeRefused as refusal:
        named = [replace(problem, where=_in_memory(problem.where, memory)) for problem in refusal.problems]
        raise MergeRefused(named) from None


def _in_memory(where: str, memory: Mapping[Path, str]) -> str:
    for path, name in memory.items():
        before, found, file = where.rpartition(f"{path}/")
        where = f"{before}{file} of {name}" if found else where.replace(str(path), name)
    return where


def _shown(base: Any, name: str) -> str:
    """A base that is not, or not any more, what lies where it was loaded from."""
    loaded = getattr(base, "name_or_path", "")
    return f"{name}, loaded from {loaded}" if loaded else name


def _add_lost_biases(adapter: Path, tensors: Mapping[str, Tensor]) -> None:
    """PEFT before 0.21 trains the biases of bias="lora_only" but saves none: the base in memory has them.

    Source: peft/utils/save_and_load.py looks for q_proj.bias, which is q_proj.base_layer.bias when wrapped.
    """
    if json.loads((adapter / ADAPTER_CONFIG).read_text("utf-8")).get("bias") != "lora_only":
        return
    saved = load_file(adapter / WEIGHTS)
    modules = {key.partition(".lora_")[0].removeprefix(PREFIX) for key in saved if ".lora_" in key}
    known = {key.replace(".base_layer.", ".") for key in saved}
    lost = {
        f"{PREFIX}{name}": tensors[name].detach().cpu().contiguous()
        for name in sorted(f"{module}.bias" for module in modules)
        if name in tensors and f"{PREFIX}{name}" not in known
    }
    if lost:
        save_file({**saved, **lost}, adapter / WEIGHTS, metadata={"format": "pt"})


def _forget_initialisation(adapter: Path) -> None:
    """PiSSA and its like change the base as they begin. The base in memory is the changed one."""
    file = adapter / ADAPTER_CONFIG
    config = json.loads(file.read_text("utf-8"))
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGING_INITS):
        file.write_text(json.dumps({**config, "init_lora_weights": True}, indent=2), "utf-8")


def _plain_name(key: str) -> str | None:
    """A key of a wrapped module's state dict -> the base's key; None for what PEFT added."""
    parts = key.split(".")
    if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
        return None
    if "trainable_tokens_delta" in parts or "trainable_tokens_original" in parts:
        return None
    return ".".join(part for part in parts if part not in LEVELS)
