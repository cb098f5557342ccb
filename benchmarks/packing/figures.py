"""The figures of docs/packing.md: SVG, by hand, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from loudmerge.evidence.clustering import CONFIDENT

STYLE = """<style>
.back{fill:#ffffff;stroke:#d0d7de}
text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#1f2328}
.title{font-weight:bold;font-size:13px}
.axis{stroke:#57606a}.grid{stroke:#8b949e;stroke-dasharray:3 3}
.real{fill:#2a7ab0}.fake{fill:#c05a1c}.curve{fill:none;stroke:#57606a;stroke-width:1.5}
.cell{stroke:#d0d7de}
@media (prefers-color-scheme: dark){
.back{fill:#0d1117;stroke:#30363d}text{fill:#e6edf3}.axis,.curve{stroke:#8b949e}
.real{fill:#58a6d8}.fake{fill:#e8935a}.cell{stroke:#30363d}
}
</style>"""


class Dot(NamedTuple):
    """One adapter: both witnesses, over 0 where they are right."""

    columns: float
    pairs: float
    fake: bool


def witnesses(dots: Sequence[Dot]) -> str:
    """Each held-out adapter by its two witnesses, on asinh scales."""
    size, left, top = 380, 60, 50

    def place(value: float) -> float:
        return (math.asinh(value) / math.asinh(100) + 1) / 2 * size

    parts = [
        _text(16, 24, "Held-out adapters by their two witnesses (standard deviations)", "title"),
        *_frame(left, top, size, size),
    ]
    for value in (-60, -20, -CONFIDENT, 0, CONFIDENT, 20, 60):
        at = place(value)
        kind = "axis" if value == 0 else "grid"
        parts += [
            _line(left + at, top, left + at, top + size, kind),
            _line(left, top + size - at, left + size, top + size - at, kind),
            _text(left + at, top + size + 16, f"{value:g}", anchor="middle"),
            _text(left - 6, top + size - at + 4, f"{value:g}", anchor="end"),
        ]
    for dot in sorted(dots, key=lambda one: one.fake):
        kind = "fake" if dot.fake else "real"
        x, y = left + place(dot.columns), top + size - place(dot.pairs)
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.4" opacity="0.6"/>')
    parts += [
        _text(left + size / 2, top + size + 36, "columns of lora_B: right over 0", anchor="middle"),
        _upright(18, top + size / 2, "lora_A and lora_B together: right over 0"),
        f'<circle class="real" cx="{left + size + 24}" cy="{top + 10}" r="4"/>',
        _text(left + size + 34, top + 14, "trained"),
        f'<circle class="fake" cx="{left + size + 24}" cy="{top + 30}" r="4"/>',
        _text(left + size + 34, top + 34, "fakes"),
        _text(left + size + 14, top + 64, "answered: both"),
        _text(left + size + 14, top + 80, f"over {CONFIDENT:g}, or both"),
        _text(left + size + 14, top + 96, f"under -{CONFIDENT:g}"),
    ]
    return _page(580, top + size + 52, parts)


def reliability(points: Sequence[tuple[float, float, int]], said: Callable[[float], float]) -> str:
    """How often both are right, by what the weaker shows. points: (weaker, share right, adapters)."""
    left, top, width, height, end = 60, 50, 440, 240, 8.0

    def spot(weaker: float, share: float) -> tuple[float, float]:
        return left + min(weaker, end) / end * width, top + height - (share - 0.4) / 0.6 * height

    parts = [_text(16, 24, "How often both are right, by what the weaker witness shows", "title")]
    parts += _frame(left, top, width, height)
    for share in (0.5, 0.75, 0.9, 1.0):
        y = spot(0, share)[1]
        parts += [
            _line(left, y, left + width, y, "grid"),
            _text(left - 6, y + 4, f"{share:.0%}", anchor="end"),
        ]
    for weaker in range(int(end) + 1):
        label = f"{weaker}+" if weaker == end else f"{weaker}"
        parts.append(_text(spot(weaker, 0)[0], top + height + 16, label, anchor="middle"))
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (spot(n / 10, said(n / 10)) for n in range(81)))
    parts += [f'<polyline class="curve" points="{curve}"/>', _line(*_vertical(spot, CONFIDENT), "axis")]
    for shown, share, count in points:
        x, y = spot(shown, share)
        parts += [f'<circle class="real" cx="{x:.1f}" cy="{y:.1f}" r="5"/>']
        parts.append(_text(x + 8, y + 16, f"{count}"))
    parts += [
        _text(left + width / 2, top + height + 36, "standard deviations", anchor="middle"),
        _text(spot(CONFIDENT, 0)[0] + 6, top + height - 8, "answered from here on"),
    ]
    return _page(550, top + height + 52, parts)


def coverage_map(cells: Mapping[tuple[int, int, bool], Sequence[bool]]) -> str:
    """The share of tiny models' adapters that are answered: after one step, and after five or more."""
    experts, ranks = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    side, left, top = 44, 60, 76
    parts = [
        _text(16, 24, "Share of trained adapters that are answered (tiny models, 2 or 3 layers)", "title")
    ]
    for number, many in enumerate((False, True)):
        x0 = left + number * (side * len(ranks) + 60)
        parts.append(_text(x0, 50, "5, 20 or 100 steps" if many else "1 step", "title"))
        for column, rank in enumerate(ranks):
            parts.append(_text(x0 + (column + 0.5) * side, top - 6, f"r {rank}", anchor="middle"))
        for row, count in enumerate(experts):
            y = top + row * side
            parts.append(_text(x0 - 6, y + side / 2 + 4, f"E {count}", anchor="end"))
            for column, rank in enumerate(ranks):
                found = cells.get((count, rank, many), ())
                share = sum(found) / len(found) if found else 0.0
                x = x0 + column * side
                parts.append(
                    f'<rect class="cell real" x="{x}" y="{y}" width="{side}" height="{side}"'
                    f' fill-opacity="{0.75 * share:.2f}"/>'
                )
                parts.append(_text(x + side / 2, y + side / 2 + 4, f"{share:.0%}", anchor="middle"))
    return _page(left + 2 * side * len(ranks) + 80, top + side * len(experts) + 16, parts)


def _vertical(
    spot: Callable[[float, float], tuple[float, float]], at: float
) -> tuple[float, float, float, float]:
    return *spot(at, 0.4), *spot(at, 1.0)


def _frame(left: float, top: float, width: float, height: float) -> list[str]:
    corners = (left, top + height, left + width, top + height), (left, top, left, top + height)
    return [_line(*corner, "axis") for corner in corners]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _upright(x: float, y: float, text: str) -> str:
    return f'<text transform="translate({x} {y}) rotate(-90)" text-anchor="middle">{text}</text>'


def _page(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    back = f'<rect class="back" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="6"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([head, STYLE, back, *parts, "</svg>"]) + "\n"
