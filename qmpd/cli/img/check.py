"""qmpd-img check: find, and with -r mend, what is wrong with an image's tables.

Exit status: 0 no error (or all mended), 1 the check failed, 2 the image is corrupt, 3 it has leaks only,
63 the format has no checks.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from typing import TYPE_CHECKING, Any

from qmpd.cli.image import workshop
from qmpd.cli.img._common import (
    add_objects,
    cache_mode,
    check_exclusive,
    check_output,
    common,
    one_operand,
    operands,
    refuse,
)
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.img._text import pretty
from qmpd.cli.subcommand import subcommand

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_check import CheckResult

FAILED, CORRUPT, LEAKS, UNSUPPORTED = 1, 2, 3, 63


@subcommand("check", help="find and mend errors in the tables of an image")
class Check:
    """Check the tables of an image. Exit status: 2 if it is corrupt, 3 if it only wastes space."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "format", "image_opts", "objects", "share", "output")
        parser.add_argument("-r", "--repair", metavar="leaks|all", help="mend that")
        parser.add_argument("-T", "--cache", default="writeback", metavar="MODE", help="cache mode")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Check, mend, check again."""
        from qmpd.block.options import OpenFlags

        as_json = check_output(args, "check")
        if args.repair not in (None, "leaks", "all"):
            refuse("check", f"--repair (-r) expects 'leaks' or 'all' not '{args.repair}'")
        name = one_operand(args, "check")
        cache = cache_mode(args.cache, "source cache option")
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(
                image_format=args.format,
                image_opts=args.image_opts,
                writable=args.repair is not None,
                force_share=args.force_share,
                cache=cache,
                flags=OpenFlags.CHECK,
                quiet=args.quiet,
            )
            backend = await open_image(shop, name, wish)
            node = backend.node
            assert node is not None

            def out(text: str, *, always: bool = False) -> None:
                if not args.quiet or always:
                    print(text, file=sys.stderr if as_json else sys.stdout)

            try:
                result: CheckResult = await node.check(
                    fix_leaks=args.repair is not None, fix_errors=args.repair == "all"
                )
                for line in result.messages:
                    print(line, file=sys.stderr)
                if args.repair == "leaks" and result.check_errors:
                    raise OSError(errno.EIO, "the refcounts must be made anew, which takes -r all")
                if result.corruptions_fixed or result.leaks_fixed:
                    fixed = (result.leaks_fixed, result.corruptions_fixed)
                    if not as_json:
                        out(
                            "The following inconsistencies were found and repaired:\n\n"
                            f"    {fixed[0]} leaked clusters\n    {fixed[1]} corruptions\n\n"
                            "Double checking the fixed image now..."
                        )
                    result = await node.check(fix_leaks=False, fix_errors=False)
                    for line in result.messages:
                        print(line, file=sys.stderr)
                    result.leaks_fixed, result.corruptions_fixed = fixed
            except OSError as error:
                if error.errno == errno.ENOTSUP:
                    print("qmpd-img: This image format does not support checks", file=sys.stderr)
                    return UNSUPPORTED
                print(f"qmpd-img: Check failed: {os.strerror(error.errno or 0)}", file=sys.stderr)
                return FAILED
            if as_json:
                if not args.quiet:
                    print(pretty(members(result, name, node.driver_name)))
            elif not args.quiet:
                _print(result)
        if result.corruptions:
            return CORRUPT
        if result.leaks:
            return LEAKS
        return FAILED if result.check_errors else 0


def members(result: CheckResult, name: str, image_format: str) -> dict[str, Any]:
    """Return the ImageCheck that the JSON output is."""
    info: dict[str, Any] = {
        "filename": name,
        "format": image_format,
        "check-errors": result.check_errors,
    }
    optional = {
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks-fixed": result.leaks_fixed,
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    return info | {key: value for key, value in optional.items() if value}


def _print(result: CheckResult) -> None:
    if not (result.corruptions or result.leaks or result.check_errors):
        print("No errors were found on the image.")
    else:
        if result.corruptions:
            print(
                f"\n{result.corruptions} errors were found on the image.\nData may be corrupted, or further writes to"
                " the image may corrupt it."
            )
        if result.leaks:
            print(
                f"\n{result.leaks} leaked clusters were found on the image.\n"
                "This means waste of disk space, but no harm to data."
            )
        if result.check_errors:
            print(f"\n{result.check_errors} internal errors have occurred during the check.")
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        print(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated,"
            f" {result.fragmented_clusters * 100 / allocated:.2f}% fragmented,"
            f" {result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        print(f"Image end offset: {result.image_end_offset}")
