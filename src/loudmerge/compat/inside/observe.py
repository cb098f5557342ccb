"""What the installed versions do, as one JSON document: runs inside an environment that `bisect` made.

`python -m loudmerge.compat.inside.observe layout FILE` asks PEFT alone (seconds); `… journey FILE` trains,
merges and compares as a cell does; `… both FILE` does both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from loudmerge.comparing.relay import probe
from loudmerge.compat.environments.environment import SHOWN
from loudmerge.compat.inside import journey
from loudmerge.compat.judging.cells import FUSED, PER_EXPERT
from loudmerge.compat.judging.result import OK, CellResult
from loudmerge.demo.training import lora_targets
from loudmerge.errors import EnvironmentFailed
from loudmerge.layout import detect_layout
from loudmerge.reading.adapter import read_adapter

EXPERTS, HIDDEN, INTERMEDIATE, RANK = 3, 16, 10, 2
FUSED_SHAPES = {"gate_up_proj": (2 * INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
"""(out, in) of one expert. No two sizes are equal, so that the shapes of A and B tell the orientation."""


def layout(directory: Path) -> dict[str, Any]:
    """How the installed PEFT lays out the LoRA of a Qwen3-MoE's experts: as written and as computed.

    The adapter's file (in `directory`) is read for its shapes, and the live module is asked for the update
    that random factors make. Raises EnvironmentFailed where the two disagree.
    """
    model = _model()
    experts = model.model.layers[0].mlp.experts
    if not hasattr(experts, "gate_up_proj"):
        return {"path": PER_EXPERT, "orientation": None, "lora_b_layout": None, "evidence": "Linears"}
    written = _written(directory)
    computed = {name: reading for name, reading in probe(experts).items() if name in FUSED_SHAPES}
    says = {name: reading.orientation.value for name, reading in computed.items()}
    if {name: orientation for name, (orientation, _) in written.items()} != says:
        raise EnvironmentFailed(
            f"PEFT {version('peft')}: writes {written}, but computes its update as {says}"
        )
    evidence = "; ".join(f"{name}: {shapes}" for name, (_, shapes) in written.items())
    return {
        "path": FUSED,
        "orientation": _one(says.values()),
        "lora_b_layout": _one(reading.lora_b_layout.value for reading in computed.values()),
        "evidence": evidence,
    }


def _model() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


def _written(directory: Path) -> dict[str, tuple[str, str]]:
    """Fused parameter -> the orientation that the saved shapes of A and B say, and the shapes."""
    model = _model()
    with warnings.catch_warnings():
        # PEFT warns of what it cannot know of a model that was never on disk.
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", **lora_targets(model))
        get_peft_model(model, config).save_pretrained(directory)
    found = {}
    for pair in read_adapter(directory).pairs:
        for name, (rows, columns) in FUSED_SHAPES.items():
            a, b = pair.a.shape, pair.b.shape
            orientation, rank = detect_layout(a, b, EXPERTS, rows, columns)
            if pair.module.endswith(".experts") and orientation != "unknown" and rank == RANK:
                found[name] = (str(orientation), f"lora_A {list(a)}, lora_B {list(b)}")
    return found


def _one(values: Any) -> str:
    return ", ".join(sorted(set(values)))


def travelled(directory: Path) -> dict[str, Any]:
    """The figures of a cell's end-to-end run, as in CELL.json. Raises as journey.run."""
    found = journey.run(directory)
    result = CellResult(
        cell="",
        lane="",
        status=OK,
        versions={name: version(name) for name in SHOWN},
        path=found.path,
        orientation=found.orientation,
        merged=found.merged,
        figures=found.figures,
        unmoved=found.unmoved,
    )
    return result.to_json()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m loudmerge.compat.inside.observe")
    parser.add_argument("what", choices=("layout", "journey", "both"))
    parser.add_argument("file", type=Path)
    asked = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if asked.what != "journey":
            found |= layout(Path(scratch, "layout"))
        if asked.what != "layout":
            found |= travelled(Path(scratch, "journey"))
    asked.file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
