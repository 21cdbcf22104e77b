"""qmpd-img convert: copy images into a new one of any format, or into one that is there (-n)."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from qmpd.cli.image import workshop
from qmpd.cli.img import _opts
from qmpd.cli.img._common import (
    PROGRAM,
    add_objects,
    cache_mode,
    check_exclusive,
    common,
    operands,
    parse_number,
    refuse,
)
from qmpd.cli.img._creation import Request, known_options, print_help
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.img._sources import PREFIX, check_bitmaps, copy_bitmaps, show_snapshot
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError, QmpdError
from qmpd.units import KiB, MiB

if TYPE_CHECKING:
    from qmpd.block.backend import BlockBackend
    from qmpd.block.node import BlockNode
    from qmpd.block.throttle_group import ThrottleState
    from qmpd.cli.image import Workshop

MAX_SPARSE = 16 * MiB
MAX_COROUTINES = 16


@subcommand("convert", help="copy images into one of another format")
class Convert:
    """Copy one or more images, one after the other, into one of another format."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "progress", "objects", "share")
        add = parser.add_argument
        add("-f", "--source-format", dest="format", metavar="FMT", help="format of the sources; else probed")
        add("--image-opts", "--source-image-opts", action="store_true", help="source names are lists of options")
        add("-T", "--source-cache", default="writeback", metavar="MODE", help="cache mode of the sources")
        add("-l", "--source-snapshot", metavar="SNAPSHOT", help="copy that internal snapshot")
        add("-O", "--target-format", metavar="FMT", help="format to make (default: raw)")
        add("--target-image-opts", action="store_true", help="the target's name is a list of options (with -n)")
        add("-o", "--target-options", dest="options", action="append", default=[], metavar="OPTS", help="or help")
        add("-t", "--target-cache", default="unsafe", metavar="MODE", help="cache mode of the target")
        add("-c", "--compress", action="store_true", help="write compressed clusters")
        add("-B", "--backing", metavar="FILE", help="make the target an overlay of FILE; only differences are copied")
        add("-F", "--backing-format", metavar="FMT", help="format of that file")
        add("-n", "--no-create", action="store_true", help="the target is there already")
        add("--target-is-zero", action="store_true", help="and it is zero (with -n)")
        add("-S", "--sparse-size", metavar="SIZE", help="zeroes in a row that make a hole (4k); 0 allocates all")
        add("-m", "--parallel", metavar="N", help="windows in flight (8)")
        add("-W", "--oob-writes", action="store_true", help="write in any order")
        add("-C", "--copy-range-offloading", action="store_true", help="accepted; the data is always read and written")
        add("-r", "--rate", metavar="RATE", help="bytes a second that are written at most")
        add("--bitmaps", action="store_true", help="copy the persistent dirty bitmaps of the source too")
        add("--skip-broken-bitmaps", action="store_true", help="but not those that were not saved properly")
        add("--salvage", action="store_true", help="what cannot be read is warned of, and zero in the target")
        operands(parser, "SOURCE...", "TARGET", required=2)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Check the options, open, make, copy."""
        sparse, coroutines = _sparse(args.sparse_size), _coroutines(args.parallel)
        image_format = args.target_format or "raw"
        async with workshop() as shop, AsyncExitStack() as stack:
            if _opts.asks_help(args.options):
                print_help(shop, image_format, with_file=bool(args.operands))
                return 0
            _check(args)
            add_objects(shop, args.objects)
            job = _Conversion(shop, args, stack, sparse, coroutines, limited(args.rate))
            await job.run(args.operands[:-1], args.operands[-1], image_format)
        return 0


def _sparse(text: str | None) -> int:
    from qmpd.qapi.keyval import parse_size

    value = 4 * KiB if text is None else parse_size(text)
    if value is None or value % 512 or value > MAX_SPARSE:
        raise CommandError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to"
            f" {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return value


def _coroutines(text: str | None) -> int:
    value = 8 if text is None else int(text) if text.isdigit() else 0
    if not 1 <= value <= MAX_COROUTINES:
        raise CommandError(f"Invalid number of coroutines specified. Must be between 1 and {MAX_COROUTINES}.")
    return value


def _check(args: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing, in the reference's order. Raises CommandError."""
    check_exclusive(args)
    if args.target_image_opts and args.target_format:
        raise CommandError("--target-image-opts and -O are mutually exclusive")
    if args.skip_broken_bitmaps and not args.bitmaps:
        raise CommandError("Use of --skip-broken-bitmaps requires --bitmaps")
    if args.target_is_zero and not args.no_create:
        raise CommandError("--target-is-zero requires use of -n flag")
    if args.target_image_opts and not args.no_create:
        raise CommandError("--target-image-opts requires use of -n flag")
    if args.copy_range_offloading and args.salvage:
        raise CommandError("Cannot use copy offloading in salvaging mode")
    if args.copy_range_offloading and args.compress:
        raise CommandError("Cannot enable copy offloading when -c is used")
    if args.copy_range_offloading and args.sparse_size is not None:
        raise CommandError("Cannot enable copy offloading when -S is used")
    if args.no_create and args.options:
        raise CommandError("-o has no effect when skipping image creation")
    cache_mode(args.source_cache, "source cache option")
    cache_mode(args.target_cache)
    if len(args.operands) < 2:
        raise CommandError("Must specify image file name")
    if args.backing is not None and args.backing_format is None:
        raise CommandError("Use of backing file requires explicit backing format")
    if args.operands[-1] == "":
        refuse("convert", "Expecting image file name")


class _Conversion:
    """One run: sources, target, copy."""

    def __init__(
        self,
        shop: Workshop,
        args: argparse.Namespace,
        stack: AsyncExitStack,
        sparse: int,
        coroutines: int,
        limit: ThrottleState | None,
    ) -> None:
        self.shop, self.args, self.stack = shop, args, stack
        self.sparse, self.coroutines, self.limit = sparse, coroutines, limit

    async def run(self, names: list[str], target_name: str, image_format: str) -> None:
        """Do it. Raises CommandError."""
        args = self.args
        sources = [await self._open(name, self._source_wish()) for name in names]
        first = sources[0].node
        assert first is not None
        if args.source_snapshot is not None:
            if len(sources) > 1 and not args.source_snapshot.startswith(PREFIX):
                raise CommandError("No support for concatenating multiple snapshot")
            await show_snapshot(first, args.source_snapshot)
        if args.bitmaps:
            if len(sources) > 1:
                raise CommandError("Copying bitmaps only possible with single source")
            check_bitmaps(first, skip_broken=args.skip_broken_bitmaps)
        size = sum(source.size for source in sources)
        if args.compress and not args.target_image_opts:
            self._check_compression(image_format)
        request = Request(self.shop, target_name, image_format)
        if not args.no_create:
            await self._make(request, size, len(sources))
        target = await self._open(target_name, self._target_wish(image_format, request))
        node = target.node
        assert node is not None
        if args.bitmaps and not node.keeps_bitmaps:
            raise CommandError(f"Format driver '{node.driver_name}' does not support bitmaps")
        if target.size < size:
            raise CommandError("output file is smaller than input file")
        # of a preallocated image that is encrypted, the zeroes in its file are no zeroes for the guest
        garbage = bool(node.image_info().get("encrypted")) and request.given.get("preallocation", "off") != "off"
        new = not args.no_create and not garbage
        await self._copy(sources, target, size, new=new, overlay="backing_file" in request.given)
        if args.bitmaps:
            copy_bitmaps(first, node)

    def _check_compression(self, image_format: str) -> None:
        """Refuse -c for a driver that does not write compressed clusters. Raises CommandError."""
        known_options(self.shop, image_format)
        if not self.shop.graph.registry.drivers[image_format].cls.can_compress:
            raise CommandError("Compression not supported for this file format")

    def _source_wish(self) -> Wish:
        args = self.args
        return Wish(
            image_format=args.format,
            image_opts=args.image_opts,
            force_share=args.force_share,
            alone=not args.force_share,
            cache=cache_mode(args.source_cache),
        )

    def _target_wish(self, image_format: str, request: Request) -> Wish:
        args = self.args
        secrets = {name: value for name, value in request.given.items() if name.endswith("key-secret")}
        if "encrypt.key-secret" in secrets:
            secrets["encrypt.format"] = request.given.get("encrypt.format", "aes")
        return Wish(
            image_format=None if args.target_image_opts else image_format,
            image_opts=args.target_image_opts,
            writable=True,
            unmap=bool(self.sparse),
            extra=tuple(secrets.items()),
            cache=cache_mode(args.target_cache),
            quiet=args.quiet,
        )

    async def _open(self, name: str, wish: Wish) -> BlockBackend:
        backend = await open_image(self.shop, name, wish)
        self.stack.push_async_callback(backend.remove)
        return backend

    async def _make(self, request: Request, size: int, sources: int) -> None:
        """Make the target. Raises CommandError."""
        args = self.args
        request.read(args.options)
        if args.backing is not None:
            request.given["backing_file"] = args.backing
            request.given["backing_fmt"] = args.backing_format
        if "backing_file" in request.given:
            if sources > 1:
                raise CommandError(
                    "Having a backing file for the target makes no sense when concatenating multiple input images"
                )
            if "backing_fmt" not in request.given:
                raise CommandError("Use of backing file requires explicit backing format")
        if args.compress and ("encryption" in request.given or "encrypt.format" in request.given):
            raise CommandError("Compression and encryption not supported at the same time")
        if args.compress and request.given.get("preallocation", "off") != "off":
            raise CommandError("Compression and preallocation not supported at the same time")
        request.given.pop("size", None)
        request.size = size
        try:
            await request.find_backing(unsafe=False)
            await request.make()
        except (QmpdError, OSError) as error:
            text = str(error) if isinstance(error, QmpdError) else os.strerror(error.errno or 0)
            hint = error.hint if isinstance(error, QmpdError) else None
            name, kind = request.filename, request.image_format
            raise CommandError(f"{name}: error while converting {kind}: {text}", hint=hint) from error

    async def _copy(
        self, sources: list[BlockBackend], target: BlockBackend, size: int, *, new: bool, overlay: bool
    ) -> None:
        from qmpd.block.batch import WriteFlags
        from qmpd.cli.img._copy import WINDOW, Copier, Source, Zeroes, knows_zeroes
        from qmpd.cli.img._progress import Progress

        args = self.args
        node = target.node
        assert node is not None
        zero_already = (new and not overlay and node.driver_name != "luks") or args.target_is_zero
        if not self.sparse:
            zeroes = Zeroes.WRITE
        elif zero_already:
            zeroes = Zeroes.SKIP
        else:
            zeroes = Zeroes.PUNCH if knows_zeroes(node) else Zeroes.WRITE
        placed, start = [], 0
        cluster = int(node.image_info().get("cluster-size", 0)) if args.compress else 0
        if args.compress and not node.supports_compressed:
            raise CommandError("Compression not supported for this file format")
        for source in sources:
            if cluster and start % cluster:
                raise CommandError("With -c, every source but the last must be a whole number of clusters")
            placed.append(Source(source, start))
            start += source.size
        cache = cache_mode(args.target_cache)
        with Progress(size, shown=args.progress and not args.quiet) as progress:
            copier = Copier(
                placed,
                target,
                progress,
                zeroes,
                sparse=min(self.sparse, WINDOW),
                parallel=self.coroutines,
                in_order=not args.oob_writes,
                base=_below(sources[0]) if overlay else None,
                overlay=overlay,
                compress=cluster,
                flags=WriteFlags.FUA if cache.writethrough else WriteFlags.NONE,
                limit=self.limit,
                salvage=self._lost if args.salvage else None,
            )
            try:
                await copier.run()
                await target.flush()
            except* OSError as group:
                error = first_error(group)
                raise CommandError(f"error while converting: {os.strerror(error.errno or 0)}") from error

    def _lost(self, what: str, offset: int, error: OSError) -> None:
        """Tell of something that cannot be read."""
        if not self.args.quiet:
            text = os.strerror(error.errno or 0)
            print(f"{PROGRAM}: warning: error while reading {what} {offset}: {text}", file=sys.stderr)


def limited(rate: str | None) -> ThrottleState | None:
    """Return what lets writes through at `rate` bytes a second, None for no limit. Raises CommandError."""
    if rate is None or not (value := parse_number("rate limit", rate)):
        return None
    from qmpd.block.throttle_group import ThrottleState
    from qmpd.block.throttle_limits import merge, no_limits

    state = ThrottleState()
    state.configure(merge(no_limits(), {"bps-write": value}))
    return state


def _below(source: BlockBackend) -> BlockNode | None:
    assert source.node is not None
    backing = source.node.children.get("backing")
    return None if backing is None else backing.node


def first_error(group: BaseExceptionGroup[OSError]) -> OSError:
    """Return one of the errors in a group."""
    inner = group.exceptions[0]
    return first_error(inner) if isinstance(inner, BaseExceptionGroup) else inner
