"""A command line that was read, and the two ways in which a start ends early."""

from __future__ import annotations

from collections.abc import Sequence

from qmpd.daemon.log import Complaints
from qmpd.daemon.options import Given


class Failure(Exception):
    """A start that cannot go on; `str()` is the line for standard error.

    words   of the option at fault         hint   a further line
    """

    def __init__(self, text: str, *, words: str = "", hint: str | None = None) -> None:
        super().__init__(text)
        self.words, self.hint = words, hint


class Done(Exception):
    """The program has done all it was asked for; `str()` goes to standard output."""


class Start:
    """What `run` gets.

    given      the options that make the daemon, in the order given
    log_path   where the log goes, None for standard error
    """

    def __init__(self, complaints: Complaints, given: Sequence[Given]) -> None:
        self.complaints = complaints
        self.given = given
        self.pid_path: str | None = None
        self.daemonize = False
        self.log_path: str | None = None
