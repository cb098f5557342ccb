"""Reads the PNG that a browser writes: 8 bits a channel, RGB or RGBA, not interlaced.

https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {2: 3, 6: 4}
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """rows: of each line its bytes, `channels` a pixel."""

    width: int
    height: int
    channels: int
    rows: tuple[bytes, ...]

    def pixel(self, x: int, y: int) -> Colour:
        at = x * self.channels
        red, green, blue = self.rows[y][at : at + 3]
        return red, green, blue

    def colours(
        self, left: int = 0, top: int = 0, right: int | None = None, bottom: int | None = None
    ) -> Counter[Colour]:
        """How many pixels of a rectangle have each colour; of the whole picture by default."""
        counted: Counter[Colour] = Counter()
        n = self.channels
        for row in self.rows[top:bottom]:
            part = row[left * n : None if right is None else right * n]
            counted.update(zip(part[0::n], part[1::n], part[2::n], strict=True))
        return counted


def read(file: Path) -> Picture:
    """Raises ValueError on a PNG of another kind."""
    data = file.read_bytes()
    if not data.startswith(SIGNATURE):
        raise ValueError(f"{file}: no PNG")
    chunks: dict[bytes, bytes] = {}
    position = len(SIGNATURE)
    while position < len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        chunks[name] = chunks.get(name, b"") + data[position + 8 : position + 8 + size]
        position += size + 12
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if depth != 8 or colour not in CHANNELS or interlaced:
        raise ValueError(f"{file}: found depth {depth}, colour type {colour}, interlacing {interlaced}")
    return _picture(width, height, CHANNELS[colour], zlib.decompress(chunks[b"IDAT"]))


def _picture(width: int, height: int, channels: int, data: bytes) -> Picture:
    stride = width * channels
    rows: list[bytes] = []
    above = bytearray(stride)
    for y in range(height):
        start = y * (stride + 1)
        above = _unfiltered(data[start], bytearray(data[start + 1 : start + 1 + stride]), above, channels)
        rows.append(bytes(above))
    return Picture(width, height, channels, tuple(rows))


def _unfiltered(kind: int, line: bytearray, above: bytearray, channels: int) -> bytearray:
    """A line as it was before its filter: none, the pixel to the left, above, both's mean, Paeth's."""
    if kind == 0:
        return line
    for at, value in enumerate(line):
        left = line[at - channels] if at >= channels else 0
        corner = above[at - channels] if at >= channels else 0
        line[at] = (value + _predicted(kind, left, above[at], corner)) & 255
    return line


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind < 3:
        return left if kind == 1 else up
    if kind == 3:
        return (left + up) // 2
    estimate = left + up - corner
    return min((left, up, corner), key=lambda value: abs(estimate - value))
