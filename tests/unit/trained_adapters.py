"""The small trained adapters of tests/unit/trained, written by benchmarks/packing/export.py, and bases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loudmerge.layout import LoraBLayout
from loudmerge.reading.adapter_config import CONFIG
from tests.unit.builders import write_base

DIRECTORY = Path(__file__).parent / "trained"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.safetensors"))

SILENT = frozenset({"8x8-SGD-20-steps"})
"""Two layers of 8 experts and rank 8, gently trained: the pairs show too little, so there is no answer."""


@dataclass(frozen=True)
class Trained:
    """One adapter: tensors by PEFT's names, and how it was trained."""

    tensors: dict[str, Tensor]
    recipe: Mapping[str, Any]
    packing: LoraBLayout

    @property
    def experts(self) -> int:
        return int(self.recipe["experts"])

    def write(self, path: Path, **fields: Any) -> Path:
        """The adapter's directory. fields: of its config, beside those that every one has."""
        path.mkdir(parents=True)
        rank = self.recipe["rank"]
        swapped = self.recipe["orientation"] == "swapped"
        config = {
            "peft_type": "LORA",
            "peft_version": "0.18.1" if swapped else "0.21.2",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            **fields,
        }
        (path / CONFIG).write_text(json.dumps(config))
        save_file(self.tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        return path

    def write_base(self, path: Path) -> Path:
        """A random Qwen3-MoE checkpoint that the adapter fits."""
        hidden, intermediate = self.recipe["hidden"], self.recipe["intermediate"]
        draw = torch.Generator().manual_seed(0)
        shapes = {
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
        }
        tensors = {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": torch.randn(
                shape, generator=draw
            )
            for layer in range(self.recipe["layers"])
            for expert in range(self.experts)
            for name, shape in shapes.items()
        }
        return write_base(path, tensors, num_experts=self.experts)


def trained(name: str) -> Trained:
    """Reads one of NAMES."""
    with safe_open(DIRECTORY / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = file.metadata()
    return Trained(tensors, json.loads(metadata["recipe"]), LoraBLayout(metadata["packing"]))


def other(packing: LoraBLayout) -> LoraBLayout:
    """The packing that it is not."""
    return next(one for one in LoraBLayout if one is not packing)
