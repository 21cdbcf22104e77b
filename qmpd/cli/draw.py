"""Draws a node graph as text: a tree for the terminal, and the languages of Graphviz and Mermaid."""

from __future__ import annotations

import json
from collections.abc import Iterator

from qmpd.cli.node_graph import NodeGraph


def tree(graph: NodeGraph) -> str:
    """Return the graph as a tree of lines; a node with several parents is drawn out once."""
    lines: list[str] = []
    seen: set[int] = set()
    for root in graph.roots():
        lines.append(graph.vertices[root].label)
        seen.add(root)
        lines += _below(graph, root, "", seen)
    return "\n".join(lines) or "no nodes"


def _below(graph: NodeGraph, number: int, indent: str, seen: set[int]) -> Iterator[str]:
    file = graph.vertices[number].file
    if file:
        yield f"{indent}└─ {file}"
    edges = graph.children(number)
    for edge in edges:
        last = edge is edges[-1]
        again = edge.child in seen
        note = " (drawn above)" if again and graph.children(edge.child) else ""
        yield f"{indent}{'└─' if last else '├─'} {edge.role}: {graph.vertices[edge.child].label}{note}"
        if not again:
            seen.add(edge.child)
            yield from _below(graph, edge.child, indent + ("   " if last else "│  "), seen)


def dot(graph: NodeGraph) -> str:
    """Return the graph in Graphviz's language."""
    lines = ["digraph nodes {", "  node [shape=box];"]
    for number, vertex in graph.vertices.items():
        style = "" if vertex.driver else ", style=rounded"
        text = vertex.label if not vertex.file else f"{vertex.label}\n{vertex.file}"
        lines.append(f"  n{number} [label={json.dumps(text, ensure_ascii=False)}{style}];")
    for edge in graph.edges:
        lines.append(f"  n{edge.parent} -> n{edge.child} [label={json.dumps(edge.role)}];")
    return "\n".join([*lines, "}"])


def mermaid(graph: NodeGraph) -> str:
    """Return the graph in Mermaid's language."""
    lines = ["flowchart TD"]
    for number, vertex in graph.vertices.items():
        text = _mermaid_text(vertex.label if not vertex.file else f"{vertex.label}<br/>{vertex.file}")
        lines.append(f'  n{number}["{text}"]' if vertex.driver else f'  n{number}(["{text}"])')
    for edge in graph.edges:
        lines.append(f'  n{edge.parent} -- "{_mermaid_text(edge.role)}" --> n{edge.child}')
    return "\n".join(lines)


def _mermaid_text(text: str) -> str:
    return text.replace("#", "#35;").replace('"', "#quot;")
