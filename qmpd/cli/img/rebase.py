"""qmpd-img rebase: give an image another backing file, what it shows staying the same (or with -u, not)."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from qmpd.block.batch import WriteFlags
from qmpd.block.options import OpenFlags
from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, cache_mode, check_exclusive, common, one_operand, operands, refuse
from qmpd.cli.img._creation import full_name
from qmpd.cli.img._names import Wish, backend_on, open_backend, open_image
from qmpd.cli.img._progress import Progress
from qmpd.cli.img._status import stretches
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError, QmpdError
from qmpd.units import KiB, MiB, align_down

if TYPE_CHECKING:
    from qmpd.block.backend import BlockBackend

WINDOW = 1 * MiB


@subcommand("rebase", help="give an image another backing file")
class Rebase:
    """Give an image another backing file (-b ""  for none). Without -u, what it shows stays the same."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "progress", "format", "image_opts", "objects", "share")
        add = parser.add_argument
        add("-t", "--cache", default="writeback", metavar="MODE", help="cache mode of the image")
        add("-b", "--backing", metavar="FILE", help="the new backing file, empty for none")
        add("-F", "--backing-format", metavar="FMT", help="its format")
        add("-T", "--backing-cache", default="writeback", metavar="MODE", help="cache mode of the backing files")
        add("-u", "--backing-unsafe", action="store_true", help="only change the name in the image")
        add("-c", "--compress", action="store_true", help="write what is copied compressed, where clusters are whole")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Rebase."""
        name = one_operand(args, "rebase")
        if args.backing is None and not args.backing_unsafe:
            refuse("rebase", "Must specify backing file (-b) or use unsafe mode (-u)")
        cache = cache_mode(args.cache)
        cache_mode(args.backing_cache, "source cache option")
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(
                image_format=args.format,
                image_opts=args.image_opts,
                writable=True,
                cache=cache,
                flags=OpenFlags.NO_BACKING if args.backing_unsafe else OpenFlags.NONE,
                quiet=args.quiet,
            )
            backend = await open_image(shop, name, wish)
            node = backend.node
            assert node is not None
            if args.backing_format is not None and args.backing_format not in shop.graph.registry.drivers:
                raise CommandError(f"Invalid format name: '{args.backing_format}'")
            if args.compress and not node.supports_compressed:
                raise CommandError("Compression not supported for this file format")
            shown = args.backing or ""
            if not args.backing_unsafe and node.supports_backing:
                from qmpd.block.perm import Perm

                old = node.children.get("backing")
                before = None if old is None else backend_on(shop, old.node, Perm.CONSISTENT_READ)
                after = None
                if shown:
                    wanted = Wish(image_format=args.backing_format, force_share=args.force_share)
                    place = full_name(name, shown)
                    try:
                        after = await open_backend(shop, place, wanted)
                    except (QmpdError, OSError) as error:
                        raise CommandError(f"Could not open new backing file '{shown}': {error}") from error
                with Progress(backend.size, shown=args.progress and not args.quiet) as progress:
                    await _keep_content(backend, before, after, progress, compress=args.compress)
                for one in (before, after):
                    if one is not None:
                        await one.remove()
            try:
                if shown and args.backing_format is None:
                    raise CommandError("backing format must be specified")
                await backend.flush()
                await node.change_backing_file(shown, args.backing_format or "")
            except (QmpdError, OSError) as error:
                text = str(error) if isinstance(error, QmpdError) else "Operation not supported"
                if isinstance(error, OSError) and error.errno != 95:
                    text = os.strerror(error.errno or 0)
                raise CommandError(f"Could not change the backing file to '{shown}': {text}") from error
        return 0


async def _keep_content(
    backend: BlockBackend,
    before: BlockBackend | None,
    after: BlockBackend | None,
    progress: Progress,
    *,
    compress: bool,
) -> None:
    """Write into the image what it showed of `before` and would show differently over `after`. Raises CommandError."""
    node = backend.node
    assert node is not None
    backing = node.children.get("backing")
    grain = int(node.image_info().get("cluster-size", 64 * KiB))
    window = max(WINDOW, grain)
    try:
        async for one in stretches(node, 0, backend.size, base=None if backing is None else backing.node):
            if one.present:
                progress.add(one.length)
                continue
            at = one.start
            while at < one.end:
                stop = min(one.end, align_down(at, window) + window)
                await _keep_window(backend, before, after, at, stop, grain, compress=compress)
                progress.add(stop - at)
                at = stop
    except OSError as error:
        raise CommandError(f"error while rebasing: {os.strerror(error.errno or 0)}") from error


async def _keep_window(
    backend: BlockBackend,
    before: BlockBackend | None,
    after: BlockBackend | None,
    start: int,
    end: int,
    grain: int,
    *,
    compress: bool,
) -> None:
    old, new = await _padded(before, start, end), await _padded(after, start, end)
    if old == new:
        return
    at = start
    while at < end:
        stop = min(end, align_down(at, grain) + grain)
        piece = old[at - start : stop - start]
        if piece != new[at - start : stop - start]:
            if any(piece):
                whole = at % grain == 0 and (stop - at == grain or stop == backend.size)
                flags = WriteFlags.COMPRESSED if compress and whole else WriteFlags.NONE
                await backend.pwrite(at, piece, flags)
            else:
                await backend.pwrite_zeroes(at, stop - at)
        at = stop


async def _padded(backend: BlockBackend | None, start: int, end: int) -> bytes | bytearray:
    """Return the bytes of a backing file, zeroes where it has ended or there is none."""
    there = 0 if backend is None else max(min(end, backend.size) - start, 0)
    if backend is None or not there:
        return bytes(end - start)
    data = await backend.pread(start, there)
    return data + bytes(end - start - there)
