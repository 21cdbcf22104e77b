"""Where the work of ciphers is done: small runs at once, large ones on two threads, key derivation never on a loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qmpd.aio.pool import in_work_thread, work_executor
from qmpd.crypto.block import pieces, total
from qmpd.crypto.cipher import Span
from qmpd.luks.memory import check_memory
from qmpd.units import MiB

T = TypeVar("T")

INLINE = 2 * MiB
"""Bytes that are done on the loop: the compiled engine shares them with its own helper, in less than a millisecond."""

YIELD_EVERY = 1 * MiB
"""Bytes after which the loop gets its turn during a large run."""

NICE = 10
"""How far memory-hard derivations stand back: they would otherwise hold every core for seconds."""

Transform = Callable[[Sequence[Span]], None]

derive = in_work_thread
"""Run a key derivation in a thread and return its result."""

_heavy: ThreadPoolExecutor | None = None


async def derive_heavy(function: Callable[[], T], memory: int, what: str) -> T:
    """Like `derive`, for what takes `memory` KiB: one at a time in the whole process, and behind all I/O.

    Raises NotEnoughMemory, naming `what`, if they are not there when its turn has come.
    """
    global _heavy
    if _heavy is None:
        _heavy = ThreadPoolExecutor(1, "qmpd-kdf", initializer=_yield_to_others)

    def work() -> T:
        check_memory(memory, what)
        return function()

    return await asyncio.get_running_loop().run_in_executor(_heavy, work)


def _yield_to_others() -> None:
    """Let this thread, and those that argon2 starts from it, run behind the loops."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


async def transform(run: Transform, spans: Sequence[Span]) -> None:
    """Apply `run` (encryption or decryption) to all spans and return when all are done.

    Large runs are cut into pieces that a helper thread and this loop take in turn. A helper that
    found no free thread by the time the pieces are gone is called off, so that a key derivation in
    progress delays no I/O.
    """
    if total(spans) <= INLINE:
        run(spans)
        return
    todo = deque(pieces(spans))

    def help_out() -> None:
        while True:
            try:
                piece = todo.popleft()
            except IndexError:
                return
            run(piece)

    helper = work_executor().submit(help_out)
    try:
        done = 0
        while todo:
            try:
                piece = todo.popleft()
            except IndexError:
                break
            run(piece)
            done += total(piece)
            if done >= YIELD_EVERY:
                done = 0
                await asyncio.sleep(0)
    finally:
        todo.clear()
        if not helper.cancel():
            await asyncio.wrap_future(helper)
