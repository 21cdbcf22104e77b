"""Opening the backing file of a node: named by its options, or by its image.

An image may name a file, and nothing else happens on its word: the name is taken relative to the
image's own directory, the chain is opened read-only, and `json:` names are checked against the
schema. Model: bdrv_open_backing_file (QEMU block.c).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qmpd.block import filename, opening, protocol_names, ranges
from qmpd.block.batch import Batch
from qmpd.block.loose import undotted
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions, OpenFlags
from qmpd.block.perm import ChildRole
from qmpd.errors import CommandError, QmpdError
from qmpd.formats import probe
from qmpd.units import align_up

if TYPE_CHECKING:
    from qmpd.block.graph import Graph, Slow


async def open_backing(graph: Graph, node: BlockNode, members: Mapping[str, Any], slow: Slow, depth: int) -> None:
    """Open and attach the `backing` child of `node`, if it is to have one.

    Raises CommandError; a backing node opened here is then closed again.
    """
    if OpenFlags.NO_BACKING in graph.open_flags:
        return
    # With a backing file from the options the reference compares its name with what the image says, word for word.
    node.auto_backing = (node.backing_file if "backing" in members else full_backing_filename(node)) or ""
    if "backing" in members and not members["backing"]:
        node.backing_overridden = bool(node.auto_backing)
        return
    if "backing" not in members and not node.auto_backing:
        return
    try:
        backing = await _find(graph, node, members.get("backing"), slow, depth)
        try:
            with graph.change() as tran:
                edge = tran.attach(node, "backing", ChildRole.COW, backing)
            edge.inherits = not isinstance(members.get("backing"), str)
        except BaseException:
            await graph.drop_unreferenced(backing)
            raise
    except QmpdError as error:
        raise CommandError(f"Could not open backing file: {error}") from error
    shown = filename.node_filename(backing)
    if "backing" not in members:
        node.auto_backing = shown
    node.backing_overridden = shown != node.auto_backing


def refresh_names(nodes: Iterable[BlockNode]) -> None:
    """Find out anew whether `nodes` and those above them have the backing file that their image names."""
    above: list[BlockNode] = []
    todo = list(nodes)
    while todo:
        node = todo.pop(0)
        if node in above:
            above.remove(node)  # to come after all that is below it
        above.append(node)
        todo += [edge.parent for edge in node.parents if isinstance(edge.parent, BlockNode)]
    for node in above:
        if node.supports_backing:
            edge = node.children.get("backing")
            shown = filename.node_filename(edge.node) if edge is not None else ""
            node.backing_overridden = shown != node.auto_backing


async def _find(graph: Graph, node: BlockNode, given: Any, slow: Slow, depth: int) -> BlockNode:
    if isinstance(given, str):
        return graph.lookup(given, given)
    if given is not None:
        own = NodeOptions.from_wire(given)
        return await opening.open_tree(graph, given, slow, node.node_options.inherited_by(own, backing=True), depth + 1)
    inherited = node.node_options.inherited_by(NodeOptions(), backing=True)
    name, image_format = node.auto_backing, node.backing_format
    if name.startswith("json:"):
        tree = json_tree(graph, name, image_format)
        return await opening.open_tree(graph, tree, slow, inherited, depth + 1)
    if image_format is not None:
        if image_format not in graph.registry.drivers:
            raise CommandError(f"Unknown driver '{image_format}'")
        tree = {"driver": image_format, "file": protocol_names.options_of(graph.registry, name)}
        return await opening.open_tree(graph, tree, slow, inherited, depth + 1)
    return await open_probed(graph, name, inherited, slow, depth)


def json_tree(graph: Graph, name: str, image_format: str | None) -> dict[str, Any]:
    """Return the options that a json: name spells out."""
    if graph.validate is None:
        raise CommandError(f"Could not open '{name}': json: names are not accepted here")
    try:
        value = json.loads(name[len("json:") :])
    except ValueError as error:
        raise CommandError(f"Could not parse the JSON options of '{name}'") from error
    if isinstance(value, dict):
        value = undotted(value)
        if image_format is not None:
            value.setdefault("driver", image_format)
        value = protocol_names.modern(graph.registry, value)
        below = value.get("file")
        if isinstance(below, dict):
            if "driver" not in below and isinstance(below.get("filename"), str):
                below = protocol_names.options_of(graph.registry, below["filename"])
            value["file"] = protocol_names.modern(graph.registry, below)
    return graph.validate(value)


async def open_probed(graph: Graph, name: str, inherited: NodeOptions, slow: Slow, depth: int) -> BlockNode:
    """Open a backing file whose format the image does not say: it is found by its first bytes."""
    file_options = inherited.inherited_by(NodeOptions())
    file = await opening.open_tree(
        graph, protocol_names.options_of(graph.registry, name), slow, file_options, depth + 1
    )
    try:
        length = align_up(min(probe.PROBE_BYTES, file.size), file.request_alignment)
        head = bytearray(length)
        if head:
            batch = Batch.single(0, memoryview(head))
            await graph.runner.run(ranges.read(file, batch))
            batch.raise_first()
        image_format = probe.probe(bytes(head))
        tree = {"driver": image_format, "file": file.name}
        return await opening.open_tree(graph, tree, slow, inherited, depth + 1)
    except OSError as error:
        await graph.drop_unreferenced(file)
        raise CommandError(f"Could not read image for determining its format: {error.strerror}") from error
    except BaseException:
        await graph.drop_unreferenced(file)
        raise


def full_backing_filename(node: BlockNode) -> str | None:
    """Return the backing file named in the image, made absolute by the image's directory.

    None if the image names none. Raises CommandError if a relative name has nothing to be
    relative to, or names a protocol that there is no driver for.
    """
    name = node.backing_file
    if not name:
        return None
    if name.startswith("json:"):
        return name
    protocol = protocol_names.protocol_of(name)
    if protocol is not None and protocol != "file":
        if any(protocol in entry.cls.filename_protocols for entry in node.graph.registry.drivers.values()):
            return name
        raise CommandError(f"Could not open backing file: Unknown protocol '{protocol}'")
    if protocol is not None:
        name = name.partition(":")[2]
    if os.path.isabs(name):
        return name
    own = _protocol_filename(node)
    if not own:
        raise CommandError(
            f"Could not open backing file: Cannot use relative backing file names for '{filename.node_filename(node)}'"
        )
    return os.path.join(os.path.dirname(own), name)


def _protocol_filename(node: BlockNode) -> str:
    while not node.is_protocol:
        primary = node.primary()
        if primary is None:
            return ""
        node = primary.node
    if node.directory_refusal:
        raise CommandError(node.directory_refusal)
    return filename.exact_filename(node)
