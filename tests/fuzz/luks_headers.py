"""What a damaged LUKS header may do to us: be refused, or be opened."""

from __future__ import annotations

import functools
import json
import random
import time
import tracemalloc
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from qmpd.errors import QmpdError
from qmpd.formats.luks2 import pack_copy
from qmpd.luks.detect import read_header
from tests.gen import luks1, luks2

T = TypeVar("T")
MEMORY = 64 << 20
"""Bytes that reading a header may take at most; the largest valid LUKS2 header is 4 MiB, twice."""
SECONDS = 5.0
EDGES = (0, 1, 2, 511, 512, 4095, 4096, 16384, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
WORDS = (
    "",
    "0",
    "-1",
    "luks2",
    "crypt",
    "raw",
    "pbkdf2",
    "argon2id",
    "aes-xts-plain64",
    "dynamic",
    "18446744073709551615",
)


class Source:
    """Header bytes, as a volume reads them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    async def pread(self, offset: int, length: int) -> bytearray:
        assert offset >= 0
        assert offset + length <= self.size
        return bytearray(self._data[offset : offset + length])


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine that never waits returns, without the cost of an event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    raise AssertionError("it waits")


def judge(data: bytes) -> str:
    """Read a header as a daemon does, as whole volume and detached; return why the latter is refused, "" if it is not.

    Fails on any exception but ours.
    """
    verdict = ""
    for detached in (False, True):
        verdict = ""
        try:
            volume = finished(read_header(Source(data), detached=detached))  # type: ignore[arg-type]
            json.dumps(volume.info())
        except QmpdError as error:
            verdict = str(error)
            assert len(verdict) < 4096, "an error as long as the header that caused it"
    return verdict


def judge_bounded(data: bytes) -> str:
    """As `judge`; fails also when it takes long or much memory."""
    tracemalloc.start()
    began = time.monotonic()
    try:
        verdict = judge(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak} bytes to read a header of {len(data)}"
    assert time.monotonic() - began < SECONDS
    return verdict


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Return valid headers of both versions."""
    return luks1.header(detached=True)[:4096], luks1.header(detached=False)[:4096], luks2.header()


def damaged(chance: random.Random, seed: bytes) -> bytes:
    """Return a header with a few bytes changed; of LUKS2, checksums are wrong then, which is one thing to be tried."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(min(len(data), 4096 + 600))
        kind = chance.randrange(4)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            value = chance.choice(EDGES)
            width = 4 if value < 1 << 32 else 8
            data[at : at + width] = value.to_bytes(width, "big")
        elif kind == 2:
            del data[chance.randrange(len(data)) :]
            data = data or bytearray(1)
        else:
            data[at : at + 8] = chance.randbytes(8)
    return bytes(data)


def sealed(text: bytes) -> bytes:
    """Return a LUKS2 header whose checksums are right, whatever its JSON area says."""
    text = text[: luks2.COPY - 4096]
    return b"".join(pack_copy(luks2.binary(), text, at * luks2.COPY) for at in range(2)) + bytes(luks2.AREA)


def other_value(chance: random.Random, value: Any) -> Any:
    """Return something else than a JSON value, of its type or not."""
    choices: list[Any] = [
        None,
        True,
        -1,
        1.5,
        [],
        {},
        [value],
        {"0": value},
        chance.choice(EDGES),
        chance.choice(WORDS),
    ]
    choices += [str(chance.choice(EDGES)), "x" * 300, "\udcff", value]
    return chance.choice(choices)


def damaged_json(chance: random.Random) -> bytes:
    """Return a LUKS2 header with good checksums over changed JSON."""
    tree = luks2.tree()
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        target: Any = tree
        while True:
            if not isinstance(target, dict) or not target:
                break
            key = chance.choice(sorted(target))
            below = target[key]
            if isinstance(below, dict) and below and chance.random() < 0.8:
                target = below
                continue
            kind = chance.randrange(4)
            if kind == 0:
                del target[key]
            elif kind == 1:
                target[chance.choice(("0", "1", "31", "32", "-1", "x", key + "0"))] = below
            else:
                target[key] = other_value(chance, below)
            break
    text = json.dumps(tree).encode("utf-8", "surrogatepass")
    if chance.random() < 0.2:
        at = chance.randrange(len(text))
        text = text[:at] + chance.choice((b"", b"{", b"[" * 5000, b"\0", b'"', b"1e999", b"\xff")) + text[at:]
    return sealed(text)


def from_bytes(data: bytes) -> None:
    """Try what a fuzzer thought of: a header as it is, or the JSON of one, by the first byte."""
    if data[:1] < b"\x80":
        judge(data[1:])
    else:
        judge(sealed(data[1:]))
