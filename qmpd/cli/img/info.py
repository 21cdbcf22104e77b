"""qmpd-img info: what an image says of itself.

Only the image named is opened; its backing files are when --backing-chain asks for them. Encrypted
volumes are described without a passphrase.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, check_exclusive, check_output, common, one_operand, operands
from qmpd.cli.img._names import PROTOCOL_DRIVERS, Wish, has_protocol, open_image
from qmpd.cli.img._text import describe, pretty
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode
    from qmpd.cli.image import Workshop

MAX_CHAIN = 200
"""Images of a chain at most; longer ones are cyclic, or as good as that."""


@subcommand("info", help="tell what an image is")
class Info:
    """Tell format, sizes and properties of an image."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "format", "image_opts", "objects", "share", "output")
        parser.add_argument("-b", "--backing-chain", action="store_true", help="go on with the backing files")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Print it."""
        as_json = check_output(args, "info")
        name = one_operand(args, "info")
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            infos = await collect(shop, name, args)
        if as_json:
            print(pretty(infos if args.backing_chain else infos[0]))
            return 0
        for at, info in enumerate(infos):
            if at:
                print()
            for line in listing(info):
                print(line)
        return 0


async def collect(shop: Workshop, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the BlockGraphInfo of the image, and of its chain if that is asked for. Raises CommandError."""
    from qmpd.block.options import OpenFlags

    infos: list[dict[str, Any]] = []
    seen: set[str] = set()
    image_format, image_opts = args.format, args.image_opts
    while True:
        if name in seen or len(infos) >= MAX_CHAIN:
            raise CommandError(f"Backing file '{name}' creates an infinite loop.")
        seen.add(name)
        wish = Wish(
            image_format=image_format,
            image_opts=image_opts,
            force_share=args.force_share,
            flags=OpenFlags.NO_IO | OpenFlags.NO_BACKING,
        )
        backend = await open_image(shop, name, wish)
        try:
            assert backend.node is not None
            info = graph_info(backend.node)
        finally:
            await backend.remove()
        infos.append(info)
        if not args.backing_chain or "backing-filename" not in info:
            return infos
        if "full-backing-filename" not in info:
            raise CommandError(f"Could not determine the backing file of '{name}'")
        name = info["full-backing-filename"]
        image_format, image_opts = info.get("backing-filename-format"), False


def graph_info(node: BlockNode) -> dict[str, Any]:
    """Return the BlockGraphInfo of a node, that of its children in `children`."""
    from qmpd.block.info import image_info

    info = image_info(node, chain=False)
    named = info.get("backing-filename", "")
    if has_protocol(named):
        info.setdefault("full-backing-filename", named)
    info["children"] = [
        {"name": child.name, "info": graph_info(child.node)} for child in reversed(node.children.values())
    ]
    return info


def listing(info: dict[str, Any], path: str = "/", indent: str = "") -> list[str]:
    """Return the lines for an image, then those for its children, each under its path and one step deeper."""
    lines = describe(info, indent=indent, protocol=path != "/" and info["format"] in PROTOCOL_DRIVERS)
    for child in info["children"]:
        below = f"{path}{child['name']}"
        lines.append(f"{indent}Child node '{below}':")
        lines += listing(child["info"], f"{below}/", f"{indent}    ")
    return lines
