"""fuse: an export that shows a node as a file, mounted over a file that is there.

Options: BlockExportOptionsFuse (qapi/block-export.json). The kernel's protocol is spoken directly:
bindings of libfuse serve one file system in a process, or take over its signal handlers.
Model: fuse_export_create of QEMU's block/export/fuse.c.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from dataclasses import dataclass

from qmpd.aio import fuse_mount
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.exporting.export import BlockExport
from qmpd.exporting.fuse_file import FuseFile
from qmpd.protocols.fuse import MAX_TRANSFER
from qmpd.qapi.registry import export

log = logging.getLogger(__name__)

_mounted: set[str] = set()
"""Paths with an export of this process: a stat of one would have to be answered by ourselves."""


@dataclass(frozen=True, slots=True)
class FuseExportOptions:
    """What is special to FUSE.

    mountpoint   path of a regular file
    growable     writes behind the end make the node longer
    allow_other  "on", "off", or "auto": on where the system lets us
    """

    mountpoint: str
    growable: bool = False
    allow_other: str = "auto"


@export("fuse", schema="BlockExportOptionsFuse", options=FuseExportOptions)
class FuseExport(BlockExport):
    """A node mounted as a file."""

    type_name = "fuse"

    async def start(self, options: FuseExportOptions) -> None:
        """Check the place, mount, and serve."""
        if options.growable or self.common.writable:
            self.backend.set_perm(self.backend.perm | Perm.RESIZE, self.backend.shared)
        path = options.mountpoint
        if path in _mounted:
            raise CommandError(f"There already is a FUSE export on '{path}'")
        _check_regular(path)
        fd, allow_other = await self._mount(path, options.allow_other)
        self._file = FuseFile(
            self.backend,
            fd,
            writable=self.common.writable,
            growable=options.growable,
            writethrough=self.common.writethrough,
            allow_other=allow_other,
        )
        self._path = path
        _mounted.add(path)
        await self.exports.graph.runner.run(self._file.start())

    async def _mount(self, path: str, allow_other: str) -> tuple[int, bool]:
        tries = {"auto": (True, False), "on": (True,), "off": (False,)}[allow_other]
        for attempt in tries:
            try:
                return await asyncio.to_thread(
                    fuse_mount.mount, path, allow_other=attempt, max_read=MAX_TRANSFER
                ), attempt
            except OSError as error:
                problem = error
        log.error("FUSE: mounting on '%s' failed: %s", path, problem.strerror)
        raise CommandError("Failed to mount FUSE session to export") from problem

    async def begin_stop(self, *, only_idle: bool) -> bool:
        """Who has the file open does not keep the export, as the reference has it."""
        return True

    async def stop(self) -> None:
        """Unmount while requests can still be answered, then end."""
        try:
            await asyncio.to_thread(fuse_mount.unmount, self._path)
        except OSError as error:
            log.warning("FUSE: unmounting '%s' failed: %s", self._path, error.strerror)
        await self.exports.graph.runner.run(self._file.stop())
        _mounted.discard(self._path)


def _check_regular(path: str) -> None:
    """Refuse what is no regular file. Raises CommandError."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise CommandError(f"Failed to stat '{path}': {error.strerror}") from error
    except ValueError as error:
        raise CommandError(f"Failed to stat '{path}': Invalid argument") from error
    if not stat.S_ISREG(mode):
        raise CommandError(f"'{path}' is not a regular file")
