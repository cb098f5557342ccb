"""KL between the trained model and its merges, for each way of rounding; everything in float32 arithmetic.

    python -m benchmarks.rounding.study --dir DIR --out FILE.jsonl [--only GLOB] [--rounding NAME…]

DIR holds the adapters of `train`. Appends one line of JSON for each (adapter, rounding, seed). NAME: one of
OURS, by default all, or of the ROUNDINGS that were tried.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounding.candidates import ROUNDINGS
from benchmarks.rounding.train import base_model, sequences
from loudmerge.arithmetic.delta import Factors, Update, Workspace
from loudmerge.arithmetic.rounding import Dither, chosen, dither_table
from loudmerge.layout import Axes, Span
from loudmerge.planning.closing import closing, is_head
from loudmerge.planning.plan import Term

OURS = ("AUTO", "NEAREST", "STOCHASTIC", "BALANCED")
"""loudmerge's own; the names of the candidates are in small letters."""

TABLE = dither_table(torch.device("cpu"))

GREEDY = 24
"""Tokens of a greedy sample."""

HELD_OUT = 4
"""Sequences at the end of the text, which no run trains on."""


class Subject:
    """A base model whose weights are changed and restored in place."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.model, tokenizer = base_model(kind, directory)
        self.text = sequences(tokenizer)[-HELD_OUT:]
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def put(self, name: str, value: Tensor) -> None:
        self.model.get_parameter(name).data.copy_(value)

    def restore(self) -> None:
        for name, value in self.weights.items():
            self.put(name, value)

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        logits = [self.model(input_ids=row[None]).logits[0] for row in self.text]
        return torch.cat(logits).log_softmax(-1)

    def loss(self, log_probs: Tensor) -> float:
        rows = log_probs.view(*self.text.shape, -1)[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.nll_loss(rows, self.text[:, 1:].flatten()))

    @torch.no_grad()
    def greedy(self) -> Tensor:
        """(sequences, GREEDY): what the model goes on with after the first 32 tokens of each."""
        prompts = self.text[:, :32]
        mask = torch.ones_like(prompts)
        made: Tensor = self.model.generate(
            prompts, attention_mask=mask, max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False
        )
        return made[:, 32:]


def matrices(site: dict[str, Any], weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
    """(W, B, A, index) for each matrix of a site, in the parameter's axes."""
    a, b, experts = site["a"], site["b"], site["experts"]
    if not experts:
        yield weight, b, a, slice(None)
        return
    rank = a.shape[0] // experts
    for e in range(experts):
        rows = a[e * rank : (e + 1) * rank]
        yield weight[e], b[:, e::experts], rows, e


def merged_by(
    name: str,
    weight: Tensor,
    b: Tensor,
    a: Tensor,
    scaling: float,
    draw: torch.Generator,
    *,
    is_closing: bool,
) -> Tensor:
    """W' in float32. name: "exact", or of ROUNDINGS or OURS."""
    if name == "exact":
        return weight + scaling * (b @ a)
    if name not in OURS:
        return ROUNDINGS[name](weight, scaling * (b @ a), a, draw)
    rows, base = Span(0, b.shape[0]), weight.to(torch.bfloat16)
    update = Update.of(Term(0, -1, rows, -1, Axes.OUT_IN, rows), Factors(b[None], a[None], scaling))
    dither = Dither(TABLE, f"{int(torch.randint(1 << 31, (1,), generator=draw))}")
    space, out, how = Workspace(torch.device("cpu")), base.clone(), name.lower()
    if name == "AUTO":
        kept = update.apply(base, 0, "nearest", space, out).ratio
        how = chosen(kept, closing=is_closing)
    update.apply(base, 0, how, space, out, dither)
    return out.to(torch.float32)


def apply(subject: Subject, sites: list[dict[str, Any]], name: str, seed: int) -> float:
    """Puts the merged weights in place; returns delta_kept."""
    draw = torch.Generator().manual_seed(seed)
    along = total = 0.0
    last = closing(subject.weights)
    for site in sites:
        parameter = site["parameter"]
        target = subject.model.get_parameter(parameter).data
        how = "NEAREST" if name == "AUTO" and is_head(parameter) else name
        for weight, b, a, index in matrices(site, subject.weights[parameter]):
            merged = merged_by(how, weight, b, a, site["scaling"], draw, is_closing=parameter in last)
            delta = site["scaling"] * (b @ a)
            target[index] = merged
            along += float(((merged - weight) * delta).sum())
            total += float((delta * delta).sum())
    return along / total if total else 1.0


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats a token, of log-probabilities (tokens, vocabulary)."""
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="dense")
    parser.add_argument("--only", default="*")
    parser.add_argument(
        "--rounding", nargs="+", default=[*OURS, "peft"], choices=[*OURS, *ROUNDINGS], metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    paths = sorted(given.dir.glob(f"{given.model}-{given.only}.pt"))
    if not paths:
        parser.error(f"found no {given.model}-{given.only}.pt in {given.dir}: `train` writes them")
    subject = Subject(given.model, given.dir)
    base = subject.log_probs()
    for path in paths:
        stored = torch.load(path, weights_only=True)
        apply(subject, stored["sites"], "exact", 0)
        trained, sample = subject.log_probs(), subject.greedy()
        print(path.name, f"base||trained {divergence(base, trained):.3e}", flush=True)
        for name in given.rounding:
            deterministic = name in {
                "peft",
                "gain_tensor",
                "gain_row",
                "subspace",
                "gain_column",
                "gain_both",
                "two_sided",
                "NEAREST",
            }
            for seed in range(1 if deterministic else given.seeds):
                kept = apply(subject, stored["sites"], name, seed)
                merged = subject.log_probs()
                line = {
                    "adapter": path.stem,
                    "rounding": name,
                    "seed": seed,
                    "kept": kept,
                    "kl": divergence(trained, merged),
                    "base_trained": divergence(base, trained),
                    "base_merged": divergence(base, merged),
                    "loss": subject.loss(merged),
                    "loss_trained": subject.loss(trained),
                    "loss_base": subject.loss(base),
                    "same_samples": int((subject.greedy() == sample).all(-1).sum()),
                }
                with given.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"  {name:12s} {seed} kept {kept:.4f} kl {line['kl']:.3e}"
                    f" base||merged {line['base_merged']:.4e}",
                    flush=True,
                )
        subject.restore()


if __name__ == "__main__":
    main()
