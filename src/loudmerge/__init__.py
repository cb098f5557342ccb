"""Merges LoRA adapters of mixture-of-experts models into their base checkpoint, or refuses.

The names of `__all__` are loaded when they are first used: `import loudmerge` imports neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from loudmerge.errors import EnvironmentFailed, MergeRefused, Mismatch, Problem

if TYPE_CHECKING:
    from loudmerge.comparing.compare import Comparison, compare
    from loudmerge.executing.report import MergeReport
    from loudmerge.inspecting.inspect import Inspection, inspect
    from loudmerge.layout import detect_layout
    from loudmerge.merging.live import save_pretrained_merged
    from loudmerge.merging.merge import merge, plan
    from loudmerge.planning.plan import MergePlan
    from loudmerge.verifying.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "EnvironmentFailed",
    "Inspection",
    "MergePlan",
    "MergeRefused",
    "MergeReport",
    "Mismatch",
    "Problem",
    "Verification",
    "__version__",
    "compare",
    "detect_layout",
    "inspect",
    "merge",
    "plan",
    "save_pretrained_merged",
    "verify",
]

_LAZY: Mapping[str, str] = MappingProxyType(
    {
        "Comparison": "loudmerge.comparing.compare",
        "Inspection": "loudmerge.inspecting.inspect",
        "MergePlan": "loudmerge.planning.plan",
        "MergeReport": "loudmerge.executing.report",
        "Verification": "loudmerge.verifying.verify",
        "compare": "loudmerge.comparing.compare",
        "detect_layout": "loudmerge.layout",
        "inspect": "loudmerge.inspecting.inspect",
        "merge": "loudmerge.merging.merge",
        "plan": "loudmerge.merging.merge",
        "save_pretrained_merged": "loudmerge.merging.live",
        "verify": "loudmerge.verifying.verify",
    }
)


if not TYPE_CHECKING:  # a type checker would take every misspelled name for one that is here

    def __getattr__(name: str) -> object:
        """Loads a public name (PEP 562)."""
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
