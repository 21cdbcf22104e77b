"""The unit of work on the data path: a batch of requests, errors marked one by one."""

from __future__ import annotations

import enum
from collections.abc import Iterable


class WriteFlags(enum.IntFlag):
    """Modifiers of a write; values are internal.

    FUA         the data is on stable storage when the call returns
    MAY_UNMAP   (zero writes) the range may be deallocated
    NO_FALLBACK (zero writes) fail with ENOTSUP instead of writing zeroes slowly
    UNCHANGED   the data visible at this node does not change (copy-on-read)
    COMPRESSED  store the data compressed; only for nodes whose `supports_compressed` is true, in whole
                clusters of the image (its last one may be shorter)
    """

    NONE = 0
    FUA = 1
    MAY_UNMAP = 2
    NO_FALLBACK = 4
    UNCHANGED = 8
    COMPRESSED = 16


class Request:
    """One contiguous piece of a batch.

    offset   bytes
    view     reads: writable, contiguous, format 'B', filled by the callee
             writes: read-only use, never changed by the callee
    error    0, or the errno the client is to see
    origin   the request of the layer above that this one is part of; it shares errors upwards
    """

    __slots__ = ("error", "offset", "origin", "view")

    def __init__(self, offset: int, view: memoryview, origin: Request | None = None) -> None:
        self.offset = offset
        self.view = view
        self.error = 0
        self.origin = origin

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.offset + len(self.view)

    def fail(self, error: int) -> None:
        """Mark this request, and those it is part of, with an errno; the first one stays."""
        request: Request | None = self
        while request is not None:
            if not request.error:
                request.error = error
            request = request.origin

    def part(self, offset: int, start: int, length: int) -> Request:
        """Return a request for bytes [start, start + length) of this one's view, at `offset`."""
        return Request(offset, self.view[start : start + length], self)

    def __repr__(self) -> str:
        return f"<Request {self.offset}+{len(self.view)} error={self.error}>"


class Batch(list[Request]):
    """Requests of one kind that travel together; order has no meaning unless they overlap."""

    __slots__ = ()

    @classmethod
    def single(cls, offset: int, view: memoryview) -> Batch:
        """Return a batch of one request."""
        return cls((Request(offset, view),))

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Batch:
        """Return a batch of `requests`."""
        return cls(requests)

    def shifted(self, delta: int) -> Batch:
        """Return the batch with `delta` bytes added to every offset, sharing views and errors."""
        if delta == 0:
            return self
        return Batch(Request(r.offset + delta, r.view, r) for r in self)

    def fail(self, error: int) -> None:
        """Mark every request that has no error yet."""
        for request in self:
            if not request.error:
                request.fail(error)

    def raise_first(self) -> None:
        """Raise OSError for the first failed request, if any."""
        for request in self:
            if request.error:
                raise OSError(request.error, f"request at {request.offset} failed")

    @property
    def total(self) -> int:
        """Bytes in all views."""
        return sum(len(r.view) for r in self)
