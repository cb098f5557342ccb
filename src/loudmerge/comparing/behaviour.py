"""What a model does with text: its logits, how far two models lie apart in them, what it goes on to say."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loudmerge.comparing.models import blamed
from loudmerge.errors import EnvironmentFailed, Mismatch, plural
from loudmerge.reading.sidefiles import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "To open a file and read every line of it in Python, write",
    "A mixture of experts is a neural network in which",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
SEQUENCE = 128
"""The longest sequence that is run, in tokens."""
NEW_TOKENS = 24
"""How many tokens a greedy sample has at most."""
TIE_DEVIATIONS = 8.0
"""A sample may part where a model prefers its own token by less than this times the square root of the
allowance. A divergence k moves the difference of two logits by about 2 * sqrt(k): four times that."""
_IDS_PROMPT = 8
_ROWS = 64


@dataclass(frozen=True)
class Passages:
    """What the models are run on. Every id tensor is (tokens,), on the CPU.

    sequences: for the divergences. prompts: to be continued. source: what the sequences are, in words.
    positions: how many tokens the models take at most, None where nothing bounds them.
    """

    sequences: tuple[Tensor, ...]
    prompts: tuple[Tensor, ...]
    source: str
    text: Callable[[Sequence[int]], str]
    positions: int | None = None

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)


@dataclass(frozen=True)
class Continuation:
    """A greedy sample: the new ids, and the log-probabilities (new tokens, vocabulary) that chose them."""

    ids: tuple[int, ...]
    log_probabilities: Tensor = field(repr=False)


@dataclass(frozen=True)
class Run:
    """What is kept of a model: logits of each sequence, and the greedy continuation of each prompt."""

    logits: tuple[Tensor, ...]
    continuations: tuple[Continuation, ...]


def run(model: nn.Module, passages: Passages, ends: frozenset[int]) -> Run:
    """Runs a model on the passages. ends: the ids that end its text."""
    samples = (continue_greedily(model, prompt, ends, passages.positions) for prompt in passages.prompts)
    return Run(logits(model, passages.sequences), tuple(samples))


def check_asked(prompts: Sequence[str] | None, tokens: int) -> None:
    """Raises ValueError for prompts or a number of tokens that leave nothing to run. Nothing is read."""
    if prompts is not None and not prompts:
        raise ValueError("prompts is empty, expected some, or None for the default ones")
    if prompts is not None and not all(prompts):
        raise ValueError("an empty prompt has nothing to continue")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}, expected a whole number from 1 on")


def make_passages(
    where: Path,
    config: Mapping[str, Any],
    vocabulary: int,
    prompts: Sequence[str] | None,
    tokens: int,
    positions: int | None = None,
) -> Passages:
    """`tokens` tokens of text through the tokenizer in the directory `where`; random ids where there is none.

    prompts: replace the default prompts and text. config: config.json, for the ids that stand for no text.
    positions: how many tokens a sequence has at most; of a longer prompt the last ones are continued.
    Raises EnvironmentFailed when the tokenizer cannot be loaded, makes ids that the model has not, or is
    missing and prompts are given.
    """
    if any((where / name).is_file() for name in TOKENIZER_FILES):
        passages = _from_text(_tokenizer(where), prompts, tokens)
        _check_ids(where, passages, vocabulary)
    elif prompts is not None:
        raise EnvironmentFailed(
            f"{where}: found no tokenizer files, expected one of {', '.join(TOKENIZER_FILES)}."
        )
    else:
        passages = _from_ids(config, vocabulary, tokens)
    longest = SEQUENCE if positions is None else min(SEQUENCE, positions)
    return replace(
        passages,
        sequences=_up_to(passages.sequences, tokens, longest),
        prompts=tuple(ids[-positions:] if positions else ids for ids in passages.prompts),
        positions=positions,
    )


def _check_ids(where: Path, passages: Passages, vocabulary: int) -> None:
    largest = max(int(ids.max()) for ids in (*passages.sequences, *passages.prompts))
    if largest >= vocabulary:
        raise EnvironmentFailed(
            f"{where}: the tokenizer makes the token id {largest}, expected one of the model's {vocabulary}. "
            "Put the tokenizer there that belongs to the model."
        )


def _tokenizer(where: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with blamed(f"{where}: the tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def _from_text(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | None, tokens: int) -> Passages:
    encoded = [_encode(tokenizer, prompt) for prompt in (PROMPTS if prompts is None else prompts)]
    sequences, source = list(encoded), plural(len(encoded), "prompt")
    if prompts is None:
        sequences.append(_encode(tokenizer, library_text(tokens)))
        source = f"{source} and pydoc_data.topics of Python {platform.python_version()}"
    return Passages(tuple(sequences), tuple(encoded), source, lambda ids: _decode(tokenizer, ids))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    if not len(ids):
        raise EnvironmentFailed(
            f"{tokenizer.name_or_path}: the tokenizer makes no token of {text[:40]!r}, expected some. "
            "Get its files again."
        )
    return ids


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def library_text(tokens: int) -> str:
    """English text for at least `tokens` tokens, from the standard library's own documentation."""
    from pydoc_data.topics import topics

    longest_token = 16
    return "\n".join(topics[name] for name in sorted(topics))[: tokens * longest_token]


def _from_ids(config: Mapping[str, Any], vocabulary: int, tokens: int) -> Passages:
    """Ids that a config names (image, padding …) are left out: models give them a meaning beside text."""
    special = set(_special_ids(config))
    usable = torch.tensor([number for number in range(vocabulary) if number not in special])
    if not len(usable):
        raise EnvironmentFailed(
            f"{CONFIG}: found that all {vocabulary} token ids are special ones, expected some for text. "
            "Add the tokenizer's files, or correct it."
        )
    chosen = torch.randint(len(usable), (tokens,), generator=torch.Generator().manual_seed(0))
    ids = usable[chosen]
    return Passages(
        (ids,),
        tuple(_pieces(ids[:SEQUENCE], _IDS_PROMPT)[: len(PROMPTS)]),
        "pseudo-random token ids (no tokenizer files)",
        lambda ids: " ".join(map(str, ids)),
    )


def _pieces(tensor: Tensor, size: int) -> list[Tensor]:
    """Cut along the first axis."""
    return [tensor[start : start + size] for start in range(0, len(tensor), size)]


def _special_ids(config: Mapping[str, Any]) -> list[int]:
    found: list[int] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _special_ids(value)
        elif key.endswith(("_token_id", "_token_index")):
            found += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return found


def _up_to(sequences: Sequence[Tensor], tokens: int, longest: int) -> tuple[Tensor, ...]:
    """The first `tokens` tokens, in sequences of at most `longest` and at least one token."""
    kept = []
    for ids in sequences:
        for piece in _pieces(ids, longest):
            if tokens > 0:
                kept.append(piece[:tokens])
                tokens -= len(kept[-1])
    return tuple(kept)


@torch.no_grad()
def logits(model: nn.Module, sequences: Sequence[Tensor], *, together: int = 1) -> tuple[Tensor, ...]:
    """(tokens, vocabulary) in float32 on the CPU for each sequence.

    together: how many neighbours of one length, at most, one forward pass runs over.
    """
    found: list[Tensor] = []
    for _, alike in groupby(sequences, key=len):
        rows = list(alike)
        for start in range(0, len(rows), together):
            found += _logits(model, torch.stack(rows[start : start + together])).unbind()
    return tuple(found)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(sequences, tokens) -> (sequences, tokens, vocabulary); of whole sequences (sequences, 1, labels).

    One label alone, a reward, becomes two: a softmax over it is 1, whatever it is. Against 0 it is the chance
    of being preferred, by Bradley and Terry (trl/trainer/reward_trainer.py).
    """
    device = next(model.parameters()).device
    with blamed(f"{type(model).__name__}, as its {CONFIG} makes it, cannot be run"):
        output = model(input_ids=ids.to(device), use_cache=False)
    found: Tensor | None = getattr(output, "logits", None)
    if found is None:
        raise EnvironmentFailed(
            f"{type(model).__name__} gives no logits, expected a model with a language head."
        )
    rows = found.to("cpu", torch.float32).reshape(len(ids), -1, found.shape[-1])
    return nn.functional.pad(rows, (1, 0)) if rows.shape[-1] == 1 else rows


def check_finite(found: Sequence[Tensor], where: Path, error: type[RuntimeError]) -> None:
    """Raises `error` when a logit is not finite."""
    if not all(bool(rows.isfinite().all()) for rows in found):
        raise error(
            f"{where}: found logits that are not finite, expected numbers. `loudmerge verify` names tensors."
        )


def divergence(p: Sequence[Tensor], q: Sequence[Tensor]) -> float:
    """KL(p || q) in nats a token, mean over all positions, from logits (tokens, vocabulary), in float64."""
    total, count = 0.0, 0
    for ours, theirs in _row_blocks(p, q):
        log_p, log_q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(ours)
    return total / count


def top1_agreement(p: Sequence[Tensor], q: Sequence[Tensor]) -> float:
    """The part of all positions at which both rank the same token first."""
    same, count = 0, 0
    for ours, theirs in _row_blocks(p, q):
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(ours)
    return same / count


def _row_blocks(p: Sequence[Tensor], q: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    blocks: list[tuple[Tensor, Tensor]] = []
    for ours, theirs in zip(p, q, strict=True):
        if ours.shape != theirs.shape:
            raise Mismatch(f"found logits of shape {list(theirs.shape)}, expected {list(ours.shape)}.")
        blocks += zip(_pieces(ours, _ROWS), _pieces(theirs, _ROWS), strict=True)
    return blocks


@torch.no_grad()
def continue_greedily(
    model: nn.Module, prompt: Tensor, ends: frozenset[int], positions: int | None = None
) -> Continuation:
    """Up to NEW_TOKENS tokens after `prompt`, always the likeliest; one of `ends` is the last.

    positions: how many tokens the model takes at most. Without a cache: every architecture's own forward pass
    decides, not its caching code.
    """
    ids, rows = prompt, list[Tensor]()
    most = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions + 1 - len(prompt))
    while len(rows) < most and not (rows and int(ids[-1]) in ends):
        rows.append(_logits(model, ids[None])[0, -1].log_softmax(-1))
        ids = torch.cat([ids, rows[-1].argmax()[None]])
    return Continuation(tuple(ids[len(prompt) :].tolist()), torch.stack(rows))


def preference(trained: Continuation, merged: Continuation) -> float | None:
    """By how many nats the trained model prefers its own token to the merged model's where they first differ.

    None when they do not differ, infinite when one of them ends and the other goes on.
    """
    for position, (ours, theirs) in enumerate(zip_longest(trained.ids, merged.ids)):
        if ours is None or theirs is None:
            return float("inf")
        if ours != theirs:
            row = trained.log_probabilities[position]
            return float(row[ours] - row[theirs])
    return None


def is_near_tie(found: float | None, allowance: float) -> bool:
    """Whether a `preference` is of equal samples, or so small that `allowance` nats a token may tip it."""
    return found is None or found <= TIE_DEVIATIONS * math.sqrt(allowance)


def sample_json(prompt: str, found: float | None, **texts: str) -> dict[str, object]:
    """A prompt with its continuations, and their `preference`, of which an infinite one is null."""
    finite = found if found is not None and math.isfinite(found) else None
    return {"prompt": prompt, **texts, "matched": found is None, "preference": finite}
