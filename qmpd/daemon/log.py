"""Where the log goes, and the error lines of the command line.

The two are apart on purpose: an error line quotes the words of the command line, as the reference does,
and those may hold `data=` of a secret. Such lines go to standard error only, never to the log.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime


class _Format(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__(f"{program}[%(process)d]: %(levelname)s: %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return f"{timestamp(record.created)} {super().format(record)}"


def timestamp(seconds: float | None = None) -> str:
    """Return a moment, by default now, as the reference prints it before messages."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def set_up(program: str, path: str | None) -> None:
    """Send the log to the file `path`, else to standard error. Raises OSError."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler()
    else:
        handler = logging.FileHandler(path)
    handler.setFormatter(_Format(program))
    root = logging.getLogger("qmpd")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class Complaints:
    """Error lines as the reference prints them: `PROGRAM: WORDS: text`."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.timestamps = False

    def say(self, text: str, *, words: str = "", hint: str | None = None) -> None:
        """Print one error; `words` are those of the option it belongs to, `hint` a further line."""
        moment = f"{timestamp()} " if self.timestamps else ""
        place = f"{words}: " if words else ""
        line = f"{moment}{self.program}: {place}{text}"
        if hint:
            line += f"\n{hint}"
        sys.stderr.write(line.encode("utf-8", "surrogateescape").decode("utf-8", "replace") + "\n")
        sys.stderr.flush()
