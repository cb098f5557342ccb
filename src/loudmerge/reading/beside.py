"""Weights in an adapter's directory beside the adapter's own: none that were trained with it are lost unsaid.

ms-swift writes a trained vision tower as vit.safetensors there (swift/tuner_plugin/lora_llm.py), Unsloth a
trained MTP head as mtp_head.safetensors (unsloth/save.py), LLaVA's trainer non_lora_trainables.bin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from loudmerge.errors import Problem, plural
from loudmerge.reading.adapter_config import WEIGHTS
from loudmerge.reading.sidefiles import is_weights
from loudmerge.system.placeholders import link_to_nothing

TENSORS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
"""The formats that trainers write tensors in; others hold the adapter, or a model, for other engines."""

_STATE = re.compile(
    r"adapter_model\.(safetensors|bin|pt)"  # the adapter, as PEFT wrote it before, and again by torchtune
    r"|pytorch_model_fsdp(_\d+)?\.bin"  # the adapter again (accelerate/utils/fsdp_utils.py, adapter_only)
    r"|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.(pt|bin)|scaler\.pt|training_args\.bin"
    r"|(rng_state|random_states)(_\d+)?\.(pth|pkl)"
)
"""What transformers' Trainer and accelerate keep of a training, to go on with it."""

_OWN = re.compile(
    r"(model|pytorch_model|consolidated)([.-]\S*)?\.(safetensors|bin|pth)"
    r"|(value_head|v_head|scoring_head)\.(safetensors|bin)"
)
"""A model of its own, and heads that a reward model or PPO has beside the language model: no part of OUT."""

PICKLED = "adapter_model.bin"
"""An adapter's weights as PEFT wrote them before it wrote safetensors."""

RESTARTED = "relora"

_IN_PARTS = re.compile(r"(pytorch_model_fsdp|global_step|distcp|dist_cp)[_\d]*")
"""Folders of FSDP's sharded state (accelerate/utils/fsdp_utils.py) and of DeepSpeed's."""

_GATHER = (
    "Save the trained adapter whole: with FSDP's FULL_STATE_DICT, with DeepSpeed's"
    " stage3_gather_16bit_weights_on_model_save, or by save_pretrained with the state accelerate gathers."
)

_HINT = (
    "If they were trained with the adapter, the merge would lose them: merge with the tool that wrote them. "
    "If not, move them out of the directory."
)


def weights_beside(names: Iterable[str], where: str) -> tuple[list[str], list[Problem]]:
    """What is not read of the files of these names (no folders): what a note should say; what is refused."""
    said, refused = [], []
    for name in sorted(names):
        if _STATE.fullmatch(name) or not is_weights(name) or name.endswith(".json"):
            continue
        if PurePosixPath(name.lower()).suffix not in TENSORS or _OWN.fullmatch(name):
            said.append(name)
        else:
            refused.append(_unread(name, where))
    return said, refused


def _unread(name: str, where: str) -> Problem:
    return Problem(
        "unconsumed-adapter-tensor",
        f"{where}/{name}",
        f"weights beside {WEIGHTS}, which PEFT does not load with it",
        "the adapter's weights in one file, and beside it a training's state at most",
        _HINT,
    )


def no_weights(path: Path) -> Problem:
    """That the directory has no adapter's weights, but for pickles, or for shards.

    transformers' save_pretrained writes those of a model with an adapter, above max_shard_size.
    """
    if (problem := link_to_nothing(path / WEIGHTS)) is not None:
        return problem
    if shards := sorted(path.glob("adapter_model-*.safetensors")):
        return Problem(
            "unsupported-adapter",
            str(shards[0]),
            f"an adapter's weights in {plural(len(shards), 'file')}",
            f"one {WEIGHTS}, as PEFT reads it",
            f"Join them: safetensors.torch.save_file of all that load_file reads of them, as {WEIGHTS}.",
        )
    pickled = [file.name for file in sorted(path.glob("*.bin")) if not _STATE.fullmatch(file.name)]
    if adapter := [name for name in (PICKLED, *pickled) if (path / name).is_file()]:
        return Problem(
            "unsafe-file",
            str(path / adapter[0]),
            "a pickle, which can run code when it is loaded",
            WEIGHTS,
            "Load it with PEFT where you trust it, and save it again with safe_serialization=True.",
        )
    parts = [f.name for f in sorted(path.iterdir()) if f.is_dir() and _IN_PARTS.fullmatch(f.name)]
    found = f"no {WEIGHTS}, but a training's weights in parts, in {parts[0]}" if parts else f"no {WEIGHTS}"
    hint = _GATHER if parts else "Give the directory that holds it: PEFT's save_pretrained writes both."
    return Problem("unsupported-adapter", str(path), found, "the weights beside the config", hint)


def restarted(path: Path) -> list[Problem]:
    """A problem for an adapter of axolotl's ReLoRA, which adds its LoRA to the base and starts it anew.

    Such a base is saved as `relora` in the checkpoint, of whose restart the adapter has a folder of its own.
    Source: axolotl/monkeypatch/relora.py, `ReLoRACallback`, 0.19.0.
    """
    inside = path.resolve()
    for folder in (inside / RESTARTED, inside.parent / RESTARTED if inside.name == "adapter" else inside):
        if folder != inside and folder.is_dir():
            return [
                Problem(
                    "unsupported-adapter",
                    str(path),
                    f"{folder}, a base that ReLoRA added this training's earlier LoRAs to",
                    "an adapter that holds all that was trained",
                    "Use the model that axolotl saves at the end of training, which is merged. If the folder"
                    " has to do with something else, move it out.",
                )
            ]
    return []
