"""Options that several subcommands share, and the way they refuse a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.cli.image import Workshop
    from qmpd.cli.img._names import Cache

PROGRAM = "qmpd-img"


class UsageError(CommandError):
    """A command line that cannot be meant; the hint names the help."""


def refuse(command: str, text: str) -> NoReturn:
    """Raise UsageError with `text` and the way to the subcommand's help."""
    raise UsageError(text, hint=f"Try '{PROGRAM} {command} --help' for more info")


def common(parser: argparse.ArgumentParser, *names: str) -> None:
    """Declare shared options: quiet, progress, objects, format, image_opts, share, output, cache."""
    for name in names:
        if name == "quiet":
            parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
        elif name == "progress":
            parser.add_argument("-p", "--progress", action="store_true", help="show how far it is; SIGUSR1 asks once")
        elif name == "objects":
            parser.add_argument(
                "--object", dest="objects", action="append", default=[], metavar="OBJDEF", help="such as a secret"
            )
        elif name == "format":
            parser.add_argument("-f", "--format", metavar="FMT", help="format of the image; without it, it is probed")
        elif name == "image_opts":
            parser.add_argument("--image-opts", action="store_true", help="the name is a list of options")
        elif name == "share":
            parser.add_argument("-U", "--force-share", action="store_true", help="look even while others write")
        elif name == "output":
            parser.add_argument("--output", default="human", metavar="human|json", help="form of the output")
        else:
            raise AssertionError(name)


def operands(parser: argparse.ArgumentParser, *names: str, required: int) -> None:
    """Declare the operands, which may stand among the options; the subcommand counts them itself."""
    shown = " ".join(name if at < required else f"[{name}]" for at, name in enumerate(names))
    parser.add_argument("operands", nargs="*", metavar=shown, help=argparse.SUPPRESS)


def one_operand(args: argparse.Namespace, command: str, text: str = "Expecting one image file name") -> str:
    """Return the only operand. Raises UsageError."""
    if len(args.operands) != 1:
        refuse(command, text)
    return str(args.operands[0])


def check_output(args: argparse.Namespace, command: str) -> bool:
    """Return True for json. Raises UsageError."""
    if args.output not in ("human", "json"):
        refuse(command, f"--output expects 'human' or 'json' not '{args.output}'")
    return bool(args.output == "json")


def check_exclusive(args: argparse.Namespace) -> None:
    """Refuse --image-opts together with a format."""
    if args.image_opts and args.format:
        raise CommandError("--image-opts and --format are mutually exclusive")


def parse_number(what: str, text: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """Return the number, or size with a suffix, of an option named `what`. Raises CommandError."""
    from qmpd.qapi.keyval import parse_size

    value = parse_size(text)
    if value is None:
        raise CommandError(f"Invalid {what} specified: '{text}'.")
    if not low <= value <= high:
        raise CommandError(f"Invalid {what} specified. Must be between {low} and {high}.")
    return value


def cache_mode(text: str, what: str = "cache option") -> Cache:
    """Return the meaning of a cache mode. Raises CommandError."""
    from qmpd.cli.img._names import CACHES

    if text not in CACHES:
        raise CommandError(f"Invalid {what}: {text}")
    return CACHES[text]


def add_objects(shop: Workshop, texts: Sequence[str]) -> None:
    """Make the objects of --object. Raises CommandError, ValidationError."""
    from qmpd.cli.img import _opts
    from qmpd.cli.img._names import read_json

    for text in texts:
        if text.startswith("{"):
            shop.add_object(read_json(f"json:{text}"))
        else:
            shop.add_object(_opts.crumple([*_opts.parse(text, "qom-type")]))
