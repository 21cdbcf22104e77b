"""The live node graph as a client sees it: who stands on whom, from the replies of two commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpd.cli.client import Client


@dataclass(frozen=True, slots=True)
class Vertex:
    """A node, or a user of nodes (device, export, job).

    name     as commands name it; for users the path or id, "" for those without
    driver   "" for users
    file     what a protocol node reads, "" for others
    """

    name: str
    driver: str = ""
    file: str = ""
    read_only: bool = False

    @property
    def label(self) -> str:
        """Name and driver, as the document's diagram writes them."""
        if not self.driver:
            return self.name or "(unnamed user)"
        return f"{self.name} [{self.driver}]{' read-only' if self.read_only else ''}"


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge from a parent down to a child, with the child's role: "file", "header", "root", ..."""

    parent: int
    child: int
    role: str


@dataclass(slots=True)
class NodeGraph:
    """Vertices by number, and the edges between them."""

    vertices: dict[int, Vertex] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)

    @classmethod
    def from_replies(cls, graph: Mapping[str, Any], nodes: Iterable[Mapping[str, Any]]) -> NodeGraph:
        """Build it from what `x-debug-query-block-graph` and `query-named-block-nodes` returned."""
        details = {node["node-name"]: node for node in nodes}
        result = cls()
        for one in graph["nodes"]:
            name, detail = one["name"], details.get(one["name"])
            if one["type"] != "block-driver" or detail is None:
                result.vertices[one["id"]] = Vertex(name, "" if one["type"] != "block-driver" else "?")
                continue
            result.vertices[one["id"]] = Vertex(name, detail["drv"], detail["file"], detail["ro"])
        for edge in graph["edges"]:
            result.edges.append(Edge(edge["parent"], edge["child"], edge["name"]))
        result._only_protocols_show_files()
        return result

    def _only_protocols_show_files(self) -> None:
        for number in {edge.parent for edge in self.edges}:
            vertex = self.vertices[number]
            self.vertices[number] = Vertex(vertex.name, vertex.driver, "", vertex.read_only)

    def children(self, number: int) -> list[Edge]:
        """Return the edges down from a vertex: data before header before backing, then by name."""
        order = {"root": 0, "file": 1, "header": 2, "data-file": 3, "backing": 4}
        down = [edge for edge in self.edges if edge.parent == number]
        return sorted(down, key=lambda edge: (order.get(edge.role, 5), edge.role))

    def roots(self) -> list[int]:
        """Return the vertices nobody stands on, users first, then by name."""
        below = {edge.child for edge in self.edges}
        roots = [number for number in self.vertices if number not in below]
        return sorted(roots, key=lambda number: (self.vertices[number].driver != "", self.vertices[number].name))

    def ranks(self) -> dict[int, int]:
        """Return each vertex's distance from the top: one more than its lowest parent."""
        ranks = dict.fromkeys(self.vertices, 0)
        # The graph has no cycle, so after as many rounds as there are vertices nothing changes any more.
        for _ in self.vertices:
            for edge in self.edges:
                ranks[edge.child] = max(ranks[edge.child], ranks[edge.parent] + 1)
        return ranks


async def read_graph(client: Client) -> NodeGraph:
    """Ask a server for its graph."""
    nodes = await client.execute("query-named-block-nodes", flat=True)
    return NodeGraph.from_replies(await client.execute("x-debug-query-block-graph"), nodes)
