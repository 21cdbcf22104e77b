"""How far a long command is: the reference's `    (12.34/100%)`, or on a terminal a bar with rate and time left.

SIGUSR1 makes any long command say once on standard error how far it is, with or without -p.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from types import TracebackType
from typing import Any

STEP = 1.0
"""Per cent between two lines at least."""


class Progress:
    """Counts bytes of `total`; used as a context manager.

    shown   -p was given
    """

    def __init__(self, total: int, *, shown: bool) -> None:
        self.total, self.done = max(total, 1), 0
        self._shown = shown
        self._last = -STEP
        self._bar: Any = None

    @property
    def percent(self) -> float:
        """Per cent that are done."""
        return min(self.done / self.total, 1.0) * 100

    def __enter__(self) -> Progress:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._asked)
        if self._shown and sys.stdout.isatty():
            from tqdm import tqdm

            window = shutil.get_terminal_size()  # not 0 by 0, as a terminal may say: tqdm would draw nothing then
            self._bar = tqdm(
                total=self.total,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                file=sys.stdout,
                ncols=window.columns,
                nrows=window.lines,
            )
        self.add(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)
        if kind is None:
            self.add(self.total - self.done)
        if self._bar is not None:
            self._bar.close()
        elif self._shown:
            self._print()
            print()

    def add(self, length: int) -> None:
        """Count `length` more bytes."""
        self.done += length
        if self._bar is not None:
            self._bar.update(length)
        elif self._shown and (self.percent - self._last >= STEP or (self.percent == 100 != self._last)):
            self._print()

    def _print(self) -> None:
        self._last = self.percent
        print(f"    ({self._last:3.2f}/100%)", end="\r", flush=True)

    def _asked(self) -> None:
        print(f"    ({self.percent:3.2f}/100%)", file=sys.stderr, flush=True)
