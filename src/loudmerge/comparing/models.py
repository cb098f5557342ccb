"""Loads checkpoints with the installed transformers, base + adapter with the installed PEFT, or says why not.

Both packages report what they could not place and go on; here that is an error. No checkpoint's code is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loudmerge.comparing.relay import ADAPTER_NAME
from loudmerge.errors import EnvironmentFailed, Mismatch, is_out_of_memory, some
from loudmerge.reading.adapter import Adapter
from loudmerge.reading.checkpoint import Checkpoint
from loudmerge.reading.sidefiles import CONFIG
from loudmerge.system.tensorfile import FLOAT_CODES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PACKAGES = ("transformers", "peft")

_POSITIONS = ("max_position_embeddings", "max_seq_len")
"""How configs call it, with the names that transformers gives the same field, n_positions for one."""

_RAISED = (
    *(OSError, ValueError, RuntimeError, TypeError, AttributeError),
    *(LookupError, ArithmeticError, AssertionError, ImportError),
)
"""What code runs into that takes a config at its word."""


@dataclass(frozen=True)
class Loaded:
    """A model, and what transformers reported: parameters without a tensor, and tensors without a place."""

    model: PreTrainedModel
    missing: frozenset[str]
    unexpected: frozenset[str]


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers and peft show no warning and no progress bar.

    They warn of deprecations of their own, and of every module class that is not PEFT's; what bears on a
    comparison (tensors without a place, places without a tensor) is an error here.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def versions() -> dict[str, str]:
    """The installed packages that a comparison depends on."""
    return {package: version(package) for package in ("torch", *PACKAGES)}


@contextmanager
def blamed(subject: str) -> Iterator[None]:
    """What transformers or PEFT raise inside becomes an EnvironmentFailed: `subject`, and what they say.

    Only around calls of theirs, so that no defect of loudmerge hides in it. A config that they do not take
    fails wherever they use it first; huggingface_hub's checks of one raise classes of its own, which derive
    from Exception alone. Memory that runs out stays what it is: no config is to blame.
    """
    from huggingface_hub import errors

    strict = getattr(errors, "StrictDataclassError", OSError)  # older versions check no config
    try:
        yield
    except (*_RAISED, strict) as error:
        if is_out_of_memory(error):
            raise
        raise EnvironmentFailed(f"{subject}: {type(error).__name__}: {error}") from error


def model_class(config: Mapping[str, Any], where: Path) -> type[PreTrainedModel]:
    """The class that config.json's `architectures` names.

    Raises EnvironmentFailed when it names none, or one that the installed transformers lacks or that is an
    encoder-decoder.
    """
    import transformers

    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise EnvironmentFailed(
            f"{where / CONFIG}: found architectures {names}, expected a model class of "
            f"transformers {transformers.__version__}. Install a version that has it: code from a checkpoint "
            "is not run."
        )
    if config.get("is_encoder_decoder"):
        raise EnvironmentFailed(
            f"{name}: found an encoder-decoder, expected a model that continues a sequence. "
            "`loudmerge verify` checks its tensors."
        )
    return found


def skeleton(cls: type[PreTrainedModel], where: Path) -> PreTrainedModel:
    """The model without weights, on the meta device. Raises EnvironmentFailed where none is made."""
    with blamed(f"{where}: {_transformers()} cannot load it"):
        config = cls.config_class.from_pretrained(where, local_files_only=True)
        with torch.device("meta"):
            return cls(config)


def vocabulary(model: PreTrainedModel, where: Path) -> int:
    """How many token ids the model takes. Raises EnvironmentFailed for one that takes none."""
    found: object = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(found, int) or found < 1:
        raise EnvironmentFailed(
            f"{where / CONFIG}: found vocab_size {found}, expected how many tokens a model of "
            "text has. `loudmerge verify` checks its tensors."
        )
    return found


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have, by the config; None where it does not say.

    RoBERTa counts positions from its padding's id on (transformers/models/roberta/modeling_roberta.py,
    `create_position_ids_from_input_ids`): the rows before stand for no token.
    """
    config = model.config.get_text_config()
    sizes = [size for name in _POSITIONS if isinstance(size := getattr(config, name, None), int) and size > 0]
    if not sizes:
        return None
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    before = (
        table.padding_idx + 1 for table in tables if table.padding_idx and table.num_embeddings in sizes
    )
    return max(min(sizes) - max(before, default=0), 1)


def load(cls: type[PreTrainedModel], where: Path, dtype: torch.dtype, device: str) -> Loaded:
    """A checkpoint in `dtype`, in evaluation mode. Raises EnvironmentFailed when it cannot be loaded."""
    with blamed(f"{where}: {_transformers()} cannot load it"):
        model, info = cls.from_pretrained(
            where,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model = model.to(device).eval()
    if hasattr(model, "set_experts_implementation"):
        # transformers 5 multiplies grouped matrices by default: it needs rows of a multiple of 16 bytes.
        model.set_experts_implementation("eager")
    return Loaded(
        model, frozenset(map(str, info["missing_keys"])), frozenset(map(str, info["unexpected_keys"]))
    )


def load_base(cls: type[PreTrainedModel], where: Path, device: str) -> Loaded:
    """The base in float32. Raises EnvironmentFailed when transformers leaves a weight at a random value."""
    loaded = load(cls, where, torch.float32, device)
    if loaded.missing:
        raise EnvironmentFailed(
            f"{where}: {_transformers()} finds no tensor for {some(loaded.missing, 3)}, "
            "so the base cannot be run. Install the version of transformers that wrote the checkpoint."
        )
    return loaded


def check_complete(out: Path, merged: Loaded) -> None:
    """Raises Mismatch when OUT, as transformers loads it, lacks a tensor."""
    if merged.missing:
        raise Mismatch(
            f"{out}: found no tensor for {some(merged.missing, 3)}, expected every tensor of the base. "
            "Merge again."
        )


def check_no_extra(out: Path, unexpected: frozenset[str], base: Loaded) -> None:
    """Raises Mismatch when OUT has a tensor that the model has no place for and the base has not."""
    extra = unexpected - base.unexpected
    if extra:
        raise Mismatch(
            f"{out}: found {some(extra, 3)}, expected only tensors that the base has. Merge again."
        )


def ends(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end this model's text, by its generation_config.json or config.json.

    Raises EnvironmentFailed for what is no id: transformers keeps it as it is.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = found if isinstance(found, list) else [found] if found is not None else []
    if not all(isinstance(one, int) for one in ids):
        raise EnvironmentFailed(
            f"{type(model).__name__}: found eos_token_id {found!r}, expected a token id or a list of them. "
            "Correct generation_config.json."
        )
    return frozenset(ids)


def attach(model: PreTrainedModel, directory: Path, adapter: Adapter, sites: int, device: str) -> PeftModel:
    """base + adapter by PEFT's own reading of `directory`, an adapter relaid for it. Wraps `model` in place.

    adapter: the original, for messages. sites: how many modules or parameters must come out adapted.
    Raises EnvironmentFailed when PEFT refuses, ignores a tensor, or leaves one at its initial value.
    """
    from peft import PeftModel

    # Some classes of transformers 4 rename keys of a checkpoint on load, and PEFT those of the adapter.
    renamed = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    with blamed(f"{adapter.path}: {_peft()} cannot load it"):
        peft_model = PeftModel.from_pretrained(model, str(directory), ADAPTER_NAME, torch_device=device)
        result = peft_model.load_adapter(
            str(directory), ADAPTER_NAME, torch_device=device, key_mapping=renamed
        )
    for keys, what in ((result.unexpected_keys, "ignores"), (result.missing_keys, "finds nothing in it for")):
        if keys:
            raise EnvironmentFailed(
                f"{adapter.path}: {_peft()} {what} {some(keys, 3)}, so base+adapter is not what the adapter "
                "says. Compare under the versions that the adapter was trained with."
            )
    adapted = sum(_is_adapted(module) for module in peft_model.modules())
    if adapted != sites:
        raise EnvironmentFailed(
            f"{adapter.path}: {_peft()} adapts {adapted} modules and parameters, expected {sites}. "
            "Compare under the versions that the adapter was trained with."
        )
    return peft_model.eval()


def exact_names(model: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """The parameters of a float32 model whose every value `dtype` can hold."""
    return frozenset(
        name for name, parameter in model.named_parameters() if torch.equal(parameter, _as(parameter, dtype))
    )


@torch.no_grad()
def round_parameters(model: nn.Module, names: Collection[str], dtype: torch.dtype) -> None:
    """Rounds the named float32 parameters to the nearest values of `dtype`, in place."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.copy_(_as(parameter, dtype))


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The safetensors code of the float type that most of the checkpoint's bytes have."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in FLOAT_CODES:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda code: sizes[code], default="F32")


def _as(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.detach().to(dtype).to(parameter.dtype)


def _is_adapted(module: nn.Module) -> bool:
    return any(
        isinstance(factors := getattr(module, name, None), nn.ModuleDict | nn.ParameterDict)
        and ADAPTER_NAME in factors
        for name in ("lora_A", "lora_embedding_A")
    )


def _transformers() -> str:
    return f"transformers {version('transformers')}"


def _peft() -> str:
    return f"peft {version('peft')} on {_transformers()}"
