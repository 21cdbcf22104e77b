"""Standard streams for a process that was started without some of them."""

from __future__ import annotations

import os
import sys


def complete_streams() -> None:
    """Open /dev/null in the place of each standard stream that is closed.

    The number would go to the next file that is opened otherwise, an image for one, and what some library says on
    standard error would be written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
