"""The rounding study on tiny models, where a whole grid of trainings costs a few minutes.

    python -m benchmarks.rounding.tiny --out FILE.jsonl

A dense Llama and a Qwen2-MoE of two layers learn the bytes of the standard library's documentation, are
rounded to bfloat16, and are then tuned on other text of it.
Run in float64: the least divergences here are near what float32 can tell. Appends one line of JSON for each
(training, rounding, seed), in the form of `study`.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.rounding.study import Subject, apply, divergence
from benchmarks.rounding.train import Run, factors, lora
from loudmerge.comparing.behaviour import library_text

STEPS = (1, 5, 25, 200)
WIDTH, CONTEXT, BATCH, PRETRAINING = 128, 64, 8, 300
TUNINGS = (
    ("adamw", 1e-5, 16),
    ("adamw", 2e-4, 4),
    ("adamw", 2e-4, 16),
    ("adamw", 2e-4, 64),
    ("adamw", 2e-3, 16),
    ("sgd", 1e-1, 16),
)
"""Optimizer, learning rate and rank."""


class Tiny(Subject):
    """A tiny model in float64, with bfloat16's values, and the text it is tested on."""

    def __init__(self, model: Any, text: Tensor) -> None:
        self.model, self.text = model, text
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}


def build(kind: str) -> Any:
    """The untrained model."""
    shape: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    if kind == "tiny_dense":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=2 * WIDTH, **shape))
    config = Qwen2MoeConfig(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=WIDTH,
        **shape,
    )
    return Qwen2MoeForCausalLM(config)


def batches(text: Tensor, seed: int) -> Any:
    """Endless batches of (BATCH, CONTEXT) bytes."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - CONTEXT, (BATCH,), generator=draw)
        yield torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])


def learn(model: Any, optimizer: Any, ids: Tensor) -> None:
    """One step."""
    logits = model(input_ids=ids).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def trained(base: Any, run: Run, text: Tensor) -> dict[int, list[dict[str, Any]]]:
    """The factors after each of STEPS."""
    torch.manual_seed(run.seed)
    model = lora(copy.deepcopy(base), run)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[run.optimizer]([p for p in model.parameters() if p.requires_grad], lr=run.lr)
    data, found = batches(text, run.seed + 1), {}
    for step in range(1, max(STEPS) + 1):
        learn(model, optimizer, next(data))
        if step in STEPS:
            found[step] = factors(model)
    return found


def trimmed(p: Tensor, q: Tensor) -> float:
    """KL without the hundredth of the tokens where it is largest.

    A token whose router is all but undecided may go to another expert after any rounding: a jump, at random.
    """
    tokens = (p.exp() * (p - q)).sum(-1)
    return float(tokens.sort().values[: len(tokens) * 99 // 100].mean())


def measured(subject: Tiny, sites: list[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """One line for each rounding and seed."""
    subject.restore()
    base = subject.log_probs()
    apply(subject, sites, "exact", 0)
    tuned, lines = subject.log_probs(), []
    for name in ("NEAREST", "peft", "STOCHASTIC", "BALANCED", "AUTO"):
        for seed in range(1 if name in {"NEAREST", "peft"} else seeds):
            kept = apply(subject, sites, name, seed)
            merged = subject.log_probs()
            lines.append(
                {
                    "rounding": name,
                    "seed": seed,
                    "kept": kept,
                    "kl": divergence(tuned, merged),
                    "kl_trimmed": trimmed(tuned, merged),
                    "base_trained": divergence(base, tuned),
                    "base_merged": divergence(base, merged),
                    "loss": subject.loss(merged),
                    "loss_trained": subject.loss(tuned),
                }
            )
    return lines


def main() -> None:
    """Runs the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", nargs="*", default=["tiny_dense", "tiny_qwen2_moe"])
    given = parser.parse_args()
    text = torch.tensor(list(library_text(60_000).encode()))
    third = len(text) // 3
    for kind in given.model:
        base, data = build(kind), batches(text[:third], 0)
        optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
        for _ in range(PRETRAINING):
            learn(base, optimizer, next(data))
        for parameter in base.parameters():
            parameter.data.copy_(parameter.data.to(torch.bfloat16))
        held_out = text[2 * third : 2 * third + 16 * CONTEXT].view(16, CONTEXT)
        exact = copy.deepcopy(base).double().eval()
        exact.set_experts_implementation("eager")  # the grouped product has no float64
        subject = Tiny(exact, held_out)
        for seed, (name, lr, rank) in enumerate(TUNINGS):
            run = Run("", kind, name, lr, rank, seed, STEPS)
            for step, sites in trained(base, run, text[third : 2 * third]).items():
                label = {"adapter": f"{kind} {name} {lr:g}, {step} steps, r {rank}"}
                with given.out.open("a") as file:
                    for line in measured(subject, sites, given.seeds):
                        file.write(json.dumps({**label, **line}) + "\n")


if __name__ == "__main__":
    main()
