"""Does a converted adapter compute what the original does? Both are put on the base and run on the same text.

PEFT says what each means; where the installed PEFT or transformers would misread a layout, the adapter is
relaid first (`relay.py`, `regroup.py`), which only moves numbers. Everything is run in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loudmerge.comparing import behaviour, models, regroup
from loudmerge.comparing.behaviour import Passages, Run
from loudmerge.comparing.compare import ARITHMETIC
from loudmerge.comparing.relay import MemoryAxes, relay
from loudmerge.errors import EnvironmentFailed, plural, require
from loudmerge.merging.merge import plan
from loudmerge.planning.options import Options, check_options
from loudmerge.planning.plan import MergePlan
from loudmerge.system.device import check_device, found_device

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Continued:
    """One prompt's greedy continuation with either adapter.

    preference: where they first differ, by how many nats the original prefers its own token; None when they
    do not differ, infinite when one ends and the other goes on.
    """

    prompt: str
    original: str
    converted: str
    preference: float | None

    @property
    def explained(self) -> bool:
        """Whether the two are equal, or part at a near tie."""
        return behaviour.is_near_tie(self.preference, ARITHMETIC)

    def to_json(self) -> dict[str, object]:
        texts = {"original": self.original, "converted": self.converted}
        return behaviour.sample_json(self.prompt, self.preference, **texts)


@dataclass(frozen=True)
class Equivalence:
    """How base + ADAPTER and base + CONVERTED behave. KL in nats a token, in float32. text: what was run."""

    converted: Path
    base: Path
    adapter: Path
    kl_base_original: float
    kl_original_converted: float
    top1_agreement: float
    samples: tuple[Continued, ...]
    tokens: int
    text: str
    versions: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether nothing differs but the order of float32 sums, and the routing that it may tip."""
        return self.kl_original_converted <= ARITHMETIC and all(one.explained for one in self.samples)

    @property
    def inconclusive(self) -> bool:
        """Whether the base itself would pass: the adapter does next to nothing on this text."""
        return self.kl_base_original <= ARITHMETIC

    @property
    def matched(self) -> int:
        return sum(one.preference is None for one in self.samples)

    def to_json(self) -> dict[str, object]:
        return {
            "schema": 1,
            "status": "ok" if self.ok else "mismatch",
            "inconclusive": self.inconclusive,
            "converted": str(self.converted),
            "base": str(self.base),
            "adapter": str(self.adapter),
            "kl_base_original": self.kl_base_original,
            "kl_original_converted": self.kl_original_converted,
            "allowance": ARITHMETIC,
            "top1_agreement": self.top1_agreement,
            "samples": {
                "matched": self.matched,
                "total": len(self.samples),
                "texts": [one.to_json() for one in self.samples],
            },
            "tokens": self.tokens,
            "text": self.text,
            "versions": dict(self.versions),
        }

    def summary(self) -> str:
        """The result in words, one fact a line."""
        names = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        tokens = plural(self.tokens, "token")
        figures = [
            ("base || original", self.kl_base_original),
            ("original || converted", self.kl_original_converted),
            ("allowed", ARITHMETIC),
        ]
        return "\n".join(
            [
                f"{'ok' if self.ok else 'mismatch'}: {self._verdict()}",
                *(f"  KL {name:<21} {value:.2e} nats a token" for name, value in figures),
                f"  top-1 agreement         {self.top1_agreement:.4f} of {tokens} ({self.text})",
                f"  greedy samples          {self.matched}/{len(self.samples)} equal",
                *(line for one in self.samples for line in _parting(one)),
                f"  run in float32; {names}",
            ]
        )

    def _verdict(self) -> str:
        if not self.ok:
            return f"{self.converted} does not compute what {self.adapter} does on this base."
        if self.inconclusive:
            return "inconclusive: the adapter changes next to nothing on this text."
        return f"{self.converted} computes what {self.adapter} does."


def _parting(one: Continued) -> Iterator[str]:
    if one.preference is not None:
        yield f"    {one.prompt!r}: the samples part{' at a near tie' if one.explained else ''}"
        yield f"      original  {one.original!r}"
        yield f"      converted {one.converted!r}"


def compare_adapters(
    converted: str | Path,
    base: str | Path,
    adapter: str | Path,
    *,
    orientation: str = "auto",
    lora_b_layout: str = "auto",
    prompts: Sequence[str] | None = None,
    device: str = "cpu",
    tokens: int = 512,
) -> Equivalence:
    """Runs base + `adapter` and base + `converted` on the same text and compares.

    orientation, lora_b_layout: how `adapter` is laid, as told to `convert`; `converted` says it itself.
    prompts, device, tokens: as for `compare`. Takes the memory of one model in float32 and three sets of
    logits. Raises ValueError for an argument's value that does not exist, before anything is read;
    MergeRefused as `plan` does for either; EnvironmentFailed when the extra `compare` is
    missing, or the installed transformers and peft cannot load base and adapter faithfully.
    """
    check_options(Options(orientation, lora_b_layout))
    check_device(device)
    behaviour.check_asked(prompts, tokens)
    require("compare", *models.PACKAGES)
    original = plan(base, adapter, orientation=orientation, lora_b_layout=lora_b_layout)
    other = plan(base, converted)
    with models.quietly():
        return _compare(original, other, prompts, found_device(device), tokens)


def _compare(
    original: MergePlan, other: MergePlan, prompts: Sequence[str] | None, device: str, tokens: int
) -> Equivalence:
    base = original.base
    cls = models.model_class(base.config, base.path)
    bare = models.skeleton(cls, base.path)
    vocabulary, positions = models.vocabulary(bare, base.path), models.positions(bare)
    passages = behaviour.make_passages(base.path, base.config, vocabulary, prompts, tokens, positions)
    base_logits, ours = _run(cls, original, passages, device)
    _, theirs = _run(cls, other, passages, device)
    return Equivalence(
        converted=other.adapter.path,
        base=base.path,
        adapter=original.adapter.path,
        kl_base_original=behaviour.divergence(base_logits, ours.logits),
        kl_original_converted=behaviour.divergence(ours.logits, theirs.logits),
        top1_agreement=behaviour.top1_agreement(ours.logits, theirs.logits),
        samples=_samples(passages, ours, theirs),
        tokens=passages.tokens,
        text=passages.source,
        versions=models.versions(),
    )


def _run(
    cls: type[PreTrainedModel], merge_plan: MergePlan, passages: Passages, device: str
) -> tuple[tuple[Tensor, ...], Run]:
    """The base's logits, and the run of base + adapter."""
    base = models.load_base(cls, merge_plan.base.path, device).model
    ends, logits = models.ends(base), behaviour.logits(base, passages.sequences)
    with tempfile.TemporaryDirectory(prefix="loudmerge-") as directory:
        count = _lay(merge_plan, base, Path(directory))
        adapted = models.attach(base, Path(directory), merge_plan.adapter, count, device)
    run = behaviour.run(adapted, passages, ends)
    behaviour.check_finite(run.logits, merge_plan.adapter.path, EnvironmentFailed)
    return logits, run


def _lay(merge_plan: MergePlan, base: PreTrainedModel, into: Path) -> int:
    """Writes the adapter as the installed PEFT and transformers read it; returns its pairs."""
    sites = merge_plan.sites
    if regroup.needed(sites, base):
        return regroup.regroup(merge_plan, base, into)
    relay(merge_plan.adapter, sites, base, MemoryAxes(sites, merge_plan.outputs, base), into)
    return len(sites)


def _samples(passages: Passages, ours: Run, theirs: Run) -> tuple[Continued, ...]:
    runs = zip(passages.prompts, ours.continuations, theirs.continuations, strict=True)
    return tuple(
        Continued(
            prompt=passages.text(prompt.tolist()),
            original=passages.text(mine.ids),
            converted=passages.text(other.ids),
            preference=behaviour.preference(mine, other),
        )
        for prompt, mine, other in runs
    )
