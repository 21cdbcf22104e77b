"""qmpd-img compare: whether two images show the same content.

Exit status: 0 the same, 1 different, 2 an image could not be opened, 3 or 4 it could not be read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, cache_mode, common, operands, refuse
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.img._progress import Progress
from qmpd.cli.img._status import Stretch, stretches
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError
from qmpd.units import SECTOR, MiB

if TYPE_CHECKING:
    from qmpd.block.backend import BlockBackend

WINDOW = 1 * MiB
AHEAD = 8
"""Windows that are read ahead of the one being compared."""


class _Difference(Exception):
    """The images differ; its text says where."""


@subcommand("compare", help="tell whether two images show the same content")
class Compare:
    """Compare the content of two images. Exit status: 0 the same, 1 different, 2 or more an error."""

    failure = 2

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "progress", "objects", "share")
        add = parser.add_argument
        add("-f", "--a-format", dest="format", metavar="FMT", help="format of the first image; else probed")
        add("-F", "--b-format", metavar="FMT", help="format of the second")
        add("--image-opts", action="store_true", help="the names are lists of options")
        add("-s", "--strict", action="store_true", help="sizes and allocation must be the same, too")
        add("-T", "--cache", default="writeback", metavar="MODE", help="cache mode")
        operands(parser, "FILENAME1", "FILENAME2", required=2)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Compare and tell."""
        cache = cache_mode(args.cache, "source cache option")
        if len(args.operands) != 2:
            refuse("compare", "Expecting two image file names")
        if args.image_opts and (args.format or args.b_format):
            raise CommandError("--image-opts and format are mutually exclusive")
        async with workshop() as shop:
            add_objects(shop, args.objects)
            backends = []
            for name, image_format in zip(args.operands, (args.format, args.b_format), strict=True):
                wish = Wish(
                    image_format=image_format, image_opts=args.image_opts, force_share=args.force_share, cache=cache
                )
                backends.append(await open_image(shop, name, wish))
            first, second = backends
            say = _silent if args.quiet else print
            if args.strict and first.size != second.size:
                say("Strict mode: Image size mismatch!")
                return 1
            try:
                with Progress(max(first.size, second.size), shown=args.progress and not args.quiet) as progress:
                    await _compare(first, second, progress, strict=args.strict, say=say)
            except _Difference as found:
                say(str(found))
                return 1
            say("Images are identical.")
        return 0


def _silent(text: str) -> None:
    pass


async def _compare(first: BlockBackend, second: BlockBackend, progress: Progress, *, strict: bool, say: object) -> None:
    """Compare both; raises _Difference at the first difference, CommandError if one cannot be read."""
    assert callable(say)
    common_end = min(first.size, second.size)
    waiting: deque[tuple[int, int, asyncio.Task[int | None]]] = deque()

    async def settle(most: int) -> None:
        while len(waiting) > most:
            _, length, task = waiting.popleft()
            place = await task
            if place is not None:
                raise _Difference(f"Content mismatch at offset {place}!")
            progress.add(length)

    try:
        async for start, length, kinds in _pairs(first, second, common_end):
            one, other = kinds
            if strict and (one.data, one.zero, one.present) != (other.data, other.zero, other.present):
                await settle(0)
                raise _Difference(f"Strict mode: Offset {start} block status mismatch!")
            if one.zero and other.zero:
                await settle(0)
                progress.add(length)
                continue
            left, right = (None if one.zero else first), (None if other.zero else second)
            for at in range(start, start + length, WINDOW):
                size = min(WINDOW, start + length - at)
                waiting.append((at, size, asyncio.ensure_future(_window(left, right, at, size))))
                await settle(AHEAD)
        await settle(0)
        if first.size != second.size:
            say("Warning: Image size mismatch!")
            longer = first if first.size > second.size else second
            assert longer.node is not None
            async for stretch in stretches(longer.node, common_end, longer.size, joined=False):
                if not stretch.zero:
                    for at in range(stretch.start, stretch.end, WINDOW):
                        size = min(WINDOW, stretch.end - at)
                        waiting.append((at, size, asyncio.ensure_future(_window(longer, None, at, size))))
                        await settle(AHEAD)
                else:
                    progress.add(stretch.length)
            await settle(0)
    finally:
        for _, _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in waiting), return_exceptions=True)


async def _pairs(
    first: BlockBackend, second: BlockBackend, end: int
) -> AsyncIterator[tuple[int, int, tuple[Stretch, Stretch]]]:
    """Yield stretches on which both images are of one kind each."""
    assert first.node is not None
    assert second.node is not None
    left, right = stretches(first.node, 0, end), stretches(second.node, 0, end)
    at = 0
    one = other = None
    while at < end:
        if one is None or one.end <= at:
            one = await anext(left)
        if other is None or other.end <= at:
            other = await anext(right)
        stop = min(one.end, other.end)
        yield at, stop - at, (one, other)
        at = stop


async def _window(first: BlockBackend | None, second: BlockBackend | None, offset: int, length: int) -> int | None:
    """Return the first sector in which two images differ, None if none does; no image is zeroes."""
    left = await _read(first, offset, length)
    right = await _read(second, offset, length)
    if left == right:
        return None
    for at in range(0, length, SECTOR):
        if left[at : at + SECTOR] != right[at : at + SECTOR]:
            return offset + at
    return None


async def _read(backend: BlockBackend | None, offset: int, length: int) -> bytes | bytearray:
    if backend is None:
        return bytes(length)
    try:
        return await backend.pread(offset, length)
    except OSError as error:
        raise CommandError(f"Error while reading offset {offset}: {os.strerror(error.errno or 0)}") from error
