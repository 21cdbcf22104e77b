"""What an image is called on a command line, and how the node that it means is opened.

A name is a path, `file:PATH`, `nbd://...`, `json:{...}`, or with --image-opts a list of options. Who does not say
the format has it probed; what lies below a format is never probed. Model: bdrv_open (QEMU block.c).
"""

from __future__ import annotations

import json
import os
import stat
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qmpd.block import opening, protocol_names
from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch
from qmpd.block.loose import check_options
from qmpd.block.node import BlockNode
from qmpd.block.options import GENERIC_MEMBERS, NodeOptions, OpenFlags
from qmpd.block.perm import Perm
from qmpd.cli.image import PLUGINS
from qmpd.cli.img import _opts
from qmpd.errors import CommandError, QmpdError
from qmpd.formats import probe
from qmpd.qapi import keyval
from qmpd.qapi.offered import lazily
from qmpd.units import align_up

if TYPE_CHECKING:
    from qmpd.cli.image import Workshop

PROTOCOL_DRIVERS = frozenset(("file", "host_device", "null-co", "null-aio", "nbd"))
SIZE_MEMBERS = frozenset(
    ("offset", "size", "cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size")
)
"""Members that a command line may give with a suffix; the schema has them as integers."""

SIZE_SUFFIXES = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
)
MAX_DEPTH = 100
"""Levels of children in a json: name at most."""


def parse_size(name: str, text: str) -> int:
    """Return the bytes a size option means. Raises CommandError with the reference's text."""
    value = keyval.parse_size(text)
    if value is None:
        raise CommandError(f"Parameter '{name}' expects a non-negative number below 2^64", hint=SIZE_SUFFIXES)
    return value


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """A cache mode; writethrough: every write is made durable at once."""

    direct: bool = False
    no_flush: bool = False
    writethrough: bool = False


CACHES = {
    "none": Cache(direct=True),
    "off": Cache(direct=True),
    "writeback": Cache(),
    "unsafe": Cache(no_flush=True),
    "directsync": Cache(direct=True, writethrough=True),
    "writethrough": Cache(writethrough=True),
}


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """How an image is to be opened.

    image_format  None: found by its first bytes        image_opts  the name is a list of options
    resize        its size will change                  unmap       discards and zero writes may free space
    alone         nobody may write to it meanwhile      extra       options of the top node, dotted names and text
    """

    image_format: str | None = None
    image_opts: bool = False
    writable: bool = False
    resize: bool = False
    force_share: bool = False
    unmap: bool = False
    alone: bool = False
    extra: tuple[tuple[str, str], ...] = ()
    cache: Cache = Cache()
    flags: OpenFlags = OpenFlags.NONE
    quiet: bool = False

    def generic(self) -> NodeOptions:
        """Return the options that the top node has unless its name says otherwise."""
        return NodeOptions(
            cache_direct=self.cache.direct,
            cache_no_flush=self.cache.no_flush,
            read_only=not self.writable,
            force_share=True if self.force_share else None,
            discard="unmap" if self.unmap else None,
        )


async def open_image(shop: Workshop, name: str, wish: Wish, tree: dict[str, Any] | None = None) -> BlockBackend:
    """Return a backend of its own on the image `name`. Raises CommandError with the reference's text.

    tree   the options to open, where they are more than the name says
    """
    try:
        return await open_backend(shop, name, wish, tree)
    except (QmpdError, OSError) as error:
        text = str(error) if isinstance(error, QmpdError) else os.strerror(error.errno or 0)
        hint = error.hint if isinstance(error, QmpdError) else None
        raise CommandError(f"Could not open '{name}': {text}", hint=hint) from error


async def open_backend(shop: Workshop, name: str, wish: Wish, tree: dict[str, Any] | None = None) -> BlockBackend:
    """Like `open_image`, but what goes wrong is told without the name before it."""
    node = await open_node(shop, name, wish, tree)
    perm = Perm.NONE if OpenFlags.NO_IO in wish.flags else Perm.CONSISTENT_READ
    if wish.writable:
        perm |= Perm.WRITE
    if wish.resize:
        perm |= Perm.RESIZE
    shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED if wish.alone else Perm.ALL
    try:
        backend = backend_on(shop, node, perm, shared)
    except BaseException:
        node.monitor_owned = False
        await shop.graph.drop_unreferenced(node)
        raise
    node.monitor_owned = False
    return backend


def backend_on(shop: Workshop, node: BlockNode, perm: Perm, shared: Perm = Perm.ALL) -> BlockBackend:
    """Return a new backend on a node that is open. Raises PermissionConflict, CommandError."""
    backend = BlockBackend(shop.graph, lambda: "an unnamed block device", perm, shared)
    try:
        backend.insert(node)
    except BaseException:
        shop.graph.backends.remove(backend)
        raise
    return backend


async def open_node(shop: Workshop, name: str, wish: Wish, tree: dict[str, Any] | None = None) -> BlockNode:
    """Open the nodes that a name means and return the top one, owned by the caller (`monitor_owned`)."""
    if tree is None:
        tree = read_options(name) if wish.image_opts else read_name(name)
    for name, value in _opts.flatten(_opts.crumple([*wish.extra])):
        *path, last = name.split(".")
        place = tree
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    before, shop.graph.open_flags = shop.graph.open_flags, wish.flags
    try:
        if wish.image_format is not None:
            if wish.image_format not in shop.graph.registry.drivers:
                raise CommandError(f"Unknown driver '{wish.image_format}'")
            tree.setdefault("driver", wish.image_format)
            if wish.image_format in PROTOCOL_DRIVERS and set(tree) == {"driver", "file"}:
                tree = {**tree["file"], "driver": wish.image_format}
        return await _Opener(shop, wish).open(tree)
    finally:
        shop.graph.open_flags = before


def read_options(text: str) -> dict[str, Any]:
    """Return the tree of an --image-opts argument."""
    return _opts.crumple([*_opts.parse(text, "file")])


def read_name(name: str) -> dict[str, Any]:
    """Return the tree that a file name stands for. Raises CommandError."""
    if name.startswith("json:"):
        return _opts.crumple(_opts.flatten(read_json(name)))
    return {"file": protocol_tree(name)}


def read_json(name: str) -> dict[str, Any]:
    """Return the object behind `json:`. Raises CommandError.

    A backslash at the end of a line, as a command copied from a document may hold inside its quotes, is no part
    of any JSON and counts as a blank.
    """
    text = name.removeprefix("json:").replace("\\\n", " \n")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = "premature EOI" if getattr(error, "pos", 0) >= len(text.rstrip()) else "invalid keyword or token"
        raise CommandError(f"Could not parse the JSON options: JSON parse error, {where}") from error
    if not isinstance(value, dict):
        raise CommandError("Invalid JSON object given")
    return value


def protocol_tree(name: str) -> dict[str, Any]:
    """Return the options of the protocol node that a path, `file:PATH` or a URI means. Raises CommandError."""
    tree = protocol_names.options_of(lazily(PLUGINS), name)
    if tree["driver"] == "file":
        tree["driver"] = _file_driver(tree["filename"])
    return tree


def has_protocol(name: str) -> bool:
    """Say whether a name starts with a protocol, as `nbd:` or `json:`."""
    return protocol_names.protocol_of(name) is not None


def _file_driver(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "file"
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


class _Opener:
    """Opens one tree of loose options: drivers left out are inferred, values may be text."""

    def __init__(self, shop: Workshop, wish: Wish) -> None:
        self.shop, self.wish = shop, wish

    async def open(self, tree: dict[str, Any]) -> BlockNode:
        graph = self.shop.graph
        probed: BlockNode | None = None
        try:
            if "driver" not in tree:
                probed = await self._probe(tree)
            self._complete(tree, 0)
            checked = self._checked(tree)
            generic = _given_or(NodeOptions.from_wire(checked), self.wish.generic())
            node = await opening.open_tree(graph, checked, nullcontext, generic)
        finally:
            if probed is not None:
                probed.monitor_owned = False
                await graph.drop_unreferenced(probed)
        node.monitor_owned = True
        return node

    async def _probe(self, tree: dict[str, Any]) -> BlockNode:
        """Open the node below the format, and put the format and that node into the tree."""
        below = tree.get("file")
        graph = self.shop.graph
        if isinstance(below, str):
            graph.lookup(below, below)
        if not isinstance(below, dict):
            raise CommandError("Must specify either driver or file")
        self._complete(below, 1, protocol=True)
        inherited = _given_or(NodeOptions.from_wire(below), self.wish.generic().inherited_by(NodeOptions()))
        node = await opening.open_tree(graph, self._checked(below), nullcontext, inherited)
        node.monitor_owned = True
        try:
            tree["driver"] = probe.probe(await _head(graph, node))
        except OSError as error:
            node.monitor_owned = False
            await graph.drop_unreferenced(node)
            reason = os.strerror(error.errno or 0)
            raise CommandError(f"Could not read image for determining its format: {reason}") from error
        tree["file"] = node.name
        if tree["driver"] == "raw" and self.wish.writable and not self.wish.quiet:
            _warn_raw(str(below.get("filename", "")))
        return node

    def _complete(self, tree: dict[str, Any], depth: int, *, protocol: bool = False) -> None:
        """Fill in the drivers that a tree leaves out; see _checked for what is then asked of it."""
        if depth > MAX_DEPTH:
            raise CommandError(f"Block node tree is deeper than {MAX_DEPTH} levels")
        if "driver" not in tree:
            if not protocol:
                raise CommandError("Must specify either driver or file")
            tree["driver"] = _file_driver(str(tree.get("filename", "")))
        driver = str(tree["driver"])
        entry = self.shop.graph.registry.drivers.get(driver)
        if entry is None:
            raise CommandError(f"Unknown driver '{driver}'")
        changed = entry.cls.modern_options(dict(tree))
        tree.clear()
        tree.update(changed)
        known = self.shop.member_names("BlockdevOptions", driver)
        for member, value in tree.items():
            if member in GENERIC_MEMBERS:
                continue
            if member not in known:
                leaf = _opts.flatten({member: value})[0][0]
                raise CommandError(
                    f"Block protocol '{driver}' doesn't support the option '{leaf}'"
                    if entry.cls.is_protocol
                    else f"Block format '{driver}' does not support the option '{leaf}'"
                )
            if isinstance(value, dict) and member in {*entry.cls.child_roles, *entry.cls.late_roles, "backing"}:
                self._complete(value, depth + 1, protocol=member != "backing")
        if entry.cls.is_protocol and "filename" in known and not tree.get("filename"):
            raise CommandError(f"The '{driver}' block driver requires a file name")
        if "file" in entry.cls.child_roles and tree.get("file") in (None, "", {}, []):
            raise CommandError('A block device must be specified for "file"')

    def _checked(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Return the tree as the schema has it. Raises ValidationError."""
        bare = "backing" in tree and (tree["backing"] is None or tree["backing"] == "")
        text = {name: _text(value) for name, value in tree.items() if not (bare and name == "backing")}
        for name in SIZE_MEMBERS.intersection(text):
            if isinstance(text[name], str):
                text[name] = str(parse_size(name, text[name]))
        checked = check_options(self.shop.schema, text, keyval=True)
        if bare:
            checked["backing"] = None
        return checked


def _text(value: Any) -> Any:
    """Return a tree with its scalars as text, as a command line would have them."""
    if isinstance(value, dict):
        return {name: _text(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_text(one) for one in value]
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else str(value)


def _given_or(own: NodeOptions, default: NodeOptions) -> NodeOptions:
    changes = {
        field: getattr(default, field)
        for field in ("discard", "cache_direct", "cache_no_flush", "read_only", "auto_read_only", "force_share")
        if getattr(own, field) is None
    }
    return replace(own, **changes)


async def _head(graph: Any, node: BlockNode) -> bytes:
    """Return the first bytes of a node, as many as probing looks at. Raises OSError."""
    from qmpd.block import ranges

    length = align_up(min(probe.PROBE_BYTES, node.size), node.request_alignment)
    head = bytearray(length)
    if head:
        batch = Batch.single(0, memoryview(head))
        await graph.runner.run(ranges.read(node, batch))
        batch.raise_first()
    return bytes(head)


def _warn_raw(name: str) -> None:
    print(
        f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
        "         Automatically detecting the format is dangerous for raw images: whoever can write to one\n"
        "         can make it look like another format. Specify the 'raw' format explicitly (-f raw).",
        file=sys.stderr,
    )
