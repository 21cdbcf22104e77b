"""Clients that send anything at all: mutated conversations, in any pieces, against live connections.

Whatever they send, the server answers or hangs up, never raises, keeps nothing of them, and serves the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proof
from tests.support import nbd_wire as wire
from tests.support.nbd_wire import Client, info_data, meta_data, option
from tests.unit.exporting.rig import running

NUMBERS = (0, 1, 2, 4095, 4096, 4097, 65536, 1 << 20, (32 << 20) + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def conversation(chance: random.Random) -> bytes:
    """Return a mostly sensible stream of a client."""
    style = chance.choice(wire.STYLES)
    parts = [b"\0\0\0" + bytes((chance.choice((0, 1, 2, 3, 3, 3, 3)),))]
    for _ in range(chance.randrange(4)):
        number = chance.choice((0, 2, 3, 4, 5, 6, 8, 9, 10, 11, 99))
        data = chance.choice(
            (b"", b"x", info_data(b"n", 3), meta_data(b"n", b"base:allocation"), chance.randbytes(chance.randrange(40)))
        )
        parts.append(option(number, data, chance.choice((None, None, None, chance.choice(NUMBERS)))))
    if style != "simple":
        parts.append(option(wire.STRUCTURED if style == "structured" else wire.EXTENDED))
        parts.append(option(wire.SET_META, meta_data(b"n", b"base:allocation", b"qemu:allocation-depth")))
    parts.append(option(chance.choice((wire.GO, wire.GO, wire.EXPORT_NAME)), info_data(b"n", 3)))
    for cookie in range(chance.randrange(20)):
        command = chance.choice((*range(9), 77))
        length = chance.choice((*NUMBERS, 512, 512, 5000))
        offset = chance.choice((0, 0, 512, 1000, (1 << 20) - 1, 1 << 20, (1 << 64) - 1))
        payload = b""
        if command == wire.WRITE or (style == "extended" and chance.random() < 0.1):
            length = min(length, 70000)
            payload = chance.randbytes(length)
        flags = chance.choice((0, 0, 0, 0, 1, 2, 4, 8, 16, 0x20, 0x8000))
        parts.append(wire.request(command, offset, length, flags, cookie, payload, extended=style == "extended"))
    return b"".join(parts)


def mutated(stream: bytes, chance: random.Random) -> bytes:
    """Damage a stream in a few places."""
    data = bytearray(stream)
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + chance.randrange(1, 30)]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randrange(1, 30))
        else:
            data[at : at + 4] = chance.choice(NUMBERS).to_bytes(4, "big")
    return bytes(data)


def attack(path: str, stream: bytes, chance: random.Random) -> int:
    """Send a stream in random pieces, reading now and then; return the bytes that came back."""
    received = 0
    with contextlib.suppress(ConnectionError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        sock.setblocking(False)
        at, deadline = 0, time.monotonic() + 20
        while at < len(stream):
            assert time.monotonic() < deadline, "the server neither reads nor hangs up"
            readable, writable, _ = select.select([sock], [sock], [], 1)
            if writable:
                at += sock.send(stream[at : at + chance.choice((1, 3, 17, 500, 1 << 17))])
            if readable:
                piece = sock.recv(1 << 16)
                received += len(piece)
                if not piece:
                    break
        if chance.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
            while select.select([sock], [], [], 5)[0]:
                piece = sock.recv(1 << 20)
                received += len(piece)
                if not piece:
                    break
            else:
                raise AssertionError("the server neither answers nor hangs up")
    return received


@pytest.mark.proof
async def test_any_stream_is_survived(tmp_path: Path, proof: Proof) -> None:
    seed = random.randrange(1 << 32) if proof.full else 20
    count = proof.count(4000)
    chance = random.Random(seed)
    broken: list[dict[str, Any]] = []
    async with running(tmp_path) as rig:
        rig.loop.loop.set_exception_handler(lambda _, context: broken.append(context))
        node = rig.add_node("n")
        node.delays = random.Random(seed)
        node.holes = [(4096, 65536)]
        await rig.serve(limits=None)
        await rig.export("n", writable=True, allocation_depth=True)
        descriptors = len(os.listdir("/proc/self/fd"))
        received = 0
        for number in range(count):
            stream = mutated(conversation(chance), chance)
            received += await rig.in_thread(lambda stream=stream: attack(rig.path, stream, chance))
            assert not broken, (seed, number, broken)
        await rig.until(lambda: rig.connections == 0)
        for _ in range(100):
            if len(os.listdir("/proc/self/fd")) <= descriptors:
                break
            await asyncio.sleep(0.02)
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert received > count * 50

        def next_client() -> None:
            with Client(rig.path) as client:
                client.go(b"n").read(0, 65536)

        await rig.in_thread(next_client)
    proof.record("nbd-fuzz", seed=seed, streams=count, received=received)
