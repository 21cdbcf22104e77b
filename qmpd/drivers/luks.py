"""luks: an encrypted volume, its header at the start of `file` or apart from it in `header`.

Options: BlockdevOptionsLUKS (qapi/block-drivers.json). Formats, keys and key slots: qmpd.luks. Model:
QEMU block/crypto.c; texts as the reference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from qmpd.aio.pool import BufferPool
from qmpd.block.backend import check_length
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child
from qmpd.block.direct import DirectRead
from qmpd.block.exclusive import alone
from qmpd.block.node import BlockNode, ReopenStep, no_step
from qmpd.block.options import NodeOptions, OpenFlags
from qmpd.block.perm import ChildRole, Perm
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError
from qmpd.luks import policy
from qmpd.luks.binding import ID_SIZE, Bindings, Markable, below_filters, binding_key, payload_on
from qmpd.luks.detect import read_header
from qmpd.luks.encrypt import Encryption, drop_journal, journal_key
from qmpd.luks.keys import KeyslotEdit, edit_keyslots
from qmpd.luks.luks2 import Luks2Volume
from qmpd.luks.payload import POOL_CAP, write_encrypted
from qmpd.luks.shared import SharedHeader, header_of
from qmpd.luks.shared_key import KeyUse, forget_use, note_payload, note_use, note_writing, sharing
from qmpd.luks.update2 import update_header
from qmpd.luks.volume import Unlocked, Volume
from qmpd.luks.work import transform
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR

_log = logging.getLogger(__name__)

HeaderWork = Callable[[Child], Awaitable[None]]
"""Does something to a header through its edge."""


@dataclass(frozen=True, slots=True)
class LuksOptions:
    """BlockdevOptionsLUKS; without `header` the volume is whole in `file`.

    force   open a payload that the header is not bound to
    """

    file: Child
    header: Child | None = None
    key_secret: str | None = None
    force: bool = False


@driver("luks", schema="BlockdevOptionsLUKS", options=LuksOptions)
class LuksNode(BlockNode):
    """The decrypted payload."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole.IMAGE,
        "header": ChildRole.METADATA,
    }
    strong_options = ("key-secret",)
    reopens = True
    _gains_writer = False

    async def open(self, options: LuksOptions) -> None:
        """Look the secret up, then read and check the header."""
        self.file = options.file
        self.request_alignment = 512
        self._crypto: BlockCrypto | None = None
        self.encryption: Encryption | None = None
        self.binding: str | None = None
        self._bindings: Bindings | None = None
        self._force = options.force
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
            if passphrase is not None and self.volume.journal is not None and self._shared.admitted != self.name:
                raise CommandError("The volume is being encrypted in place: it opens for the job blockdev-encrypt only")
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
            unlocked = await self._try_slots(self._passphrase)
        finally:
            self._passphrase.wipe()
        try:
            self._crypto = BlockCrypto(self.volume.spec, unlocked.key, first=self.volume.first_sector)
            if self.volume.journal is not None and isinstance(self.volume, Luks2Volume):
                key = journal_key(unlocked.key, self.volume.copy.uuid)
                self.encryption = Encryption(self._source, self.file, self._crypto, self.volume.journal, key)
            if self._detached:
                key = binding_key(unlocked.key, self.volume.info()["uuid"])
                self._bindings = Bindings(self._source, key)
            use = KeyUse.of(unlocked.key, self.volume.first_sector, self.file.node)
        finally:
            unlocked.wipe()
        await self._check_binding()
        if self.encryption is not None:
            await self.encryption.load()
        self._refresh_size()
        note_use(self, use)
        for field, value, rule in policy.current().warnings(self.volume.costs()):
            _log.warning("node '%s': the %s is %d, below %s", self.name, field, value, rule)
            self.graph.events.emit("X_LUKS_POLICY", node_name=self.name, field=field, value=value, rule=rule)

    async def _try_slots(self, passphrase: SecretBytes) -> Unlocked:
        """Unlock the volume, again if a key change moved what was being read. Raises CommandError, OSError."""
        while True:
            generation = self._shared.generation
            try:
                return await self.volume.unlock(self._source, passphrase)
            except CommandError:
                async with self._shared.lock:  # a change may be in the middle
                    if self._shared.generation == generation:
                        raise

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

    async def prepare_reopen(self, options: LuksOptions, generic: NodeOptions) -> ReopenStep:
        """Wait for what changes the header or the payload: it relies on the edges that it has."""
        if self.encryption is not None:
            raise CommandError("Cannot reopen a volume that is being encrypted in place")
        if self._amending:
            raise CommandError("Cannot reopen a volume whose key slots are being changed")
        return no_step

    def child_replaced(self, child: Child) -> None:
        """Share the header with those who are on the same node now."""
        if child is self._source:
            self._shared.users -= 1
            self._shared.nodes.discard(self)
            self._shared = header_of(child.node)
            self._shared.users += 1
            self._shared.nodes.add(self)
        if child is self.file:
            note_payload(self, child.node)

    async def close(self) -> None:
        """Wipe the key."""
        if self._passphrase is not None:
            self._passphrase.wipe()
        if self._crypto is not None:
            self._crypto.wipe()
            self._crypto = None
        if self.encryption is not None:
            self.encryption.wipe()
        if self._bindings is not None:
            self._bindings.wipe()
        forget_use(self)
        self._shared.users -= 1
        self._shared.nodes.discard(self)

    # --- key slots ----------------------------------------------------------------------------------

    async def amend(self, options: Mapping[str, Any], *, force: bool) -> None:
        """Add or erase a passphrase (BlockdevAmendOptionsLUKS); reads and writes go on meanwhile.

        Runs on the loop of the monitor. Raises CommandError, OSError.
        """
        edit = KeyslotEdit(**{name.replace("-", "_"): value for name, value in options.items()})

        async def work(header: Child) -> None:
            secrets, detached = self.graph.objects.passphrase, self._detached
            await edit_keyslots(header, edit, secrets, self._key_secret, detached=detached, force=force)

        await self.change_header(work)

    @property
    def header(self) -> Child:
        """The edge to the node that the header lies on."""
        return self._source

    async def change_header(self, work: HeaderWork) -> None:
        """Run `work` on the header, which nobody else writes to meanwhile; all its users read it anew.

        Runs on the loop of the monitor, `work` on that of the data. Raises CommandError, OSError.
        """
        if self.encryption is not None:
            raise CommandError("The header cannot be changed while the volume is being encrypted in place")
        if self._amending:
            raise CommandError("Another job changes the key slots of this volume")
        self._amending = True
        try:
            async with alone(self.graph, self._source.node, [self], flock=self.volume.version == 2):
                await self.graph.runner.run(self._shared.change(partial(work, self._source)))
        finally:
            self._amending = False
            with self.graph.change() as tran:
                tran.touch(self)

    async def header_changed(self) -> None:
        """Read the header again, after it was changed through this node or another one."""
        try:
            self.volume = await read_header(
                self._source,
                detached=self._detached,
                image=self._source.node.name,
                key_length=self.volume.spec.key_length,
            )
        except (CommandError, ImageError, OSError) as error:
            _log.warning("%s: the header cannot be read any more: %s", self._source.node.name, error)

    # --- payload binding --------------------------------------------------------------------------

    async def _check_binding(self) -> None:
        if self._bindings is None:
            return
        try:
            self.binding = await self._bindings.check(self.volume, payload_on(self.file.node))
        except CommandError as error:
            if not self._force:
                raise
            self.binding = "forced"
            _log.warning("node '%s': opened by force: %s", self.name, error)

    async def bind_payload(self, *, mark: bool) -> str:
        """See `BindableNode`."""
        bindings, carrier = self._bindings, below_filters(self.file.node)
        if bindings is None:
            raise CommandError("Only an unlocked volume with a detached header can be bound to its payload")
        if mark:
            if not isinstance(carrier, Markable):
                raise CommandError(f"Driver '{carrier.driver_name}' cannot store an id: bind the payload by its size")
            if not carrier.payload_id:
                await self.graph.runner.run(carrier.set_payload_id(os.urandom(ID_SIZE)))
        payload = payload_on(self.file.node)
        await self.change_header(lambda _: bindings.add(self.volume, payload))
        self.binding = payload.binding
        return payload.binding

    async def unbind_payload(self) -> int:
        """See `BindableNode`."""
        bindings, removed = self._bindings, 0
        if bindings is None:
            raise CommandError("Only an unlocked volume with a detached header can be bound to its payload")

        async def work(_: Child) -> None:
            nonlocal removed
            removed = await bindings.clear(self.volume)

        await self.change_header(work)
        self.binding = None
        return removed

    # --- encryption in place ----------------------------------------------------------------------

    async def finish_encryption(self) -> None:
        """Make a volume that is all ciphertext a plain one; see `EncryptingNode`."""
        encryption = self.encryption
        assert encryption is not None
        async with self._shared.lock:
            await update_header(self._source, drop_journal, self._source.node.name)
            self.encryption = None
            await self.header_changed()
        try:
            await encryption.clear()
        except OSError as error:
            _log.warning("%s: the journal of a finished encryption stays: %s", self._source.node.name, error)
        encryption.wipe()

    # --- I/O --------------------------------------------------------------------------------------

    @property
    def crypto(self) -> BlockCrypto:
        """The cipher of the open volume."""
        assert self._crypto is not None, "the node is not unlocked"
        return self._crypto

    async def preadv(self, batch: Batch) -> None:
        """Read ciphertext into the caller's views and decrypt it there."""
        if self.encryption is not None:
            await self.encryption.serve(batch, self._read, self.file.preadv)
        else:
            await self._read(batch)

    async def _read(self, batch: Batch) -> None:
        crypto = self.crypto
        await self.file.preadv(batch.shifted(self.volume.payload_offset))
        spans = crypto.in_place(batch)
        if spans:
            await transform(crypto.decrypt, spans)

    def direct_read(self) -> DirectRead | None:
        """Decrypt what lies behind the header, unless the volume is half encrypted."""
        return self._direct(self.file.node.direct_read())

    def direct_write(self) -> DirectRead | None:
        """Encrypt it, under the same condition."""
        return self._direct(self.file.node.direct_write())

    def _direct(self, below: DirectRead | None) -> DirectRead | None:
        if below is None or self.encryption is not None or self._crypto is None:
            return None
        return below.decrypted(self._crypto, self.volume.payload_offset)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Encrypt into bounce buffers and write those."""
        if self.encryption is not None:
            await self.encryption.serve(
                batch, partial(self._write, flags=flags), partial(self.file.pwritev, flags=flags)
            )
        else:
            await self._write(batch, flags)

    async def _write(self, batch: Batch, flags: WriteFlags) -> None:
        write = partial(self.file.pwritev, flags=flags)
        await write_encrypted(self.crypto, self._buffers, batch, write, shift=self.volume.payload_offset)
        if self.volume.payload_length is None and self.file.size > self.size + self.volume.payload_offset:
            self._refresh_size()

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard the ciphertext; what is read there afterwards is undefined until rewritten."""
        lower = offset + self.volume.payload_offset
        if self.encryption is not None:
            await self.encryption.quiet(lower, length, partial(self.file.pdiscard, lower, length))
        else:
            await self.file.pdiscard(lower, length)

    async def flush(self) -> None:
        """Flush the payload; the header is not written to."""
        await self.file.flush()

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Resize the payload."""
        if self.encryption is not None:
            raise CommandError("Cannot resize a volume that is being encrypted in place")
        if self.binding in ("size", "id"):
            raise CommandError("Cannot resize a payload that the header is bound to: unbind it first")
        if size > (1 << 63) - 1 - self.volume.payload_offset:
            raise CommandError("The requested file size is too large")
        if self.volume.payload_length is not None:
            raise CommandError("Cannot resize a LUKS volume whose header gives the payload a fixed size")
        if self.volume.spec.sector_size != SECTOR and size % self.volume.spec.sector_size:
            raise CommandError(f"The new size is not a multiple of the sector size {self.volume.spec.sector_size}")
        lower = size + self.volume.payload_offset
        check_length(lower)
        await self.file.node.truncate(lower, exact=exact, preallocation=preallocation)
        self._refresh_size()

    # --- permissions ------------------------------------------------------------------------------

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Treat the payload like a filter's child; a header is only read, and shared with everybody.

        During an encryption in place both are written to, and the payload, half of it plaintext, is for nobody else.
        The reference passes write through to the header as well; see docs/differences.md.
        """
        own = Perm.CONSISTENT_READ
        if getattr(self, "_amending", False) and self.children[name] is self._source:
            own |= Perm.WRITE
        if getattr(self, "encryption", None) is not None:
            lets = Perm.ALL & ~(Perm.WRITE | Perm.RESIZE)
            if name == "header":
                return own | Perm.WRITE, lets
            return perm | own | Perm.WRITE, shared & lets & ~Perm.CONSISTENT_READ
        if name == "header":
            return own, Perm.ALL
        return perm | own, shared

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        """Nothing to veto; see `commit_perm`."""
        if perm & Perm.WRITE and not self.perm & Perm.WRITE:
            self._gains_writer = True

    def abort_perm(self) -> None:
        """Forget what `check_perm` saw."""
        self._gains_writer = False

    def commit_perm(self) -> None:
        """Warn when the volume is about to be written to and its key is in use for another payload."""
        if self._gains_writer:
            self._gains_writer = False
            note_writing(self)

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
        data = self.volume.info()
        if self.binding is not None:
            data["binding"] = self.binding
        if others := sharing(self):
            data["shared-key"] = others
        info["format-specific"] = {"type": "luks", "data": data}
        return info
