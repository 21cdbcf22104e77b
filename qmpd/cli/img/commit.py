"""qmpd-img commit: write what an image holds into its backing file."""

from __future__ import annotations

import argparse
import os

from qmpd.cli.image import workshop
from qmpd.cli.img._chain import link, writable_chain
from qmpd.cli.img._common import add_objects, cache_mode, check_exclusive, common, one_operand, operands
from qmpd.cli.img._names import Wish, backend_on, open_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError


@subcommand("commit", help="write what an image holds into its backing file")
class Commit:
    """Write what an image holds into its backing file, then empty it (unless -d or -b)."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "progress", "format", "image_opts", "objects")
        parser.add_argument("-t", "--cache", default="writeback", metavar="MODE", help="cache mode")
        parser.add_argument("-d", "--drop", action="store_true", help="leave the image as it is: it is not needed")
        parser.add_argument("-b", "--base", metavar="FILE", help="write into that image of the chain instead")
        parser.add_argument("-r", "--rate", metavar="RATE", help="bytes a second that are written at most")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Commit."""
        from qmpd.block.batch import WriteFlags
        from qmpd.block.perm import Perm
        from qmpd.cli.img._copy import Copier, Source, Zeroes, knows_zeroes
        from qmpd.cli.img._progress import Progress
        from qmpd.cli.img.convert import first_error, limited

        name = one_operand(args, "commit")
        cache = cache_mode(args.cache)
        limit = limited(args.rate)
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(
                image_format=args.format, image_opts=args.image_opts, writable=True, cache=cache, quiet=args.quiet
            )
            await link(shop, name, wish)
            tree, depth = await writable_chain(shop, name, wish, args.base)
            backend = await open_image(shop, name, wish, tree)
            node = backend.node
            assert node is not None
            base_node = node
            for _ in range(depth):
                base_node = base_node.children["backing"].node
            base = backend_on(shop, base_node, Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE)
            with Progress(backend.size, shown=args.progress and not args.quiet) as progress:
                copier = Copier(
                    [Source(backend, 0)],
                    base,
                    progress,
                    Zeroes.PUNCH if knows_zeroes(base_node) else Zeroes.WRITE,
                    base=base_node,
                    overlay=True,
                    flags=WriteFlags.FUA if cache.writethrough else WriteFlags.NONE,
                    limit=limit,
                )
                try:
                    if base.size < backend.size:
                        await base.truncate(backend.size)
                    await copier.run()
                    await base.flush()
                    if not args.drop and args.base is None:
                        await node.make_empty()
                        await backend.flush()
                except* OSError as group:
                    error = first_error(group)
                    raise CommandError(f"Could not commit: {os.strerror(error.errno or 0)}") from error
            await base.remove()
        if not args.quiet:
            print("Image committed.")
        return 0
