"""What every block export has, whatever its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qmpd.block.backend import BlockBackend

if TYPE_CHECKING:
    from qmpd.exporting.exports import Exports


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """The base of BlockExportOptions, without the node."""

    id: str
    writable: bool = False
    writethrough: bool = False
    iothread: str | None = None
    fixed_iothread: bool = False
    allow_inactive: bool = False


class BlockExport:
    """One export: a backend on a node, and whoever reads it through some protocol.

    A type is a subclass declared with `@export(name, ...)`. Its methods run on the monitor's loop
    and reach the data loop through the graph's runner.

    shutting_down   its end was asked for, and waits for clients or requests
    inherited       addresses of its options may name a descriptor of the process by its number
    """

    type_name: ClassVar[str] = ""

    def __init__(self, exports: Exports, common: CommonOptions, backend: BlockBackend) -> None:
        self.exports, self.common, self.backend = exports, common, backend
        self.shutting_down = self.inherited = False

    @property
    def id(self) -> str:
        """The export's id, unique among all exports."""
        return self.common.id

    async def start(self, options: Any) -> None:
        """Serve clients from now on; `options` is the dataclass of the type.

        Raises CommandError; the backend is then removed by the caller.
        """
        raise NotImplementedError

    def uri(self) -> str | None:
        """Return the standard URI by which clients find the export, None if there is none."""
        return None

    def newest_client(self) -> int:
        """Return the number of the client that came last, counted over all exports; 0 without clients."""
        return 0

    async def begin_stop(self, *, only_idle: bool) -> bool:
        """Admit no more clients. With `only_idle` do nothing and return False if there are any."""
        raise NotImplementedError

    async def stop(self) -> None:
        """(After `begin_stop`) End every client when its requests in flight have ended."""
        raise NotImplementedError
