"""Commands of qemu-io on a backend: read, write, flush and look.

Options, checks and what is printed where: qemu-io-cmds.c of QEMU. Results go to standard output,
a command line that does not fit goes to standard error; both are the daemon's own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from getopt import GetoptError, getopt

from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.node import Extent
from qmpd.block.perm import Perm
from qmpd.errors import QmpdError
from qmpd.qapi import keyval
from qmpd.units import SECTOR, KiB

MAX_BYTES = (2**31 - 512) // 512 * 512
"""Bytes in one request (BDRV_REQUEST_MAX_BYTES)."""
DEFAULT_PATTERN = 0xCD
_PIECE = 4 << 20
"""Bytes read or written at once; longer requests go in pieces, so that memory stays bounded."""


class Refused(Exception):
    """The command line does not fit; the text says why, "" asks for the usage line."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    least, most   how many words may follow it; most -1: any number
    perm          what it needs of the node beyond what the backend has
    """

    name: str
    work: Callable[[BlockBackend, list[str]], Awaitable[str]]
    least: int
    most: int
    shown: str
    help: str
    perm: Perm = Perm.NONE


@dataclass(frozen=True, slots=True)
class Prepared:
    """A command with its words, ready to run: its permissions are taken."""

    entry: Command
    backend: BlockBackend
    words: list[str]

    async def run(self) -> None:
        """Carry it out and print what it has to say."""
        try:
            _print(await self.entry.work(self.backend, self.words))
        except Refused as problem:
            _print(f"{problem}\n" if str(problem) else _usage(self.entry))
        except GetoptError as error:
            _complain(f"{self.entry.name}: invalid option -- '{error.opt}'\n")
            _print(_usage(self.entry))


def prepare(backend: BlockBackend, line: str) -> Prepared | str:
    """Return the command that `line` calls, or what the monitor is to print, usually nothing."""
    words = [word for word in line.split(" ") if word]
    if not words:
        return ""
    entry = COMMANDS.get(words[0])
    if entry is None:
        _complain(f'command "{words[0]}" not found\n')
        return ""
    given = len(words) - 1
    if given < entry.least or (entry.most >= 0 and given > entry.most):
        _complain(f"bad argument count {given} to {words[0]}, expected {_count(entry)} arguments\n")
        return ""
    if entry.perm & ~backend.perm and backend.node is not None:
        try:
            backend.set_perm(backend.perm | entry.perm, backend.shared)
        except QmpdError as error:
            return f"{error}\n"
    return Prepared(entry, backend, words[1:])


def _count(entry: Command) -> str:
    if entry.most < 0:
        return f"at least {entry.least}"
    return str(entry.least) if entry.least == entry.most else f"between {entry.least} and {entry.most}"


def _usage(entry: Command) -> str:
    return f"{entry.name} {entry.shown} -- {entry.help}\n" if entry.shown else f"{entry.name} -- {entry.help}\n"


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _complain(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


# --- numbers ------------------------------------------------------------------------------------


def number(text: str) -> int:
    """Return an offset or length in bytes. Raises Refused."""
    value = keyval.parse_size(text)
    if value is None:
        raise Refused(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
    if value >= 1 << 63:
        raise Refused(f"Parsing error: argument too large -- {text}")
    return value


def _length(text: str) -> int:
    value = number(text)
    if value > MAX_BYTES:
        raise Refused(f"length cannot exceed {MAX_BYTES}, given {text}")
    return value


def _pattern(text: str) -> int:
    value = keyval.parse_int64(text)
    if value is None or not 0 <= value <= 255:
        raise Refused(f"{text} is not a valid pattern byte")
    return value


def size_text(value: float) -> str:
    """Return bytes as qemu-io prints them: up to three decimals, none if they are zero."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    step = 0
    while step < 6 and value >= KiB:
        value /= KiB
        step += 1
    shown = f"{value:.3f}"
    return f"{shown.removesuffix('.000')} {units[step]}"


def report(operation: str, offset: int, count: int, requests: int, seconds: float, *, machine: bool) -> str:
    """Return the lines about a request that went well: `count` bytes at `offset`, in `seconds`."""
    seconds = max(seconds, 1e-6)
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    if machine:
        took = f"{int(hours)}:{int(minutes):02}:{rest:05.2f}"
        return f"{count},{requests},{took},{count / seconds:.3f},{requests / seconds:.3f}\n"
    took = f"{rest:05.2f} sec"
    if hours:
        took = f"{int(hours)}:{int(minutes):02}:{rest:05.2f}"
    elif minutes:
        took = f"{int(minutes):02}:{rest:05.2f}"
    return (
        f"{operation} {count}/{count} bytes at offset {offset}\n"
        f"{size_text(count)}, {requests} ops; {took} "
        f"({size_text(count / seconds)}/sec and {requests / seconds:.4f} ops/sec)\n"
    )


def dump(data: bytes | bytearray, offset: int) -> str:
    """Return the bytes in lines of 16, in hexadecimal and as letters."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        codes = "".join(f"{byte:02x} " for byte in row)
        letters = "".join(chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else "." for byte in row)
        lines.append(f"{offset + at:08x}:  {codes} {letters}\n")
    return "".join(lines)


def _failure(what: str, error: OSError) -> str:
    return f"{what} failed: {os.strerror(error.errno or 5)}\n"


# --- reading and writing ------------------------------------------------------------------------


async def read(backend: BlockBackend, words: list[str]) -> str:
    """`read` and `aio_read`: one request; -P checks the bytes, -v shows them."""
    flags, rest = getopt(words, "Cl:pP:qrs:v")
    if len(rest) != 2:
        raise Refused
    return await _read(backend, dict(flags), number(rest[0]), [_length(rest[1])])


async def readv(backend: BlockBackend, words: list[str]) -> str:
    """`readv`: one request into several buffers."""
    flags, rest = getopt(words, "CP:qrv")
    if len(rest) < 2:
        raise Refused
    return await _read(backend, dict(flags), number(rest[0]), [_length(word) for word in rest[1:]])


async def _read(backend: BlockBackend, flags: dict[str, str], offset: int, lengths: Sequence[int]) -> str:
    total = sum(lengths)
    if "-P" not in flags and ("-l" in flags or "-s" in flags):
        raise Refused
    pattern = _pattern(flags["-P"]) if "-P" in flags else None
    start = number(flags.get("-s", "0"))
    checked = number(flags["-l"]) if "-l" in flags else total - start
    if checked < 0 or checked + start > total:
        raise Refused("pattern verification range exceeds end of read data")
    begun = time.monotonic()
    mismatch, shown = False, ""
    at = 0
    try:
        while True:
            piece = await backend.pread(offset + at, min(_PIECE, total - at))
            if pattern is not None:
                low, high = max(start - at, 0), min(start + checked - at, len(piece))
                mismatch = mismatch or (low < high and piece[low:high].strip(bytes((pattern,))) != b"")
            if "-v" in flags and "-q" not in flags:
                shown += dump(piece, offset + at)
            at += len(piece)
            if at >= total:
                break
    except OSError as error:
        return _failure("read", error)
    taken = time.monotonic() - begun
    printed = f"Pattern verification failed at offset {offset + start}, {checked} bytes\n" if mismatch else ""
    if "-q" in flags:
        return printed
    return printed + shown + report("read", offset, total, 1, taken, machine="-C" in flags)


async def write(backend: BlockBackend, words: list[str]) -> str:
    """`write` and `aio_write`: one request of a pattern, of a file's bytes (-s), or of zeroes (-z)."""
    flags, rest = getopt(words, "CfnpP:qrs:uz")
    if len(rest) != 2:
        raise Refused
    return await _write(backend, dict(flags), number(rest[0]), [_length(rest[1])])


async def writev(backend: BlockBackend, words: list[str]) -> str:
    """`writev`: one request out of several buffers."""
    flags, rest = getopt(words, "CfP:qr")
    if len(rest) < 2:
        raise Refused
    return await _write(backend, dict(flags), number(rest[0]), [_length(word) for word in rest[1:]])


async def _write(backend: BlockBackend, flags: dict[str, str], offset: int, lengths: Sequence[int]) -> str:
    total = sum(lengths)
    for letter in ("n", "u"):
        if f"-{letter}" in flags and "-z" not in flags:
            raise Refused(f"-{letter} requires -z to be specified")
    if sum(flag in flags for flag in ("-z", "-P", "-s")) > 1:
        raise Refused("Only one of -z, -P, and -s can be specified at the same time")
    begun = time.monotonic()
    try:
        if "-z" in flags:
            await backend.pwrite_zeroes(offset, total, _zero_flags(flags))
        else:
            pattern = await _source(flags, total)
            await _write_pattern(backend, offset, total, pattern, WriteFlags.FUA if "-f" in flags else WriteFlags.NONE)
    except OSError as error:
        return _failure("write", error)
    if "-q" in flags:
        return ""
    return report("wrote", offset, total, 1, time.monotonic() - begun, machine="-C" in flags)


def _zero_flags(flags: dict[str, str]) -> WriteFlags:
    chosen = WriteFlags.NONE
    for letter, meaning in (("u", WriteFlags.MAY_UNMAP), ("n", WriteFlags.NO_FALLBACK), ("f", WriteFlags.FUA)):
        if f"-{letter}" in flags:
            chosen |= meaning
    return chosen


async def _source(flags: dict[str, str], total: int) -> bytes:
    """Return the bytes to repeat: one pattern byte, or the head of a file."""
    if "-s" not in flags:
        return bytes((_pattern(flags["-P"]) if "-P" in flags else DEFAULT_PATTERN,))

    def head() -> bytes:
        with open(flags["-s"], "rb") as file:
            return file.read(min(total, _PIECE))

    try:
        data = await asyncio.to_thread(head)
    except OSError as error:
        raise Refused(f"{flags['-s']}: {error.strerror}") from error
    if not data:
        raise Refused(f"{flags['-s']}: file is empty")
    return data


async def _write_pattern(backend: BlockBackend, offset: int, total: int, source: bytes, flags: WriteFlags) -> None:
    whole = _PIECE // len(source) * len(source)
    data = memoryview(source * (min(whole, total) // len(source) + 1))
    at = 0
    while True:
        length = min(whole, total - at)
        batch = Batch.of([Request(offset + at, data[:length])])
        await backend.pwritev(batch, flags)
        batch.raise_first()
        at += length
        if at >= total:
            return


async def discard(backend: BlockBackend, words: list[str]) -> str:
    """`discard`: forget a range."""
    options, rest = getopt(words, "Cq")
    flags = dict(options)
    if len(rest) != 2:
        raise Refused
    offset, length = number(rest[0]), _length(rest[1])
    begun = time.monotonic()
    try:
        await backend.pdiscard(offset, length)
    except OSError as error:
        return _failure("discard", error)
    if "-q" in flags:
        return ""
    return report("discard", offset, length, 1, time.monotonic() - begun, machine="-C" in flags)


async def flush(backend: BlockBackend, words: list[str]) -> str:
    """`flush` and `aio_flush`: make what was written durable; a failure is not shown, as there."""
    try:
        await backend.flush()
    except OSError as error:
        return _failure("flush", error)
    return ""


# --- looking --------------------------------------------------------------------------------------


async def length(backend: BlockBackend, words: list[str]) -> str:
    """`length`: the size of the node."""
    if backend.node is None:
        return "getlength: No medium found\n"
    return f"{size_text(backend.size)}\n"


async def alloc(backend: BlockBackend, words: list[str]) -> str:
    """`alloc`: how much of a range this layer itself holds."""
    offset, count = number(words[0]), number(words[1]) if len(words) > 1 else SECTOR
    try:
        extents = await backend.block_status(offset, max(0, min(count, backend.size - offset)))
    except OSError as error:
        return f"is_allocated failed: {os.strerror(error.errno or 5)}\n"
    held = sum(extent.length for extent in extents if extent.allocated)
    return f"{held}/{count} bytes allocated at offset {size_text(offset)}\n"


async def map_(backend: BlockBackend, words: list[str]) -> str:
    """`map`: what this layer holds, from the beginning to the end."""
    try:
        extents = await backend.block_status(0, backend.size)
    except OSError as error:
        return f"Failed to query: {os.strerror(error.errno or 5)}\n"
    printed = ""
    for offset, count, allocated in _merged(extents):
        state = "    allocated" if allocated else "not allocated"
        printed += f"{size_text(count)} (0x{count:x}) bytes {state} at offset {size_text(offset)} (0x{offset:x})\n"
    return printed


def _merged(extents: Sequence[Extent]) -> list[tuple[int, int, bool]]:
    runs: list[tuple[int, int, bool]] = []
    for one in extents:
        if runs and runs[-1][2] == one.allocated:
            runs[-1] = (runs[-1][0], runs[-1][1] + one.length, one.allocated)
        else:
            runs.append((one.offset, one.length, one.allocated))
    return runs


async def info(backend: BlockBackend, words: list[str]) -> str:
    """`info`: the driver and its cluster size."""
    node = backend.node
    if node is None:
        return ""
    protocol = f"format name: {node.driver_name}\n" * node.is_protocol
    clusters = node.image_info().get("cluster-size", 0)
    return f"format name: {node.driver_name}\n{protocol}cluster size: {size_text(clusters)}\nvm state offset: 0 bytes\n"


async def sleep(backend: BlockBackend, words: list[str]) -> str:
    """`sleep`: wait for so many milliseconds."""
    wait = keyval.parse_int64(words[0])
    if wait is None:
        raise Refused(f"{words[0]} is not a valid argument")
    await asyncio.sleep(max(wait, 0) / 1000)
    return ""


async def help_(backend: BlockBackend, words: list[str]) -> str:
    """`help`: one command, or all of them."""
    if not words:
        return "".join(_usage(entry) for _, entry in sorted(COMMANDS.items()))
    entry = COMMANDS.get(words[0])
    return _usage(entry) if entry else f"command {words[0]} not found\n"


_READ = "[-Cqrv] [-P pattern [-s off] [-l len]] off len"
_WRITE = "[-Cfnqruz] [-P pattern | -s source_file] off len"
_TABLE = (
    Command("read", read, 2, -1, _READ, "read bytes, check or show them"),
    Command("readv", readv, 2, -1, "[-Cqrv] [-P pattern] off len [len..]", "read into several buffers"),
    Command("aio_read", readv, 2, -1, "[-Cqrv] [-P pattern] off len [len..]", "read; it is done on return"),
    Command("write", write, 2, -1, _WRITE, "write a pattern, a file or zeroes", Perm.WRITE),
    Command("writev", writev, 2, -1, "[-Cfqr] [-P pattern] off len [len..]", "write from several buffers", Perm.WRITE),
    Command("aio_write", write, 2, -1, _WRITE, "write; it is done on return", Perm.WRITE),
    Command("aio_flush", flush, 0, 0, "", "wait for requests: none are left waiting"),
    Command("flush", flush, 0, 0, "", "make what was written durable"),
    Command("discard", discard, 2, -1, "[-Cq] off len", "forget a range", Perm.WRITE),
    Command("length", length, 0, 0, "", "show the size"),
    Command("alloc", alloc, 1, 2, "offset [count]", "show how much of a range is held in this layer"),
    Command("map", map_, 0, 1, "", "show what this layer holds"),
    Command("info", info, 0, 0, "", "show driver and cluster size"),
    Command("sleep", sleep, 1, 1, "", "wait for so many milliseconds"),
    Command("help", help_, 0, 1, "[command]", "show this list, or one command of it"),
)
COMMANDS = {entry.name: entry for entry in _TABLE}
