"""Draws the ratios as an SVG: one dot per row on a scale of doublings, the goal as a tick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.qmp import Figure
from bench.report import met
from bench.rows import IMAGES
from bench.transfer import Row

LINE, LEFT, WIDTH, RIGHT = 17, 300, 440, 70
"""Pixels: height of a row, room for names, width of the scale, room for numbers."""

LOWEST, HIGHEST = 0.5, 16.0
INK, FAINT, GOOD, SHORT, GOAL = "#24292f", "#d0d7de", "#1a7f37", "#bf5700", "#57606a"


def _x(ratio: float) -> float:
    ratio = min(max(ratio, LOWEST), HIGHEST)
    return LEFT + WIDTH * math.log(ratio / LOWEST) / math.log(HIGHEST / LOWEST)


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal", ink: str = INK) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{ink}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, ink: str, width: int = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{ink}" stroke-width="{width}"/>'


def _groups(
    rows: Sequence[Row], figures: Sequence[Figure]
) -> list[tuple[str, list[tuple[str, float, float | None, bool | None]]]]:
    groups = []
    for image, words in IMAGES.items():
        lines = [(row.name, row.ratio() or 0.0, row.goal, met(row)) for row in rows if row.image == image]
        if lines:
            groups.append((words, lines))
    others = [(one.name, one.ratio(), one.goal, one.met()) for one in figures]
    lines = [(name, ratio, goal, reached) for name, ratio, goal, reached in others if ratio is not None]
    if lines:
        groups.append(("Monitor and qmpd-img, beside QEMU", lines))
    return groups


def draw(path: Path, settings: dict[str, Any], rows: Sequence[Row], figures: Sequence[Figure]) -> None:
    """Write the picture; without rows there is none."""
    groups = _groups(rows, figures)
    if not groups:
        return
    height = 64 + sum(LINE * (len(lines) + 2) for _, lines in groups)
    total = LEFT + WIDTH + RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{total}" height="{height}" fill="#ffffff"/>',
        _text(12, 20, "Speed of qmpd as a multiple of QEMU's, same machine, same run", weight="bold"),
        _text(12, 36, f"{settings['qemu']}; medians of pairs; tick: goal; right of 1: qmpd is faster", ink=GOAL),
    ]
    mark = LOWEST
    while mark <= HIGHEST:
        ink = INK if mark == 1 else FAINT
        parts.append(_line(_x(mark), 50, _x(mark), height - 8, ink))
        parts.append(_text(_x(mark), 48, f"{mark:g}", anchor="middle", ink=GOAL))
        mark *= 2
    y = 50.0
    for words, lines in groups:
        y += LINE * 1.5
        parts.append(_text(12, y, words, weight="bold"))
        for name, ratio, goal, reached in lines:
            y += LINE
            ink = SHORT if reached is False or (reached is None and ratio < 1) else GOOD
            parts.append(_text(LEFT - 10, y, name, anchor="end"))
            parts.append(_line(_x(1), y - 4, _x(ratio), y - 4, ink, 6))
            if goal:
                parts.append(_line(_x(goal), y - 10, _x(goal), y + 2, GOAL, 2))
            parts.append(_text(total - 8, y, f"{ratio:.2f}", anchor="end", ink=ink))
        y += LINE * 0.5
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n")
