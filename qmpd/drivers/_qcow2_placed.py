"""Requests to the file of a qcow2 image that know where on the guest's disk their data belongs."""

from __future__ import annotations

from qmpd.block.batch import Request


class Placed(Request):
    """A request to the file that knows where on the guest's disk its data belongs.

    guest   offset on the guest's disk in bytes
    """

    __slots__ = ("guest",)

    def __init__(self, offset: int, guest: int, view: memoryview, origin: Request | None = None) -> None:
        super().__init__(offset, view, origin)
        self.guest = guest

    def part(self, offset: int, start: int, length: int) -> Request:
        """See `Request.part`."""
        return Placed(offset, self.guest + start, self.view[start : start + length], self)
