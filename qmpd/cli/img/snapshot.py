"""qmpd-img snapshot: list, make, apply or delete internal snapshots, in formats that have them."""

from __future__ import annotations

import argparse
import errno
import os
from typing import TYPE_CHECKING

from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, check_exclusive, common, one_operand, operands, refuse
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.img._text import snapshot_lines
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode

VERBS = ("create", "apply", "delete")


@subcommand("snapshot", help="list, make, apply or delete internal snapshots")
class Snapshot:
    """List the internal snapshots of an image, or make, apply or delete one."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "format", "image_opts", "objects", "share")
        parser.add_argument("-l", "--list", action="store_true", help="list them (the default)")
        parser.add_argument("-c", "--create", metavar="NAME", help="make one of what the disk shows")
        parser.add_argument("-a", "--apply", metavar="NAME", help="make the disk show it again")
        parser.add_argument("-d", "--delete", metavar="NAME", help="forget it")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Do it."""
        verbs = [verb for verb in VERBS if getattr(args, verb) is not None]
        if len(verbs) + args.list > 1:
            refuse("snapshot", "Cannot mix '-l', '-a', '-c', '-d'")
        name = one_operand(args, "snapshot")
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(
                image_format=args.format,
                image_opts=args.image_opts,
                writable=bool(verbs),
                force_share=args.force_share,
                quiet=args.quiet,
            )
            backend = await open_image(shop, name, wish)
            node = backend.node
            assert node is not None
            if not verbs:
                snapshots = node.image_info().get("snapshots")
                if snapshots:
                    print("Snapshot list:")
                    print("\n".join(snapshot_lines(snapshots)))
                return 0
            await _change(node, verbs[0], getattr(args, verbs[0]))
        return 0


async def _change(node: BlockNode, verb: str, tag: str) -> None:
    """Make, apply or delete a snapshot. Raises CommandError."""
    try:
        if verb == "create":
            await node.snapshot_create(tag)
        elif verb == "apply":
            await node.snapshot_apply(tag)
        else:
            await node.snapshot_delete(tag)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        if verb == "apply":
            reason = f"Failed to load snapshot: {reason}"
        raise CommandError(f"Could not {verb} snapshot '{tag}': {reason}") from error
    except CommandError as error:
        raise CommandError(f"Could not {verb} snapshot '{tag}': {error}") from error
