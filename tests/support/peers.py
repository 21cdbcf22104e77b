"""The real programs and modules that tests work with: named, never silently left out."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

EXTRA_PATH = "/usr/sbin:/sbin"


def find(program: str) -> str | None:
    """Return the path of a program, also of those that only root has in PATH."""
    return shutil.which(program) or shutil.which(program, path=EXTRA_PATH)


def need(*names: str) -> None:
    """Go on only if every named program (in PATH) or Python module ("module:NAME") is there.

    With QMPD_PEERS=required, as in CI, a missing one fails the test; otherwise it is a skip that says
    what is missing and how to get it.
    """
    for name in names:
        kind, _, module = name.partition(":")
        if kind == "module":
            there = importlib.util.find_spec(module) is not None
        else:
            there = find(name) is not None
        if there:
            continue
        text = f"peer {name} is not installed (tests/peers/install does it)"
        if os.environ.get("QMPD_PEERS") == "required":
            pytest.fail(text)
        pytest.skip(text)
