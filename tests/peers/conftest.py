"""For tests against real peers: `need("qemu-img")` before using one."""

from __future__ import annotations

from tests.support.peers import need

__all__ = ["need"]
