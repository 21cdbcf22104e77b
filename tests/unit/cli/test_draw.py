"""Drawing the node graph."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from qmpd.cli.draw import dot, mermaid, tree
from qmpd.cli.draw_svg import svg
from qmpd.cli.node_graph import NodeGraph

GRAPH = {
    "nodes": [
        {"id": 1, "type": "block-backend", "name": "/machine/peripheral/d/virtio-backend"},
        {"id": 2, "type": "block-driver", "name": "luks0"},
        {"id": 3, "type": "block-driver", "name": "payload"},
        {"id": 4, "type": "block-driver", "name": "header"},
        {"id": 5, "type": "block-driver", "name": "luks1"},
    ],
    "edges": [
        {"parent": 1, "child": 2, "name": "root", "perm": [], "shared-perm": []},
        {"parent": 2, "child": 4, "name": "header", "perm": [], "shared-perm": []},
        {"parent": 2, "child": 3, "name": "file", "perm": [], "shared-perm": []},
        {"parent": 5, "child": 4, "name": "header", "perm": [], "shared-perm": []},
        {"parent": 5, "child": 3, "name": "file", "perm": [], "shared-perm": []},
    ],
}
NODES = [
    {"node-name": "luks0", "drv": "luks", "file": "json:{}", "ro": False},
    {"node-name": "luks1", "drv": "luks", "file": "json:{}", "ro": True},
    {"node-name": "payload", "drv": "file", "file": "/d/pay & load", "ro": False},
    {"node-name": "header", "drv": "file", "file": "/d/header", "ro": False},
]


def graph() -> NodeGraph:
    return NodeGraph.from_replies(GRAPH, NODES)


def test_tree_draws_a_shared_node_once() -> None:
    assert tree(graph()) == (
        "/machine/peripheral/d/virtio-backend\n"
        "└─ root: luks0 [luks]\n"
        "   ├─ file: payload [file]\n"
        "   │  └─ /d/pay & load\n"
        "   └─ header: header [file]\n"
        "      └─ /d/header\n"
        "luks1 [luks] read-only\n"
        "├─ file: payload [file]\n"
        "└─ header: header [file]"
    )


def test_no_nodes() -> None:
    empty = NodeGraph.from_replies({"nodes": [], "edges": []}, [])
    assert tree(empty) == "no nodes"
    ET.fromstring(svg(empty))


def test_dot_and_mermaid_name_every_edge() -> None:
    assert '  n2 -> n4 [label="header"];' in dot(graph()).splitlines()
    assert '  n2 -- "header" --> n4' in mermaid(graph()).splitlines()


def test_svg_is_well_formed_and_no_boxes_overlap() -> None:
    root = ET.fromstring(svg(graph()))
    boxes = [
        tuple(float(rect.get(name, "0")) for name in ("x", "y", "width", "height"))
        for rect in root.iter("{http://www.w3.org/2000/svg}rect")
    ][1:]
    assert len(boxes) == 5
    for one in boxes:
        assert one[0] >= 0
        assert one[0] + one[2] <= float(root.get("width", "0"))
        for other in boxes:
            apart = one[0] + one[2] <= other[0] or other[0] + other[2] <= one[0]
            assert one is other or one[1] != other[1] or apart
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"luks0 [luks]", "/d/pay & load", "header"} <= texts
