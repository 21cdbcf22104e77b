"""Other options for an open qcow2 image: everything is written, and the tables are read anew.

So caches of other sizes, refcounts kept late or at once, and a node that becomes writable need no
way of their own. What stays is what the image cannot tell: the volume key, the external data file,
and the dirty bitmaps, which are stored before the node becomes read-only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.block.node import ReopenStep
from qmpd.drivers._qcow2_bitmaps import store_bitmaps
from qmpd.drivers._qcow2_open import open_image, read_bitmaps
from qmpd.drivers._qcow2_options import resolve
from qmpd.formats.qcow2_snapshot import BITMAP_IN_USE

if TYPE_CHECKING:
    from qmpd.block.change import Transaction
    from qmpd.block.options import NodeOptions
    from qmpd.drivers._qcow2_image import Image
    from qmpd.drivers._qcow2_options import Qcow2Options
    from qmpd.drivers.qcow2 import Qcow2Node


async def prepare(node: Qcow2Node, options: Qcow2Options, generic: NodeOptions) -> ReopenStep:
    """See `BlockNode.prepare_reopen`."""
    old = node.image
    unmap, writable = generic.discard == "unmap", not generic.read_only
    resolve(options, old.header, unmap=unmap)  # before anything is written
    if node.writes:
        if not writable:
            await store_bitmaps(old, node)
            old.bitmaps_fresh = any(not one.flags & BITMAP_IN_USE for one in old.bitmaps)
        await old.close()
    new = await open_image(options, writable=writable, unmap=unmap, report=node.report, data_given=old.external)
    if old.external:
        new.data = old.data
    new.encryption = old.encryption
    new.bitmaps = await read_bitmaps(new)
    secret = (options.encrypt or {}).get("key-secret")

    def step(tran: Transaction) -> None:
        _exchange(node, new, tran)
        if new.encryption is not None and secret is not None:
            _name_secret(node, new, secret, tran)

    return step


def _exchange(node: Qcow2Node, new: Image, tran: Transaction) -> None:
    """Serve from `new`. Bitmaps of a read-only image cannot be changed, those of a writable one can."""
    old = node.image
    flags = [(bitmap, bitmap.readonly) for bitmap in node.dirty_bitmaps if bitmap.persistent]

    def restore() -> None:
        node.image = old
        for bitmap, readonly in flags:
            bitmap.readonly = readonly

    node.image = new
    for bitmap, _ in flags:
        bitmap.readonly = not new.writable
    tran.on_undo(restore)


def _name_secret(node: Qcow2Node, image: Image, secret: str, tran: Transaction) -> None:
    """Remember which secret the options name; the key that it once opened stays."""
    encryption = image.encryption
    assert encryption is not None
    old = encryption.key_secret

    def restore() -> None:
        encryption.key_secret = old

    encryption.key_secret = secret
    node.given = {**node.given, "encrypt.key-secret": secret}  # who undoes the change, undoes this as well
    tran.on_undo(restore)
