"""luks: an encrypted volume, its header at the start of `file` or apart from it in `header`.

Options: BlockdevOptionsLUKS (qapi/block-drivers.json). Formats, keys and key slots: qmpd.luks. Model:
QEMU block/crypto.c; texts as the reference.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qmpd.aio.pool import BufferPool
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.node import BlockNode
from qmpd.block.options import OpenFlags
from qmpd.block.perm import ChildRole, Perm
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.luks.detect import read_header
from qmpd.luks.keys import KeyslotEdit, edit_keyslots
from qmpd.luks.shared import SharedHeader, header_of
from qmpd.luks.volume import Volume
from qmpd.luks.work import transform
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR, MiB

_log = logging.getLogger(__name__)

WRITE_CHUNK = 1 * MiB
"""Bytes that are encrypted before they are handed down together."""

POOL_CAP = 8 * MiB
"""Bytes of idle bounce buffers a node keeps."""


@dataclass(frozen=True, slots=True)
class LuksOptions:
    """BlockdevOptionsLUKS; without `header` the volume is whole in `file`."""

    file: Child
    header: Child | None = None
    key_secret: str | None = None


@driver("luks", schema="BlockdevOptionsLUKS", options=LuksOptions)
class LuksNode(BlockNode):
    """The decrypted payload."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole.IMAGE,
        "header": ChildRole.METADATA,
    }
    strong_options = ("key-secret",)

    async def open(self, options: LuksOptions) -> None:
        """Look the secret up, then read and check the header."""
        self.file = options.file
        self.request_alignment = 512
        self._crypto: BlockCrypto | None = None
        self._passphrase: SecretBytes | None = None
        self._source = options.header or options.file
        self._shared: SharedHeader = header_of(self._source.node)
        passphrase: SecretBytes | None = None
        if OpenFlags.NO_IO not in self.graph.open_flags:
            if options.key_secret is None:
                raise CommandError("Parameter 'key-secret' is required for cipher")
            passphrase = self.graph.objects.passphrase(options.key_secret)
        try:
            self.volume: Volume = await self._shared.read(
                self._source, detached=options.header is not None, image=self._source.node.name
            )
        except BaseException:
            if passphrase is not None:
                passphrase.wipe()
            raise
        self._passphrase = passphrase
        self._shared.users += 1
        self._shared.nodes.add(self)
        self._detached = options.header is not None
        self._key_secret = options.key_secret
        self._amending = False
        if self.volume.problem is not None:
            _log.warning("%s: %s", self._source.node.name, self.volume.problem)
        self.request_alignment = self.volume.spec.sector_size
        self.supports_fua = True  # writes pass it on, and the edge below flushes where it must
        self._buffers = BufferPool(POOL_CAP)

    async def unlock(self) -> None:
        """Derive the volume key, unless nothing will be read; the passphrase is forgotten either way."""
        if self._passphrase is None:
            self._refresh_size()
            return
        try:
            unlocked = await self.volume.unlock(self._source, self._passphrase)
        finally:
            self._passphrase.wipe()
        try:
            self._crypto = BlockCrypto(self.volume.spec, unlocked.key, first=self.volume.first_sector)
        finally:
            unlocked.wipe()
        self._refresh_size()

    def _refresh_size(self) -> None:
        if self.volume.payload_offset > self.file.size:
            raise CommandError("Could not refresh total sector count: Input/output error")
        size = self.file.size - self.volume.payload_offset
        length, sector = self.volume.payload_length, self.volume.spec.sector_size
        if length is not None:
            if length > size:
                raise CommandError(f"The LUKS payload takes {length} bytes, there are {size}")
            size = length
        if sector != SECTOR and size % sector:
            raise CommandError(f"The LUKS payload has {size} bytes, not a multiple of its sector size {sector}")
        self.size = size

    async def close(self) -> None:
        """Wipe the key."""
        if self._passphrase is not None:
            self._passphrase.wipe()
        if self._crypto is not None:
            self._crypto.wipe()
            self._crypto = None
        self._shared.users -= 1
        self._shared.nodes.discard(self)

    # --- key slots ----------------------------------------------------------------------------------

    async def amend(self, options: Mapping[str, Any], *, force: bool) -> None:
        """Add or erase a passphrase (BlockdevAmendOptionsLUKS); reads and writes go on meanwhile.

        Runs on the loop of the monitor. Raises CommandError, OSError.
        """
        if self.volume.version != 1:
            raise CommandError("Key slots can only be changed in LUKS version 1")
        if self._amending:
            raise CommandError("Another job changes the key slots of this volume")
        edit = KeyslotEdit(**{name.replace("-", "_"): value for name, value in options.items()})
        self._amending = True
        try:
            with self.graph.change() as tran:
                tran.touch(self)
            await self.graph.runner.run(self._edit(edit, force=force))
        finally:
            self._amending = False
            with self.graph.change() as tran:
                tran.touch(self)

    async def _edit(self, edit: KeyslotEdit, *, force: bool) -> None:
        async with self._shared.lock:
            try:
                await edit_keyslots(
                    self._source,
                    edit,
                    self.graph.objects.passphrase,
                    self._key_secret,
                    detached=self._detached,
                    force=force,
                )
            finally:
                self._shared.generation += 1
                for node in list(self._shared.nodes):
                    await node.header_changed()

    async def header_changed(self) -> None:
        """Read the header again, after key slots were changed through this node or another one."""
        self.volume = await read_header(self._source, detached=self._detached, image=self._source.node.name)

    # --- I/O --------------------------------------------------------------------------------------

    @property
    def crypto(self) -> BlockCrypto:
        """The cipher of the open volume."""
        assert self._crypto is not None, "the node is not unlocked"
        return self._crypto

    async def preadv(self, batch: Batch) -> None:
        """Read ciphertext into the caller's views and decrypt it there."""
        crypto = self.crypto
        await self.file.preadv(batch.shifted(self.volume.payload_offset))
        spans = crypto.in_place(batch)
        if spans:
            await transform(crypto.decrypt, spans)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Encrypt into bounce buffers, about WRITE_CHUNK at a time, and write those."""
        for group in _chunks(batch):
            buffer = self._buffers.take(group.total)
            try:
                spans = self.crypto.onto(group, buffer.view)
                await transform(self.crypto.encrypt, spans)
                offset = self.volume.payload_offset
                lower = Batch(
                    Request(request.offset + offset, memoryview(target), request)
                    for request, (_, _, target) in zip(group, spans, strict=True)
                )
                await self._write_down(lower, flags)
            finally:
                buffer.release()
        if self.volume.payload_length is None and self.file.size > self.size + self.volume.payload_offset:
            self._refresh_size()

    async def _write_down(self, lower: Batch, flags: WriteFlags) -> None:
        try:
            await self.file.pwritev(lower, flags)
        except OSError as error:
            lower.fail(error.errno or errno.EIO)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard the ciphertext; what is read there afterwards is undefined until rewritten."""
        await self.file.pdiscard(offset + self.volume.payload_offset, length)

    async def flush(self) -> None:
        """Flush the payload; the header is not written to."""
        await self.file.flush()

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Resize the payload."""
        if size > (1 << 63) - 1 - self.volume.payload_offset:
            raise OSError(errno.EFBIG, "The requested file size is too large")
        if self.volume.payload_length is not None:
            raise CommandError("Cannot resize a LUKS volume whose header gives the payload a fixed size")
        if self.volume.spec.sector_size != SECTOR and size % self.volume.spec.sector_size:
            raise CommandError(f"The new size is not a multiple of the sector size {self.volume.spec.sector_size}")
        lower = size + self.volume.payload_offset
        await self.file.node.truncate(lower, exact=exact, preallocation=preallocation)
        self._refresh_size()

    # --- permissions ------------------------------------------------------------------------------

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Treat the payload like a filter's child; a header is only read, and shared with everybody.

        The reference passes write through to the header as well; see docs/differences.md.
        """
        own = Perm.CONSISTENT_READ
        if getattr(self, "_amending", False) and self.children[name] is self._source:
            own |= Perm.WRITE
        if name == "header":
            return own, Perm.ALL
        return perm | own, shared

    # --- descriptions -----------------------------------------------------------------------------

    def image_info(self) -> dict[str, Any]:
        """ImageInfoSpecificLUKS; cluster size and dirty flag are those of the payload's node, the latter never set."""
        below = self.file.node.image_info()
        info: dict[str, Any] = {}
        if "cluster-size" in below:
            info["cluster-size"] = below["cluster-size"]
        info["encrypted"] = True
        if "dirty-flag" in below:
            info["dirty-flag"] = False
        info["format-specific"] = {"type": "luks", "data": self.volume.info()}
        return info


def _chunks(batch: Batch) -> list[Batch]:
    """Cut a batch into parts of at most WRITE_CHUNK bytes; a cut request becomes several."""
    if batch.total <= WRITE_CHUNK:
        return [batch]
    groups: list[Batch] = []
    current, room = Batch(), WRITE_CHUNK
    for request in batch:
        at, length = 0, len(request.view)
        while at < length:
            now = min(room, length - at)
            whole = now == length
            current.append(request if whole else request.part(request.offset + at, at, now))
            at += now
            room -= now
            if not room:
                groups.append(current)
                current, room = Batch(), WRITE_CHUNK
    if current:
        groups.append(current)
    return groups
