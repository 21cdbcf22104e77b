"""What the backup job asks of the filter that copies before writes."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from qmpd.block.batch import WriteFlags
from qmpd.block.child import Child
from qmpd.block.dirty_bitmap import DirtyBitmap


class TargetFailed(OSError):
    """A copy failed where it was written, not where it was read."""


@runtime_checkable
class Keeping(Protocol):
    """A node that keeps in a target what its file held when it was made; all but the bitmap on the data loop.

    cluster     bytes that are copied as one      to_copy   what is not in the target yet
    copy_flags  how the target is written to
    """

    cluster: int
    to_copy: DirtyBitmap
    target: Child
    copy_flags: WriteFlags

    async def copy(self, start: int, end: int) -> None:
        """Copy what of [start, end), in whole clusters, is still to be copied. Raises OSError, TargetFailed."""
