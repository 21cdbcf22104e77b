"""qmpd-img bitmap: change the persistent dirty bitmaps of an image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qmpd.block import dirty_bitmap
from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, check_exclusive, common, operands, parse_number
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode


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
            node = (await open_image(shop, name, wish)).node
            assert node is not None
            source = node
            if args.source_file:
                other = Wish(image_format=args.source_format)
                found = (await open_image(shop, args.source_file, other)).node
                assert found is not None
                source = found
            for verb, value in args.actions:
                try:
                    await _act(node, source, verb, bitmap, value, granularity)
                except CommandError as error:
                    raise CommandError(
                        f"Operation {verb} on bitmap {bitmap} failed: {error}", hint=error.hint
                    ) from error
        return 0


async def _act(
    node: BlockNode, source: BlockNode, verb: str, name: str, value: str | None, granularity: int | None
) -> None:
    """Do one action. Raises CommandError."""
    if verb == "add":
        dirty_bitmap.add(node, name, granularity, persistent=True, disabled=False)
        return
    bitmap = dirty_bitmap.find(node, name)
    if verb == "remove":
        bitmap.check(inconsistent=True)
        await node.remove_stored_bitmap(name)
        node.dirty_bitmaps.remove(bitmap)
    elif verb == "merge":
        assert value is not None
        other = dirty_bitmap.find(source, value)
        dirty_bitmap.check_mergeable(bitmap, other)
        bitmap.merge(other)
    elif verb == "clear":
        bitmap.check()
        bitmap.clear()
    else:
        bitmap.check(readonly=True)
        bitmap.enabled = verb == "enable"
