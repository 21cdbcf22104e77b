"""Version data for the greeting, `query-version` and `--version`."""

from __future__ import annotations

VERSION = "0.1.0"
"""qmpd's own version."""

QEMU_LEVEL = (10, 0, 2)
"""The QEMU release whose monitor this one is compatible with."""
