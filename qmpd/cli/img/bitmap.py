"""qmpd-img bitmap: change the persistent dirty bitmaps of an image, where its driver can."""

from __future__ import annotations

import argparse
from typing import Any

from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, check_exclusive, common, operands, parse_number
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError


class _Action(argparse.Action):
    """Collects the actions in the order given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.actions = [*namespace.actions, (str(option_string).lstrip("-"), values or None)]


@subcommand("bitmap", help="change persistent dirty bitmaps")
class Bitmap:
    """Change a persistent dirty bitmap of an image; several actions are done in turn."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "format", "image_opts", "objects")
        add = parser.add_argument
        for verb in ("add", "remove", "clear", "enable", "disable"):
            add(f"--{verb}", dest="actions", action=_Action, nargs=0, default=[], help=f"{verb} it")
        add("--merge", dest="actions", action=_Action, default=[], metavar="SOURCE", help="add what SOURCE has")
        add("-b", "--source-file", metavar="FILE", help="image of that SOURCE")
        add("-F", "--source-format", metavar="FMT", help="its format")
        add("-g", "--granularity", metavar="SIZE", help="bytes for one bit of --add")
        operands(parser, "FILENAME", "BITMAP", required=2)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Do the actions."""
        if not args.actions:
            raise CommandError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
        if len(args.operands) != 2:
            raise CommandError("Expecting filename and bitmap name")
        merging = any(verb == "merge" for verb, _ in args.actions)
        if args.granularity is not None and not any(verb == "add" for verb, _ in args.actions):
            raise CommandError("granularity only supported with --add")
        if (args.source_file or args.source_format) and not merging:
            raise CommandError("Merge bitmap source file only supported with --merge")
        granularity = None if args.granularity is None else parse_number("granularity", args.granularity, 1)
        name, bitmap = args.operands
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(image_format=args.format, image_opts=args.image_opts, writable=True)
            backend = await open_image(shop, name, wish)
            node = backend.node
            assert node is not None
            for verb, value in args.actions:
                work = getattr(node, f"bitmap_{verb}", None)
                try:
                    if work is None or args.source_file:
                        raise CommandError(
                            f"Can't store persistent bitmaps to {node.name}: Operation not supported"
                            if verb == "add"
                            else "Operation not supported"
                        )
                    if verb == "add":
                        await work(bitmap, granularity)
                    elif verb == "merge":
                        await work(bitmap, value)
                    else:
                        await work(bitmap)
                except CommandError as error:
                    raise CommandError(f"Operation {verb} on bitmap {bitmap} failed: {error}") from error
        return 0
