"""`python -m qmpd`: the same as the program `qmpd`."""

from __future__ import annotations

from qmpd.daemon.main import main

main()
