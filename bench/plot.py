"""Draws the ratios as an SVG: panels of bars on a scale of doublings, the goal as a tick.

A pattern has one line: a thick bar for one connection, a thin one for four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bench.qmp import Figure
from bench.rows import IMAGES
from bench.transfer import Row

LINE, LEFT, SCALE, NUMBERS = 16, 295, 190, 75
"""Pixels: height of a row, room for names, width of the scale, room for numbers."""

PANEL = LEFT + SCALE + NUMBERS
TOP = 64
LOWEST, HIGHEST = 0.5, 16.0
INK, FAINT, QUIET = "#24292f", "#d0d7de", "#57606a"
GOOD, SHORT = "#1a7f37", "#bf5700"
ONE, FOUR = ", 1 connection", ", 4 connections"


@dataclass
class Bar:
    """One line of a panel: the ratio, that with four connections if there is one, and the goal."""

    name: str
    ratio: float
    goal: float | None
    four: float | None = None


def _x(ratio: float) -> float:
    ratio = min(max(ratio, LOWEST), HIGHEST)
    return LEFT + SCALE * math.log(ratio / LOWEST) / math.log(HIGHEST / LOWEST)


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal", ink: str = INK) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{ink}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, ink: str, width: int = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{ink}" stroke-width="{width}"/>'


def _bars(rows: Sequence[Row]) -> list[Bar]:
    """Return one bar for each pattern of one image."""
    four = {row.name.removesuffix(FOUR): row.ratio() for row in rows if row.name.endswith(FOUR)}
    bars = []
    for row in rows:
        ratio, name = row.ratio(), row.name.removesuffix(ONE)
        if ratio is not None and not row.name.endswith(FOUR):
            bars.append(Bar(name, ratio, row.goal, four.get(name)))
    return bars


def _panels(rows: Sequence[Row], figures: Sequence[Figure]) -> list[tuple[str, list[Bar]]]:
    """Return title and bars of each panel. What has an absolute goal is in the tables only."""
    panels = [(words, _bars([row for row in rows if row.image == image])) for image, words in IMAGES.items()]
    for title, chosen in (("Monitor", False), ("qmpd-img", True)):
        bars = [
            Bar(one.name, ratio, one.goal)
            for one in figures
            if (one.peer == "qemu-img") is chosen and one.limit is None and (ratio := one.ratio()) is not None
        ]
        panels.append((title, bars))
    return [panel for panel in panels if panel[1]]


def _panel(title: str, bars: Sequence[Bar]) -> list[str]:
    """Return the parts of one panel, its upper left corner at 0, 0."""
    bottom = LINE * (len(bars) + 2)
    parts = [_text(LEFT - 24, 10, title, anchor="end", weight="bold")]
    mark = LOWEST
    while mark <= HIGHEST:
        parts.append(_line(_x(mark), 14, _x(mark), bottom, INK if mark == 1 else FAINT))
        parts.append(_text(_x(mark), 10, f"{mark:g}", anchor="middle", ink=QUIET))
        mark *= 2
    for number, bar in enumerate(bars):
        y = LINE * (number + 2)
        ink = GOOD if bar.ratio >= (bar.goal or 1.0) else SHORT
        parts.append(_text(LEFT - 10, y, bar.name, anchor="end"))
        parts.append(_line(_x(1), y - 6, _x(bar.ratio), y - 6, ink, 6))
        words = f"{bar.ratio:.2f}"
        if bar.four is not None:
            parts.append(_line(_x(1), y, _x(bar.four), y, GOOD if bar.four >= (bar.goal or 1.0) else SHORT, 2))
            words += f" / {bar.four:.2f}"
        if bar.goal:
            parts.append(_line(_x(bar.goal), y - 12, _x(bar.goal), y + 2, INK, 2))
        parts.append(_text(LEFT + SCALE + 8, y, words, ink=ink))
    return parts


def draw(path: Path, settings: dict[str, Any], rows: Sequence[Row], figures: Sequence[Figure]) -> None:
    """Write the picture, panels in two columns; without rows there is none."""
    panels = _panels(rows, figures)
    if not panels:
        return
    title = "Speed of qmpd as a multiple of QEMU's, same machine, same run (right of 1: qmpd is faster)"
    legend = f"{settings['qemu']}; medians of pairs; thick: one connection, thin: four; tick: goal"
    parts = [_text(12, 20, title, weight="bold"), _text(12, 38, legend, ink=QUIET)]
    y = TOP
    for at in range(0, len(panels), 2):
        for column, (words, bars) in enumerate(panels[at : at + 2]):
            parts.append(f'<g transform="translate({column * PANEL} {y})">')
            parts += [*_panel(words, bars), "</g>"]
        y += LINE * (max(len(bars) for _, bars in panels[at : at + 2]) + 3)
    width = PANEL * min(2, len(panels))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}"'
        ' font-family="system-ui, sans-serif" font-size="11">'
    )
    parts = [head, f'<rect width="{width}" height="{y}" fill="#ffffff"/>', *parts, "</svg>"]
    path.write_text("\n".join(parts) + "\n")
