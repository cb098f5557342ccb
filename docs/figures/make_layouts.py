"""Writes the figures of docs/layouts.md: plain SVG, from the index formulas themselves.

    PYTHONPATH=src python docs/figures/make_layouts.py

Every cell says in words what its colour says: the figures can be read without colour, on light and on dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from loudmerge.layout import LoraBLayout, Orientation, Span

EXPERTS, RANK = 3, 2
D1, D2 = 3, 5
HALF, HIDDEN = 2, 4
CELL = 36
STYLE = """
.back{fill:#ffffff;stroke:#d0d7de}
text{font:13px ui-monospace,SFMono-Regular,Menlo,monospace;fill:#1f2328}
text.title{font-weight:bold}
text.cell{text-anchor:middle;font-size:12px;fill:#1f2328}
rect.c{stroke:#1f2328;stroke-width:1}
.k0{fill:#9ecae9}.k1{fill:#ffd27f}.k2{fill:#a8d5a2}.zero{fill:#ffffff}.plain{fill:#e4e7eb}
@media (prefers-color-scheme: dark){
.back{fill:#0d1117;stroke:#30363d}
text,text.title{fill:#e6edf3}
rect.c{stroke:#8b949e}
}
text.cell{fill:#1f2328}
"""


def columns(packing: LoraBLayout, expert: int) -> Span:
    """The columns of lora_B that belong to an expert, as loudmerge.layout has them."""
    if packing is LoraBLayout.RANK_MAJOR:
        return Span(expert, RANK, EXPERTS)
    return Span(expert * RANK, RANK)


def rows(expert: int) -> Span:
    """The rows of lora_A that belong to an expert."""
    return Span(expert * RANK, RANK)


def owners(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """For each index: which span has it, and as which of its own."""
    every = range(sum(span.count for span in spans))
    found = {at: (who, own) for who, span in enumerate(spans) for own, at in enumerate(every[span.places])}
    return [found[at] for at in every]


class Figure:
    """Parts of a drawing, from the top down."""

    def __init__(self, width: int) -> None:
        self._parts: list[str] = []
        self._width, self.y = width, 14

    def text(self, line: str, x: int = 16, kind: str = "") -> None:
        """A line of text below all that is there."""
        self.y += 18
        named = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text x="{x}" y="{self.y}"{named}>{escape(line)}</text>')

    def label(self, line: str, x: float, y: float) -> None:
        """A line of text at a place."""
        self._parts.append(f'<text class="title" x="{x:g}" y="{y:g}">{escape(line)}</text>')

    def cell(self, x: int, y: int, width: int, height: int, kind: str, text: str, **data: object) -> None:
        """A box with text. data: what a reader of the file may want to know of it."""
        known = "".join(f' data-{name}="{value}"' for name, value in data.items())
        self._parts.append(
            f'<rect class="c {kind}" x="{x}" y="{y}" width="{width}" height="{height}"{known}/>'
        )
        middle = x + width / 2, y + height / 2 + 4
        self._parts.append(f'<text class="cell" x="{middle[0]:g}" y="{middle[1]:g}">{escape(text)}</text>')

    def matrix(self, x: int, y: int, cells: Sequence[Sequence[tuple[str, str]]]) -> tuple[int, int]:
        """Boxes (kind, text) row by row; returns the place after the last, to the right and below."""
        for number, row in enumerate(cells):
            for at, (kind, text) in enumerate(row):
                self.cell(x + at * CELL, y + number * CELL, CELL, CELL, kind, text)
        return x + len(cells[0]) * CELL, y + len(cells) * CELL

    def svg(self) -> str:
        """The file's content."""
        size = f'width="{self._width}" height="{self.y + 16}" viewBox="0 0 {self._width} {self.y + 16}"'
        back = f'<rect class="back" x="0.5" y="0.5" width="{self._width - 1}" height="{self.y + 15}" rx="6"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        return "\n".join([head, f"<style>{STYLE}</style>", back, *self._parts, "</svg>", ""])


def packing() -> str:
    """A's rows, and B's columns under both packings."""
    figure = Figure(560)
    figure.text(f"lora_A (rank·E, a) with E = {EXPERTS}, rank = {RANK}: A_e = A[e*r:(e+1)*r]", kind="title")
    for row, (expert, own) in enumerate(owners([rows(expert) for expert in range(EXPERTS)])):
        text = f"row {row}: expert {expert}, rank {own}"
        figure.cell(
            16, figure.y + 10 + row * 22, 320, 22, f"k{expert}", text, matrix="A", index=row, expert=expert
        )
    figure.y += 10 + RANK * EXPERTS * 22 + 10
    formulas = {
        LoraBLayout.RANK_MAJOR: "B_e = B[:, e::E]",
        LoraBLayout.GROUPED_BY_EXPERT: "B_e = B[:, e*r:(e+1)*r]",
    }
    for layout, formula in formulas.items():
        figure.text(f"lora_B (b, rank·E), {layout.value}: {formula}", kind="title")
        top = figure.y + 10
        for column, (expert, own) in enumerate(
            owners([columns(layout, expert) for expert in range(EXPERTS)])
        ):
            data = {"matrix": layout.value, "index": column, "expert": expert}
            figure.cell(16 + column * 84, top, 84, 22, "plain", f"col {column}")
            figure.cell(16 + column * 84, top + 22, 84, 66, f"k{expert}", f"e{expert}, rank {own}", **data)
        figure.y = top + 98
    return figure.svg()


def orientation() -> str:
    """The update of one expert in memory, from the same two tensors, standard and swapped."""
    figure = Figure(620)
    standard = [[("k1", f"b{row}{rank}") for rank in range(RANK)] for row in range(D1)]
    swapped = [[("k0", f"a{rank}{row}") for rank in range(RANK)] for row in range(D1)]
    for way, title, left, right in (
        (
            Orientation.STANDARD,
            "A (rank·E, d2), B (d1, rank·E): ΔW[e] = s · B_e · A_e",
            standard,
            [[("k0", f"a{rank}{column}") for column in range(D2)] for rank in range(RANK)],
        ),
        (
            Orientation.SWAPPED,
            "A (rank·E, d1), B (d2, rank·E): ΔW[e] = s · (B_e · A_e)ᵀ",
            swapped,
            [[("k1", f"b{column}{rank}") for column in range(D2)] for rank in range(RANK)],
        ),
    ):
        figure.text(f"{way.value}: {title}", kind="title")
        top = figure.y + 12
        end, below = figure.matrix(16, top, left)
        figure.label("·", end + 9, top + D1 * CELL / 2 + 4)
        end, _ = figure.matrix(end + 26, top, right)
        figure.label("=", end + 8, top + D1 * CELL / 2 + 4)
        update = [[("plain", f"w{row}{column}") for column in range(D2)] for row in range(D1)]
        figure.matrix(end + 26, top, update)
        figure.y = below + 8
    figure.text(f"a01: A_e[0, 1]. b10: B_e[1, 0]. w: ΔW[e] (d1, d2), here ({D1}, {D2}), rank = {RANK}")
    return figure.svg()


def halves(*, interleaved: bool) -> list[str]:
    """Which of gate and up each index of the out axis of gate_up is."""
    spans = [Span(0, HALF, 2), Span(1, HALF, 2)] if interleaved else [Span(0, HALF), Span(HALF, HALF)]
    return ["gu"[who] + str(own) for who, own in owners(spans)]


def disk() -> str:
    """gate and up of one expert, as checkpoints hold them."""
    figure = Figure(640)
    kinds = {"g": "k0", "u": "k1"}

    def drawn(names: Sequence[str], x: int, y: int, *, transposed: bool = False) -> tuple[int, int]:
        cells = [[(kinds[name[0]], name)] * HIDDEN for name in names]
        return figure.matrix(x, y, [list(row) for row in zip(*cells, strict=True)] if transposed else cells)

    figure.text("one by one: gate_proj (I, H) and up_proj (I, H)", kind="title")
    end, below = drawn([f"g{row}" for row in range(HALF)], 16, figure.y + 10)
    drawn([f"u{row}" for row in range(HALF)], end + 24, figure.y + 10)
    for interleaved, order in ((False, "gate, then up"), (True, "interleaved")):
        figure.y = below + 10
        figure.text(f"(out, in), {order}: (2I, H)", kind="title")
        figure.label(f"(in, out), {order}: (H, 2I)", 320, figure.y)
        _, below = drawn(halves(interleaved=interleaved), 16, figure.y + 10)
        drawn(halves(interleaved=interleaved), 320, figure.y + 10, transposed=True)
    figure.y = below + 4
    figure.text(f"g0: row 0 of gate_proj. u0: row 0 of up_proj. Here I = {HALF}, H = {HIDDEN}")
    return figure.svg()


def joined() -> str:
    """gate's and up's own LoRA as one of rank 2r: B is block-diagonal."""
    figure = Figure(620)
    figure.text("One expert's gate and up, fused from two LoRA of rank r to one of rank 2r", kind="title")
    top = figure.y + 12
    block = [[("k0", "Bg"), ("k0", "Bg"), ("zero", "0"), ("zero", "0")]] * HALF
    block += [[("zero", "0"), ("zero", "0"), ("k1", "Bu"), ("k1", "Bu")]] * HALF
    end, figure.y = figure.matrix(16, top, block)
    figure.label("·", end + 9, top + 2 * CELL + 4)
    figure.matrix(end + 26, top, [[("k0", "Ag")] * HIDDEN] * RANK + [[("k1", "Au")] * HIDDEN] * RANK)
    figure.text(f"B_e (2I, 2r) · A_e (2r, H); here I = {HALF}, r = {RANK}, H = {HIDDEN}")
    return figure.svg()


def figures() -> Iterator[tuple[str, str]]:
    """Every figure: its file's name, and the content."""
    yield "layouts-packing.svg", packing()
    yield "layouts-orientation.svg", orientation()
    yield "layouts-disk.svg", disk()
    yield "layouts-rank-2r.svg", joined()


if __name__ == "__main__":
    for name, content in figures():
        Path(__file__).with_name(name).write_text(content, "utf-8")
