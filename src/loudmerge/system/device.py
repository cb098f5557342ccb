"""Where the sums are computed: the processor, or a CUDA device."""

from __future__ import annotations

import re

from loudmerge.errors import EnvironmentFailed

_DEVICE = re.compile(r"cpu|auto|cuda(:\d+)?")


def check_device(name: object) -> None:
    """Raises ValueError for what names no device, whether there is one or not."""
    if not isinstance(name, str) or not _DEVICE.fullmatch(name):
        raise ValueError(f"device is {name!r}, expected one of cpu, cuda, cuda:N, auto")


def found_device(name: str) -> str:
    """The device that "auto" means here; any other name as it is.

    Raises EnvironmentFailed for a CUDA device that torch does not find.
    """
    if name == "cpu":
        return name
    import torch  # noqa: PLC0415 - what the CPU computes may not need it

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentFailed(
            f"device {name}: torch {torch.__version__} finds no CUDA device. Use --device cpu."
        )
    return name
