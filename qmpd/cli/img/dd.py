"""qmpd-img dd: copy blocks of one image into a new one."""

from __future__ import annotations

import argparse
import sys

from qmpd.cli.image import workshop
from qmpd.cli.img._common import PROGRAM, add_objects, common, operands, parse_number
from qmpd.cli.img._creation import Request
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError, QmpdError
from qmpd.units import MiB, align_up

MAX_BLOCK = (1 << 31) - 1
WINDOW = 1 * MiB


@subcommand("dd", help="copy blocks into a new image")
class Dd:
    """Copy if=FILE into a new image of=FILE, in blocks of bs=SIZE bytes.

    count=N ends after the Nth block of the input, skip=N begins after its Nth: as in qemu-img, unlike dd(1), both
    count from the start.
    """

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "format", "image_opts", "objects", "share")
        parser.add_argument("-O", "--output-format", default="raw", metavar="FMT", help="format to make")
        parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTS", help="its options")
        operands(parser, "if=FILE", "of=FILE", "bs=SIZE", "count=N", "skip=N", required=2)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Copy."""
        given: dict[str, str] = {}
        for word in args.operands:
            key, sign, value = word.partition("=")
            if not sign or key not in ("if", "of", "bs", "count", "skip"):
                raise CommandError(f"unrecognized operand {key}")
            given[key] = value
        block = parse_number("bs", given["bs"], 1, MAX_BLOCK) if "bs" in given else 512
        count = parse_number("count", given["count"]) if "count" in given else None
        skip = parse_number("skip", given["skip"]) if "skip" in given else 0
        if "if" not in given or "of" not in given:
            raise CommandError("Must specify both input and output files")
        if args.image_opts and args.format:
            raise CommandError("--image-opts and --format are mutually exclusive")
        async with workshop() as shop:
            add_objects(shop, args.objects)
            wish = Wish(image_format=args.format, image_opts=args.image_opts, force_share=args.force_share, alone=True)
            source = await open_image(shop, given["if"], wish)
            try:
                request = Request(shop, given["of"], args.output_format)
                request.read(args.options)
            except QmpdError as error:
                text = "Unknown file format" if str(error).startswith("Unknown file format") else str(error)
                raise CommandError(text) from error
            end = source.size if count is None else min(source.size, count * block)
            start = min(skip * block, source.size)
            if skip * block > source.size:
                print(f"{PROGRAM}: {given['if']}: cannot skip to specified offset", file=sys.stderr)
            size = max(end - start, 0)
            request.size = size
            try:
                await request.make()
            except QmpdError as error:
                raise CommandError(f"{given['of']}: error while creating output image: {error}") from error
            secrets = tuple((name, value) for name, value in request.given.items() if name.endswith("key-secret"))
            target = await open_image(
                shop, given["of"], Wish(image_format=args.output_format, writable=True, resize=True, extra=secrets)
            )
            if target.size < align_up(size, 512):
                raise CommandError("output file is smaller than input file")
            for at in range(0, size, WINDOW):
                length = min(WINDOW, size - at)
                await target.pwrite(at, await source.pread(start + at, length))
            await target.flush()
        return 0
