"""qmpd-img create: make an image."""

from __future__ import annotations

import argparse
import os

from qmpd.cli.image import workshop
from qmpd.cli.img import _opts
from qmpd.cli.img._common import add_objects, common, operands, refuse
from qmpd.cli.img._creation import MAX_SIZE, Request, img_create, print_help
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError, FileTooLarge, QmpdError
from qmpd.qapi import keyval


@subcommand("create", help="make an image: raw, qcow2, luks, or a detached luks header")
class Create:
    """Make an image. With -o detached-header=true a luks header is made without payload."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "objects")
        parser.add_argument("-f", "--format", default="raw", metavar="FMT", help="format to make (default: raw)")
        parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTS", help="options, or help")
        parser.add_argument("-b", "--backing", metavar="FILE", help="make it an overlay of FILE")
        parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of that file")
        parser.add_argument("-u", "--backing-unsafe", action="store_true", help="do not look at that file")
        parser.add_argument("--iterations", type=int, metavar="N", help="luks: rounds of key derivation, not a time")
        operands(parser, "FILENAME", "SIZE", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Make it."""
        async with workshop() as shop:
            if _opts.asks_help(args.options):
                print_help(shop, args.format, with_file=bool(args.operands))
                return 0
            if not args.operands:
                refuse("create", "Expecting image file name")
            if len(args.operands) > 2:
                refuse("create", f"Unexpected argument: {args.operands[2]}")
            filename = args.operands[0]
            size = None
            if len(args.operands) > 1:
                size = _size(args.operands[1])
            add_objects(shop, args.objects)
            try:
                iterations = args.iterations if args.format == "luks" else None
                request = Request(shop, filename, args.format, size=size, iterations=iterations)
                if args.iterations is not None and args.format not in ("luks", "qcow2"):
                    raise CommandError("--iterations is for luks, and qcow2 with encrypt.format=luks, only")
                request.read(args.options)
                if args.iterations is not None and args.format == "qcow2":
                    request.given["encrypt.iterations"] = str(args.iterations)
                if args.backing is not None:
                    request.given["backing_file"] = args.backing
                if args.backing_format is not None:
                    request.given["backing_fmt"] = args.backing_format
                await img_create(request, unsafe=args.backing_unsafe, quiet=args.quiet)
            except FileTooLarge as error:
                advice = " (try using a larger cluster size)" if args.format == "qcow2" else ""
                text = f"The image size is too large for file format '{args.format}'{advice}"
                raise CommandError(f"{filename}: {text}") from error
            except QmpdError as error:
                raise CommandError(f"{filename}: {error}", hint=error.hint) from error
            except OSError as error:
                raise CommandError(f"{filename}: {os.strerror(error.errno or 0)}") from error
        return 0


def _size(text: str) -> int:
    size = keyval.parse_size(text)
    if size is None:
        raise CommandError(f"Invalid image size specified: '{text}'.")
    if size > MAX_SIZE:
        raise CommandError(f"Invalid image size specified. Must be between 0 and {MAX_SIZE}.")
    return size
