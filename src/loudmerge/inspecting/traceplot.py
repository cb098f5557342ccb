"""What the weights show of lora_B's packing, site by site: a plot for a terminal, and one for a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from loudmerge.errors import plural
from loudmerge.evidence.clustering import CONFIDENT, SiteTraces
from loudmerge.evidence.weighing import FusedSite, Weighed, evenly

SHOWN_SITES = 12
"""How many sites the terminal's plot has; the page's has all."""

HALF = 12
"""Characters on either side of a bar's zero."""

LARGEST = 120.0
"""Standard deviations at a bar's end. The scale is that of asinh: linear near zero, then logarithmic."""

ROW, BAR, NAME = 18, 130, 300
"""Pixels: the height of a row, half the width of a bar, the width of the names."""


def terminal_lines(weighed: Weighed) -> Iterator[str]:
    """Some lines of text, without the indentation."""
    for leaf, verdict in weighed.verdicts.items():
        says = "no evidence" if verdict.says is None else f"{verdict.says.value} ({verdict.confidence:.3f})"
        yield f"{leaf}: {says}; {verdict.detail}"
    if not weighed.sites:
        return
    shown = evenly(weighed.sites, SHOWN_SITES)
    width = max(len(short_name(site)) for site, _ in shown)
    titles = (f"{f'grouped  {name}  major':^{2 * HALF + 1}}" for name in ("columns", " pairs "))
    yield f"{'':{width}}  {'  '.join(titles)}"
    for site, traces in shown:
        bars = f"{_bar(traces.columns)}  {_bar(traces.pairs)}"
        yield f"{short_name(site):{width}}  {bars}  {traces.columns:+.1f} {traces.pairs:+.1f}"
    if len(shown) < len(weighed.sites):
        yield f"and {plural(len(weighed.sites) - len(shown), 'more site')}"


def short_name(site: FusedSite) -> str:
    """The layer's number and the parameter; the whole name where it has no number."""
    numbers = [part for part in site.name.split(".") if part.isdigit()]
    return f"{numbers[0]} {site.leaf}" if numbers else site.name


def svg(weighed: Weighed) -> str:
    """Two bars for each site; dots where a bar has no length. Dark or light as the page's text."""
    height = ROW * (len(weighed.sites) + 1)
    width = NAME + 4 * BAR + 40
    style = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    label = 'role="img" aria-label="packing, by site"'
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" {label} {style}>']
    zeros = NAME + BAR, NAME + 3 * BAR + 40
    for title, zero in zip(("lora_B's columns", "lora_A and lora_B together"), zeros, strict=True):
        parts.append(f'<text x="{zero}" y="12" text-anchor="middle">grouped ← {title} → rank_major</text>')
        for sign in (-1, 1):
            x = zero + sign * _scaled(CONFIDENT) * BAR
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ROW}" y2="{height}" stroke="currentColor"'
                ' stroke-dasharray="2 3" opacity="0.5"/>'
            )
        parts.append(f'<line x1="{zero}" x2="{zero}" y1="{ROW}" y2="{height}" stroke="currentColor"/>')
    for number, (site, traces) in enumerate(weighed.sites):
        parts += _row(site, traces, zeros, ROW * (number + 1))
    return "".join([*parts, "</svg>"])


def _row(site: FusedSite, traces: SiteTraces, zeros: tuple[int, int], top: int) -> Iterator[str]:
    yield f'<text x="{NAME - 8}" y="{top + 13}" text-anchor="end">{escape(short_name(site))}</text>'
    for value, zero in zip((traces.columns, traces.pairs), zeros, strict=True):
        length = _scaled(value) * BAR
        x, color = (zero, "#2a7ab0") if length >= 0 else (zero + length, "#c05a1c")
        yield (
            f'<rect x="{x:.1f}" y="{top + 3}" width="{max(abs(length), 1):.1f}" height="{ROW - 6}"'
            f' fill="{color}"><title>{escape(site.name)}: {value:+.1f}</title></rect>'
        )


def _bar(value: float) -> str:
    length = round(abs(_scaled(value)) * HALF)
    left, right = (length, 0) if value < 0 else (0, length)
    return f"{'█' * left:>{HALF}}│{'█' * right:<{HALF}}"


def _scaled(value: float) -> float:
    """-1 to 1."""
    return max(-1.0, min(1.0, math.asinh(value) / math.asinh(LARGEST)))
