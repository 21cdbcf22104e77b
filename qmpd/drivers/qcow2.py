"""qcow2: the image format with allocation on demand, backing files and snapshots, version 2 and 3.

Options: BlockdevOptionsQcow2 (qapi/block-drivers.json). The parts: `_qcow2_open` checks and
opens, `_qcow2_image` holds the metadata and its order on disk, `_qcow2_map`, `_read`, `_write`
and `_zero` serve the guest, `_check` repairs, `_create` makes images; what most images never need is
imported when it is. Messages: as the reference.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child
from qmpd.block.direct import DirectRead
from qmpd.block.node import BlockNode, Extent, ReopenStep
from qmpd.block.options import NodeOptions, OpenFlags
from qmpd.block.perm import ChildRole
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers._qcow2_holes import looks_preallocated, with_holes
from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_map import Run, map_range, plain_run, plain_target
from qmpd.drivers._qcow2_open import clear_autoclear, open_image, read_bitmaps
from qmpd.drivers._qcow2_options import CHANGEABLE, Qcow2Options
from qmpd.drivers._qcow2_read import read_batch
from qmpd.drivers._qcow2_write import write_batch
from qmpd.drivers._qcow2_zero import discard_range, zero_range
from qmpd.errors import CommandError
from qmpd.formats.qcow2 import ClusterType
from qmpd.formats.qcow2_header import (
    COMPRESSION_TYPES,
    CORRUPT,
    CRYPT_AES,
    DATA_FILE,
    DATA_FILE_RAW,
    DIRTY,
    LAZY_REFCOUNTS,
)
from qmpd.formats.qcow2_snapshot import BITMAP_IN_USE
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR

if TYPE_CHECKING:
    from qmpd.block.filling import Filling
    from qmpd.drivers._qcow2_check import CheckResult

log = logging.getLogger(__name__)


@driver("qcow2", schema="BlockdevOptionsQcow2", options=Qcow2Options)
class Qcow2Node(BlockNode):
    """A qcow2 image."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole.IMAGE}
    late_roles: ClassVar[Mapping[str, ChildRole]] = {"data-file": ChildRole.DATA}
    supports_backing = True
    can_compress = True
    opens_writing = True
    supports_snapshots = True
    strong_options = ("encrypt.key-secret",)
    reopens = True
    reopen_takes = ("encrypt.", *CHANGEABLE)
    reopen_resets = CHANGEABLE

    image: Image
    _passphrase: SecretBytes | None = None
    _ready = False
    _preallocated: bool | None = None

    async def open(self, options: Qcow2Options) -> None:
        """Check and open the image; repair it if it was not closed and is to be written."""
        self.file = options.file
        unmap = self.node_options.discard == "unmap"
        check = OpenFlags.CHECK in self.graph.open_flags
        no_io = OpenFlags.NO_IO in self.graph.open_flags
        image = await open_image(
            options,
            writable=self.writable,
            unmap=unmap,
            report=self.report,
            check=check,
            no_io=no_io,
            data_given="data-file" in self.given,
        )
        self.image = image
        if image.external:
            self.file.role = ChildRole.METADATA | ChildRole.PRIMARY
        self._take_secret(options)
        header = image.header
        image.bitmaps = await read_bitmaps(image)
        if not self.locked:
            await self._begin_writing()
        self.size = header.size // SECTOR * SECTOR
        self.zero_alignment = 1 << image.sub_bits
        self.backing_file = header.backing_file.decode("utf-8", "surrogateescape") or None
        self.backing_format = header.backing_format.decode("utf-8", "surrogateescape") or None
        if image.bitmaps and not check and OpenFlags.NO_IO not in self.graph.open_flags:
            from qmpd.drivers._qcow2_bitmaps import load_bitmaps

            await load_bitmaps(image, self)

    def late_filename(self, name: str) -> str | None:
        """Return the external data file that the image names: a file of this host, whatever the name looks like."""
        named = self.image.header.data_file if self.image.external else None
        return None if named is None else named.decode("utf-8", "surrogateescape")

    def late_children_attached(self) -> None:
        """Take note of the external data file. Raises CommandError if there is none, or one for nothing."""
        image, child = self.image, self.children.get("data-file")
        if image.external:
            if child is None:
                raise CommandError("'data-file' is required for this image")
            image.data = child
        elif child is not None:
            raise CommandError("'data-file' can only be set for images with an external data file")

    def _take_secret(self, options: Qcow2Options) -> None:
        """Look up what opens an encrypted image, unless nothing will be read. Raises CommandError."""
        encryption = self.image.encryption
        self.locked = encryption is not None or (self.image.external and OpenFlags.NO_IO not in self.graph.open_flags)
        if encryption is None:
            return
        if encryption.method == CRYPT_AES:
            from qmpd.drivers._qcow2_crypto import refuse_aes

            refuse_aes(self.graph.open_flags)
        encryption.key_secret = (options.encrypt or {}).get("key-secret")
        self.request_alignment = SECTOR
        if encryption.key_secret is not None:
            self.given = {**self.given, "encrypt.key-secret": encryption.key_secret}
        if OpenFlags.NO_IO not in self.graph.open_flags:
            self._passphrase = encryption.passphrase(self.graph.objects)

    async def unlock(self) -> None:
        """Derive the key of an encrypted image; before that, nothing of it is changed."""
        encryption, passphrase = self.image.encryption, self._passphrase
        try:
            if encryption is not None and passphrase is not None:
                await encryption.unlock(passphrase)
        finally:
            if passphrase is not None:
                passphrase.wipe()
        await self._begin_writing()

    async def _begin_writing(self) -> None:
        """Do what comes before the first write, if there may be any."""
        image = self.image
        if self.writable:
            image.bitmaps_fresh = any(not bitmap.flags & BITMAP_IN_USE for bitmap in image.bitmaps)
            await clear_autoclear(image)
            if image.header.incompatible & DIRTY and OpenFlags.CHECK not in self.graph.open_flags:
                await self._repair()
        self._ready = True

    async def _repair(self) -> None:
        """Repair an image whose refcounts were not written back, and mark it clean."""
        from qmpd.drivers._qcow2_check import check_image

        try:
            result = await check_image(self.image, fix_leaks=True, fix_errors=True)
        except OSError as error:
            raise CommandError("Could not repair dirty image") from error
        if result.check_errors:
            raise CommandError("Could not repair dirty image")

    def report(self, message: str, offset: int | None, size: int | None, fatal: bool) -> None:
        """Tell the world of a corruption; see `_qcow2_image.Report`."""
        self.graph.events.emit(
            "BLOCK_IMAGE_CORRUPTED",
            device="",
            node_name=self.name,
            msg=message,
            offset=offset,
            size=size,
            fatal=fatal,
        )

    @property
    def writes(self) -> bool:
        """True once the image was made ready for being written to."""
        return self._ready and self.image.writable

    async def prepare_reopen(self, options: Qcow2Options, generic: NodeOptions) -> ReopenStep:
        """Check the other options, write what is in memory, and read the tables anew."""
        from qmpd.drivers._qcow2_reopen import prepare

        return await prepare(self, options, generic)

    async def reopened(self) -> None:
        """Do what comes before the first write, if there may be any from now on."""
        self._ready, self._preallocated = False, None
        await self._begin_writing()
        if self.image.writable:
            await self.image.outdate_bitmaps()

    async def close(self) -> None:
        """Write what is in memory and mark the image clean, unless it was not opened that far."""
        self.image.writable &= self._ready
        try:
            if self.dirty_bitmaps:
                from qmpd.drivers._qcow2_bitmaps import store_bitmaps

                await store_bitmaps(self.image, self)
        except (OSError, CommandError) as error:
            log.error("Lost persistent bitmaps during inactivation of node '%s': %s", self.name, error)
        try:
            await self.image.close()
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            log.error("qcow2 node '%s': writing metadata at close failed: %s", self.name, reason)
        if self._passphrase is not None:
            self._passphrase.wipe()
        if self.image.encryption is not None:
            self.image.encryption.wipe()

    @property
    def supports_compressed(self) -> bool:
        """True unless the image is encrypted, as what is compressed would be stored in plain text, or its data
        is in a file of its own, where each cluster has its place."""
        return self.image.encryption is None and not self.image.external

    # --- I/O --------------------------------------------------------------------------------------

    def _backing(self) -> Child | None:
        return self.children.get("backing")

    async def preadv(self, batch: Batch) -> None:
        """Read from clusters, the backing file, or nothing at all."""
        await read_batch(self.image, batch, self._backing())

    def direct_read(self) -> DirectRead | None:
        """Look clusters up in the tables that are in memory."""
        below = self.children.get("data-file", self.file).node.direct_read()
        if below is None or self.image.encryption is not None:
            return None
        return below.mapped(partial(plain_run, self.image))

    def direct_write(self) -> DirectRead | None:
        """The same, where clusters are there already and nobody else's."""
        below = self.children.get("data-file", self.file).node.direct_write()
        if below is None or self.image.encryption is not None:
            return None
        return below.mapped(partial(plain_target, self.image))

    async def begin_filling(self, ranges: Sequence[tuple[int, int]]) -> Filling | None:
        """Take new clusters for the ranges, if they have none."""
        from qmpd.drivers._qcow2_fill import begin  # only copies of whole disks need it

        return await begin(self, self.image, ranges)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write into clusters, allocating those that are missing or shared."""
        if flags and flags & WriteFlags.COMPRESSED:
            from qmpd.drivers._qcow2_compressed import write_compressed

            await write_compressed(self.image, batch, self._backing(), self.size)
        else:
            await write_batch(self.image, batch, self._backing(), self.size)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Mark whole clusters as zero; write zeroes to parts of clusters."""
        await zero_range(self.image, offset, length, flags, self._backing(), self.size)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Forget whole clusters."""
        await discard_range(self.image, offset, length, self._backing(), self.size)

    async def flush(self) -> None:
        """Make data and metadata durable."""
        if self.image.dead:
            raise OSError(errno.ENOMEDIUM, "the image is corrupt")
        if self.image.writable:
            await self.image.flush()
        else:
            await super().flush()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Return what this layer holds; where it holds nothing, whether the backing file could.

        In an image that was preallocated without its data, clusters that are holes in the file are zero.
        """
        generation = self.image.enter()
        try:
            if self._preallocated is None:
                self._preallocated = self.image.encryption is None and await looks_preallocated(self.image)
            runs = await map_range(self.image, offset, length)
            extents: list[Extent] = []
            for run in runs:
                if run.kind is ClusterType.NORMAL and self._preallocated:
                    extents += await with_holes(self.image, run.offset, run.length, run.host)
                else:
                    extents += self._extents(run)
        except Corruption as found:
            raise OSError(await self.image.fail(found), found.text) from found
        finally:
            self.image.leave(generation)
        return _joined(extents)

    def _extents(self, run: Run) -> list[Extent]:
        """Return what the tables say of one run: two extents where the backing file ends in it."""
        kind, at, size, place = run
        below = self.image.data.node
        host = place if place >= 0 and self.image.encryption is None else None
        if kind is ClusterType.NORMAL:
            return [Extent(at, size, data=True, zero=False, host=host, file=below)]
        if kind is ClusterType.COMPRESSED:
            return [Extent(at, size, data=True, zero=False, compressed=True)]
        if kind is ClusterType.ZERO_ALLOC:
            return [Extent(at, size, data=False, zero=True, host=host, file=below)]
        if kind is ClusterType.ZERO_PLAIN:
            return [Extent(at, size, data=False, zero=True)]
        backing = self._backing()
        inside = 0 if backing is None else max(min(size, backing.size - at), 0)
        found: list[Extent] = []
        if inside:
            found.append(Extent(at, inside, data=False, zero=False, allocated=False))
        if inside < size:
            spot = None if host is None else host + inside
            place_in = below if host is not None else None
            found.append(
                Extent(at + inside, size - inside, data=False, zero=True, allocated=False, host=spot, file=place_in)
            )
        return found

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Grow or shrink the guest disk; what is new reads as zeroes."""
        from qmpd.drivers._qcow2_bitmaps import check_resizable
        from qmpd.drivers._qcow2_resize import resize

        check_resizable(self.image, self)
        self.size = await resize(self.image, size, self.size, self._backing(), preallocation, exact=exact)

    async def change_backing_file(self, name: str, image_format: str) -> None:
        """Name another backing file in the image, none if `name` is empty. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_backing import change_backing

        await change_backing(self.image, name.encode("utf-8", "surrogateescape"), image_format.encode())
        self.backing_file, self.backing_format = name or None, (name and image_format) or None
        self.auto_backing = name

    async def set_lazy_refcounts(self, lazy: bool) -> None:
        """Let refcounts be brought up to date late, or not. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_backing import set_lazy

        await set_lazy(self.image, lazy)

    async def snapshot_create(self, name: str, *, vm_clock: int = 0, icount: int | None = 0) -> None:
        """Make an internal snapshot; nothing uses the node meanwhile. Raises OSError."""
        from qmpd.drivers._qcow2_snapshots import create_snapshot

        await create_snapshot(self.image, name, vm_clock=vm_clock, icount=icount)

    async def snapshot_apply(self, tag: str) -> None:
        """Make the disk show again what it did in a snapshot. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_snapshots import apply_named

        self.size = await apply_named(self.image, self, tag)

    async def snapshot_show(self, identifier: str, name: str) -> None:
        """Show a snapshot from now on; the node is read-only. Raises OSError."""
        from qmpd.drivers._qcow2_snapshots import show_snapshot

        await show_snapshot(self.image, identifier, name)

    async def snapshot_delete(self, name: str, identifier: str | None = None) -> None:
        """Forget an internal snapshot. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_snapshots import delete_named

        await delete_named(self.image, name, identifier)

    @property
    def keeps_bitmaps(self) -> bool:
        """Version 2 has no place for bitmaps."""
        return self.image.header.version >= 3

    def check_storing_bitmap(self, name: str, granularity: int) -> None:
        """Refuse a bitmap for which the image has no place."""
        from qmpd.drivers._qcow2_bitmaps import check_storing

        check_storing(self.image, self, name, granularity)

    async def remove_stored_bitmap(self, name: str) -> None:
        """Take a persistent bitmap out of the image."""
        from qmpd.drivers._qcow2_bitmaps import remove_bitmap

        await remove_bitmap(self.image, name)

    @property
    def payload_id(self) -> bytes:
        """The id by which a LUKS header knows the image, b"" if it has none."""
        from qmpd.drivers._qcow2_mark import identity

        return identity(self.image)

    async def set_payload_id(self, identity: bytes) -> None:
        """Give the image an id, which QEMU keeps. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_mark import mark

        if self.read_only:
            raise CommandError("Block node is read-only")
        await mark(self.image, identity)

    async def set_version(self, version: int) -> None:
        """Make the image one of version 2 or 3; no request uses the node. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_amend import downgrade, upgrade

        if version == 2:
            await downgrade(self.image, self._backing(), self.size)
            self.dirty_bitmaps[:] = [one for one in self.dirty_bitmaps if not one.persistent]
        else:
            await upgrade(self.image)

    async def set_refcount_bits(self, bits: int) -> None:
        """Change the width of the refcounts; no request uses the node. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_amend import change_refcount_bits

        await change_refcount_bits(self.image, bits)

    async def forget_raw_data_file(self) -> None:
        """Give up that the data file is valid as a raw image. Raises OSError."""
        from qmpd.drivers._qcow2_amend import forget_raw

        await forget_raw(self.image)

    async def set_data_file_name(self, name: str) -> None:
        """Name another external data file in the image, none if `name` is empty. Raises CommandError, OSError."""
        from qmpd.drivers._qcow2_backing import name_data_file

        await name_data_file(self.image, name.encode("utf-8", "surrogateescape"))

    async def make_empty(self) -> None:
        """Give up everything that this layer holds."""
        from qmpd.drivers._qcow2_backing import make_empty

        await make_empty(self.image, self.size)

    async def amend(self, options: Mapping[str, Any], *, force: bool) -> None:
        """Change the key slots (BlockdevAmendOptionsQcow2); reads and writes go on meanwhile."""
        from qmpd.drivers._qcow2_crypto import amend_encryption

        await self.graph.runner.run(
            amend_encryption(self.image, options.get("encrypt"), self.graph.objects.passphrase, force=force)
        )

    async def check(self, *, fix_leaks: bool, fix_errors: bool) -> CheckResult:
        """Compare refcounts and flags with what refers to each cluster, and mend them."""
        from qmpd.drivers._qcow2_check import check_image

        return await check_image(self.image, fix_leaks=fix_leaks, fix_errors=fix_errors)

    # --- descriptions -----------------------------------------------------------------------------

    def image_info(self) -> dict[str, Any]:
        """ImageInfoSpecificQCow2 and what else the image says of itself."""
        header = self.image.header
        data: dict[str, Any] = {
            "compat": "0.10" if header.version == 2 else "1.1",
            "compression-type": COMPRESSION_TYPES[header.compression_type],
            "refcount-bits": 1 << header.refcount_order,
        }
        if header.version >= 3:
            data["lazy-refcounts"] = bool(header.compatible & LAZY_REFCOUNTS)
            data["corrupt"] = bool(header.incompatible & CORRUPT)
            data["extended-l2"] = header.extended
            if header.incompatible & DATA_FILE:
                if header.data_file is not None:
                    data["data-file"] = header.data_file.decode("utf-8", "surrogateescape")
                data["data-file-raw"] = bool(header.autoclear & DATA_FILE_RAW)
            if self.image.bitmaps:
                data["bitmaps"] = [bitmap.to_qapi() for bitmap in self.image.bitmaps]
        encryption = self.image.encryption
        if encryption is not None:
            data["encrypt"] = encryption.info()
        info: dict[str, Any] = {
            "cluster-size": header.cluster_size,
            "dirty-flag": bool(header.incompatible & DIRTY),
            "format-specific": {"type": "qcow2", "data": data},
        }
        if encryption is not None:
            info["encrypted"] = True
        if self.image.snapshots:
            info["snapshots"] = [snapshot.to_qapi() for snapshot in self.image.snapshots]
        return info


def _joined(extents: list[Extent]) -> list[Extent]:
    """Join neighbours that a caller cannot tell apart."""
    joined: list[Extent] = []
    for one in extents:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.data, last.zero, last.allocated, last.compressed)
            == (one.data, one.zero, one.allocated, one.compressed)
            and (
                (last.host is None and one.host is None)
                or (last.host is not None and one.host == last.host + last.length)
            )
        ):
            joined[-1] = Extent(
                last.offset,
                last.length + one.length,
                data=last.data,
                zero=last.zero,
                allocated=last.allocated,
                host=last.host,
                file=last.file,
                compressed=last.compressed,
            )
        else:
            joined.append(one)
    return joined
