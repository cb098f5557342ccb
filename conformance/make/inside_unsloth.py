"""Runs inside an environment with unsloth_zoo: makes the adapters that are this release's.

    UNSLOTH_ALLOW_CPU=1 UNSLOTH_IS_PRESENT=1 python -m conformance.make.inside_unsloth DATA

Unsloth's experts forward replaces transformers', and Unsloth's save_pretrained writes the marker. The
expected tensors
are the formula's, with lora_B packed as the recipe says. Unsloth's own forward is asked whether it reads it
so: the live
adapter's logits are those of the merged weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

# Before torch and transformers: it patches them.
import unsloth_zoo
from unsloth_zoo.hf_utils import fix_lora_auto_mapping
from unsloth_zoo.temporary_patches import mixtral_moe, qwen3_moe

import peft  # isort: skip
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from conformance.make import inside
from conformance.make.formula import Config, updates
from conformance.make.packed import PACKED
from conformance.make.recipes import Packed

LOGITS_AGREE, LOGITS_APART = 1e-4, 1e-1
"""Of the largest logit: how far the live adapter and its merge may be apart, and how far any other model
must be.
"""


def logits(model: nn.Module) -> Tensor:
    """Of a fixed text."""
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 20)[None]).logits
    return found.float()


def add(data: inside.Data, recipe: Packed, changes: dict[str, Tensor]) -> nn.Module:
    """The base, with updates added to its weights in float64."""
    model = inside.load(data, inside.NAMED[recipe.base])
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, update in changes.items():
            weights[name].copy_(weights[name].double() + update)
    return model


def make(data: inside.Data, recipe: Packed) -> None:
    """Makes and saves one adapter; writes what it changes where that is expected."""
    os.environ["UNSLOTH_MOE_LORA_B_LAYOUT"] = recipe.packing
    config = LoraConfig(
        r=inside.RANK,
        lora_alpha=inside.ALPHA,
        target_parameters=list(recipe.parameters),
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    live = get_peft_model(inside.load(data, inside.NAMED[recipe.base]), config)
    live.peft_config["default"].base_model_name_or_path = recipe.base
    # As unsloth's FastLanguageModel.get_peft_model does, which needs a GPU.
    fix_lora_auto_mapping(live)
    inside.train(live, sum(recipe.id.encode()))
    live.eval()
    trained = logits(live)
    adapter = data.adapter(recipe.id)
    live.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    version = tuple(int(part) for part in peft.__version__.split("."))
    read = {
        packing: dict(updates(live, tensors, Config(fields, version, packing == "grouped_by_expert")))
        for packing in ("rank_major", "grouped_by_expert")
    }
    del live
    merged = add(data, recipe, read.pop(recipe.packing))
    (other,) = read.values()
    apart = [
        float((logits(model) - trained).abs().max() / trained.abs().max())
        for model in (merged, add(data, recipe, other))
    ]
    if not apart[0] <= LOGITS_AGREE < LOGITS_APART <= apart[1]:
        raise ValueError(
            f"{recipe.id}: the logits of this packing and the other are {apart} from the live adapter's"
        )
    note = {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "unsloth_zoo": unsloth_zoo.__version__,
    }
    data.note(recipe.id).write_text(json.dumps({**note, "formula": "agrees with Unsloth's forward"}))
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder, **inside.NAMED[recipe.base].form)
        inside.write_changed(data, recipe, inside.read(Path(folder)))


def main(arguments: list[str]) -> int:
    """Makes what is this release's."""
    recipes = [recipe for recipe in PACKED if recipe.zoo == unsloth_zoo.__version__]
    if not recipes:
        raise SystemExit(f"found unsloth_zoo {unsloth_zoo.__version__}, of which no adapter is made")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    qwen3_moe.patch_qwen3_moe()
    mixtral_moe.patch_mixtral_moe()
    for recipe in recipes:
        make(inside.Data(Path(arguments[0])), recipe)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
