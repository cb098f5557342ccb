"""Merges LoRA adapters of mixture-of-experts models into their base checkpoint, or refuses.

The names of `__all__` are loaded when they are first used: `import loudmerge` imports neither torch nor
transformers. Some functions are called like the module they or others live in (`loudmerge.merge`,
`loudmerge.plan`, `loudmerge.verify`). As attributes of the package these names are always the
functions; the modules are reached by `from loudmerge.merge import …`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from loudmerge.errors import EnvironmentFailed, MergeRefused, Mismatch, Problem

if TYPE_CHECKING:
    from loudmerge.compare import Comparison, compare
    from loudmerge.inspect import Inspection, inspect
    from loudmerge.layout import detect_layout
    from loudmerge.live import save_pretrained_merged
    from loudmerge.merge import merge, plan
    from loudmerge.plan import MergePlan
    from loudmerge.report import MergeReport
    from loudmerge.verify import Verification, verify

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
        "Comparison": "loudmerge.compare",
        "Inspection": "loudmerge.inspect",
        "MergePlan": "loudmerge.plan",
        "MergeReport": "loudmerge.report",
        "Verification": "loudmerge.verify",
        "compare": "loudmerge.compare",
        "detect_layout": "loudmerge.layout",
        "inspect": "loudmerge.inspect",
        "merge": "loudmerge.merge",
        "plan": "loudmerge.merge",
        "save_pretrained_merged": "loudmerge.live",
        "verify": "loudmerge.verify",
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


class _Package(ModuleType):
    """Keeps a submodule from taking a public name.

    Python binds every imported submodule as an attribute of its package, so that without this
    `loudmerge.merge` would be a function or a module, depending on what was imported before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
