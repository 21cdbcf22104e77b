"""qmpd-img map: where the content of an image lies, over its backing chain."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, check_exclusive, check_output, common, one_operand, operands, parse_number
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.img._status import Stretch, stretches
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@subcommand("map", help="tell where the content of an image lies")
class Map:
    """Tell where the content of an image lies, in it and in its backing files."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "format", "image_opts", "objects", "share", "output")
        parser.add_argument("-s", "--start-offset", metavar="OFFSET", help="begin there")
        parser.add_argument("-l", "--max-length", metavar="LENGTH", help="end after so many bytes")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Print it."""
        as_json = check_output(args, "map")
        name = one_operand(args, "map")
        start = 0 if args.start_offset is None else parse_number("start offset", args.start_offset)
        limit = None if args.max_length is None else parse_number("max length", args.max_length)
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(image_format=args.format, image_opts=args.image_opts, force_share=args.force_share)
            backend = await open_image(shop, name, wish)
            node = backend.node
            assert node is not None
            end = backend.size if limit is None else min(backend.size, start + limit)
            found = stretches(node, start, end)
            await (_print_json(found) if as_json else _print_table(found))
        return 0


async def _print_json(found: AsyncIterator[Stretch]) -> None:
    opening = "["
    async for one in found:
        place = "" if one.host is None else f', "offset": {one.host}'
        sys.stdout.write(
            f'{opening}{{ "start": {one.start}, "length": {one.length}, "depth": {one.depth},'
            f' "present": {_word(one.present)}, "zero": {_word(one.zero)}, "data": {_word(one.data)},'
            f' "compressed": {_word(one.compressed)}{place}}}'
        )
        opening = ",\n"
    if opening == "[":
        none = '"depth": 0, "present": false, "zero": false, "data": false, "compressed": false'
        sys.stdout.write(f'[{{ "start": 0, "length": 0, {none}}}')
    sys.stdout.write("]\n")


def _word(value: bool) -> str:
    return "true" if value else "false"


async def _print_table(found: AsyncIterator[Stretch]) -> None:
    from qmpd.block.filename import node_filename

    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    async for one in found:
        if not one.data or one.zero:
            continue
        if one.host is None or one.file is None:
            raise CommandError("File contains external, encrypted or compressed clusters.")
        print(f"{_hex(one.start):<16}{_hex(one.length):<16}{_hex(one.host):<16}{node_filename(one.file)}")


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"
