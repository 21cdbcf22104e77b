"""Making a qcow2 image: the `qcow2` branch of blockdev-create.

Options: BlockdevCreateOptionsQcow2 (qapi/block-create.json). Messages: as the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from qmpd.block.backend import BlockBackend
from qmpd.block.child import Child
from qmpd.block.filename import node_filename
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.drivers._qcow2_create import new_image, write_new
from qmpd.qapi.registry import creator
from qmpd.units import KiB


@dataclass(frozen=True, slots=True, eq=False)
class Qcow2CreateOptions:
    """BlockdevCreateOptionsQcow2; `file` is a reference to the node the image is made on. Sizes in bytes."""

    file: str | Mapping[str, Any]
    size: int
    version: str = "v3"
    backing_file: str | None = None
    backing_fmt: str | None = None
    encrypt: dict[str, Any] | None = None
    cluster_size: int = 64 * KiB
    preallocation: str = "off"
    lazy_refcounts: bool = False
    refcount_bits: int = 16
    compression_type: str = "zlib"
    extended_l2: bool = False
    data_file: str | Mapping[str, Any] | None = None
    data_file_raw: bool = False


@creator("qcow2", schema="BlockdevCreateOptionsQcow2", options=Qcow2CreateOptions)
class Qcow2Creator:
    """Writes an empty image into a node."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    async def create(self, options: Qcow2CreateOptions) -> None:
        """Make the image. Raises CommandError, OSError."""

        encryption = None
        if options.encrypt is not None:
            from qmpd.drivers._qcow2_create_crypto import NewEncryption

            encryption = NewEncryption(options.encrypt, self._graph.objects, self._graph.open_flags)

        data: Child | None = None
        async with AsyncExitStack() as stack:
            node = await stack.enter_async_context(self._graph.borrowed(options.file))
            header, preallocation = new_image(
                size=options.size,
                cluster_size=options.cluster_size,
                version=2 if options.version == "v2" else 3,
                refcount_bits=options.refcount_bits,
                lazy_refcounts=options.lazy_refcounts,
                backing_file=options.backing_file,
                backing_fmt=options.backing_fmt,
                preallocation=options.preallocation,
                compression_type=options.compression_type,
                extended_l2=options.extended_l2,
                data_file=None if options.data_file is None else "",
                data_file_raw=options.data_file_raw,
            )
            below: BlockNode | None = None
            if options.data_file is not None:
                below = await stack.enter_async_context(self._graph.borrowed(options.data_file))
                header.set_data_file(node_filename(below).encode("utf-8", "surrogateescape"))
            target = await self._held(stack, node)
            if below is not None:
                data = (await self._held(stack, below)).root

            async def work(file: Child) -> None:
                await write_new(file, header, preallocation, encryption=encryption, data=data)

            await target.visit(work)

    async def _held(self, stack: AsyncExitStack, node: BlockNode) -> BlockBackend:
        """Return a backend that may write to `node`, for as long as `stack` is open."""
        backend = BlockBackend(self._graph, lambda: "an unnamed block device", Perm.WRITE | Perm.RESIZE, Perm.ALL)
        stack.push_async_callback(backend.remove)
        backend.insert(node)
        return backend
