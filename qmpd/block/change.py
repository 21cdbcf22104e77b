"""A change of the graph: edges attached, detached and given new permissions, all or nothing.

Model: transactional permission update (bdrv_list_refresh_perms, QEMU block.c). There is no await
in a change, so on the monitor's loop it is atomic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qmpd.block.child import Child, Parent
from qmpd.block.node import BlockNode
from qmpd.block.perm import ChildRole, Perm, perm_text
from qmpd.errors import CommandError, PermissionConflict


class Transaction:
    """Steps done so far, each with the function that undoes it; made by `Graph.change`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._commit: list[Callable[[], None]] = []
        self._touched: list[BlockNode] = []
        self.losing_write: set[BlockNode] = set()
        """Nodes that were writable before the change, and are not any more."""

    def attach(
        self,
        parent: Parent,
        name: str,
        role: ChildRole,
        node: BlockNode,
        perm: Perm = Perm.NONE,
        shared: Perm = Perm.ALL,
    ) -> Child:
        """Add an edge; below a `BlockNode` its permissions follow from `child_perm`."""
        child = Child(name, role, parent, node)
        child.perm, child.shared = perm, shared
        if isinstance(parent, BlockNode):
            parent.children[name] = child
            self._undo.append(lambda: _forget(parent, name))
            self._touched.append(parent)
        node.parents.insert(0, child)
        self._undo.append(lambda: node.parents.remove(child))
        self._touched.append(node)
        return child

    def detach(self, child: Child) -> None:
        """Remove an edge from both of its ends."""
        node, parent = child.node, child.parent
        place = node.parents.index(child)
        del node.parents[place]
        self._undo.append(lambda: node.parents.insert(place, child))
        if isinstance(parent, BlockNode):
            order = dict(parent.children)
            del parent.children[child.name]

            def restore() -> None:
                parent.children.clear()
                parent.children.update(order)

            self._undo.append(restore)
        self._touched.append(node)

    def replace(self, child: Child, node: BlockNode) -> None:
        """Point an edge at another node; its permissions stay what its parent asks for."""
        old, inherits = child.node, child.inherits
        place = old.parents.index(child)
        del old.parents[place]
        child.node, child.inherits = node, False
        node.parents.insert(0, child)

        def restore() -> None:
            node.parents.remove(child)
            child.node, child.inherits = old, inherits
            old.parents.insert(place, child)

        self._undo.append(restore)
        if isinstance(child.parent, BlockNode):
            parent = child.parent
            self._commit.append(lambda: parent.child_replaced(child))
            self._touched.append(parent)
        self._touched += [old, node]

    def set_perm(self, child: Child, perm: Perm, shared: Perm) -> None:
        """Change what a backend's edge takes and shares."""
        self._set(child, perm, shared)
        self._touched.append(child.node)

    def touch(self, node: BlockNode) -> None:
        """Have the permissions of `node` and everything below it computed anew."""
        self._touched.append(node)

    def on_undo(self, step: Callable[[], None]) -> None:
        """Call `step` if the change is undone."""
        self._undo.append(step)

    def on_commit(self, step: Callable[[], None]) -> None:
        """Call `step` when the change is final."""
        self._commit.append(step)

    def _set(self, child: Child, perm: Perm, shared: Perm) -> None:
        old = child.perm, child.shared
        if old == (perm, shared):
            return
        child.perm, child.shared = perm, shared

        def restore() -> None:
            child.perm, child.shared = old

        self._undo.append(restore)

    def refresh(self) -> None:
        """Compute permissions from every touched node downwards.

        Raises PermissionConflict, or CommandError where a node cannot be written or a driver
        vetoes; the caller then undoes everything.
        """
        touched, self._touched = self._touched, []
        for node in topological(touched):
            self._refresh_node(node)

    def _refresh_node(self, node: BlockNode) -> None:
        check_conflicts(node)
        perm, shared = cumulative(node)
        if perm & (Perm.WRITE | Perm.WRITE_UNCHANGED) and not node.writable:
            if node in self.losing_write:
                raise CommandError(f"Read-only block node '{node.name}' cannot support read-write users")
            raise CommandError("Block node is read-only")
        if perm & Perm.WRITE and not perm & Perm.RESIZE and node.size % node.request_alignment:
            raise CommandError(
                "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
            )
        old = node.perm, node.shared
        node.check_perm(perm, shared)
        self._undo.append(node.abort_perm)
        self._commit.append(node.commit_perm)
        node.perm, node.shared = perm, shared

        def restore() -> None:
            node.perm, node.shared = old

        self._undo.append(restore)
        for child in node.children.values():
            wanted, lets = node.child_perm(child.name, child.role, perm, shared)
            if child.node.node_options.force_share:
                lets = Perm.ALL
            self._set(child, wanted, lets)

    def commit(self) -> None:
        """Make the change final."""
        for step in self._commit:
            step()
        self._commit.clear()
        self._undo.clear()

    def undo(self) -> None:
        """Restore the graph as it was."""
        for step in reversed(self._undo):
            step()
        self._commit.clear()
        self._undo.clear()


def _forget(parent: BlockNode, name: str) -> None:
    parent.children.pop(name, None)


def cumulative(node: BlockNode) -> tuple[Perm, Perm]:
    """Return what all parents together take, and what all of them share."""
    perm, shared = Perm.NONE, Perm.ALL
    for parent in node.parents:
        perm |= parent.perm
        shared &= parent.shared
    return perm, shared


def check_conflicts(node: BlockNode) -> None:
    """Raise PermissionConflict if a parent of `node` takes what another does not share."""
    for strict in node.parents:
        for other in node.parents:
            denied = other.perm & ~strict.shared
            if denied and other is not strict:
                raise PermissionConflict(
                    f"Permission conflict on node '{node.name}': permissions '{perm_text(denied)}' are both "
                    f"required by {other.describe()} and unshared by {strict.describe()}."
                )


def topological(roots: Iterable[BlockNode]) -> list[BlockNode]:
    """Return `roots` and everything below them, every parent before its children."""
    order: list[BlockNode] = []
    seen: set[int] = set()

    for root in roots:
        if id(root) in seen:
            continue
        seen.add(id(root))
        stack = [(root, iter(list(root.children.values())))]
        while stack:
            node, children = stack[-1]
            for child in children:
                if id(child.node) not in seen:
                    seen.add(id(child.node))
                    stack.append((child.node, iter(list(child.node.children.values()))))
                    break
            else:
                stack.pop()
                order.append(node)
    order.reverse()
    return order


def reaches(top: BlockNode, node: BlockNode) -> bool:
    """Say whether `node` is `top` or anywhere below it."""
    return node is top or node in topological([top])
