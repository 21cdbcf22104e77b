"""qmpd-img resize: change the size of the disk that an image shows."""

from __future__ import annotations

import argparse
import os
import sys

from qmpd.cli.image import workshop
from qmpd.cli.img._common import PROGRAM, add_objects, check_exclusive, common, operands, refuse
from qmpd.cli.img._names import Wish, open_image, parse_size
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

MODES = ("off", "metadata", "falloc", "full")


@subcommand("resize", help="change the size of the disk")
class Resize:
    """Give an image a new size, or (with + or -) make it so much larger or smaller."""

    @staticmethod
    def prepare(words: list[str]) -> list[str]:
        """Keep a size such as -1G from being taken for options: it is the last word."""
        if len(words) > 1 and words[-1][:1] == "-" and words[-1][1:2].isdigit() and "--" not in words:
            return [*words[:-1], "--", words[-1]]
        return words

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "format", "image_opts", "objects")
        parser.add_argument("--shrink", action="store_true", help="allow a smaller size: what lies behind it is lost")
        parser.add_argument("--preallocation", metavar="MODE", help=f"space taken at once: {', '.join(MODES)}")
        operands(parser, "FILENAME", "[+-]SIZE", required=2)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Resize."""
        if len(args.operands) != 2:
            refuse("resize", "Expecting image file name and size")
        if args.preallocation is not None and args.preallocation not in MODES:
            raise CommandError(f"Invalid preallocation mode '{args.preallocation}'")
        name, text = args.operands
        sign = {"+": 1, "-": -1}.get(text[:1], 0)
        amount = parse_size("size", text[1:] if sign else text)
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(
                image_format=args.format, image_opts=args.image_opts, writable=True, resize=True, quiet=args.quiet
            )
            backend = await open_image(shop, name, wish)
            before = backend.size
            size = before + sign * amount if sign else amount
            if size <= 0:
                raise CommandError("New image size must be positive")
            mode = args.preallocation or "off"
            if size <= before and mode != "off":
                raise CommandError("Preallocation can only be used for growing images")
            if size < before and not args.shrink:
                hint = (
                    f"{PROGRAM}: warning: Shrinking an image will delete all data beyond the shrunken image's end."
                    " Before performing such an operation, make sure there is no important data there."
                )
                raise CommandError("Use the --shrink option to perform a shrink operation.", hint=hint)
            try:
                await backend.truncate(size, preallocation=mode)
            except OSError as error:
                raise CommandError(f"Could not resize image: {os.strerror(error.errno or 0)}") from error
        if not args.quiet:
            print("Image resized.")
            sys.stdout.flush()
        return 0
