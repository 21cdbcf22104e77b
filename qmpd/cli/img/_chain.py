"""Writing below an image: its backing chain spelt out, so that one of its members can be opened for writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmpd.block.options import OpenFlags
from qmpd.cli.img._names import Wish, has_protocol, open_image, read_name, read_options
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.cli.image import Workshop

MAX_CHAIN = 200


async def link(shop: Workshop, name: str, wish: Wish) -> tuple[str, str | None, str | None]:
    """Return (format, backing file, its format) of one image, nothing else being opened. Raises CommandError."""
    from qmpd.block.backing import full_backing_filename

    looking = Wish(
        image_format=wish.image_format,
        image_opts=wish.image_opts,
        force_share=True,
        flags=OpenFlags.NO_IO | OpenFlags.NO_BACKING,
    )
    backend = await open_image(shop, name, looking)
    try:
        node = backend.node
        assert node is not None
        if not node.backing_file:
            return node.driver_name, None, None
        return node.driver_name, full_backing_filename(node), node.backing_format
    finally:
        await backend.remove()


async def writable_chain(shop: Workshop, name: str, wish: Wish, base: str | None) -> tuple[dict[str, Any], int]:
    """Return the options of an image whose chain can be written down to `base`, and how far below that lies.

    base   None: the backing file of the image itself
    Raises CommandError.
    """
    tree = read_options(name) if wish.image_opts else read_name(name)
    if wish.image_format is not None:
        tree.setdefault("driver", wish.image_format)
    top, depth = tree, 0
    current, looking = name, wish
    while True:
        found, backing, backing_format = await link(shop, current, looking)
        tree.setdefault("driver", found)
        if backing is None:
            if depth == 0:
                raise CommandError("Image does not have a backing file")
            raise CommandError(f"Did not find '{base}' in the backing chain of '{name}'")
        depth += 1
        if depth > MAX_CHAIN:
            raise CommandError("The backing chain is too long")
        below = read_name(backing)
        looking = Wish(image_format=backing_format)
        if backing_format is None:
            backing_format = (await link(shop, backing, looking))[0]
        below.setdefault("driver", backing_format)
        below["read-only"] = "off"
        tree["backing"] = below
        if base is None or backing == base or (not has_protocol(base) and backing.endswith(f"/{base}")):
            return top, depth
        current, tree = backing, below
