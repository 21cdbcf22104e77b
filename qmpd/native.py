"""The modules that are compiled at install, where there was a compiler."""

from __future__ import annotations

import importlib
from typing import Any


def compiled(module: str) -> Any | None:
    """Return a compiled module by its dotted name; None if it was not built, and its user does without."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
