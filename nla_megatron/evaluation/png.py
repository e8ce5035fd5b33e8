"""The charts of `charts.py` as PNG: a painter for the few elements that they are made of, and no SVG beyond these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nla_megatron.contract.files import atomic_path

SCALE, OVERSAMPLING = 3, 2  # pixels of the picture per unit of the drawing; drawn larger and shrunk, edges are smooth
INK, PAPER, MARGIN = "#1d2126", (255, 255, 255), 14
# Signs that the painter's font has no glyph for.
_PLAIN = str.maketrans({"−": "-", "…": "...", "’": "'", "–": "-", "×": "x"})
_TOKEN = re.compile(r"[MLHhv]|-?[\d.]+")

Point = tuple[float, float]


@dataclass(frozen=True)
class _Pen:
    """What an element inherits."""

    color: str = INK
    fill: str = "currentColor"
    stroke: str = "none"
    fill_opacity: float = 1.0
    stroke_opacity: float = 1.0
    width: float = 1.0
    anchor: str = "start"
    size: float = 12.0
    dash: tuple[float, ...] = ()

    def over(self, attributes: Mapping[str, str]) -> _Pen:
        style = re.search(r"color:(?:var\([^,]*,)?(#\w{6})", attributes.get("style", ""))
        dash = attributes.get("stroke-dasharray")
        return replace(
            self,
            color=style[1] if style else self.color,
            fill=attributes.get("fill", self.fill),
            stroke=attributes.get("stroke", self.stroke),
            fill_opacity=float(attributes.get("fill-opacity", self.fill_opacity)),
            stroke_opacity=float(attributes.get("stroke-opacity", self.stroke_opacity)),
            width=float(attributes.get("stroke-width", self.width)),
            anchor=attributes.get("text-anchor", self.anchor),
            size=float(attributes.get("font-size", self.size)),
            dash=tuple(float(part) for part in dash.split()) if dash else self.dash,
        )

    def paint(self, what: str, opacity: float) -> tuple[int, int, int] | None:
        """The colour on white paper; None where nothing is painted."""
        if what == "none" or not opacity:
            return None
        name = self.color if what == "currentColor" else what
        parts = [int(name[start : start + 2], 16) for start in (1, 3, 5)]
        red, green, blue = (round(255 + (part - 255) * opacity) for part in parts)
        return red, green, blue


def write_png(svg: str, path: Path) -> None:
    """Draw a chart and write it, whole or not at all.

    Args:
        svg: what `line_chart` or `stacked_bars` returned.
    """
    from PIL import Image, ImageDraw

    root = ElementTree.fromstring(svg)
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    size = round((width + 2 * MARGIN) * SCALE), round((height + 2 * MARGIN) * SCALE)
    image = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), PAPER)
    _Painter(ImageDraw.Draw(image)).draw(root, _Pen())
    with atomic_path(path) as temporary:
        image.resize(size, Image.Resampling.LANCZOS).save(temporary, format="PNG", dpi=(72 * SCALE, 72 * SCALE))


class _Painter:
    def __init__(self, canvas: Any):
        self.canvas = canvas

    def draw(self, element: ElementTree.Element, inherited: _Pen) -> None:
        pen = inherited.over(element.attrib)
        if element.tag == "text":
            self._text(element, pen)
        elif element.tag == "path":
            self._path(element.attrib["d"], pen)
        elif element.tag == "circle" and (colour := pen.paint(pen.fill, pen.fill_opacity)):
            x, y, radius = (float(element.attrib[key]) for key in ("cx", "cy", "r"))
            self.canvas.ellipse([_at(x - radius, y - radius), _at(x + radius, y + radius)], fill=colour)
        elif element.tag == "rect" and (colour := pen.paint(pen.fill, pen.fill_opacity)):
            x, y, wide, high = (float(element.attrib[key]) for key in ("x", "y", "width", "height"))
            self.canvas.rectangle([_at(x, y), _at(x + wide, y + high)], fill=colour)
        for child in element:
            self.draw(child, pen)

    def _text(self, element: ElementTree.Element, pen: _Pen) -> None:
        from PIL import ImageFont

        colour = pen.paint(pen.fill, pen.fill_opacity)
        font = ImageFont.load_default(pen.size * SCALE * OVERSAMPLING)
        bold = 1.2 * OVERSAMPLING if element.get("font-weight") == "600" else 0
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[pen.anchor]
        at = _at(float(element.attrib["x"]), float(element.attrib["y"]))
        text = (element.text or "").translate(_PLAIN)
        self.canvas.text(at, text, fill=colour, font=font, anchor=anchor, stroke_width=bold / 2)

    def _path(self, data: str, pen: _Pen) -> None:
        colour = pen.paint(pen.stroke, pen.stroke_opacity)
        width = max(1, round(pen.width * SCALE * OVERSAMPLING))
        for line in _lines(data):
            for piece in _dashes(line, pen.dash) if pen.dash else [line]:
                self.canvas.line([_at(*point) for point in piece], fill=colour, width=width, joint="curve")


def _at(x: float, y: float) -> Point:
    return (x + MARGIN) * SCALE * OVERSAMPLING, (y + MARGIN) * SCALE * OVERSAMPLING


def _lines(data: str) -> list[list[Point]]:
    """The polylines of a path made of M, L, H, h and v."""
    tokens, lines, here, command = _TOKEN.findall(data), [], (0.0, 0.0), "M"
    position = 0
    while position < len(tokens):
        if tokens[position].isalpha():
            command, position = tokens[position], position + 1
        first = float(tokens[position])
        if command in "ML":
            here, position = (first, float(tokens[position + 1])), position + 2
        else:
            along = {"H": (first, here[1]), "h": (here[0] + first, here[1]), "v": (here[0], here[1] + first)}
            here, position = along[command], position + 1
        if command == "M":
            lines.append([here])
            command = "L"
        else:
            lines[-1].append(here)
    return lines


def _dashes(line: list[Point], pattern: tuple[float, ...]) -> list[list[Point]]:
    """A level line (start to end) cut into the drawn pieces of a dash pattern."""
    (x, y), (end, _) = line[0], line[-1]
    pieces, index = [], 0
    while x < end:
        after = min(end, x + pattern[index % len(pattern)])
        if index % 2 == 0:
            pieces.append([(x, y), (after, y)])
        x, index = after, index + 1
    return pieces
