"""The exceptions of loudmerge.

    Exception
    └── RuntimeError
        ├── MergeRefused        the inputs cannot be merged correctly      exit code 3
        ├── Mismatch            verify or compare found a difference       exit code 4
        └── EnvironmentFailed   disk, network, permission, missing extra   exit code 5

Every refusal is one or more `Problem`s. The first word of the message is the
first problem's code, one of `REFUSAL_CODES`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

REFUSAL_CODES = frozenset(
    {
        "ambiguous-layout",
        "unknown-layout",
        "shape-mismatch",
        "rank-mismatch",
        "num-experts-mismatch",
        "experts-incomplete",
        "unconsumed-adapter-tensor",
        "missing-adapter-tensor",
        "missing-base-tensor",
        "unsupported-adapter",
        "unsupported-base",
        "non-finite",
        "corrupt-file",
        "unsafe-file",
        "out-exists",
    }
)

WHICH_BASE = "Is this the base that the adapter was trained on?"
"""The hint where adapter and base do not fit together."""

TRY_AGAIN = "Check the network and try again."
"""The hint where a host did not answer."""

SHOWN_PROBLEMS = 20
"""How many further problems the message of a refusal names before it only counts them."""


@dataclass(frozen=True)
class Problem:
    """One reason to refuse.

    code: one of REFUSAL_CODES.
    where: the tensor, module or file, with its role and expert where it has one.
    found, expected: what is there, and what would have been right.
    hint: the option or step that helps.
    """

    code: str
    where: str
    found: str
    expected: str
    hint: str

    def __post_init__(self) -> None:
        if self.code not in REFUSAL_CODES:
            raise ValueError(f"{self.code!r} is not a refusal code")
        if not self.hint:
            raise ValueError(f"{self.where}: a refusal names the option or step that helps")

    def __str__(self) -> str:
        return f"{self.code}: {self.where}: found {self.found}, expected {self.expected}. {self.hint}"


class MergeRefused(RuntimeError):
    """The inputs cannot be merged correctly; nothing was written to OUT.

    `.code`, `.where` and `.hint` are those of the first problem, `.problems` has all.
    """

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        first = self.problems[0]
        self.code, self.where, self.hint = first.code, first.where, first.hint
        super().__init__(_message(self.problems))

    def to_json(self) -> dict[str, Any]:
        """As the commands print it under `refusal`."""
        return {
            "code": self.code,
            "where": self.where,
            "hint": self.hint,
            "message": str(self),
            "problems": [asdict(problem) for problem in self.problems],
        }

    def __reduce__(self) -> tuple[type[MergeRefused], tuple[tuple[Problem, ...]]]:
        return MergeRefused, (self.problems,)


class Mismatch(RuntimeError):
    """`verify` or `compare` found that OUT is not the merge of BASE and ADAPTER."""


class EnvironmentFailed(RuntimeError):
    """Something outside the inputs failed: network, an extra that is not installed, a device."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch ran out of memory, or of threads: their stacks take some, and most is limited
    together. On the CPU torch says so only in a RuntimeError's text, and so does Python of threads.

    The canary runs where there is no torch, and then it was not torch.
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or str(error) == "can't start new thread":
        return True
    return torch is not None and (
        isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    )


def require(extra: str, *packages: str) -> None:
    """Raises EnvironmentFailed unless every package, each of this extra, can be imported."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise EnvironmentFailed(
                f"{package} cannot be imported ({error}). It comes with the extra `{extra}`: "
                f"pip install 'loudmerge[{extra}]'"
            ) from error


def plural(number: int, one: str, more: str = "") -> str:
    """`1 site`, `2 sites`. more: what several are called, where that is not `one` with an s."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def some(names: Collection[str], shown: int = 5) -> str:
    """The first names, those of a set by the alphabet, and how many more there are: `a, b and 3 more`."""
    listed = sorted(names) if isinstance(names, AbstractSet) else [*names]
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return (", ".join(listed[:shown]) or "none") + more


def _message(problems: Sequence[Problem]) -> str:
    lines = [str(problems[0])]
    rest = problems[1:]
    if rest:
        lines.append(f"{plural(len(rest), 'more problem')}:")
        lines += [f"  {problem}" for problem in rest[:SHOWN_PROBLEMS]]
    if len(rest) > SHOWN_PROBLEMS:
        lines.append(f"  … and {len(rest) - SHOWN_PROBLEMS} more")
    return "\n".join(lines)
