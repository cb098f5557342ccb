"""The end-to-end run of one cell: build, train, save, merge, reload, and compare with the trained model.

The trained model is the one in memory, as its trainer left it. It is never read back from the adapter's
file: an adapter that was saved wrongly must show up, too. One model is in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loudmerge import merge as loudmerge_merge
from loudmerge.comparing import behaviour
from loudmerge.comparing.behaviour import Continuation, Passages
from loudmerge.compat.judging.result import Figures
from loudmerge.demo import training
from loudmerge.demo.training import Recipe
from loudmerge.executing.report import MergeReport
from loudmerge.system.threads import one_torch_thread

CELL_RECIPE = Recipe(
    hidden=128,
    intermediate=64,
    layers=2,
    heads=4,
    head=40,
    experts=16,
    experts_per_token=8,
    vocabulary=512,
    embedding_gain=8.0,
    head_gain=3.0,
    rank=32,
    alpha=64,
    steps=5,
    batch=8,
    tokens=96,
    learning_rate=3e-3,
)
"""What every cell trains. Its figures mean something because of these choices:

- 2 x 64 = 128: each expert's gate and up, fused, are a square matrix, so that a transposed update fits, as in
  several real families, and must be told from the down projection beside it.
- 8 of 16 experts run, and their weights are normalised. Rounding W to bfloat16 tips the choice of the last
  expert for some tokens; with 8 that one weighs little: KL(trained || merged) is up to 1e-4 of
  KL(base || trained), over the versions and seeds tried. With 2 of 8 it was 4e-4 to 1.3e-3.
- A larger embedding than the usual one carries each token through the residual stream, as in a trained
  model, and a larger output matrix makes the base sure of its next token. Without both, 5 steps that move the
  model as far leave one or two frequent tokens everywhere, and greedy samples that agree say little.
- The rate moves every expert by far more than half a unit in the last place of its weights, so that
  rounding swallows none of the update (`delta_kept`). The loss falls from step to step, as it does at 1e-2.
"""

MERGED, MERGED_FLOAT32 = "merged", "merged-float32"
SAMPLES = 3
CANDIDATES = 64
"""Prompts that are tried. The samples are those at which the trained model does not repeat itself and is
surest of all its tokens: where it is undecided, which token wins says nothing about a merge. The merged model
has no say in the choice. In the newest cell the best of 64 are sure by 0.1 nats throughout; of 16 by 0.06,
which rounding to bfloat16 tips now and then, PEFT's own merge included."""
VARIED = 8
"""Different tokens of a sample, of the 24 that it has at most, that are enough."""
PROMPT = 12
"""Tokens of a prompt."""
SEQUENCES = 12
"""Sequences of at most `Recipe.tokens` tokens that the divergences are taken over."""
TOGETHER = 6
"""Sequences that one forward pass runs over, at most: a large vocabulary's logits take memory."""
HELD_OUT = 400
"""Characters that a text for it has at least, so that few sequences are short."""

Merge = Callable[..., MergeReport]
"""`loudmerge.merge`, or what a test puts in its place."""
Stage = Callable[[str], None]
"""Called with the name of a stage as it begins."""


@dataclass(frozen=True)
class Journey:
    """What a run showed, and where it left its files.

    path: "fused" or "per-expert", how the adapter has the experts. orientation: of a fused adapter.
    merged: per-expert projections (applied, attempted). losses: of each training step, nats a token.
    samples: what the trained model said. unmoved: how many of them the base says, too.
    """

    figures: Figures
    path: str
    orientation: str | None
    merged: tuple[int, int]
    base: Path
    adapter: Path
    out: Path
    versions: Mapping[str, str]
    losses: tuple[float, ...]
    samples: tuple[str, ...]
    unmoved: int


@dataclass(frozen=True)
class Run:
    """What is kept of a model.

    logits: in float32 arithmetic. continuations: of the prompts, in float32. coarse: the logits in bfloat16
    arithmetic, where they are needed.
    """

    logits: tuple[Tensor, ...]
    continuations: tuple[Continuation, ...]
    coarse: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Reference:
    """What a merge is measured against: the runs of the base and of the trained model.

    passages: its prompts are the samples'. ends: the ids that end a text. fused: as of `Journey.path`.
    """

    base: Path
    adapter: Path
    passages: Passages
    ends: frozenset[int]
    base_run: Run
    trained_run: Run
    losses: tuple[float, ...]
    fused: bool
    device: str


def run(
    directory: Path,
    recipe: Recipe = CELL_RECIPE,
    *,
    base: Path | None = None,
    merge: Merge = loudmerge_merge,
    float32_merge: bool = True,
    stage: Stage = lambda _: None,
) -> Journey:
    """Leaves `directory`/base, adapter, merged and merged-float32, and compares.

    base: a checkpoint with its tokenizer to train on, by default a random one of the recipe's size.
    merge: takes what `loudmerge.merge` takes. float32_merge: whether a merge in float32 is made, too: without
    it kl_float32_merge is nan. stage: called with the name of each stage as it begins.
    Deterministic on the CPU: one torch thread, seeded.
    Raises MergeRefused and Mismatch as `loudmerge.merge` does, EnvironmentFailed where a package is missing.
    """
    reference = train(directory, recipe, base=base, stage=stage)
    return measure(reference, directory, merge=merge, float32_merge=float32_merge, stage=stage)


def train(
    directory: Path, recipe: Recipe = CELL_RECIPE, *, base: Path | None = None, stage: Stage = lambda _: None
) -> Reference:
    """The first half of `run`: builds, trains, saves, and runs both models."""
    with _quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if base is None:
            stage("base")
            base = directory / training.BASE
            training.write_base(base, recipe)
        passages, ends = _passages(base, recipe)
        adapter = directory / training.ADAPTER
        stage("train")
        fitted = training.fit(base, recipe)
        losses, targets = fitted.losses, fitted.targets
        stage("save")
        fitted.model.save_pretrained(adapter)
        stage("run trained")
        trained = _run(fitted.model, passages, ends)
        del fitted
        chosen = _chosen(trained.continuations)
        trained = replace(trained, continuations=tuple(trained.continuations[at] for at in chosen))
        passages = replace(passages, prompts=tuple(passages.prompts[at] for at in chosen))
        stage("run base")
        untrained = _run_in_float32(_load(base, torch.bfloat16, recipe.device), passages, ends)
    fused = any(name in training.FUSED_EXPERTS for name in targets)
    return Reference(base, adapter, passages, ends, untrained, trained, losses, fused, recipe.device)


def measure(
    reference: Reference,
    directory: Path,
    *,
    merge: Merge = loudmerge_merge,
    float32_merge: bool = True,
    stage: Stage = lambda _: None,
) -> Journey:
    """The second half of `run`: merges into `directory`, reloads, compares."""
    out, device = directory / MERGED, reference.device
    passages = reference.passages
    with _quietly():
        stage("merge")
        report = merge(reference.base, reference.adapter, out, device=device).to_json()
        stage("run merged")
        merged = _run(_load(out, torch.bfloat16, device), passages, reference.ends)
        exact = None
        if float32_merge:
            stage("merge in float32")
            wide = directory / MERGED_FLOAT32
            merge(reference.base, reference.adapter, wide, device=device, dtype="float32")
            stage("run merged in float32")
            exact = _logits(_evaluated(_load(wide, torch.float32, device)), passages.sequences)
    experts = report["counts"]["expert"]
    said = reference.trained_run.continuations
    return Journey(
        figures=_figures(reference, merged, exact, report),
        path="fused" if reference.fused else "per-expert",
        orientation=report["layout"]["orientation"] if reference.fused else None,
        merged=(experts["applied"], experts["attempted"]),
        base=reference.base,
        adapter=reference.adapter,
        out=out,
        versions={package: version(package) for package in training.SHOWN},
        losses=reference.losses,
        samples=tuple(passages.text(continuation.ids) for continuation in said),
        unmoved=_same(reference.trained_run, reference.base_run),
    )


@contextmanager
def _quietly() -> Iterator[None]:
    with training.quiet_libraries(), one_torch_thread():
        yield


def _passages(base: Path, recipe: Recipe) -> tuple[Passages, frozenset[int]]:
    """Paragraphs that the training does not see, the first tokens of some as prompts; and what ends a text.

    That is the tokenizer's id: a trainer may change those of the model that it trains.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen = set(training.training_texts(recipe))
    texts = [text for text in training.paragraphs() if len(text) > HELD_OUT and text not in seen]
    encoded = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts[: SEQUENCES + CANDIDATES]]
    passages = Passages(
        sequences=tuple(ids[: recipe.tokens] for ids in encoded[:SEQUENCES]),
        prompts=tuple(ids[:PROMPT] for ids in encoded[SEQUENCES:]),
        source="paragraphs of pydoc_data.topics that the training did not see",
        text=lambda ids: str(tokenizer.decode(list(ids))),
    )
    return passages, frozenset({int(tokenizer.eos_token_id)})


def _load(where: Path, dtype: torch.dtype, device: str) -> Any:
    """A checkpoint as a user loads it. What earlier models held is given back first."""
    gc.collect()  # a trainer and its model hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **training.placement(device))


def _figures(
    reference: Reference, merged: Run, exact: Sequence[Tensor] | None, report: Mapping[str, Any]
) -> Figures:
    divergence, base, trained = behaviour.divergence, reference.base_run, reference.trained_run
    return Figures(
        kl_trained_merged=divergence(trained.logits, merged.logits),
        kl_base_trained=divergence(base.logits, trained.logits),
        kl_base_merged=divergence(base.logits, merged.logits),
        kl_float32_merge=float("nan") if exact is None else divergence(trained.logits, exact),
        kl_floor=divergence(trained.logits, trained.coarse),
        kl_bfloat16_arithmetic=divergence(trained.coarse, merged.coarse),
        top1_agreement=behaviour.top1_agreement(trained.logits, merged.logits),
        samples=(_same(trained, merged), len(trained.continuations)),
        delta_kept=float(report["delta_kept"]["overall"]),
    )


def _run(model: Any, passages: Passages, ends: frozenset[int]) -> Run:
    """Of a model with bfloat16 weights; leaves it in float32 arithmetic."""
    coarse = _logits(_evaluated(model), passages.sequences)
    return replace(_run_in_float32(model, passages, ends), coarse=coarse)


def _run_in_float32(model: Any, passages: Passages, ends: frozenset[int]) -> Run:
    compute_in_float32(_evaluated(model))
    return Run(_logits(model, passages.sequences), _continue_greedily(model, passages.prompts, ends))


def _logits(model: Any, sequences: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Several sequences at once, for the reason of `_continue_greedily`."""
    return behaviour.logits(model, sequences, together=TOGETHER)


@torch.no_grad()
def _continue_greedily(
    model: Any, prompts: Sequence[Tensor], ends: frozenset[int]
) -> tuple[Continuation, ...]:
    """As behaviour.continue_greedily, for all prompts at once: they are of one length.

    PEFT makes W + dW of every expert in each forward pass, which costs more than the pass itself.
    """
    ids, rows = torch.stack(list(prompts)), list[Tensor]()
    device = next(model.parameters()).device
    for _ in range(behaviour.NEW_TOKENS):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, -1]
        rows.append(logits.to("cpu", torch.float32).log_softmax(-1))
        ids = torch.cat([ids, rows[-1].argmax(-1, keepdim=True)], dim=1)
    new = ids[:, -behaviour.NEW_TOKENS :].tolist()
    log_probabilities = torch.stack(rows, dim=1)
    lengths = [next((at + 1 for at, one in enumerate(each) if one in ends), len(each)) for each in new]
    return tuple(
        Continuation(tuple(each[:length]), found[:length])
        for each, length, found in zip(new, lengths, log_probabilities, strict=True)
    )


def _evaluated(model: Any) -> Any:
    # transformers 5 would multiply grouped matrices, whose sums are in another order in each version.
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def compute_in_float32(model: nn.Module) -> None:
    """From now on the model computes in float32, exactly as `model.float()` would, in the memory of bfloat16.

    Its decoder layers are widened one at a time, while they run: a bfloat16 value survives the way to float32
    and back. What is in float32 already (the LoRA factors as they were trained) is left alone.
    """
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    _cast([parameter for parameter in model.parameters() if parameter not in inside], torch.float32)
    for layer in layers:
        narrow = [parameter for parameter in layer.parameters() if parameter.dtype is torch.bfloat16]
        layer.register_forward_pre_hook(_Caster(narrow, torch.float32))
        layer.register_forward_hook(_Caster(narrow, torch.bfloat16))


class _Caster:
    """A hook that casts parameters in place."""

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self._dtype = dtype

    def __call__(self, *_: object) -> None:
        _cast(self._parameters, self._dtype)


def _cast(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _chosen(continuations: Sequence[Continuation]) -> list[int]:
    """The numbers of the SAMPLES continuations that say most about a merge.

    First those of at least VARIED different tokens, then those whose closest choice between two tokens is
    the least close. Of prompts that are continued alike, one: the others say nothing more.
    """

    def rank(number: int) -> tuple[int, float]:
        return min(len(set(continuations[number].ids)), VARIED), _margin(continuations[number])

    best = sorted(range(len(continuations)), key=rank, reverse=True)
    first = {continuations[number].ids: number for number in reversed(best)}
    # Stable: those that repeat another go last, and are taken only where there are too few others.
    return sorted(sorted(best, key=lambda number: first[continuations[number].ids] != number)[:SAMPLES])


def _margin(continuation: Continuation) -> float:
    best = continuation.log_probabilities.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def _same(ours: Run, theirs: Run) -> int:
    pairs = zip(ours.continuations, theirs.continuations, strict=True)
    return sum(one.ids == other.ids for one, other in pairs)
