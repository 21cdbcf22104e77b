"""Works on images with the daemon's own code, in this process: a graph of its own, on one loop, without a monitor."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from qmpd.block.backend import BlockBackend
from qmpd.block.graph import Graph
from qmpd.block.loose import check_options
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.events import EventBus
from qmpd.qapi import schema as schemas
from qmpd.qapi.bind import build
from qmpd.qapi.offered import lazily
from qmpd.qapi.visit import validate
from qmpd.qom.tree import ObjectTree

SCHEMA = "storage-daemon.json"
PROTOCOL_NODE = "image"
PLUGINS = ("drivers", "objects")
"""What a tool may need of the plug-ins; each is imported when it is first used."""


class Workshop:
    """The graph and the objects of one tool run."""

    def __init__(self) -> None:
        registry = lazily(PLUGINS)
        self.schema = schemas.load(SCHEMA)
        self.objects = ObjectTree(registry)
        self.graph = Graph(self.objects, EventBus(), registry=registry)
        self.graph.validate = lambda tree: check_options(self.schema, tree)

    def add_object(self, members: Mapping[str, Any]) -> None:
        """Add an object, its values given as text. Raises ValidationError or CommandError."""
        self.objects.create(validate(self.schema, "ObjectOptions", dict(members), keyval=True))

    def member_names(self, union: str, tag: str) -> frozenset[str]:
        """Return the members that a branch of a union has, those of its base included."""
        entity = self.schema.object_type(union)
        branch = entity.branches.get(tag)
        names = {member.name for member in self.schema.members(entity.base)}
        return frozenset(names | {member.name for member in self.schema.members(branch)})

    async def run_creator(self, options: Mapping[str, Any], **extra: Any) -> None:
        """Do what blockdev-create does with `options`, given as text. Raises ValidationError or CommandError.

        extra   what the creator takes beyond its options
        """
        members = dict(validate(self.schema, "BlockdevCreateOptions", dict(options), keyval=True))
        entry = self.graph.registry.creators.get(members.pop("driver"))
        if entry is None:
            raise CommandError(f"Format driver '{options['driver']}' does not support image creation")
        assert entry.options is not None
        await entry.cls(self.graph).create(build(entry.options, members), **extra)

    async def read(self, tree: Mapping[str, Any], offset: int, length: int) -> bytes:
        """Open the nodes of a BlockdevOptions tree and return `length` bytes from `offset` of the top one."""
        node = await self.graph.blockdev_add(validate(self.schema, "BlockdevOptions", dict(tree)))
        backend = BlockBackend(self.graph, lambda: "qmpd-img", Perm.CONSISTENT_READ, Perm.ALL)
        backend.insert(node)
        try:
            return bytes(await backend.pread(offset, length))
        finally:
            await backend.remove()


@contextlib.asynccontextmanager
async def workshop() -> AsyncIterator[Workshop]:
    """Make a workshop and close everything it holds at the end."""
    shop = Workshop()
    try:
        yield shop
    finally:
        await shop.graph.close_all()
        shop.objects.close()


async def create_image(
    filename: str,
    image_format: str,
    options: Mapping[str, Any],
    *,
    size: str | None = None,
    header_only: bool = False,
    objects: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Make a file and an image of `image_format` in it; a file that is there already is emptied.

    options      members of the format's branch of BlockdevCreateOptions, as text
    size         of the disk, as text ("10G")
    header_only  luks: the file becomes a detached header, and the payload is elsewhere
    objects      made first: secrets that the options name
    """
    async with workshop() as shop:
        for members in objects:
            shop.add_object(members)
        await make_image(shop, filename, image_format, options, size=size, header_only=header_only)


async def make_image(
    shop: Workshop,
    filename: str,
    image_format: str,
    options: Mapping[str, Any],
    *,
    size: str | None = None,
    header_only: bool = False,
    file_options: Mapping[str, Any] | None = None,
    iterations: int | None = None,
) -> None:
    """Like `create_image`, in a workshop that is there already; nothing stays open.

    file_options   members of BlockdevCreateOptionsFile for the file below a format
    iterations     luks: rounds of key derivation in place of a time
    """
    below = file_options or {}
    if image_format in ("raw", "file"):
        await shop.run_creator({"driver": "file", "filename": filename, "size": size, **options, **below})
        return
    await shop.run_creator({"driver": "file", "filename": filename, "size": "0", **below})
    reference = {"driver": "file", "filename": filename}
    where = "header" if header_only else "file"
    extra = {} if iterations is None else {"iterations": iterations}
    await shop.run_creator({"driver": image_format, where: reference, "size": size or "0", **options}, **extra)
