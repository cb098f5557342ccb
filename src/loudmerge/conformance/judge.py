"""What a merge command made of a case: its verdict.

    right           OUT holds what it must
    refused         it refused where it must, or may
    wrong-silently  exit code 0, and OUT is not the merge: the worst there is
    other-form      exit code 0, and OUT has other names or axes than the base: what can be compared is right
    crashed         it failed where a merge was expected, and left no weights
    moot            it failed where it must, but fails on the undamaged case, too
    wrote-failed    it failed, and left weights that can be taken for a merge
    timed-out       it did not end

A float32 or float64 tensor of OUT may be `TOLERANCE` of its largest update away; one in half precision one
unit in the last place, of the largest of weight, update and sum. What lies beside the tensors is `folder`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loudmerge.conformance.cases import EITHER, REFUSE, Case
from loudmerge.conformance.folder import as_loaded, beside, read
from loudmerge.conformance.forms import unfused
from loudmerge.errors import plural

RIGHT, REFUSED, WRONG, OTHER_FORM = "right", "refused", "wrong-silently", "other-form"
CRASHED, MOOT, WROTE, TIMED_OUT = "crashed", "moot", "wrote-failed", "timed-out"
VERDICTS = (RIGHT, REFUSED, WRONG, OTHER_FORM, WROTE, TIMED_OUT, CRASHED, MOOT)
PASSED = (RIGHT, REFUSED)

TOLERANCE = 1e-3
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SHOWN = 3
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What floating-point tensors may be written in: one unit in the last place of eight bits hides an update."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: None when it did not, within its time. said: the end of what it printed."""

    code: int | None
    said: str = ""


@dataclass(frozen=True)
class Verdict:
    """One case's verdict. detail: what is wrong, in a line. code, said: how the command ended."""

    case: str
    topic: str
    verdict: str
    detail: str = ""
    code: int | None = None
    said: str = ""
    made: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.verdict in PASSED


def judge(case: Case, ended: Ended, out: Path, *, told: bool = True) -> Verdict:
    """The verdict on OUT. told: whether the command was given the case's options; else it may refuse, too."""
    verdict, detail = _judge(case, ended, out, told=told)
    said = "" if verdict == RIGHT else ended.said
    return Verdict(case.id, case.topic, verdict, detail, ended.code, said, case.made)


def _judge(case: Case, ended: Ended, out: Path, *, told: bool) -> tuple[str, str]:
    left = _weights(out)
    if ended.code is None:
        return TIMED_OUT, f"it did not end in its time; left {plural(len(left), 'file')} with weights"
    if ended.code != 0 and left:
        return WROTE, f"exit code {ended.code}, but {left[0].name} is there"
    if ended.code != 0:
        may = case.expect in {REFUSE, EITHER} or (case.options and not told)
        return (REFUSED, "") if may else (CRASHED, _last_line(ended.said))
    if case.expected is None:
        return WRONG, "exit code 0 where nothing says what the merge would be: " + case.why
    try:
        found = as_loaded(out)
    except (SafetensorError, OSError, ValueError) as error:
        return WRONG, f"exit code 0, but OUT cannot be read: {error}"
    expected = load_file(case.expected)
    wrong = [*found.wrong, *beside(case.base, out, case.config)] if found.tensors else []
    return compare(read(case.base), found.tensors, expected, wrong=wrong, form=found.form)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def _weights(out: Path) -> list[Path]:
    if out.is_file():
        return [out]
    return sorted(file for file in out.rglob("*") if file.suffix in WEIGHTS)


def compare(
    base: Mapping[str, Tensor],
    out: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    wrong: Sequence[str] = (),
    form: Sequence[str] = (),
) -> tuple[str, str]:
    """(verdict, detail) of OUT's tensors. expected: what changes, in float32. wrong, form: what was found of
    OUT's files.
    """
    wanted = base.keys() | expected.keys()
    apart, fused = unfused(base, out)
    out = {**{name: tensor for name, tensor in out.items() if name not in fused}, **apart}
    lost, odd = sorted(wanted - out.keys()), sorted(out.keys() - wanted)
    turned = [
        name for name in sorted(wanted & out.keys()) if _turned(expected.get(name, base.get(name)), out[name])
    ]
    problems = [
        problem
        for name in sorted(wanted & out.keys())
        if (
            problem := _wrong(
                name, base.get(name), out[name].mT if name in turned else out[name], expected.get(name)
            )
        )
    ]
    forms = [f"{name}: axes exchanged, {list(out[name].shape)}" for name in turned]
    forms += [f"{name}: experts fused, which the base holds apart" for name in sorted(fused)]
    if lost and odd:
        forms.append(
            f"{lost[0]} is not in OUT, {odd[0]} is: {plural(len(lost), 'name')} lost, {len(odd)} new"
        )
    elif lost:
        problems.insert(0, f"{lost[0]} is not in OUT ({len(lost)} of {len(wanted)} lost)")
    coarse = sorted({str(tensor.dtype) for tensor in out.values() if _coarse(tensor)})
    wrong = [*(f"found {dtype}, too coarse to tell a merge" for dtype in coarse), *wrong]
    if problems or wrong:
        return WRONG, _some([*problems, *wrong, *forms, *form])
    if forms or form:
        return OTHER_FORM, _some([*forms, *form])
    return RIGHT, f"{plural(len(odd), 'tensor')} more than expected" if odd else ""


def _turned(wanted: Tensor | None, out: Tensor) -> bool:
    """Whether the last two of three axes are the other way round."""
    return (
        wanted is not None and wanted.ndim == 3 and wanted.shape != out.shape and wanted.mT.shape == out.shape
    )


def _coarse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype not in DTYPES


def _some(problems: list[str]) -> str:
    more = len(problems) - SHOWN
    return "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _wrong(name: str, base: Tensor | None, out: Tensor, expected: Tensor | None) -> str:
    """What is wrong with one tensor, "" where nothing is."""
    wanted = expected if expected is not None else base
    if wanted is None or wanted.shape != out.shape:
        shape = list(wanted.shape) if wanted is not None else None
        return f"{name}: found shape {list(out.shape)}, expected {shape}"
    if not out.is_floating_point():
        return "" if torch.equal(wanted, out) else f"{name}: found other values"
    if expected is None:
        return "" if torch.equal(wanted.to(out.dtype), out) else f"{name}: changed, though nothing targets it"
    update = (
        expected.double() - base.double()
        if base is not None and base.shape == expected.shape
        else expected.double()
    )
    apart = (out.double() - expected.double()).abs()
    if bool((apart <= _allowed(expected.double(), update, out)).all()):
        return ""
    if base is not None and torch.equal(base.to(out.dtype), out):
        return f"{name}: unchanged, the base's"
    return f"{name}: {float(apart.norm() / update.norm()):.2g} of its update away"


def _allowed(expected: Tensor, update: Tensor, out: Tensor) -> Tensor:
    """How far each element may be away."""
    if out.dtype in {torch.float32, torch.float64}:
        return TOLERANCE * update.abs().max().expand_as(expected)
    largest = torch.maximum(torch.maximum(expected.abs(), update.abs()), (expected - update).abs())
    smallest = torch.finfo(out.dtype).tiny
    exponent = torch.frexp(largest.clamp(min=smallest))[1] - 1
    return torch.finfo(out.dtype).eps * torch.pow(2.0, exponent.double())
