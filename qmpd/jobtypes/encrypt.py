"""blockdev-encrypt: an image becomes the payload of a LUKS2 volume where it lies, while it is used.

Options: BlockdevEncryptOptions (qapi/luks-encrypt.json), an extension of ours. What makes it survive a
crash is in `qmpd.luks.encrypt`. The job opens the luks node and leaves it there: finished, or, if it was
cancelled or failed, half encrypted and in use, to be gone on with.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from functools import partial
from typing import Any

from qmpd.block.backend import BlockBackend
from qmpd.block.child import Child
from qmpd.block.exclusive import HostFile
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.context import Context
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.jobs.block_job import BlockJob
from qmpd.jobs.job import JobManager
from qmpd.luks.create2 import Luks2Options, header_length
from qmpd.luks.encrypt import EncryptingNode, Encryption
from qmpd.luks.encrypt_header import prepare_header
from qmpd.luks.shared import header_of
from qmpd.qapi.registry import command, jobtype
from qmpd.units import SECTOR


@jobtype("encrypt")
class EncryptJob(BlockJob):
    """Encrypts one image; progress counts the bytes of payload that are ciphertext."""

    job_type = "encrypt"

    def __init__(
        self, manager: JobManager, job_id: str, graph: Graph, name: str, options: Mapping[str, Any], **named: Any
    ) -> None:
        super().__init__(manager, job_id, **named)
        self._graph, self._name, self._options = graph, name, options

    async def run(self) -> None:
        """Make the header unless it is there, open the node, encrypt zone by zone, make the volume a plain one."""
        node = self._graph.get(self._name) or await self._open()
        if not isinstance(node, EncryptingNode) or node.encryption is None:
            raise CommandError(f"Node '{self._name}' is not being encrypted in place")
        encryption = node.encryption
        if encryption.worker is not None:
            raise CommandError(f"Node '{self._name}' is being encrypted by job '{encryption.worker}'")
        encryption.worker = self.id
        backend = BlockBackend(
            self._graph, lambda: f"block job '{self.id}'", Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL
        )
        try:
            backend.insert(node)
            await self._work(backend, encryption)
            await backend.visit(lambda _: node.finish_encryption())
        finally:
            encryption.worker = None
            await backend.remove()
        with self._graph.change() as tran:
            tran.touch(node)

    async def _work(self, backend: BlockBackend, encryption: Encryption) -> None:
        self.total, self.current = encryption.journal.payload_size, encryption.position

        async def step(_: Child) -> int:
            return await encryption.step()

        while not encryption.done:
            await self.pause_point()
            await self.pace(await backend.visit(step))
            self.current = encryption.position

    async def _open(self) -> BlockNode:
        """Open the luks node, on a header that is made now if there is none. Raises QmpdError, OSError."""
        options = self._options
        for name in ("file", "header", "key-secret"):
            if name not in options:
                raise CommandError(f"Parameter '{name}' is missing")
        file = self._graph.lookup(options["file"], options["file"])
        header = self._graph.lookup(options["header"], options["header"])
        if file is header:
            raise CommandError(f"The header cannot lie on the image itself, '{file.name}'")
        await self._make_header(header, _exact_size(file))
        shared = header_of(header)
        if shared.admitted is not None:
            raise CommandError(f"Another job encrypts an image with the header '{header.name}'")
        shared.admitted = self._name
        try:
            tree = {"driver": "luks", "node-name": self._name, "file": file.name, "header": header.name}
            return await self._graph.blockdev_add(tree | {"key-secret": options["key-secret"]})
        finally:
            shared.admitted = None

    async def _make_header(self, header: BlockNode, size: int) -> None:
        shared = header_of(header)
        if shared.users:
            raise CommandError(f"The header on node '{header.name}' is in use")
        luks2 = Luks2Options(
            **{name.replace("-", "_"): value for name, value in self._options.items() if name in _CREATION}
        )
        backend = BlockBackend(
            self._graph,
            lambda: f"block job '{self.id}'",
            Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE,
            Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED,
        )
        passphrase: SecretBytes = self._graph.objects.passphrase(self._options["key-secret"])
        with passphrase:
            try:
                backend.insert(header)
                if backend.size < header_length():
                    await backend.truncate(header_length())
                work = partial(prepare_header, backend, luks2, passphrase, size)
                await self._graph.runner.run(shared.locked(work))
            finally:
                await backend.remove()


def _exact_size(node: BlockNode) -> int:
    """Return the bytes of an image that loses none when it is written in whole sectors. Raises CommandError."""
    below = node
    while (below.is_filter or below.driver_name == "raw") and "file" in below.children and "size" not in below.given:
        below = below.children["file"].node
    if isinstance(below, HostFile):  # whose size as a node is rounded up
        status = os.stat(below.path)
        if stat.S_ISREG(status.st_mode) and status.st_size % SECTOR:
            raise CommandError(f"The image has {status.st_size} bytes, expected a multiple of {SECTOR}")
    return node.size


_CREATION = frozenset(name.replace("_", "-") for name in Luks2Options.__dataclass_fields__)


@command("blockdev-encrypt")
async def blockdev_encrypt(ctx: Context, *, options: dict[str, Any]) -> None:
    """Start the job that encrypts an image in place, or go on with one."""
    job_id, name, speed = options["job-id"], options["node-name"], options.get("speed", 0)
    if speed < 0:
        raise CommandError("Parameter 'speed' expects a non-negative value")
    named: dict[str, Any] = {
        "speed": speed,
        "auto_finalize": options.get("auto-finalize", True),
        "auto_dismiss": options.get("auto-dismiss", True),
    }
    job = ctx.jobs.add(lambda: EncryptJob(ctx.jobs, job_id, ctx.graph, name, options, **named), job_id)
    job.start()
