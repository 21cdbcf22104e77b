"""qmpd-img snapshot: list the internal snapshots of an image, and make, apply or delete one where its driver can."""

from __future__ import annotations

import argparse
import errno
import os

from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, check_exclusive, common, one_operand, operands, refuse
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.img._text import snapshot_lines
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

VERBS = {"create": "create", "apply": "apply", "delete": "delete"}


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
            verb = verbs[0]
            tag = getattr(args, verb)
            work = getattr(node, f"snapshot_{verb}", None)
            try:
                if work is None:
                    raise OSError(errno.ENOTSUP, "no internal snapshots")
                await work(tag)
            except OSError as error:
                raise CommandError(f"Could not {verb} snapshot '{tag}': {os.strerror(error.errno or 0)}") from error
            except CommandError as error:
                raise CommandError(f"Could not {verb} snapshot '{tag}': {error}") from error
        return 0
