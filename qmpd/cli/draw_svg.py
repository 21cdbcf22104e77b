"""Draws a node graph as an SVG picture: ranks of boxes from the users at the top to the files at the bottom.

Lengths are pixels of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

from qmpd.cli.node_graph import NodeGraph

CHARACTER = 7.3
"""Width of a character of the 12 pixel monospace font, rounded up."""
LINE = 16
PADDING = 10
GAP_ACROSS = 36
GAP_DOWN = 48
MARGIN = 16


@dataclass(slots=True)
class _Box:
    lines: list[str]
    rank: int
    user: bool
    x: float = 0
    y: float = 0

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * CHARACTER + 2 * PADDING

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + PADDING

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def svg(graph: NodeGraph) -> str:
    """Return the picture as the text of an SVG file."""
    boxes = _place(graph)
    width = max((box.x + box.width for box in boxes.values()), default=0) + MARGIN
    height = max((box.y + box.height for box in boxes.values()), default=0) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="monospace" font-size="12">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for edge in graph.edges:
        top, bottom = boxes[edge.parent], boxes[edge.child]
        y1, y2 = top.y + top.height, bottom.y
        parts.append(
            f'<line x1="{top.middle:.1f}" y1="{y1:.1f}" x2="{bottom.middle:.1f}" y2="{y2:.1f}" stroke="black"/>'
        )
        # The role stands beside the lower end, where lines from one parent have parted, and outside of them.
        x, y = top.middle + (bottom.middle - top.middle) * 0.7, y1 + (y2 - y1) * 0.7
        left = bottom.middle < top.middle
        parts.append(
            f'<text x="{x - 6 if left else x + 6:.1f}" y="{y:.1f}" fill="#444" '
            f'text-anchor="{"end" if left else "start"}">{escape(edge.role)}</text>'
        )
    for box in boxes.values():
        parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
            f'fill="{"#eef3fa" if box.user else "#f7f7f2"}" stroke="black" rx="{8 if box.user else 0}"/>'
        )
        for number, line in enumerate(box.lines):
            y = box.y + PADDING / 2 + LINE * (number + 0.75)
            parts.append(f'<text x="{box.middle:.1f}" y="{y:.1f}" text-anchor="middle">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"])


def _place(graph: NodeGraph) -> dict[int, _Box]:
    """Make a box for every vertex and give it its place; no two overlap."""
    ranks = graph.ranks()
    boxes = {
        number: _Box([vertex.label, vertex.file] if vertex.file else [vertex.label], ranks[number], not vertex.driver)
        for number, vertex in graph.vertices.items()
    }
    order = _walk(graph)
    y = float(MARGIN)
    for rank in range(max(ranks.values(), default=-1) + 1):
        row = [boxes[number] for number in order if ranks[number] == rank]
        x = float(MARGIN)
        for box in row:
            box.x, box.y = x, y
            x += box.width + GAP_ACROSS
        y += max(box.height for box in row) + GAP_DOWN
    _centre(graph, boxes, order)
    return boxes


def _walk(graph: NodeGraph) -> list[int]:
    """Return the vertices in the order of a walk down from the roots, so that edges cross little."""
    order: dict[int, None] = {}

    def visit(number: int) -> None:
        if number not in order:
            order[number] = None
            for edge in graph.children(number):
                visit(edge.child)

    for root in graph.roots():
        visit(root)
    return list(order)


def _centre(graph: NodeGraph, boxes: dict[int, _Box], order: list[int]) -> None:
    """Move boxes right until parents stand over the middle of their children, and children under parents."""
    for _ in range(4):
        for number in reversed(order):
            below = [boxes[edge.child].middle for edge in graph.children(number)]
            if below:
                _move(boxes, order, number, sum(below) / len(below))
        for number in order:
            edges = graph.children(number)
            if len(edges) == 1:
                _move(boxes, order, edges[0].child, boxes[number].middle)


def _move(boxes: dict[int, _Box], order: list[int], number: int, middle: float) -> None:
    """Move a box to the right so that its middle is at `middle`, pushing those of its rank before it."""
    box = boxes[number]
    if middle <= box.middle:
        return
    box.x = middle - box.width / 2
    end = box.x + box.width + GAP_ACROSS
    row = [boxes[one] for one in order if boxes[one].rank == box.rank]
    for other in row[row.index(box) + 1 :]:
        other.x = max(other.x, end)
        end = other.x + other.width + GAP_ACROSS
