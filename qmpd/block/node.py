"""The contract of a block driver: `BlockNode`.

A node belongs to one event loop, the data loop of its graph; `open`, `unlock`, `close` and all
I/O run there. What is synchronous here (`child_perm`, `check_perm`, the descriptions) runs on the
loop of the monitor, while no I/O of the node is changing what it reads.
Model: BlockDriver (QEMU include/block/block_int-common.h).
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from qmpd.block import perm as perms
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.perm import ChildRole, Perm
from qmpd.block.ranges import RangeTable
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.change import Transaction
    from qmpd.block.child import Child
    from qmpd.block.direct import DirectRead
    from qmpd.block.dirty_bitmap import DirtyBitmap
    from qmpd.block.filling import Filling
    from qmpd.block.graph import Graph
    from qmpd.block.options import NodeOptions

MAX_REQUEST = 2**31 - 512
"""Bytes in one request at most (BDRV_REQUEST_MAX_BYTES); backends refuse longer ones."""


class Extent(NamedTuple):
    """A stretch of a node with one kind of content.

    offset, length   bytes of this node
    data             the stretch is stored (here or below), not a hole
    zero             it reads as zeroes
    allocated        this layer provides it; False: it comes from the backing chain
    host             where it starts in `file`, None if it has no plain place there
    file             the node that `host` counts in, None with host None
    """

    offset: int
    length: int
    data: bool
    zero: bool
    allocated: bool = True
    host: int | None = None
    file: BlockNode | None = None
    compressed: bool = False


ReopenStep = Callable[["Transaction"], None]
"""A part of a change of the graph that gives a node other options."""


def no_step(tran: Transaction) -> None:
    """Change nothing."""


class Discard(enum.Enum):
    """What a node does with discard requests that reach it."""

    IGNORE = "ignore"
    UNMAP = "unmap"


class BlockNode:
    """A node of the graph; a driver is a subclass with `@registry.driver(...)`.

    Class attributes a driver sets
    child_roles      its children that are opened before `open`, in that order, with their roles
    late_roles       children that are opened between `open` and `unlock`: those that the options name, and those
                     that the image does (`late_filename`)
    supports_backing True if it has a `backing` child (opened by the graph after `open`)
    is_filter        True if it shows its `file` child's data unchanged
    is_protocol      True if it has no child and talks to something outside (file, nbd)
    strong_options   option names (wire) that change what is seen, in the reference's order; with
                     one of them given, the node's file name becomes a json: one; a name with a dot
                     at its end stands for a list or a dictionary, whose members get dotted names
    has_protocol_name True if a file name may begin with the driver's name, as blkdebug:CONFIG:FILE
    filename_protocols  what precedes the colon of file names that `parse_filename` understands
    directory_refusal   why names cannot be relative to this node's, "" if they can
    opens_alone      True if `open` neither waits, nor does I/O, nor touches what belongs to the data loop: it then
                     runs where it is asked for, which saves two changes of thread (`close` does without being told:
                     a driver that has none is not sent there)
    opens_writing    True if opening a writable node needs a writable file at once (qcow2)
    supports_snapshots  True if it keeps internal snapshots
    can_compress     True if the driver stores compressed clusters, or passes them on (COMPRESSED)
    reopens          True if the node can get other options while it is open
    reopen_takes     its own options that may then have another value; a dot at the end stands for what is below
    reopen_resets    those of them that may be left out, to have their default again

    Set by the graph before `open`: name, graph, node_options, given, explicit, read_only, children
    Set by a driver with backing in `open`: backing_file, backing_format, as the image names them
    Set by the driver in `open`: size; and where they differ from the default, request_alignment,
    zero_alignment (best alignment of zero and discard requests), supports_fua, locked (False if
    there is nothing for `unlock` to do)
    """

    driver_name: ClassVar[str] = ""
    stays_at_node: ClassVar[bool] = False
    child_roles: ClassVar[Mapping[str, ChildRole]] = {}
    late_roles: ClassVar[Mapping[str, ChildRole]] = {}
    supports_backing: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    is_protocol: ClassVar[bool] = False
    strong_options: ClassVar[Sequence[str]] = ()
    locked: bool = True
    opens_alone: ClassVar[bool] = False
    opens_writing: ClassVar[bool] = False
    supports_snapshots: ClassVar[bool] = False
    has_protocol_name: ClassVar[bool] = False
    can_compress: ClassVar[bool] = False
    filename_protocols: ClassVar[Sequence[str]] = ()
    directory_refusal: ClassVar[str] = ""
    reopens: ClassVar[bool] = False
    reopen_takes: ClassVar[Sequence[str]] = ()
    reopen_resets: ClassVar[Sequence[str]] = ()

    def __init__(self, graph: Graph, name: str, node_options: NodeOptions, given: Mapping[str, Any]) -> None:
        """Make an unopened node.

        given   the driver's own members as they came over the wire (validated, wire names);
                for file names and `blockdev-reopen`, not for behaviour
        """
        self.graph = graph
        self.name = name
        self.node_options = node_options
        self.given = given
        self.explicit: Mapping[str, Any] = {}
        """The base of BlockdevOptions as it was given, before inheritance (wire names)."""
        self.read_only = bool(node_options.read_only)
        self.children: dict[str, Child] = {}
        self.parents: list[Child] = []
        self.perm, self.shared = Perm.NONE, Perm.ALL
        self.monitor_owned = False
        self.sequence = 0
        self.backing_file: str | None = None
        self.backing_format: str | None = None
        self.auto_backing = ""
        self.backing_overridden = False
        self.size = 0
        self.request_alignment = 1
        self.zero_alignment = 1
        self.supports_fua = False
        self.wr_highest_offset = 0
        self.write_threshold = 0
        self.ranges = RangeTable()
        self.dirty_bitmaps: list[DirtyBitmap] = []
        self.blockers: list[str] = []
        """Why commands may not change the node: jobs that rely on it."""

    # --- names and old spellings ------------------------------------------------------------

    @staticmethod
    def parse_filename(name: str) -> dict[str, Any]:
        """Return the options that a name with one of `filename_protocols` means. Raises CommandError."""
        raise CommandError(f"Could not parse the file name '{name}'")

    @staticmethod
    def modern_options(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return loose options (of json: names and command lines) as the schema has them. Raises CommandError."""
        return tree

    # --- life cycle -------------------------------------------------------------------------

    async def open(self, options: Any) -> None:
        """Read what is needed to serve I/O through `self.children`, which are attached already.

        options   the dataclass registered for this driver, its BlockdevRef members being `Child`
        Raises CommandError or ImageError with the reference's text, or OSError, which the graph
        turns into "Could not open '...': REASON". Whatever this acquired before it raises, it
        releases itself; the graph detaches the children.
        """
        raise NotImplementedError

    def late_filename(self, name: str) -> str | None:
        """Return the file of this host that the image names for the child `name` of `late_roles`, None for none."""
        return None

    def late_children_attached(self) -> None:
        """Called after `open`, once the children of `late_roles` that are named are attached; not if nothing will
        be read (NO_IO). Raises CommandError if one is missing or has no place."""

    async def unlock(self) -> None:
        """The slow part of opening (key derivation); runs after `open`, out of turn."""

    async def close(self) -> None:
        """Flush own caches and release everything; children are still attached. Never raises
        for I/O errors: they are logged."""

    async def prepare_reopen(self, options: Any, generic: NodeOptions) -> ReopenStep:
        """Say what other options mean, once they are known to be allowed; no request is in flight.

        options   as for `open`      generic   the base of the options, after inheritance
        Returns the step that makes them true, run in the change of the graph that sets the generic ones; it undoes
        itself through the transaction. What is to be written before the node becomes read-only is written here: the
        change may still fail, and the node is then used as before. Raises CommandError, ImageError, OSError.
        """
        return no_step

    async def reopened(self) -> None:
        """Do what needs the new permissions, once they are there. Raises CommandError, OSError: all goes back."""

    def child_replaced(self, child: Child) -> None:
        """Called when an edge below leads to another node, for good."""

    def stop_waiting(self) -> None:
        """Fail what waits for something outside that may never come, from now on: the program ends.

        Runs on the data loop.
        """

    # --- I/O --------------------------------------------------------------------------------

    async def preadv(self, batch: Batch) -> None:
        """Fill every `view` of the batch with the bytes at [offset, offset + len(view)).

        offset   bytes, a multiple of self.request_alignment, as is the length; each range lies
                 within self.size rounded up to that alignment (edges and backends have aligned
                 and checked it: drivers assert, they do not repair)
        view     writable, contiguous, format 'B', 1..MAX_REQUEST bytes; owned by the caller. The
                 driver may scribble on it before it fails, and keeps no view of it afterwards
        Errors   `request.fail(errno)` marks one (EIO bad data, ENOMEM, ENOSPC, ESHUTDOWN) and the
                 others go on; an OSError that leaves means every request not yet marked
        Cancel   never delivered here
        """
        raise NotImplementedError

    def direct_read(self) -> DirectRead | None:
        """Say how reads of this node come down to reads of a file, None if they do not, or not always.

        Runs on the data loop. The answer holds until the graph changes; a driver that can say it keeps
        to these rules in `preadv` as well.
        """
        return None

    def direct_write(self) -> DirectRead | None:
        """Say the same of writes: where `locate` finds a range, writing there changes nothing but its data."""
        return None

    async def begin_filling(self, ranges: Sequence[tuple[int, int]]) -> Filling | None:
        """Say how `ranges` (start, end) of the node, in order and apart, are filled from file to file, room being made
        for them; None if they are not all empty, or the driver makes no room. Raises OSError.

        Only `block.filling` calls it, which has looked at what else may concern a write.
        """
        return None

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write every `view` of the batch; the views may be shared and are never changed.

        Offsets, errors and cancellation as for `preadv`. Requests of one batch that overlap are
        written in any order. With FUA the data is durable on return; a driver whose
        `supports_fua` is False is not given it, the edge flushes instead.
        """
        raise NotImplementedError

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Make the range read as zeroes; it is aligned to request_alignment.

        Raises OSError(ENOTSUP) if the driver has no better way than writing zeroes: the edge
        then writes them, unless NO_FALLBACK is set.
        """
        raise OSError(errno.ENOTSUP, "no efficient zero write")

    async def pdiscard(self, offset: int, length: int) -> None:
        """Forget the range; only called if node_options.discard is `unmap`, aligned to
        request_alignment. Advisory: a driver without it does nothing."""

    async def flush(self) -> None:
        """Make all completed writes durable, children included. Raises OSError.

        The default flushes every child that is written to.
        """
        for child in list(self.children.values()):
            if child.perm & (Perm.WRITE | Perm.WRITE_UNCHANGED):
                await child.flush()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Return extents that cover [offset, offset + length) exactly, in order; neighbours differ.

        Raises OSError. The default calls everything data of this layer.
        """
        return (Extent(offset, length, data=True, zero=False),)

    async def snapshot_preadv(self, batch: Batch) -> None:
        """Read what the node held when it began to copy before writes; see `preadv`. Raises OSError(ENOTSUP)
        if the node keeps nothing."""
        raise OSError(errno.ENOTSUP, "no snapshot to read")

    async def snapshot_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Say what lies where for `snapshot_preadv`; see `block_status`. Raises OSError."""
        raise OSError(errno.ENOTSUP, "no snapshot to read")

    async def snapshot_discard(self, offset: int, length: int) -> None:
        """Give up a part of what `snapshot_preadv` reads. Raises OSError."""
        raise OSError(errno.ENOTSUP, "no snapshot to discard from")

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Change the size in bytes. Raises OSError(ENOTSUP) or CommandError.

        exact          False: a larger size will do (block devices)
        preallocation  PreallocMode for what is added
        """
        raise OSError(errno.ENOTSUP, "this driver cannot resize")

    def child_resized(self) -> None:
        """Called when the size of what is below, the child or the file itself, was changed from elsewhere; a window to
        its end follows."""

    async def change_backing_file(self, name: str, image_format: str) -> None:
        """Name another backing file in the image, none if `name` is empty; the graph stays as it is.

        Raises OSError(ENOTSUP) if the format has none, CommandError.
        """
        raise OSError(errno.ENOTSUP, "no backing files")

    async def make_empty(self) -> None:
        """Give up everything that this layer holds; no request uses the node. Raises OSError."""
        raise OSError(errno.ENOTSUP, "the format cannot give up its content")

    async def check(self, *, fix_leaks: bool, fix_errors: bool) -> Any:
        """Check the tables of the format and mend what the arguments allow; no request uses the node.

        Returns what was found, with the members of ImageCheck as attributes and `messages` for people.
        Raises OSError(ENOTSUP) if the format has no checks.
        """
        raise OSError(errno.ENOTSUP, "no checks")

    def find_snapshot(self, identifier: str | None, name: str | None) -> dict[str, Any] | None:
        """Return the SnapshotInfo of the first internal snapshot with that id and that name, None for any."""
        for one in self.image_info().get("snapshots", ()):
            if identifier in (None, one["id"]) and name in (None, one["name"]):
                return dict(one)
        return None

    async def snapshot_create(self, name: str, *, vm_clock: int = 0, icount: int | None = 0) -> None:
        """Make an internal snapshot; nothing uses the node meanwhile. Raises OSError.

        vm_clock   nanoseconds the machine had run     icount  instructions it had executed
        """
        raise OSError(errno.ENOTSUP, "no internal snapshots")

    async def snapshot_apply(self, tag: str) -> None:
        """Make the disk show again what it did in the snapshot of that id or name. Raises CommandError, OSError."""
        raise CommandError("Block driver does not support snapshots")

    async def snapshot_show(self, identifier: str, name: str) -> None:
        """Show a snapshot from now on; the node is read-only, and keeps its size. Raises OSError."""
        raise OSError(errno.ENOTSUP, "no internal snapshots")

    async def snapshot_delete(self, name: str, identifier: str | None = None) -> None:
        """Forget the first internal snapshot of that name, and id. Raises CommandError, OSError."""
        raise CommandError("snapshot not found")

    @property
    def keeps_bitmaps(self) -> bool:
        """True if the format can keep dirty bitmaps."""
        return False

    def check_storing_bitmap(self, name: str, granularity: int) -> None:
        """Refuse a further bitmap that the image is to keep. Raises CommandError."""
        raise CommandError(f"Can't store persistent bitmaps to {self.name}: Operation not supported")

    async def remove_stored_bitmap(self, name: str) -> None:
        """Take a persistent bitmap out of the image, if it is there. Raises CommandError."""

    def debug_event(self, event: str) -> None:
        """Hear what the node above is about to do, a BlkdebugEvent; only fault injection listens."""

    def drained_begin(self) -> None:
        """(Parent) Called when a node below is to become quiet; passed upwards by the graph."""

    def drained_end(self) -> None:
        """(Parent) Undo `drained_begin`."""

    def check_write_threshold(self, end: int) -> None:
        """Tell whoever set a threshold that a write ended beyond it, once."""
        threshold = self.write_threshold
        if threshold and end > threshold:
            self.write_threshold = 0
            self.graph.events.emit(
                "BLOCK_WRITE_THRESHOLD",
                node_name=self.name,
                amount_exceeded=end - threshold,
                write_threshold=threshold,
            )

    # --- permissions ------------------------------------------------------------------------

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Return what the edge `name` takes and shares, given what this node's parents do.

        The default follows the role (bdrv_default_perms); see `block.defaults`.
        """
        from qmpd.block.defaults import default_child_perm

        return default_child_perm(self, name, role, perm, shared)

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        """Veto the new cumulative permissions by raising CommandError (file: image locks).

        Followed by exactly one of `commit_perm` or `abort_perm`.
        """

    def commit_perm(self) -> None:
        """Keep what `check_perm` prepared and release what is no longer needed."""

    def abort_perm(self) -> None:
        """Undo what `check_perm` prepared."""

    # --- descriptions -----------------------------------------------------------------------

    def describe_parent(self) -> str:
        """(Parent) Name this node in a permission conflict."""
        return f"node '{self.name}'"

    @property
    def supports_compressed(self) -> bool:
        """True if writes may carry COMPRESSED."""
        return self.can_compress

    @property
    def writable(self) -> bool:
        """True if the node may be written to."""
        return not self.read_only

    def primary(self) -> Child | None:
        """The child that stands for this node in names and sizes."""
        for child in self.children.values():
            if child.role & ChildRole.PRIMARY:
                return child
        return None

    def exact_filename(self) -> str | None:
        """A driver whose file name is not its primary child's: the plain name, "" if only json:
        can say it. None: the default rule."""
        return None

    def allocated_size(self) -> int | None:
        """Bytes really taken on the host, None if unknown; the default is the sum over the
        children that hold this node's data or metadata (backing excluded)."""
        total = 0
        for child in self.children.values():
            if child.role & (ChildRole.DATA | ChildRole.METADATA | ChildRole.FILTERED):
                size = child.node.allocated_size()
                if size is None:
                    return None
                total += size
        return total

    def image_info(self) -> dict[str, Any]:
        """Driver-specific members of ImageInfo (wire names): cluster-size, encrypted,
        compressed, dirty-flag, format-specific {"type": ..., "data": {...}}."""
        return {}

    def driver_stats(self) -> dict[str, Any] | None:
        """Members of BlockStatsSpecific without `driver`, None if the driver has none."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} size={self.size} parents={len(self.parents)}>"


__all__ = ["MAX_REQUEST", "BlockNode", "Discard", "Extent", "perms"]
