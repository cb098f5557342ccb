"""Trains the adapters of the rounding study, and stores their factors.

    python -m benchmarks.rounding.train --dir DIR --model dense|untied|qwen2_moe|mixtral [--run NAME…]

The models are SmolLM2-135M-Instruct and its upcycled mixtures (tests/support/smollm2.py), the text is the
standard library's documentation. One run is one training; its factors are stored at several step counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from loudmerge.comparing.behaviour import library_text
from tests.support import smollm2

TOKENS = 160
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Run:
    """One training. steps: the step counts whose factors are stored."""

    name: str
    model: str
    optimizer: str
    lr: float
    rank: int
    seed: int
    steps: tuple[int, ...]


RUNS = (
    Run("a", "dense", "adamw", 2e-4, 16, 0, (1, 5, 25, 100, 200)),
    Run("b", "dense", "adamw", 1e-5, 16, 0, (5, 25)),
    Run("c", "dense", "adamw", 2e-3, 16, 0, (1, 5, 25)),
    Run("d", "dense", "adamw", 2e-4, 4, 1, (5,)),
    Run("e", "dense", "adamw", 2e-4, 64, 2, (5,)),
    Run("f", "dense", "sgd", 1e-1, 16, 3, (5,)),
    # As a, from other starts and with the text in another order.
    Run("g", "dense", "adamw", 2e-4, 16, 4, (5, 25)),
    Run("h", "dense", "adamw", 2e-4, 16, 5, (5, 25)),
    # With a head of its own, and LoRA on it.
    Run("n", "untied", "adamw", 2e-4, 16, 4, (1, 5, 25)),
    Run("o", "untied", "adamw", 5e-5, 8, 9, (10,)),
    # Held out: trained after all choices of `auto` had been made but that for a head.
    Run("i", "dense", "adamw", 5e-4, 8, 6, (12,)),
    Run("j", "dense", "adamw", 1e-4, 32, 7, (40,)),
    Run("c", "qwen2_moe", "adamw", 2e-4, 16, 2, (20,)),
    Run("c", "mixtral", "adamw", 5e-4, 8, 3, (15,)),
    Run("a", "qwen2_moe", "adamw", 2e-4, 16, 0, (5,)),
    Run("b", "qwen2_moe", "adamw", 1e-3, 16, 1, (3,)),
    Run("a", "mixtral", "adamw", 2e-4, 8, 0, (1, 5)),
)


def base_model(kind: str, directory: Path) -> tuple[Any, Any]:
    """The base in float32 with bfloat16's values, and the tokenizer. directory: where files are kept."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        dense = smollm2.load_dense(Path(scratch))
    if kind == "untied":
        dense.model.config.tie_word_embeddings = False
        dense.model.lm_head.weight = torch.nn.Parameter(dense.model.lm_head.weight.detach().clone())
    if kind in {"dense", "untied"}:
        return dense.model, dense.tokenizer
    checkpoint = directory / kind
    if not checkpoint.exists():
        smollm2.upcycle(dense, "mixtral" if kind == "mixtral" else "qwen2_moe", checkpoint)
    return smollm2.load(checkpoint), dense.tokenizer


def sequences(tokenizer: Any) -> Tensor:
    """(sequences, TOKENS): what the study trains on, and tests on from the end."""
    ids: Tensor = tokenizer(library_text(60_000), return_tensors="pt", add_special_tokens=False)["input_ids"][
        0
    ]
    count = len(ids) // TOKENS
    return ids[: count * TOKENS].view(count, TOKENS)


def lora(model: Any, run: Run) -> Any:
    """The model with an adapter on attention, and on the experts or the MLP."""
    fused = {n.rpartition(".experts.")[2] for n, _ in model.named_parameters() if ".experts." in n}
    config: dict[str, Any] = {"r": run.rank, "lora_alpha": 2 * run.rank, "task_type": "CAUSAL_LM"}
    if fused:
        config["target_parameters"] = [f"mlp.experts.{name}" for name in sorted(fused)]
    mlp = () if fused else ("gate_proj", "up_proj", "down_proj")
    if run.model == "untied":
        mlp += ("lm_head",)
    return get_peft_model(model, LoraConfig(**config, target_modules=[*ATTENTION, *mlp]))


def factors(model: Any) -> list[dict[str, Any]]:
    """Every site: the base's parameter, its experts (0 for a dense one), scaling, and the pair."""
    found = []
    for name, module in model.named_modules():
        if "default" not in getattr(module, "lora_A", {}):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", "weight")
        found.append(
            {
                "parameter": f"{plain}.{parameter}",
                "experts": int(getattr(module, "num_experts", 0)) if parameter != "weight" else 0,
                "scaling": float(module.scaling["default"]),
                "a": module.lora_A["default"].weight.detach().clone(),
                "b": module.lora_B["default"].weight.detach().clone(),
            }
        )
    return found


def train(run: Run, directory: Path) -> None:
    """Runs one training and stores DIR/MODEL-NAME-STEPS.pt for each of its step counts."""
    base, tokenizer = base_model(run.model, directory)
    text = sequences(tokenizer)
    torch.manual_seed(run.seed)
    model = lora(base, run)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[run.optimizer]([p for p in model.parameters() if p.requires_grad], lr=run.lr)
    model.train()
    if run.model not in {"dense", "untied"}:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    order = torch.randperm(len(text) // 2, generator=torch.Generator().manual_seed(run.seed))
    started = time.monotonic()
    for step in range(1, max(run.steps) + 1):
        ids = text[order[step % len(order)]][None]
        loss = cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if step in run.steps:
            meta = {"run": vars(run), "steps": step, "sites": factors(model)}
            torch.save(meta, directory / f"{run.model}-{run.name}-{step}.pt")
            print(
                run.model,
                run.name,
                step,
                f"loss {loss.item():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )


def main() -> None:
    """Runs the trainings that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--model", required=True, choices=sorted({run.model for run in RUNS}))
    parser.add_argument("--run", nargs="*", default=[])
    given = parser.parse_args()
    runs = {run.name: run for run in RUNS if run.model == given.model}
    if unknown := set(given.run) - runs.keys():
        parser.error(f"found --run {min(unknown)}, expected of {', '.join(runs)}")
    given.dir.mkdir(parents=True, exist_ok=True)
    for name in given.run or runs:
        train(runs[name], given.dir)


if __name__ == "__main__":
    main()
