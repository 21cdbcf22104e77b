"""Making a LUKS volume: the `luks` branch of blockdev-create.

Options: BlockdevCreateOptionsLUKS (qapi/block-drivers.json). Unlike the reference, nothing stays
attached to the payload afterwards.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from qmpd.block.backend import BlockBackend
from qmpd.block.graph import Graph
from qmpd.block.opening import MAX_LENGTH
from qmpd.block.perm import Perm
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, FileTooLarge
from qmpd.luks import create2
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from qmpd.luks.create2 import Luks2Options, create_luks2
from qmpd.luks.volume import HeaderIO
from qmpd.qapi.registry import creator

Reference = str | Mapping[str, Any]

ONLY_LUKS2 = ("sector_size", "pbkdf", "pbkdf_memory", "pbkdf_parallel", "label", "subsystem")


class Writer(Protocol):
    """Writes the header of a new volume."""

    async def __call__(self, target: HeaderIO, *, detached: bool) -> object:
        """Write it to `target`, for a payload behind it or, detached, elsewhere."""


@dataclass(frozen=True, slots=True)
class LuksCreateOptions:
    """BlockdevCreateOptionsLUKS.

    size  bytes of payload        iter_time  milliseconds of key derivation
    From `version` on: extensions that QEMU does not have.
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
    version: int = 1
    iterations: int | None = None
    uuid: str | None = None
    sector_size: int | None = None
    pbkdf: str | None = None
    pbkdf_memory: int | None = None
    pbkdf_parallel: int | None = None
    label: str | None = None
    subsystem: str | None = None
    force: bool = False

    def luks1(self) -> Luks1Options:
        """Return what concerns a LUKS1 header. Raises CommandError for options that are LUKS2's alone."""
        for name in ONLY_LUKS2:
            if getattr(self, name) is not None:
                raise CommandError(f"Parameter '{name.replace('_', '-')}' is for LUKS version 2 only")
        return Luks1Options(**{name: getattr(self, name) for name in Luks1Options.__dataclass_fields__})

    def luks2(self) -> Luks2Options:
        """Return what concerns a LUKS2 header."""
        return Luks2Options(**{name: getattr(self, name) for name in Luks2Options.__dataclass_fields__})


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
        if options.file is None and options.preallocation != "off":
            raise CommandError("Parameter 'preallocation' requires 'file' to be specified for formatting LUKS disk")
        if iterations is not None:
            options = replace(options, iterations=iterations)
        if options.version not in (1, 2):
            raise CommandError(f"LUKS version {options.version} is not supported")
        if options.uuid is not None and not _is_uuid(options.uuid):
            raise CommandError(f"Parameter 'uuid' expects a UUID, not '{options.uuid}'")
        async with AsyncExitStack() as stack:
            main = options.file if options.header is None else options.header
            assert main is not None
            header = await stack.enter_async_context(self._backend(main))
            if options.key_secret is None:
                raise CommandError("Parameter 'key-secret' is required for cipher")
            passphrase = self._graph.objects.passphrase(options.key_secret)
            stack.callback(passphrase.wipe)
            room, write = _writer(options, passphrase)
            if options.header is None:
                await _make_room(header, room + options.size, options.preallocation)
                await write(header, detached=False)
                return
            payload = None
            if options.file is not None:
                payload = await stack.enter_async_context(self._backend(options.file))
            await header.truncate(room)
            await write(header, detached=True)
            if payload is not None:
                await _size_payload(payload, options)

    @asynccontextmanager
    async def _backend(self, reference: Reference) -> AsyncIterator[BlockBackend]:
        async with self._graph.borrowed(reference) as node:
            backend = BlockBackend(self._graph, lambda: "an unnamed block device", Perm.WRITE | Perm.RESIZE, Perm.ALL)
            try:
                backend.insert(node)
                yield backend
            finally:
                await backend.remove()


async def _make_room(target: BlockBackend, size: int, preallocation: str) -> None:
    """Give header and payload their room. Raises CommandError, OSError."""
    if size >= 1 << 63:
        raise CommandError("The requested file size is too large")
    if preallocation == "metadata":
        preallocation = "off"
    try:
        await target.truncate(size, preallocation=preallocation)
    except FileTooLarge as error:
        raise CommandError("The requested file size is too large") from error


async def _size_payload(payload: BlockBackend, options: LuksCreateOptions) -> None:
    """Give a payload of its own its size; QEMU tells no more than the errno. Raises CommandError, OSError."""
    if options.size >= 1 << 63:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if options.size > MAX_LENGTH:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if options.preallocation == "metadata":
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    try:
        await payload.truncate(options.size, preallocation=options.preallocation)
    except FileTooLarge as error:
        raise CommandError("The requested file size is too large") from error


def _writer(options: LuksCreateOptions, passphrase: SecretBytes) -> tuple[int, Writer]:
    """Return the bytes that the header takes, and what writes it; every option is checked. Raises CommandError."""
    if options.version == 1:
        luks1 = options.luks1()
        return header_length(luks1), partial(create_luks1, options=luks1, passphrase=passphrase)
    luks2 = options.luks2()
    sector = luks2.checked().sector_size
    if options.size % sector:
        raise CommandError(f"The size of the volume must be a multiple of its sector size {sector}")
    return create2.header_length(), partial(create_luks2, options=luks2, passphrase=passphrase)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False
