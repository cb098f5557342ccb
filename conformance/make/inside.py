"""Runs inside one environment: makes the bases and adapters that are this environment's.

    python -m conformance.make.inside TRANSFORMERS PEFT DATA bases|adapters

Every adapter is made, saved and merged by the installed PEFT, in float32; the merged model is saved by the
installed
transformers under the base's own names. What changed is the expected output. `formula` computes it a second
time.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from conformance.make.edited import EDITED
from conformance.make.formula import Config, updates
from conformance.make.made import MADE
from conformance.make.recipes import BASES, SIZES, Base, Made, Packed
from tests.support import tiny

RANK, ALPHA = 2, 3
AGREE = 2e-6
"""How far formula and PEFT may be apart, of the largest weight."""

NAMED = {base.name: base for base in BASES}


class Data(NamedTuple):
    """Where the suite's files go."""

    root: Path

    def base(self, name: str) -> Path:
        return self.root / "bases" / name

    def adapter(self, name: str) -> Path:
        return self.root / "adapters" / name

    def expected(self, name: str) -> Path:
        return self.root / "expected" / f"{name}.safetensors"

    def note(self, name: str) -> Path:
        return self.root / "notes" / f"{name}.json"


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load(data: Data, base: Base) -> PreTrainedModel:
    """A base in float32, in evaluation mode; nothing of it missing or left over."""
    cls = tiny.model_class(base.model_type)
    if cls is None:
        raise LookupError(f"transformers {transformers.__version__} has no {base.model_type}")
    model, info = cls.from_pretrained(data.base(base.name), dtype=torch.float32, output_loading_info=True)
    left = {key: value for key, value in info.items() if value}
    if left:
        raise ValueError(f"{base.name}: found {left}, expected a base that loads whole")
    return model.eval()


def make_base(data: Data, base: Base) -> None:
    """Builds and saves one base."""
    if base.of:
        model = load(data, NAMED[base.of])
    else:
        config = tiny.config(base.model_type, **{**SIZES, **base.sizes})
        config.update(dict(base.config))
        cls = tiny.model_class(base.model_type)
        if cls is None:
            raise LookupError(f"transformers {transformers.__version__} has no {base.model_type}")
        torch.manual_seed(0)
        model = cls(config)
        tiny.fill(model, sum(base.name.encode()))
    dtype = getattr(torch, base.dtype)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(data.base(base.name), **base.save)


def train(live: nn.Module, seed: int) -> None:
    """Random values in everything that is trained. LoRA's factors anew, exact in bfloat16; the rest moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(live.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            if "magnitude" in name:
                parameter.mul_(1 + noise)
            elif re.search(r"\.(lora_(embedding_)?[AB]|hada_w[12]_[ab])\.", name):
                parameter.copy_(noise.bfloat16())
            else:
                parameter.add_(noise)


def attach(model: PreTrainedModel, made: Made) -> PeftModel:
    """The adapter on the live model, trained, so to say."""
    if made.method == "LOHA":
        config: Any = LoHaConfig(r=RANK, alpha=ALPHA, **made.lora)
    else:
        config = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM", **made.lora})
    live = get_peft_model(model, config)
    live.peft_config["default"].base_model_name_or_path = made.base
    train(live, sum(made.id.encode()))
    return live.eval()


def untie(model: nn.Module) -> None:
    """Gives every shared parameter a copy of its own, as training parted them."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def exact_updates(live: PeftModel, adapter: Path) -> tuple[dict[str, Tensor], str]:
    """The formula's updates by name in memory, and how much of the adapter they are."""
    file = adapter / "adapter_model.safetensors"
    fields = json.loads((adapter / "adapter_config.json").read_text())
    if (
        not file.is_file()
        or fields["peft_type"] != "LORA"
        or fields.get("use_dora")
        or fields.get("layer_replication")
    ):
        return {}, "does not apply"
    tensors = load_file(file)
    version = tuple(int(part) for part in peft.__version__.split("."))
    found = dict(updates(live, tensors, Config(fields, version)))
    if 2 * len(found) == len(tensors):
        return found, "agrees"
    return found, f"agrees on {len(found)} pairs of {len(tensors)} tensors"


def check(
    name: str, updates: dict[str, Tensor], before: dict[str, Tensor], merged: dict[str, Tensor]
) -> None:
    """Raises ValueError where PEFT's merge is not what the formula says."""
    for key, update in updates.items():
        exact = before[key].double() + update
        apart = float((merged[key].double() - exact).abs().max() / exact.abs().max())
        if not apart <= AGREE:
            raise ValueError(f"{name}: {key}: PEFT's merge and the formula are {apart} apart")


def make_adapter(data: Data, made: Made) -> None:
    """Makes, saves and merges one adapter; writes what it changed, and a note of how it was made."""
    model = load(data, NAMED[made.base])
    if made.of:
        live = PeftModel.from_pretrained(model, data.adapter(made.of)).eval()
        live.peft_config["default"].base_model_name_or_path = made.base
    else:
        live = attach(model, made)
    live.save_pretrained(data.adapter(made.id), **made.save)
    (data.adapter(made.id) / "README.md").unlink(missing_ok=True)
    note = {"transformers": transformers.__version__, "peft": peft.__version__}
    told = any(edited.of == made.id and edited.expect == "merge" for edited in EDITED)
    if not made.of and (made.expect != "refuse" or told):
        note["formula"] = merge(data, made, live)
    data.note(made.id).write_text(json.dumps(note))


def merge(data: Data, made: Made, live: PeftModel) -> str:
    """Writes the expected tensors: PEFT's merge, saved by transformers under the base's names."""
    inner = live.base_model.model
    before = {name.replace(".base_layer", ""): value.clone() for name, value in inner.state_dict().items()}
    exact, says = exact_updates(live, data.adapter(made.id))
    if made.parted:
        untie(inner)
        inner.config.tie_word_embeddings = False
    merged = live.merge_and_unload()
    check(made.id, exact, before, merged.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder, **NAMED[made.base].form)
        after = read(Path(folder))
    write_changed(data, made, after, other_names=made.parted or made.expect == "either")
    return says


def in_axes_of(base: Tensor | None, tensor: Tensor) -> Tensor:
    """Transformers 5 saves qwen3_vl_moe's experts (E, out, in), which 4 saved (E, in, out): as the base has
    them.

    Raises ValueError where the shape is another one.
    """
    if base is None or base.shape == tensor.shape:
        return tensor
    if base.ndim == 3 and base.mT.shape == tensor.shape:
        return tensor.mT
    raise ValueError(f"found shape {list(tensor.shape)}, expected {list(base.shape)}")


def write_changed(
    data: Data, made: Made | Packed, after: dict[str, Tensor], *, other_names: bool = False
) -> None:
    """The tensors that differ from the base's, in float32. Raises ValueError where names differ without
    reason.
    """
    before = read(data.base(made.base))
    odd = before.keys() ^ after.keys()
    if odd and not other_names:
        raise ValueError(f"{made.id}: {sorted(odd)} are in base or output only, expected the same names")
    after = {name: in_axes_of(before.get(name), tensor) for name, tensor in after.items()}
    changed = {
        name: tensor.float().contiguous()
        for name, tensor in sorted(after.items())
        if name not in before or not torch.equal(tensor.float(), before[name].float())
    }
    if not changed:
        raise ValueError(f"{made.id}: the adapter changes nothing")
    save_file(changed, data.expected(made.id))


def main(arguments: list[str]) -> int:
    """Makes what is this environment's: `bases` or `adapters`, or those that are named."""
    *wanted, root, stage = arguments
    if wanted != [transformers.__version__, peft.__version__]:
        raise SystemExit(
            f"found transformers {transformers.__version__}, peft {peft.__version__}, expected {wanted}"
        )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tiny.VOCABULARY = SIZES["vocab_size"]
    data = Data(Path(root))
    if stage == "bases":
        for base in BASES:
            if base.transformers == wanted[0]:
                make_base(data, base)
    else:
        for made in MADE:
            if [made.transformers, made.peft] == wanted:
                make_adapter(data, made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
