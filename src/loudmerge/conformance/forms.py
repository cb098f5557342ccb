"""Output in another form than the base: experts fused where the base holds them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_APART = re.compile(
    r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)
_FUSED = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
"""Each projection's fused name in memory (transformers >= 5), and which half of its out axis."""


def unfused(base: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The expert matrices that `base` has apart and `out` has fused, (E, out, in): (by the base's name,
    fused names).
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in base.keys() - out.keys():
        match = _APART.fullmatch(name)
        if match is None:
            continue
        leaf, half = _FUSED[match["leaf"]]
        fused = next(
            (key for module in (match["module"], match["module"].replace("block_sparse_moe", "mlp"))
             if (key := f"{module}.{leaf}") in out),
            None,
        )  # fmt: skip
        expert = int(match["expert"])
        if fused is None or out[fused].ndim != 3 or expert >= out[fused].shape[0]:
            continue
        matrix = out[fused][expert]
        found[name] = matrix if half is None else matrix.chunk(2)[half]
        used.add(fused)
    return found, used
