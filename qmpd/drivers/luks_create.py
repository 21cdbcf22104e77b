"""Making a LUKS volume: the `luks` branch of blockdev-create.

Options: BlockdevCreateOptionsLUKS (qapi/block-drivers.json). Unlike the reference, nothing stays
attached to the payload afterwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from qmpd.block.backend import BlockBackend
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from qmpd.qapi.registry import creator

Reference = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LuksCreateOptions:
    """BlockdevCreateOptionsLUKS.

    size  bytes of payload        iter_time  milliseconds of key derivation
    """

    size: int
    file: Reference | None = None
    header: Reference | None = None
    key_secret: str | None = None
    cipher_alg: str | None = None
    cipher_mode: str | None = None
    ivgen_alg: str | None = None
    ivgen_hash_alg: str | None = None
    hash_alg: str | None = None
    iter_time: int | None = None
    preallocation: str = "off"

    def luks1(self) -> Luks1Options:
        """Return what concerns the header."""
        return Luks1Options(
            cipher_alg=self.cipher_alg,
            cipher_mode=self.cipher_mode,
            ivgen_alg=self.ivgen_alg,
            ivgen_hash_alg=self.ivgen_hash_alg,
            hash_alg=self.hash_alg,
            iter_time=self.iter_time,
        )


@creator("luks", schema="BlockdevCreateOptionsLUKS", options=LuksCreateOptions)
class LuksCreator:
    """Writes a header, and gives the payload its size."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    async def create(self, options: LuksCreateOptions, *, iterations: int | None = None) -> None:
        """Make the volume. Raises CommandError, OSError.

        iterations   rounds of key derivation, where a time is not to decide it
        """
        if options.file is None and options.header is None:
            raise CommandError("Either the parameter 'header' or 'file' must be specified")
        async with AsyncExitStack() as stack:
            file = header = None
            if options.file is not None:
                file = await stack.enter_async_context(self._backend(options.file))
            if options.header is not None:
                header = await stack.enter_async_context(self._backend(options.header))
            if options.key_secret is None:
                raise CommandError("Parameter 'key-secret' is required for cipher")
            passphrase = self._graph.objects.passphrase(options.key_secret)
            stack.callback(passphrase.wipe)
            luks1 = replace(options.luks1(), iterations=iterations)
            room = header_length(luks1)
            if header is None:
                assert file is not None
                await file.truncate(room + options.size, preallocation=options.preallocation)
                await create_luks1(file, luks1, passphrase, detached=False)
                return
            await header.truncate(room)
            await create_luks1(header, luks1, passphrase, detached=True)
            if file is not None:
                await file.truncate(options.size, preallocation=options.preallocation)

    @asynccontextmanager
    async def _backend(self, reference: Reference) -> AsyncIterator[BlockBackend]:
        async with self._graph.borrowed(reference) as node:
            backend = BlockBackend(self._graph, lambda: "an unnamed block device", Perm.WRITE | Perm.RESIZE, Perm.ALL)
            try:
                backend.insert(node)
                yield backend
            finally:
                await backend.remove()
