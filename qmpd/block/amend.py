"""What a driver offers whose images can be amended while they are open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Amendable(Protocol):
    """A node with options that can be changed; called on the loop of the monitor."""

    async def amend(self, options: Mapping[str, Any], *, force: bool) -> None:
        """Carry out its branch of BlockdevAmendOptions (wire names). Raises CommandError, OSError."""
