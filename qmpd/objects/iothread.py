"""iothread: an event loop in a thread of its own, for those who ask to be served there.

Options: IothreadProperties (qapi/qom.json). The polling and batching numbers are checked and kept
as QEMU does; this program's loops do not busy-wait, so they change nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from qmpd.aio.loop import DataLoop
from qmpd.errors import CommandError
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property, QomObject
from qmpd.qom.tree import ObjectTree

_THREADS_MAX = (1 << 31) - 1
_START_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class IothreadOptions:
    """Members of IothreadProperties; times in nanoseconds."""

    aio_max_batch: int = 0
    thread_pool_min: int = 0
    thread_pool_max: int = 64
    poll_max_ns: int = 32768
    poll_grow: int = 0
    poll_shrink: int = 0


def _positive(name: str, value: Any) -> int:
    """Return a number of 63 bits. Raises ValidationError, CommandError."""
    number = values.integer(name, value)
    if number < 0:
        raise CommandError(f"{name} value must be in range [0, {values.INT64_MAX}]")
    return number


def _number(name: str) -> Property:
    """Return the property `name`, kept in `parameters`."""

    def get(self: EventLoopBase) -> int:
        return self.parameters[name]

    def set_(self: EventLoopBase, value: Any) -> None:
        self.change(name, _positive(name, value))

    return Property(name, "int", get, set_)


class EventLoopBase(QomObject):
    """What every event loop has: limits of its queue and of its helper threads."""

    qom_type = "event-loop-base"
    abstract = True
    interfaces = ("user-creatable",)
    qom_properties: ClassVar[tuple[Property, ...]] = tuple(
        _number(name) for name in ("aio-max-batch", "thread-pool-min", "thread-pool-max")
    )

    def __init__(self, parameters: dict[str, int]) -> None:
        super().__init__()
        self.parameters = {name: _positive(name, value) for name, value in parameters.items()}

    def change(self, name: str, value: int) -> None:
        """Set one parameter, or leave all as they were. Raises CommandError."""
        changed = {**self.parameters, name: value}
        _check_threads(changed)
        self.parameters = changed

    def complete(self, objects: ObjectTree) -> None:
        """Check the parameters against each other."""
        _check_threads(self.parameters)


def _check_threads(parameters: dict[str, int]) -> None:
    most = parameters["thread-pool-max"]
    if not 0 < most <= _THREADS_MAX or parameters["thread-pool-min"] > most:
        raise CommandError("bad thread-pool-min/thread-pool-max values")


@qom_type("iothread", schema="IothreadProperties", options=IothreadOptions)
class IoThread(EventLoopBase):
    """A running thread with a data loop (DataThread)."""

    qom_type = "iothread"
    abstract = False
    qom_properties = tuple(_number(name) for name in ("poll-max-ns", "poll-grow", "poll-shrink"))

    def __init__(self, options: IothreadOptions) -> None:
        super().__init__(
            {
                "poll-shrink": options.poll_shrink,
                "poll-grow": options.poll_grow,
                "poll-max-ns": options.poll_max_ns,
                "aio-max-batch": options.aio_max_batch,
                "thread-pool-min": options.thread_pool_min,
                "thread-pool-max": options.thread_pool_max,
            }
        )
        self._loop: DataLoop | None = None
        self.thread_id = 0

    def complete(self, objects: ObjectTree) -> None:
        """Start the thread."""
        super().complete(objects)
        self._loop = DataLoop(f"iothread-{self.id}")
        self.thread_id = asyncio.run_coroutine_threadsafe(_call(threading.get_native_id), self._loop.loop).result(
            _START_SECONDS
        )

    @property
    def data_loop(self) -> DataLoop:
        """Return the loop; asked for only while the object is in the tree."""
        assert self._loop is not None, "the iothread is not running"
        return self._loop

    def wire_info(self) -> dict[str, Any]:
        """Return the row of query-iothreads."""
        shown = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch")
        return {"id": self.id, "thread-id": self.thread_id} | {name: self.parameters[name] for name in shown}

    def delete(self) -> None:
        """End the thread."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None


async def _call(function: Callable[[], int]) -> int:
    return function()
