"""page.css's colours, and how far apart they are for an eye, with or without colour."""

from __future__ import annotations

import re
from importlib.resources import files

from tests.unit.compat.png import Colour

FILLED = ("ok", "failed", "not-installed", "unreachable")
"""The statuses with a colour of their own; not-run has the page's, and a dashed border."""


def style(*, dark: bool) -> dict[str, Colour]:
    """page.css's colours by name."""
    sheet = files("loudmerge.compat.rendering").joinpath("page.css").read_text("utf-8")
    parts = sheet.split("prefers-color-scheme: dark")
    found = re.findall(r"--([\w-]+): #(\w\w)(\w\w)(\w\w);", parts[1] if dark else parts[0])
    return {name: (int(red, 16), int(green, 16), int(blue, 16)) for name, red, green, blue in found}


def luminance(colour: Colour) -> float:
    """Relative luminance, 0 to 1: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    linear = [
        value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: Colour, b: Colour) -> float:
    """1 to 21: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
