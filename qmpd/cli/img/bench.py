"""qmpd-img bench: time requests to an image, also to an encrypted one (--object)."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import TYPE_CHECKING

from qmpd.cli.image import workshop
from qmpd.cli.img._common import (
    add_objects,
    cache_mode,
    check_exclusive,
    common,
    one_operand,
    operands,
    parse_number,
)
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.backend import BlockBackend

MAX = (1 << 31) - 1


@subcommand("bench", help="time requests to an image")
class Bench:
    """Send requests to an image and tell how long they took."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "format", "image_opts", "objects", "share")
        add = parser.add_argument
        add("-t", "--cache", default="writeback", metavar="MODE", help="cache mode")
        add("-c", "--count", metavar="N", help="requests in all (75000)")
        add("-d", "--depth", metavar="N", help="requests at a time (64)")
        add("-o", "--offset", metavar="OFFSET", help="of the first (0)")
        add("-s", "--buffer-size", metavar="SIZE", help="bytes in each (4k)")
        add("-S", "--step-size", metavar="SIZE", help="from one to the next (its size)")
        add("-i", "--aio", metavar="AIO", help="accepted: there is one way of I/O here")
        add("-n", "--native", action="store_true", help=argparse.SUPPRESS)
        add("-w", "--write", action="store_true", help="write instead of reading")
        add("--pattern", metavar="BYTE", help="the byte to write (0)")
        add("--flush-interval", metavar="N", help="flush after so many writes")
        add("--no-drain", action="store_true", help="do not wait for the writes under way before a flush")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Send them."""
        count = 75000 if args.count is None else parse_number("request count", args.count, 1, MAX)
        depth = 64 if args.depth is None else parse_number("queue depth", args.depth, 1, MAX)
        offset = 0 if args.offset is None else parse_number("offset", args.offset)
        size = 4096 if args.buffer_size is None else parse_number("buffer size", args.buffer_size, 1, MAX)
        step = size if args.step_size is None else parse_number("step size", args.step_size, 0, MAX)
        pattern = 0 if args.pattern is None else parse_number("pattern byte", args.pattern, 0, 255)
        interval = 0 if args.flush_interval is None else parse_number("flush interval", args.flush_interval, 0, MAX)
        name = one_operand(args, "bench")
        if not args.write and interval:
            raise CommandError("--flush-interval is only available in write tests")
        if interval and interval < depth:
            raise CommandError("Flush interval can't be smaller than depth")
        cache = cache_mode(args.cache)
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(
                image_format=args.format,
                image_opts=args.image_opts,
                writable=args.write,
                force_share=args.force_share,
                cache=cache,
                quiet=args.quiet,
            )
            backend = await open_image(shop, name, wish)
            if backend.size < offset + size:
                raise CommandError("Image is too small for the requests")
            what = "write" if args.write else "read"
            if not args.quiet:
                print(
                    f"Sending {count} {what} requests, {size} bytes each, {depth} in parallel"
                    f" (starting at offset {offset}, step size {step})"
                )
                if interval:
                    print(f"Sending flush every {interval} requests")
            load = _Load(backend, count, size, step, offset, interval, args.write, pattern, drain=not args.no_drain)
            begun = time.monotonic()
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(depth, count)):
                        group.create_task(load.work())
            except* OSError as errors:
                from qmpd.cli.img.convert import first_error

                raise CommandError(f"Failed request: {os.strerror(first_error(errors).errno or 0)}") from errors
            if not args.quiet:
                print(f"Run completed in {time.monotonic() - begun:.3f} seconds.")
        return 0


class _Load:
    """The requests of a run; several workers take them in turn."""

    def __init__(
        self,
        backend: BlockBackend,
        count: int,
        size: int,
        step: int,
        offset: int,
        interval: int,
        write: bool,
        pattern: int,
        *,
        drain: bool,
    ) -> None:
        self.backend, self.left, self.size, self.step, self.write = backend, count, size, step, write
        self.first = self.offset = offset
        self.interval, self.pattern, self.sent = interval, pattern, 0
        self.drain, self.busy = drain, 0
        self.gate = asyncio.Condition()
        self.flushing = False

    def _next(self) -> int:
        at = self.offset
        self.offset += self.step
        if self.offset + self.size > self.backend.size:
            self.offset = self.first
        self.left -= 1
        self.sent += 1
        return at

    async def work(self) -> None:
        """Send requests until none is left."""
        from qmpd.block.batch import Batch

        with memoryview(bytearray([self.pattern]) * self.size) as view:
            while self.left > 0:
                if self.flushing:
                    async with self.gate:
                        await self.gate.wait_for(lambda: not self.flushing)
                    continue
                at = self._next()
                flush = self.interval and not self.sent % self.interval
                self.flushing = bool(flush and self.drain)
                self.busy += 1
                batch = Batch.single(at, view)
                await (self.backend.pwritev(batch) if self.write else self.backend.preadv(batch))
                batch.raise_first()
                self.busy -= 1
                if flush:
                    await self._flush()
                elif self.flushing:
                    async with self.gate:
                        self.gate.notify_all()
                await asyncio.sleep(0)

    async def _flush(self) -> None:
        """Flush, when the requests under way have ended if that is wanted."""
        if self.drain:
            async with self.gate:
                await self.gate.wait_for(lambda: not self.busy)
        await self.backend.flush()
        self.flushing = False
        async with self.gate:
            self.gate.notify_all()
