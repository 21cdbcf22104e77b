"""Coroutines that run at once, and only become a task if they have to wait.

Most batches of a data loop are answered by the page cache: for them a task (10 us) would cost more
than the work. Python 3.12 has tasks that start eagerly; before that the first stretch is run here.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

if sys.version_info >= (3, 12):

    def start(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> asyncio.Future[T] | None:
        """Run `work` until it waits; return the task that goes on with it, None if it has ended.

        An exception of the first stretch is raised here. The loop is the running one.
        """
        task: asyncio.Task[T] = asyncio.Task(work, loop=loop, eager_start=True)
        if not task.done():
            return task
        task.result()
        return None

else:

    class _Rest(Coroutine[Any, Any, T]):
        """What is left of a coroutine that has yielded its first future."""

        def __init__(self, work: Coroutine[Any, Any, T], first: Any) -> None:
            self._work, self._first = work, [first]

        def send(self, value: Any) -> Any:
            return self._first.pop() if self._first else self._work.send(value)

        def throw(self, *error: Any) -> Any:
            self._first.clear()
            return self._work.throw(*error)

        def close(self) -> None:
            self._work.close()

        def __await__(self) -> Generator[Any, Any, T]:
            raise NotImplementedError

    def start(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> asyncio.Future[T] | None:
        """Run `work` until it waits; return the task that goes on with it, None if it has ended.

        An exception of the first stretch is raised here. The loop is the running one. During that
        stretch there is no current task, so it may not use timeouts or cancel itself.
        """
        try:
            first = work.send(None)
        except StopIteration:
            return None
        return loop.create_task(_Rest(work, first))
