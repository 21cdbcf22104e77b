"""The speed of qmpd beside that of QEMU's tools, measured in one run: `make bench`, or `python -m bench`."""

from __future__ import annotations
