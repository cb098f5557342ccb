"""What `inspect` found as one page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from loudmerge import __version__
from loudmerge.inspecting.inspect import Inspection
from loudmerge.inspecting.traceplot import svg

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border: 1px solid #8886; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
.refused { border-left: 0.3rem solid #c0392b; padding: 0.3rem 1rem; white-space: pre-wrap; }
"""

MEANING = (
    "Bars over 0 speak for rank_major, as PEFT packs, bars under 0 for grouped_by_expert, as Unsloth packed "
    "until 2026.9.5; in standard deviations of what chance gives, on an asinh scale. Both witnesses, "
    "summed over the sites, have to pass the dashed line (4) on the same side for an answer."
)


def render(found: Inspection) -> str:
    """The whole file."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Inspection) -> Iterator[str]:
    name = escape(found.adapter.path.name)
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{name}: loudmerge inspect</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield f"<h1>{escape(str(found.adapter.path))}</h1>"
    yield f"<p>Inspected by loudmerge {escape(__version__)}.</p>"
    if found.refusal is not None:
        yield f'<p class="refused">The merge would be refused. {escape(str(found.refusal))}</p>'
    yield from _table("Config", ("", ""), _config(found))
    yield from _table(
        "LoRA",
        ("sites", "module", "lora_A", "lora_B", "rank", "experts", "with"),
        (
            (
                kind.sites,
                kind.module + ".base_layer" * kind.depth,
                list(kind.shape_a),
                list(kind.shape_b),
                kind.rank or "unknown",
                f"{kind.experts} of {kind.parameter}" if kind.experts else "",
                ", ".join(kind.extras),
            )
            for kind in found.kinds
        ),
    )
    if found.weighed.sites:
        yield "<h2>How lora_B is packed, by the weights</h2>"
        yield from (f"<p>{escape(leaf)}: {_said(found, leaf)}</p>" for leaf in found.weighed.verdicts)
        yield f'<div class="box">{svg(found.weighed)}</div><p>{escape(MEANING)}</p>'
    layout = found.layout
    rows = ((e.source, e.says or "nothing", f"{e.confidence:.3f}", e.site, e.detail) for e in layout.evidence)
    yield from _table(
        f"Layout: {found.orientation_text}, {layout.lora_b_layout}",
        ("source", "says", "confidence", "site", "why"),
        rows,
    )
    yield from _table("Odd", ("",), ((text,) for text in found.odd))
    yield "</body>\n</html>"


def _config(found: Inspection) -> Iterator[tuple[str, object]]:
    config = found.adapter.config
    yield "PEFT", config.peft_version or "not recorded"
    yield "rank", config.rank
    yield "alpha", f"{config.alpha}, {'rank-stabilised' if config.use_rslora else 'alpha / rank'}"
    yield "tensors", len(found.adapter.entries)
    if found.predicted is not None:
        yield from (("predicted", line.strip()) for line in found.predicted.lines())


def _said(found: Inspection, leaf: str) -> str:
    verdict = found.weighed.verdicts[leaf]
    says = (
        "no evidence"
        if verdict.says is None
        else f"{verdict.says.value}, confidence {verdict.confidence:.3f}"
    )
    return f"<strong>{escape(says)}</strong>. {escape(verdict.detail)}."


def _table(title: str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    body = ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    if not body:
        return
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in header)
    yield f"<h2>{escape(title)}</h2>"
    yield f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>'
    yield from body
    yield "</tbody></table></div>"
