"""Other options for nodes that are open: `blockdev-reopen`, and what makes a node read-only or writable.

First every node is asked, on the data loop, what its new options mean (`BlockNode.prepare_reopen`);
then all of them change in one change of the graph; then each does what needs the new permissions
(`BlockNode.reopened`). All of it while no request is in flight. Model: bdrv_reopen_multiple and what
it calls (QEMU block.c); the order of checks is theirs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmpd.block import filename
from qmpd.block.backing import refresh_names
from qmpd.block.change import Transaction, reaches
from qmpd.block.node import BlockNode, ReopenStep
from qmpd.block.options import GENERIC_MEMBERS, NodeOptions, driver_members
from qmpd.block.perm import ChildRole
from qmpd.errors import CommandError, QmpdError
from qmpd.qapi.bind import build
from qmpd.qapi.hashorder import dict_order

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

RESETTABLE = frozenset(
    ("node-name", "discard", "cache.direct", "cache.no-flush", "read-only", "auto-read-only", "detect-zeroes")
)
"""Generic options that a node may lose by leaving them out."""

CHANGEABLE = RESETTABLE - {"node-name"} | {"active"}
"""Generic options that can have another value."""

REPLACEABLE = ("backing", "file")
"""Children that can become other nodes, in the order in which they do."""


@dataclass(eq=False)
class _Wish:
    """What one node is to become.

    tree      its options, those of children left out that are asked for their own
    generic   the base of its options, after inheritance
    whole     False: what is not given goes back to its default
    children  the nodes that its replaceable children are to be, None for no node
    """

    node: BlockNode
    tree: dict[str, Any]
    generic: NodeOptions
    whole: bool
    children: dict[str, BlockNode | None]
    step: ReopenStep | None = None


async def reopen(graph: Graph, trees: Iterable[Mapping[str, Any]]) -> None:
    """Give nodes the options of these validated BlockdevOptions trees, all or none. Raises QmpdError."""
    queue = _Queue(graph)
    for tree in trees:
        name = tree.get("node-name")
        if name is None:
            raise CommandError("node-name not specified")
        queue.add(graph.find_node(name), tree, keep=False)
    await queue.run()


async def set_read_only(graph: Graph, node: BlockNode, read_only: bool) -> None:
    """Make a node, and what was opened for it, read-only or writable; all else stays. Raises QmpdError."""
    if node.read_only == read_only:
        return
    queue = _Queue(graph)
    queue.add(node, {"read-only": read_only}, keep=True)
    await queue.run()


def options_of(node: BlockNode) -> dict[str, Any]:
    """Return the options that were given for `node` itself, those for its children left out."""
    names = _child_names(node)
    own = {name: value for name, value in node.given.items() if name not in names and "." not in name}
    return {"driver": node.driver_name, **node.explicit, **own}


def _child_names(node: BlockNode) -> set[str]:
    names = {*node.child_roles, *node.late_roles}
    return names | {"backing"} if node.supports_backing else names


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of options by their dotted names."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = [(str(at), one) for at, one in enumerate(tree)]
    else:
        return {prefix: tree}
    if not items and prefix:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in items:
        leaves |= flattened(value, f"{prefix}.{name}" if prefix else name)
    return leaves


class _Queue:
    """The nodes to reopen, parents before the children that were opened for them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.wishes: dict[BlockNode, _Wish] = {}

    def add(self, node: BlockNode, tree: Mapping[str, Any], *, keep: bool, above: _Wish | None = None) -> None:
        """Ask for the options of `tree`; with `keep`, or if others were asked for before, on top of those."""
        before = self.wishes.get(node)
        wanted = dict(tree)
        if before is not None or keep:
            old = before.tree if before is not None else options_of(node)
            wanted = {**old, **tree}
            if "cache" in old and "cache" in tree:
                wanted["cache"] = {**old["cache"], **tree["cache"]}
        generic = NodeOptions.from_wire(wanted)
        if above is not None:
            is_backing = any(edge.parent is above.node and edge.name == "backing" for edge in node.parents)
            generic = above.generic.inherited_by(generic, backing=is_backing, parent_is_format=not above.node.is_filter)
        elif keep:
            generic = node.node_options.overridden_by(generic)
        wish = _Wish(node, wanted, generic, keep, {})
        if before is None:
            self.wishes[node] = wish
        else:
            before.tree, before.generic, wish = wanted, generic, before
        self._add_children(wish, keep=keep)

    def _add_children(self, wish: _Wish, *, keep: bool) -> None:
        """Ask the children that were opened for a node, unless it is to have others."""
        for child in list(wish.node.children.values()):
            if not child.inherits:
                continue
            reference = wish.tree.get(child.name)
            if isinstance(reference, Mapping):
                del wish.tree[child.name]
                self.add(child.node, reference, keep=keep, above=wish)
                wish.children[child.name] = child.node
            elif child.name not in wish.tree:
                if keep:
                    self.add(child.node, {}, keep=True, above=wish)
                elif child.name != "backing":
                    self.add(child.node, {}, keep=False, above=wish)
            elif reference == child.node.name:
                self.add(child.node, {}, keep=True, above=wish)

    async def run(self) -> None:
        """Do it. Raises QmpdError, with everything as it was."""
        async with self.graph.drained(*self.wishes):
            for wish in self.wishes.values():
                await self._flush(wish.node)
            for wish in self.wishes.values():
                await self._prepare(wish)
            dropped = await self._change()
        for node in dropped:
            await self.graph.drop_unreferenced(node)

    async def _flush(self, node: BlockNode) -> None:
        try:
            if not node.read_only:
                await self.graph.runner.run(node.flush())
        except OSError as error:
            raise CommandError("Error flushing drive") from error

    # --- what the new options mean ----------------------------------------------------------------

    async def _prepare(self, wish: _Wish) -> None:
        node, generic = wish.node, wish.generic
        if generic.detect_zeroes == "unmap" and generic.discard != "unmap":
            raise CommandError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
            )
        if not node.reopens:
            raise CommandError(
                f"Block format '{node.driver_name}' used by node '{node.name}' does not support reopening files"
            )
        new, old = flattened(wish.tree), flattened(options_of(node))
        for name in dict_order(old):
            if name not in new and name not in RESETTABLE and not _listed(name, node.reopen_resets):
                raise CommandError(f"Option '{name}' cannot be reset to its default value")
        wish.step = await self._ask(wish)
        has_backing = node.supports_backing and ("backing" in node.children or node.backing_file)
        if has_backing and not wish.whole and "backing" not in {*wish.tree, *wish.children}:
            raise CommandError(f"backing is missing for '{node.name}'")
        for role in REPLACEABLE:
            if role in wish.tree and not isinstance(wish.tree[role], Mapping):
                wish.children[role] = self._replacement(node, role, wish.tree[role])
        self._check_unchanged(node, new, old)

    async def _ask(self, wish: _Wish) -> ReopenStep:
        node = wish.node
        own = {name: value for name, value in driver_members(wish.tree).items() if name not in _child_names(node)}
        children = {name: node.children[name] for name in node.child_roles if name in node.children}
        entry = self.graph.registry.drivers[node.driver_name]
        options = build(entry.options, {**own, **children}) if entry.options is not None else None
        try:
            return await self.graph.runner.run(node.prepare_reopen(options, wish.generic))
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            shown = filename.node_filename(node)
            raise CommandError(f"failed while preparing to reopen image '{shown}': {reason}") from error

    def _replacement(self, node: BlockNode, role: str, reference: Any) -> BlockNode | None:
        """Return the node that a child is to be. Raises CommandError if it cannot."""
        if reference is None:
            found = None
        else:
            found = self.graph.lookup(None, reference)
            if reaches(found, node):
                raise CommandError(f"Making '{reference}' a {role} child of '{node.name}' would create a cycle")
        edge = node.children.get(role)
        if edge is None and node.is_filter:
            raise CommandError(
                f"'{node.name}' is a {node.driver_name} filter node that does not support a {role} child"
            )
        if edge is not None and edge.node is found:
            return found
        if edge is not None and edge.frozen:
            raise CommandError(f"Cannot change frozen '{role}' link from '{node.name}' to '{edge.node.name}'")
        if role == "backing" and not node.supports_backing:
            raise CommandError(f"Driver '{node.driver_name}' of node '{node.name}' does not support backing files")
        if role == "file" and edge is None:
            raise CommandError("Cannot set file child to format node without file child")
        return found

    @staticmethod
    def _check_unchanged(node: BlockNode, new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
        """Raise CommandError if an option that must stay has another value."""
        for name in dict_order(new):
            if name in CHANGEABLE or name in REPLACEABLE or _listed(name, node.reopen_takes):
                continue
            child = node.children.get(name)
            if child is not None and child.node.name == new[name]:
                continue
            # The reference compares this one as text with what it was given, so it is never the same.
            if name == "force-share" or name not in old or new[name] != old[name]:
                raise CommandError(f"Cannot change the option '{name}'")

    # --- the change -------------------------------------------------------------------------------

    async def _change(self) -> list[BlockNode]:
        """Change all nodes; return those that lost a parent."""
        before = [self._as_it_is(wish) for wish in self.wishes.values()]
        dropped = self._apply(self.wishes.values())
        try:
            for wish in self.wishes.values():
                await self.graph.runner.run(wish.node.reopened())
        except (QmpdError, OSError) as error:
            for wish in before:
                wish.step = await self._ask(wish)
            self._apply(before)
            if isinstance(error, OSError):
                raise CommandError(os.strerror(error.errno or errno.EIO)) from error
            raise
        return dropped

    @staticmethod
    def _as_it_is(wish: _Wish) -> _Wish:
        """Return the wish to be what a node is now."""
        node = wish.node
        children = {name: edge.node if (edge := node.children.get(name)) else None for name in wish.children}
        return _Wish(node, options_of(node), node.node_options, True, children)

    def _apply(self, wishes: Iterable[_Wish]) -> list[BlockNode]:
        """Change the graph; return the nodes that lost a parent. Raises QmpdError, and nothing is changed."""
        dropped: list[BlockNode] = []
        wishes = list(wishes)
        with self.graph.change() as tran:
            for wish in wishes:
                dropped += _change_children(tran, wish)
                _set_options(tran, wish)
                assert wish.step is not None
                wish.step(tran)
                tran.touch(wish.node)
        refresh_names(wish.node for wish in wishes)
        return dropped


def _listed(name: str, patterns: Sequence[str]) -> bool:
    return any(name == one or (one.endswith(".") and name.startswith(one)) for one in patterns)


def _change_children(tran: Transaction, wish: _Wish) -> list[BlockNode]:
    """Have the edges of a node lead where they are to; return where they led. Raises CommandError."""
    node = wish.node
    left: list[BlockNode] = []
    for name, wanted in wish.children.items():
        edge = node.children.get(name)
        if (edge.node if edge is not None else None) is wanted:
            continue
        if wanted is not None and reaches(wanted, node):
            raise CommandError(f"Making '{wanted.name}' a {name} child of '{node.name}' would create a cycle")
        if edge is not None:
            left.append(edge.node)
        if wanted is None:
            assert edge is not None
            tran.detach(edge)
        elif edge is None:
            tran.attach(node, name, ChildRole.COW, wanted)
        else:
            tran.replace(edge, wanted)
    return left


def _set_options(tran: Transaction, wish: _Wish) -> None:
    """Give a node its new options; the driver's own step comes after it."""
    node = wish.node
    old = node.read_only, node.node_options, node.given, node.explicit

    def restore() -> None:
        node.read_only, node.node_options, node.given, node.explicit = old

    tran.on_undo(restore)
    names = _child_names(node)
    kept = {name: value for name, value in node.given.items() if name in names}
    node.node_options = wish.generic
    node.read_only = bool(wish.generic.read_only)
    node.given = {**kept, **driver_members(wish.tree)}
    node.explicit = {name: wish.tree[name] for name in GENERIC_MEMBERS if name in wish.tree and name != "driver"}
    if node.read_only and not old[0]:
        tran.losing_write.add(node)
