"""Volumes that are open under one volume key: where they have the same sector numbers, equality shows.

A sector is encrypted under the key and its number. Two payloads with both in common have equal
ciphertext where they hold equal plaintext, which somebody who sees both can tell without any key. The
event comes when one of them can be written to, and more of that may come about.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.luks.binding import below_filters
from qmpd.units import SECTOR

EVENT = "X_LUKS_SHARED_KEY"
_LABEL = b"qmpd volume key fingerprint"


@dataclass(frozen=True, slots=True)
class KeyUse:
    """One unlocked volume.

    fingerprint   tells volume keys apart, and tells nothing else of them
    first         number of its first sector, counted as the cipher does
    payload       the node that holds the ciphertext
    """

    fingerprint: bytes
    first: int
    payload: BlockNode

    @classmethod
    def of(cls, key: bytes | bytearray, first: int, payload: BlockNode) -> KeyUse:
        """Describe what was unlocked with a volume key."""
        return cls(hmac.digest(key, _LABEL, "sha256"), first, below_filters(payload))


_uses: WeakKeyDictionary[BlockNode, KeyUse] = WeakKeyDictionary()


def note_use(node: BlockNode, use: KeyUse) -> None:
    """Count `node`, which was just unlocked, among the open volumes; warn if another one is being written to."""
    _uses[node] = use
    _warn(node, [other for other in _sharing(node) if other.perm & Perm.WRITE])


def note_payload(node: BlockNode, payload: BlockNode) -> None:
    """Take note that the ciphertext of `node` is on another node now."""
    if node in _uses:
        _uses[node] = replace(_uses[node], payload=below_filters(payload))


def note_writing(node: BlockNode) -> None:
    """Warn if `node`, whose first writer has come, shares sectors with another open volume."""
    _warn(node, _sharing(node))


def _warn(node: BlockNode, others: list[BlockNode]) -> None:
    if others:
        node.graph.events.emit(EVENT, node_name=node.name, shared_with=[other.name for other in others])


def forget_use(node: BlockNode) -> None:
    """Count `node` no longer."""
    _uses.pop(node, None)


def sharing(node: BlockNode) -> list[str]:
    """Return the names of the nodes that have sectors under the same key and number, on another payload."""
    return [other.name for other in _sharing(node)]


def _sharing(node: BlockNode) -> list[BlockNode]:
    mine = _uses.get(node)
    if mine is None:
        return []
    found = []
    for other, use in list(_uses.items()):
        if other is node or use.payload is mine.payload or other.graph is not node.graph:
            continue
        overlap = use.first < mine.first + node.size // SECTOR and mine.first < use.first + other.size // SECTOR
        if overlap and hmac.compare_digest(use.fingerprint, mine.fingerprint):
            found.append(other)
    return sorted(found, key=lambda other: other.name)
