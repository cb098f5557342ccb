"""Does the merged model behave as base + adapter does? Runs both on text; PEFT says what the adapter means.

Everything is run in float32, one model at a time: the noise of bfloat16 arithmetic would hide the difference.
transformers and peft are imported only when a comparison runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loudmerge.comparing import behaviour, models
from loudmerge.comparing.behaviour import Passages, Run
from loudmerge.comparing.relay import MemoryAxes, read_sites, relay
from loudmerge.errors import EnvironmentFailed, Mismatch, plural, require
from loudmerge.planning.options import Options, check_options
from loudmerge.planning.plan import MergePlan
from loudmerge.reading.checkpoint import Checkpoint, open_checkpoint
from loudmerge.system.device import check_device, found_device
from loudmerge.system.tensors import DTYPES
from loudmerge.verifying.verify import plan_again

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ROUNDING_FACTOR = 4.0
"""How many times the divergence that rounding PEFT's own merge makes is allowed. Stochastic rounding has
twice the variance of rounding to nearest where updates are large; the rest is for the scatter of tokens."""
TRAINING_FRACTION = 2e-2
"""The part of KL(base || trained) that is allowed in any case. In tiny random models rounding sends some
tokens to another expert, which cost up to 0.6 % of it over 512 tokens; a missing update costs 100 %."""
ARITHMETIC = 1e-6
"""Nats a token allowed in any case: float32 sums in another order, and the routing they may tip."""


@dataclass(frozen=True)
class Sample:
    """One prompt's greedy continuation by the trained model, the merged one and PEFT's own rounded merge.

    preference: where they first differ, by how many nats the trained model prefers its own token; None when
    they do not differ, infinite when one ends and the other goes on.
    """

    prompt: str
    trained: str
    merged: str
    rounded: str
    preference: float | None

    @property
    def matched(self) -> bool:
        return self.preference is None

    def to_json(self) -> dict[str, object]:
        texts = {"trained": self.trained, "merged": self.merged}
        return behaviour.sample_json(self.prompt, self.preference, **texts)


@dataclass(frozen=True)
class Comparison:
    """How base, trained (base + adapter by PEFT) and merged (OUT) behave. KL in nats a token, from float32.

    kl_rounding: KL(PEFT's own merge || the same, rounded to nearest in OUT's dtype): what rounding costs. Not
    from the trained model: PEFT's merge may be another one, as where it forgets that weights are tied.
    kl_peft: KL(trained || PEFT's own merge before rounding), which tells that.
    kl_bfloat16: KL(merged || merged run in bfloat16): the noise floor of bfloat16 arithmetic; None where OUT
    is not stored in it. stored: the dtype of most of OUT. text: what the models were run on.
    """

    out: Path
    base: Path
    adapter: Path
    kl_base_trained: float
    kl_base_merged: float
    kl_trained_merged: float
    kl_rounding: float
    kl_peft: float
    kl_bfloat16: float | None
    top1_agreement: float
    samples: tuple[Sample, ...]
    tokens: int
    text: str
    stored: str
    versions: Mapping[str, str]

    @property
    def allowance(self) -> float:
        """The largest KL(trained || merged) that counts as rounding."""
        return max(ROUNDING_FACTOR * self.kl_rounding, self._unrounded)

    @property
    def _unrounded(self) -> float:
        """The same where nothing is rounded."""
        return max(TRAINING_FRACTION * self.kl_base_trained, ARITHMETIC)

    @property
    def ok(self) -> bool:
        """Whether what is left between trained and merged is rounding.

        KL(trained || merged) is at most `allowance`, and every greedy sample is the trained model's, or that
        of PEFT's own rounded merge, or parts from the trained model's at a near tie.
        A merge without the update, or with a wrong one, lies at KL(base || trained) or above. `inconclusive`
        says where the allowance reaches that far, so that this tells nothing.
        """
        return self.kl_trained_merged <= self.allowance and all(map(self.explained, self.samples))

    @property
    def inconclusive(self) -> bool:
        """Whether the base itself would pass: the update does nothing here, or OUT's dtype rounds it away."""
        return self.allowance >= self.kl_base_trained

    @property
    def matched(self) -> int:
        return sum(sample.matched for sample in self.samples)

    def explained(self, sample: Sample) -> bool:
        """Whether a sample matches, or differs by what rounding to OUT's dtype does.

        PEFT's own rounded merge shows that only where it is a merge of what was trained.
        """
        if sample.merged == sample.rounded and self.kl_peft <= self._unrounded:
            return True
        return behaviour.is_near_tie(sample.preference, self.allowance)

    def to_json(self) -> dict[str, object]:
        return {
            "schema": 1,
            "status": "ok" if self.ok else "mismatch",
            "inconclusive": self.inconclusive,
            "out": str(self.out),
            "base": str(self.base),
            "adapter": str(self.adapter),
            "kl_base_trained": self.kl_base_trained,
            "kl_base_merged": self.kl_base_merged,
            "kl_trained_merged": self.kl_trained_merged,
            "kl_rounding": self.kl_rounding,
            "kl_peft": self.kl_peft,
            "kl_bfloat16": self.kl_bfloat16,
            "allowance": self.allowance,
            "top1_agreement": self.top1_agreement,
            "samples": {
                "matched": self.matched,
                "total": len(self.samples),
                "texts": [sample.to_json() for sample in self.samples],
            },
            "tokens": self.tokens,
            "text": self.text,
            "stored": self.stored,
            "versions": dict(self.versions),
        }

    def summary(self) -> str:
        """The result in words, one fact a line."""
        floor = [] if self.kl_bfloat16 is None else [("merged in bfloat16", self.kl_bfloat16)]
        figures = [
            ("base || trained", self.kl_base_trained),
            ("base || merged", self.kl_base_merged),
            ("trained || merged", self.kl_trained_merged),
            ("allowed", self.allowance),
            *floor,
        ]
        names = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        tokens = plural(self.tokens, "token")
        return "\n".join(
            [
                f"{'ok' if self.ok else 'mismatch'}: {self._verdict()}",
                *(f"  KL {name:<20} {value:.2e} nats a token" for name, value in figures),
                f"  top-1 agreement         {self.top1_agreement:.4f} of {tokens} ({self.text})",
                f"  greedy samples          {self.matched}/{len(self.samples)} equal",
                *(line for sample in self.samples for line in self._parting(sample)),
                f"  run in float32; stored as {self.stored}; {names}",
            ]
        )

    def _verdict(self) -> str:
        if not self.kl_trained_merged <= self.allowance:
            return (
                f"{self.out} does not behave as base + adapter: KL is {self.kl_trained_merged:.2e}, at most "
                f"{self.allowance:.2e} is allowed. Run `loudmerge verify` to find the tensors."
            )
        if not self.ok:
            return f"{self.out} says something else than base + adapter, by more than rounding explains."
        if self.kl_base_trained <= ARITHMETIC:
            return "inconclusive: the adapter changes next to nothing on this text."
        if self.inconclusive:
            return (
                f"inconclusive: {self.stored} rounds so much of this small update away that the base itself "
                "would pass. `--rounding auto` or `--dtype float32` keeps it."
            )
        return f"{self.out} behaves as base + adapter."

    def _parting(self, sample: Sample) -> Iterator[str]:
        if sample.matched:
            return
        why = "by rounding" if self.explained(sample) else "not by rounding"
        yield f"    {sample.prompt!r}: the samples part ({why})"
        yield f"      trained {sample.trained!r}"
        yield f"      merged  {sample.merged!r}"


def compare(
    out: str | Path,
    base: str | Path,
    adapter: str | Path,
    *,
    orientation: str = "auto",
    lora_b_layout: str = "auto",
    prompts: Sequence[str] | None = None,
    device: str = "cpu",
    tokens: int = 512,
) -> Comparison:
    """Runs base, base + adapter (by the installed PEFT) and `out` on the same text and compares.

    out, base, adapter: local directories. orientation, lora_b_layout: as for `verify`.
    prompts: run and continued instead of the default prompts and text. device: "cpu", "cuda[:N]" or "auto".
    tokens: how many tokens to run. Takes the memory of one model in float32 (4 bytes a parameter) and four
    sets of logits (4 bytes * tokens * vocabulary each).
    Raises ValueError for an argument's value that does not exist, before anything is read;
    MergeRefused and Mismatch as `verify` does; Mismatch also when `out` lacks a tensor;
    EnvironmentFailed when the extra `compare` is missing, or the installed transformers and peft cannot load
    base + adapter faithfully.
    """
    check_options(Options(orientation, lora_b_layout))
    check_device(device)
    behaviour.check_asked(prompts, tokens)
    require("compare", *models.PACKAGES)
    merged_file = open_checkpoint(Path(out))
    laid = {"orientation": orientation, "lora_b_layout": lora_b_layout}
    merge_plan, _ = plan_again(Path(out), base, adapter, **laid)
    with models.quietly():
        return _compare(merged_file, merge_plan, prompts, found_device(device), tokens)


def _compare(
    merged: Checkpoint, merge_plan: MergePlan, prompts: Sequence[str] | None, device: str, tokens: int
) -> Comparison:
    base = merge_plan.base
    cls = models.model_class(base.config, base.path)
    bare = models.skeleton(cls, base.path)
    tuple(read_sites(merge_plan.sites, bare))  # what PEFT cannot load is told before any weight is read
    vocabulary = models.vocabulary(bare, base.path)
    positions = models.positions(bare)
    passages = behaviour.make_passages(merged.path, merged.config, vocabulary, prompts, tokens, positions)
    out = _run_out(cls, merged, base, passages, device)
    base_logits, trained, unrounded, rounded = _run_trained(cls, merge_plan, out, passages, device)
    return Comparison(
        out=merged.path,
        base=base.path,
        adapter=merge_plan.adapter.path,
        kl_base_trained=behaviour.divergence(base_logits, trained.logits),
        kl_base_merged=behaviour.divergence(base_logits, out.run.logits),
        kl_trained_merged=behaviour.divergence(trained.logits, out.run.logits),
        kl_rounding=behaviour.divergence(unrounded, rounded.logits),
        kl_peft=behaviour.divergence(trained.logits, unrounded),
        kl_bfloat16=out.kl_bfloat16,
        top1_agreement=behaviour.top1_agreement(trained.logits, out.run.logits),
        samples=_samples(passages, trained, out.run, rounded),
        tokens=passages.tokens,
        text=passages.source,
        stored=str(out.dtype).removeprefix("torch."),
        versions=models.versions(),
    )


@dataclass(frozen=True)
class _Out:
    """What is kept of OUT. exact: the parameters that `dtype`, the dtype of most of the file, can hold."""

    path: Path
    run: Run
    dtype: torch.dtype
    exact: frozenset[str]
    unexpected: frozenset[str]
    kl_bfloat16: float | None


def _run_out(
    cls: type[PreTrainedModel], file: Checkpoint, base: Checkpoint, passages: Passages, device: str
) -> _Out:
    dtype = DTYPES[models.stored_dtype(file)]
    loaded = models.load(cls, file.path, torch.float32, device)
    if loaded.missing:
        # Where this transformers has other names than the base, it is not OUT that lacks a tensor.
        models.load_base(cls, base.path, device)
    models.check_complete(file.path, loaded)
    run = behaviour.run(loaded.model, passages, models.ends(loaded.model))
    behaviour.check_finite(run.logits, file.path, Mismatch)
    exact, unexpected = models.exact_names(loaded.model, dtype), loaded.unexpected
    del loaded
    floor = _noise_floor(cls, file, passages, run, device) if dtype is torch.bfloat16 else None
    return _Out(file.path, run, dtype, exact, unexpected, floor)


def _noise_floor(
    cls: type[PreTrainedModel], file: Checkpoint, passages: Passages, run: Run, device: str
) -> float:
    model = models.load(cls, file.path, torch.bfloat16, device).model
    return behaviour.divergence(run.logits, behaviour.logits(model, passages.sequences))


def _run_trained(
    cls: type[PreTrainedModel], merge_plan: MergePlan, out: _Out, passages: Passages, device: str
) -> tuple[tuple[Tensor, ...], Run, tuple[Tensor, ...], Run]:
    """The base's logits, the trained model's run, and PEFT's merge: logits, and its run rounded as OUT is."""
    adapter, sites = merge_plan.adapter, merge_plan.sites
    loaded = models.load_base(cls, merge_plan.base.path, device)
    models.check_no_extra(out.path, out.unexpected, loaded)
    base, ends = loaded.model, models.ends(loaded.model)
    base_logits = behaviour.logits(base, passages.sequences)
    with tempfile.TemporaryDirectory(prefix="loudmerge-") as directory:
        axes = MemoryAxes(sites, merge_plan.outputs, base)
        relay(adapter, sites, base, axes, Path(directory))
        trained = models.attach(base, Path(directory), adapter, len(sites), device)
    run = behaviour.run(trained, passages, ends)
    behaviour.check_finite(run.logits, adapter.path, EnvironmentFailed)
    merged = trained.merge_and_unload()
    unrounded = behaviour.logits(merged, passages.sequences)
    models.round_parameters(merged, out.exact, out.dtype)
    return base_logits, run, unrounded, behaviour.run(merged, passages, ends)


def _samples(passages: Passages, trained: Run, merged: Run, rounded: Run) -> tuple[Sample, ...]:
    runs = zip(trained.continuations, merged.continuations, rounded.continuations, strict=True)
    return tuple(
        Sample(
            prompt=passages.text(prompt.tolist()),
            trained=passages.text(ours.ids),
            merged=passages.text(theirs.ids),
            rounded=passages.text(reference.ids),
            preference=behaviour.preference(ours, theirs),
        )
        for prompt, (ours, theirs, reference) in zip(passages.prompts, runs, strict=True)
    )
