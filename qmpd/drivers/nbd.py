"""nbd: an export of an NBD server, here or on another host.

Options: BlockdevOptionsNbd (qapi/block-drivers.json). Model: block/nbd.c of QEMU. A connection that is lost is made
again in the background; requests wait for it for `reconnect-delay` seconds, then they fail with EIO, and so does
everything until it is there again. A server that breaks the protocol is not spoken to again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.node import BlockNode, Extent, ReopenStep, no_step
from qmpd.block.options import NodeOptions
from qmpd.drivers._nbd_link import Link, Place, negotiate
from qmpd.errors import CommandError, QmpdError
from qmpd.protocols import nbd_uri
from qmpd.protocols.nbd import (
    ALLOCATION,
    DEPTH,
    MAX_PAYLOAD,
    MAX_STRING,
    STATE_HOLE,
    STATE_ZERO,
    Command,
    CommandFlag,
    Style,
    TransmissionFlag,
)
from qmpd.protocols.nbd_client import Negotiated, ProtocolError
from qmpd.protocols.nbd_replies import Pending
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR, align_down, align_up

log = logging.getLogger(__name__)

_PLAIN = CommandFlag(0)

MAX_IN_FLIGHT = 64
"""Requests sent and not yet answered; more than a server's queue gains nothing."""

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 16.0
"""Seconds between attempts to connect; each pause is twice the one before."""

MAX_STATUS_EXTENTS = 1 << 16
"""Extents of one status question; what comes after them is called data, which is always safe to say."""

MAX_32BIT_LENGTH = (1 << 31) - 512
"""Bytes of one discard or status question without extended headers."""


@dataclass(frozen=True, slots=True)
class NbdOptions:
    """BlockdevOptionsNbd.

    server   a SocketAddress (wire names)    export   its name, the server's default one without
    reconnect_delay, open_timeout   seconds
    """

    server: dict[str, Any]
    export: str | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    x_dirty_bitmap: str | None = None
    reconnect_delay: int = 0
    open_timeout: int = 0


class _Group:
    """Requests that somebody waits for together."""

    __slots__ = ("_future", "_left")

    def __init__(self, count: int) -> None:
        self._left = count
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def one_done(self) -> None:
        self._left -= 1
        if not self._left and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        await self._future


@driver("nbd", schema="BlockdevOptionsNbd", options=NbdOptions)
class NbdNode(BlockNode):
    """The client of one export."""

    is_protocol = True
    reopens = True
    strong_options = ("export", "tls-creds", "tls-hostname", "server.")
    directory_refusal = "Cannot generate a base directory for NBD nodes"
    filename_protocols: ClassVar[Sequence[str]] = nbd_uri.SCHEMES

    @staticmethod
    def parse_filename(name: str) -> dict[str, Any]:
        """Return the options that a file name of these protocols means. Raises CommandError."""
        try:
            options = nbd_uri.parse(name)
        except nbd_uri.BadName as error:
            raise CommandError(str(error)) from error
        if "server" not in options:
            raise CommandError("NBD server address missing")
        return options

    @staticmethod
    def modern_options(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turn `path`, or `host` and `port`, into a `server`. Raises CommandError."""
        old = {key: str(tree[key]) for key in ("path", "host", "port") if key in tree}
        if "path" in old and "host" in old:
            raise CommandError("path and host may not be used at the same time")
        if "port" in old and "host" not in old and "path" in old:
            raise CommandError("port may not be used without host")
        if old and "server" in tree:
            raise CommandError("Cannot use 'server' and path/host/port at the same time")
        rest = {key: value for key, value in tree.items() if key not in old}
        if "path" in old:
            rest["server"] = {"type": "unix", "path": old["path"]}
        elif "host" in old:
            rest["server"] = {"type": "inet", "host": old["host"], "port": old.get("port", nbd_uri.DEFAULT_PORT)}
        elif "server" not in tree:
            raise CommandError("NBD server address missing")
        return rest

    # --- life cycle -----------------------------------------------------------------------------------

    async def open(self, options: NbdOptions) -> None:
        """Check the options; connecting is left to `unlock`, as it may last."""
        self.options = options
        for name, text in (("export name", options.export), ("x-dirty-bitmap query", options.x_dirty_bitmap)):
            if text is not None and len(text.encode()) > MAX_STRING:
                raise CommandError(f"{name} too long to send to server")
        self._place = self._find_place(options)
        self.agreed = Negotiated(0, TransmissionFlag(0))
        self._link: Link | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._may_wait = False
        """Requests wait for a new connection; else they fail."""
        self._broken = False
        self._patient = bool(options.reconnect_delay)
        self._held: deque[Pending] = deque()
        self._slots = MAX_IN_FLIGHT
        self._slot_waiters: deque[asyncio.Future[None]] = deque()

    def _find_place(self, options: NbdOptions) -> Place:
        export = (options.export or "").encode()
        context = options.x_dirty_bitmap.encode() if options.x_dirty_bitmap else ALLOCATION
        if options.tls_creds is None:
            return Place(options.server, export, context)
        credentials = self.graph.objects.tls_credentials(options.tls_creds)
        if credentials.endpoint != "client":
            raise CommandError("Expecting TLS credentials with a client endpoint")
        hostname = options.tls_hostname
        if hostname is None and options.server["type"] == "inet":
            hostname = options.server["host"]

        def context_for_tls() -> ssl.SSLContext:
            return credentials.context(check_hostname=hostname is not None)

        return Place(options.server, export, context, context_for_tls, hostname)

    async def unlock(self) -> None:
        """Connect, again and again until open-timeout is over, and take what the export is like."""
        if not self.options.open_timeout:
            await self._connect(first=True)
            return
        refusal = CommandError("Connection attempt cancelled by timeout")
        pause = FIRST_PAUSE
        try:
            async with asyncio.timeout(self.options.open_timeout):
                while True:
                    try:
                        await self._connect(first=True)
                        return
                    except CommandError as error:
                        refusal = error
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except TimeoutError as error:
            raise refusal from error

    async def _connect(self, *, first: bool) -> None:
        """Make a connection and use it. Raises CommandError."""
        sock, agreed = await negotiate(self._place)
        link = Link(sock, agreed, self._lost)
        try:
            if first:
                self._adopt(agreed)
            else:
                self._compare(agreed)
        except BaseException:
            link.close()
            raise
        self.agreed, self._link = agreed, link

    def _adopt(self, agreed: Negotiated) -> None:
        """Take size, limits and abilities over. Raises CommandError for an export that will not do."""
        if self.options.x_dirty_bitmap and agreed.context is None:
            raise _Unfit("Could not open image: Invalid argument")
        if agreed.flags & TransmissionFlag.READ_ONLY and not self.read_only:
            if not self.node_options.auto_read_only:
                raise _Unfit("Could not open image: Permission denied")
            self.read_only = True
        self.size = align_up(agreed.size, SECTOR)
        self.request_alignment = agreed.minimum_block or (1 if agreed.size % SECTOR else SECTOR)
        self.zero_alignment = max(self.request_alignment, min(agreed.preferred_block, MAX_PAYLOAD))
        self.supports_fua = bool(agreed.flags & TransmissionFlag.SEND_FUA)

    def _compare(self, agreed: Negotiated) -> None:
        """Refuse a server that came back with something else."""
        if agreed.size != self.agreed.size:
            raise CommandError(f"the export has {agreed.size} bytes now, it had {self.agreed.size}")
        if agreed.flags & TransmissionFlag.READ_ONLY and not self.read_only:
            raise CommandError("the export is read-only now")
        if agreed.minimum_block > self.request_alignment:
            raise CommandError(f"minimum block size is {agreed.minimum_block} now, it was {self.request_alignment}")
        self.supports_fua = bool(agreed.flags & TransmissionFlag.SEND_FUA)

    async def prepare_reopen(self, options: NbdOptions, generic: NodeOptions) -> ReopenStep:
        """Refuse to write to what the server does not let anybody write to."""
        if self.agreed.flags & TransmissionFlag.READ_ONLY and not generic.read_only:
            raise CommandError("Can't reopen read-only NBD mount as read/write")
        return no_step

    async def close(self) -> None:
        """Take leave of the server."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._may_wait, self._broken = False, True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)
        self._give_up()
        if self._link is not None:
            self._link.close()
            self._link = None

    def stop_waiting(self) -> None:
        """Fail what waits for a connection, now and later."""
        self._patient = self._may_wait = False
        self._give_up()

    # --- losing and finding the server ----------------------------------------------------------------

    def _lost(self, error: Exception) -> None:
        """(Link) The connection is gone: hold or fail what was under way, and begin to look for a new one."""
        link, self._link = self._link, None
        assert link is not None
        under_way = list(link.transmission.pending.values())
        log.warning("node '%s': connection to the NBD server lost: %s", self.name, error)
        self._broken = isinstance(error, ProtocolError)
        self._may_wait = self._patient and not self._broken
        for pending in under_way:
            pending.reset()
        self._held.extendleft(reversed(under_way))
        if not self._may_wait:
            self._give_up()
        elif self._held:
            self._start_deadline()
        if not self._broken:
            self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    def _start_deadline(self) -> None:
        if self._deadline is None:
            delay = self.options.reconnect_delay
            self._deadline = asyncio.get_running_loop().call_later(delay, self._delay_over)

    def _delay_over(self) -> None:
        self._deadline = None
        self._may_wait = False
        self._give_up()

    def _give_up(self) -> None:
        """Fail everything that waits for a connection."""
        held, self._held = self._held, deque()
        for pending in held:
            pending.error = errno.EIO
            pending.done(pending)

    async def _reconnect(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                await self._connect(first=False)
                break
            except QmpdError as error:
                log.debug("node '%s': no NBD server: %s", self.name, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        log.info("node '%s': connected to the NBD server again", self.name)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._reconnecting = None
        held, self._held = self._held, deque()
        assert self._link is not None
        for pending in held:
            self._link.submit(pending)
        self._link.push()

    # --- requests -------------------------------------------------------------------------------------

    async def _take_slot(self) -> None:
        while not self._slots:
            future = asyncio.get_running_loop().create_future()
            self._slot_waiters.append(future)
            if self._link is not None:
                self._link.push()
            await future
        self._slots -= 1

    def _free_slot(self) -> None:
        self._slots += 1
        while self._slot_waiters:
            waiter = self._slot_waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _start(self, pending: Pending) -> None:
        """Send, hold or fail one request; `push` is the caller's."""
        if self._link is not None:
            self._link.submit(pending)
        elif self._may_wait:
            self._held.append(pending)
            self._start_deadline()
        else:
            pending.error = errno.EIO
            pending.done(pending)

    async def _run(self, parts: Sequence[tuple[Request, int, int]], command: Command, flags: CommandFlag) -> None:
        """Do the transfer of every (request, start in it, length); errors are marked in the requests."""
        group = _Group(len(parts))
        for request, start, length in parts:
            await self._take_slot()

            def done(pending: Pending, request: Request = request) -> None:
                self._free_slot()
                if pending.error:
                    request.fail(pending.error)
                group.one_done()

            view = request.view[start : start + length]
            pending = Pending(command, request.offset + start, length, view, done)
            pending.flags = flags
            self._start(pending)
        if self._link is not None:
            self._link.push()
        await group.wait()

    async def _one(self, command: Command, offset: int, length: int, flags: CommandFlag = _PLAIN) -> Pending:
        """Do one request without data, and return it answered."""
        await self._take_slot()
        group = _Group(1)

        def done(_: Pending) -> None:
            self._free_slot()
            group.one_done()

        pending = Pending(command, offset, length, None, done)
        pending.flags = flags
        self._start(pending)
        if self._link is not None:
            self._link.push()
        await group.wait()
        return pending

    def _parts(self, batch: Batch, *, writing: bool) -> list[tuple[Request, int, int]]:
        """Cut requests to what one message may carry, and to the end of the export.

        Sizes of nodes are whole sectors, those of exports need not be: what lies between is zero.
        """
        largest = self._largest()
        parts: list[tuple[Request, int, int]] = []
        for request in batch:
            length = len(request.view)
            inside = min(length, max(0, self.agreed.size - request.offset))
            if inside < length:
                if writing:
                    request.fail(errno.ENOSPC)
                    continue
                request.view[inside:] = bytes(length - inside)
            parts += [(request, start, min(largest, inside - start)) for start in range(0, inside, largest)]
        return parts

    def _largest(self) -> int:
        """Bytes of data in one message at most."""
        largest = min(MAX_PAYLOAD, self.agreed.maximum_payload)
        return max(align_down(largest, self.request_alignment), self.request_alignment)

    async def preadv(self, batch: Batch) -> None:
        """Read; many requests are under way at once."""
        parts = self._parts(batch, writing=False)
        if parts:
            await self._run(parts, Command.READ, _PLAIN)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write; many requests are under way at once."""
        parts = self._parts(batch, writing=True)
        if parts:
            fua = flags & WriteFlags.FUA and self.agreed.flags & TransmissionFlag.SEND_FUA
            await self._run(parts, Command.WRITE, CommandFlag.FUA if fua else _PLAIN)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Have the server write zeroes."""
        can = self.agreed.flags
        if not can & TransmissionFlag.SEND_WRITE_ZEROES:
            raise OSError(errno.ENOTSUP, "the server has no zero writes")
        wire = _PLAIN
        if not flags & WriteFlags.MAY_UNMAP:
            wire |= CommandFlag.NO_HOLE
        if flags & WriteFlags.NO_FALLBACK:
            if not can & TransmissionFlag.SEND_FAST_ZERO:
                raise OSError(errno.ENOTSUP, "the server has no fast zero writes")
            wire |= CommandFlag.FAST_ZERO
        if flags & WriteFlags.FUA and can & TransmissionFlag.SEND_FUA:
            wire |= CommandFlag.FUA
        if offset + length > self.agreed.size:
            length = max(0, self.agreed.size - offset)
        await self._in_pieces(Command.WRITE_ZEROES, offset, length, self._largest(), wire)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Trim, if the server can."""
        can = self.agreed.flags
        if can & TransmissionFlag.READ_ONLY or not can & TransmissionFlag.SEND_TRIM:
            return
        length = min(length, max(0, self.agreed.size - offset))
        await self._in_pieces(Command.TRIM, offset, length, MAX_32BIT_LENGTH, _PLAIN)

    async def _in_pieces(self, command: Command, offset: int, length: int, largest: int, flags: CommandFlag) -> None:
        if self.agreed.style is Style.EXTENDED:
            largest = max(length, 1)
        else:
            largest = max(align_down(largest, self.request_alignment), self.request_alignment)
        end = offset + length
        while offset < end:
            pending = await self._one(command, offset, min(largest, end - offset), flags)
            if pending.error:
                raise OSError(pending.error, f"{command.name} failed")
            offset += pending.length

    async def flush(self) -> None:
        """Have the server make everything durable; one that cannot has nothing to flush."""
        if self.agreed.flags & TransmissionFlag.SEND_FLUSH:
            pending = await self._one(Command.FLUSH, 0, 0)
            if pending.error:
                raise OSError(pending.error, "flush failed")

    # --- block status ---------------------------------------------------------------------------------

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Ask the server what it stores; without base:allocation everything is data."""
        end = offset + length
        inside = min(end, self.agreed.size)
        found: list[Extent] = []
        if offset < inside:
            found = await self._status(offset, inside)
        if end > max(offset, inside):
            found.append(Extent(max(offset, inside), end - max(offset, inside), data=False, zero=True))
        return found

    async def _status(self, at: int, end: int) -> list[Extent]:
        if self.agreed.context is None:
            return [self._extent(at, end - at, 0)]
        # Questions begin and end at whole blocks; what is answered for the bytes around is left out.
        start, stop = align_down(at, self.request_alignment), align_up(end, self.request_alignment)
        stop = min(stop, self.agreed.size)
        largest = MAX_32BIT_LENGTH if self.agreed.style is not Style.EXTENDED else stop - start
        extents: list[Extent] = []
        while start < stop and len(extents) < MAX_STATUS_EXTENTS:
            ask = min(stop - start, align_down(largest, self.request_alignment) or largest)
            pending = await self._one(Command.BLOCK_STATUS, start, ask)
            if pending.error:
                raise OSError(pending.error, "block status failed")
            start = self._merge(extents, start, at, end, pending.extents)
        if start < end:
            self._append(extents, max(start, at), end, 0)
        return extents

    def _merge(self, extents: list[Extent], start: int, low: int, high: int, answer: list[tuple[int, int]]) -> int:
        """Add an answer that begins at `start`, cut to [low, high); return where it ends."""
        depth = self.options.x_dirty_bitmap == DEPTH.decode()
        for length, flags in answer:
            stop = start + length
            if max(start, low) < min(stop, high):
                self._append(extents, max(start, low), min(stop, high), min(flags, 2) if depth else flags)
            start = stop
            if start >= high:
                break
        return start

    def _append(self, extents: list[Extent], start: int, stop: int, flags: int) -> None:
        new = self._extent(start, stop - start, flags)
        if extents:
            last = extents[-1]
            if (last.data, last.zero) == (new.data, new.zero):
                extents[-1] = self._extent(last.offset, stop - last.offset, flags)
                return
        extents.append(new)

    def _extent(self, offset: int, length: int, flags: int) -> Extent:
        data, zero = not flags & STATE_HOLE, bool(flags & STATE_ZERO)
        if self.options.x_dirty_bitmap and not data and not zero:
            # Shown as QEMU shows it. Of base:allocation this means only that the content is anybody's guess.
            return Extent(offset, length, data=False, zero=False, allocated=False)
        return Extent(offset, length, data=data, zero=zero, host=offset, file=self)

    # --- the rest -------------------------------------------------------------------------------------

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """An export has the size it has."""
        if exact and size != self.agreed.size:
            raise CommandError("Cannot resize NBD nodes")
        if size > self.agreed.size:
            raise CommandError("Cannot grow NBD nodes")

    def exact_filename(self) -> str:
        """The URI, as far as there is one for the address."""
        return nbd_uri.uri(self.options.server, self.options.export)

    def allocated_size(self) -> int | None:
        """The server knows, but there is no way to ask."""
        return None


class _Unfit(CommandError):
    """The export is there, but not for this use: trying again does not help."""
