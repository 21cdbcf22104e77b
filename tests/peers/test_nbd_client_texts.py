"""What the NBD driver says of servers that refuse, lie or know little: word for word what QEMU's says."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support import nbd_liar as liar
from tests.support.daemon import RawClient
from tests.support.nbd_liar import HANG_UP, NEWSTYLE, OLDSTYLE, Script, context, info_export, info_sizes, lying, reply
from tests.support.nbd_servers import qemu, qmpd
from tests.support.nbd_wire import ACK, EXPORT_NAME, EXTENDED, GO, LIST, SET_META, STRUCTURED

ERRORS = (*range(0x80000001, 0x80000009), 0x80000077)


def go(*replies: bytes) -> Script:
    return Script(options={GO: b"".join(replies)})


def without_go(listed: bytes, name: bytes = b"") -> Script:
    return Script(options={GO: reply(GO, liar.UNSUP), LIST: listed, EXPORT_NAME: name or Script().polite(EXPORT_NAME)})


def listed(*names: bytes) -> bytes:
    return b"".join(reply(LIST, 2, struct.pack(">I", len(name)) + name) for name in names) + reply(LIST, ACK)


SCRIPTS: dict[str, Script] = {
    "bad initial magic": Script(greeting=b"NBDMAGIX" + HANG_UP),
    "bad server magic": Script(greeting=b"NBDMAGICxxxxxxxx" + HANG_UP),
    "no greeting": Script(greeting=HANG_UP),
    "half a greeting": Script(greeting=b"NBDM" + HANG_UP),
    "no second half": Script(greeting=b"NBDMAGIC" + HANG_UP),
    "no flags": Script(greeting=NEWSTYLE[:-1] + HANG_UP),
    "oldstyle": Script(greeting=OLDSTYLE + struct.pack(">QI", liar.SIZE, 1) + bytes(124)),
    "newstyle, not fixed": Script(greeting=NEWSTYLE[:-2] + b"\0\0"),
    "go: junk magic": go(b"x" * 20),
    "go: another option": go(reply(LIST, ACK)),
    "go: no known option": go(reply(99, ACK)),
    "go: ack with data": go(info_export(), reply(GO, ACK, b"x")),
    "go: no export info": go(info_sizes(), reply(GO, ACK)),
    "go: another reply": go(reply(GO, 2)),
    "go: unknown reply": go(reply(GO, 77)),
    "go: info without type": go(reply(GO, 3, b"x")),
    "go: short export info": go(reply(GO, 3, struct.pack(">HQ", 0, 5))),
    "go: long export info": go(reply(GO, 3, bytes(50))),
    "go: short sizes": go(reply(GO, 3, struct.pack(">HI", 3, 5))),
    "go: minimum 3": go(info_sizes(3)),
    "go: minimum 0": go(info_sizes(0)),
    "go: minimum 64M": go(info_sizes(1 << 26, 1 << 26, 1 << 26), HANG_UP),
    "go: preferred 5": go(info_sizes(1, 5)),
    "go: preferred small": go(info_sizes(4096, 512)),
    "go: preferred 0": go(info_sizes(1, 0)),
    "go: maximum small": go(info_sizes(4096, 4096, 512)),
    "go: size does not fit": go(info_sizes(4096), info_export(5000)),
    "go: unknown info": go(reply(GO, 3, b"\0\x63abc"), info_export(), reply(GO, ACK)),
    "go: size 2^64-1": go(info_export((1 << 64) - 1), reply(GO, ACK)),
    "go: size 2^63-1": go(info_export((1 << 63) - 1), reply(GO, ACK)),
    "go: hang up": go(HANG_UP),
    "go: hang up in reply": go(info_export()[:-4], HANG_UP),
    "go: hang up in header": go(info_export()[:7], HANG_UP),
    "go: writable": go(info_export(flags=0x4D), reply(GO, ACK)),
    "go: read-only": go(info_export(flags=0x3), reply(GO, ACK)),
    "go: no flags": go(info_export(flags=0), reply(GO, ACK)),
    "export name": without_go(listed(b"")),
    "export name: not listed": without_go(listed(b"other", b"another")),
    "export name: no list": without_go(reply(LIST, liar.UNSUP)),
    "export name: list refused": without_go(reply(LIST, liar.POLICY)),
    "export name: list end with data": without_go(reply(LIST, ACK, b"x")),
    "export name: list of junk": without_go(reply(LIST, 3, b"x")),
    "export name: short entry": without_go(reply(LIST, 2, b"x")),
    "export name: wrong entry": without_go(reply(LIST, 2, struct.pack(">I", 50))),
    "export name: long name": without_go(reply(LIST, 2, struct.pack(">I", 5000) + bytes(5000))),
    "export name: hang up": without_go(listed(b""), HANG_UP),
    "export name: half": without_go(listed(b""), b"\0" * 8 + HANG_UP),
    "context: another": Script(options={SET_META: context(b"base:other") + reply(SET_META, ACK)}),
    "context: two": Script(options={SET_META: context() + context(number=2) + reply(SET_META, ACK)}),
    "context: no name": Script(options={SET_META: reply(SET_META, 4, bytes(4))}),
    "context: junk": Script(options={SET_META: reply(SET_META, 3, bytes(9))}),
    "context: ack with data": Script(options={SET_META: reply(SET_META, ACK, bytes(9))}),
    "context: none": Script(options={SET_META: reply(SET_META, ACK)}),
    "structured: ack with data": Script(options={STRUCTURED: reply(STRUCTURED, ACK, b"xx")}),
    "structured: junk": Script(options={STRUCTURED: reply(STRUCTURED, 3, b"xx")}),
    "structured: unknown junk": Script(options={STRUCTURED: reply(STRUCTURED, 333)}),
    "extended: ack with data": Script(options={EXTENDED: reply(EXTENDED, ACK, b"xx")}),
}
for code in ERRORS:
    SCRIPTS[f"go: error {code - (1 << 31)}"] = go(reply(GO, code, b"because"))
    SCRIPTS[f"context: error {code - (1 << 31)}"] = Script(options={SET_META: reply(SET_META, code)})
    SCRIPTS[f"structured: error {code - (1 << 31)}"] = Script(options={STRUCTURED: reply(STRUCTURED, code, b"no")})
    SCRIPTS[f"extended: error {code - (1 << 31)}"] = Script(options={EXTENDED: reply(EXTENDED, code)})
    SCRIPTS[f"list: error {code - (1 << 31)}"] = without_go(reply(LIST, code))


@dataclass
class Pair:
    """QEMU's daemon and ours."""

    folder: Path
    theirs: RawClient
    ours: RawClient


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    need("qemu-storage-daemon")
    folder = tmp_path_factory.mktemp("texts")
    with qemu(folder / "q") as theirs, qmpd(folder / "o") as ours:
        yield Pair(folder, theirs, ours)


def attempt(client: RawClient, path: Path, **members: object) -> object:
    """Add a node, say what came of it, and remove it."""
    server = {"type": "unix", "path": str(path)}
    reply = client.command("blockdev-add", driver="nbd", node_name="n", server=server, **members)
    if "error" in reply:
        return reply["error"]["desc"]
    [node] = client.ok("query-named-block-nodes", flat=True)
    client.ok("blockdev-del", node_name="n")
    return {key: node[key] for key in ("ro", "image")}


DIFFERENT = {
    "go: size 2^64-1": "export size 18446744073709551615 is larger than 9223372036854775807",
    "go: minimum 64M": "server minimum block size 67108864 is larger than 33554432",
}
"""Where QEMU takes a size for an errno, or cannot send a single request."""


@pytest.mark.parametrize("what", SCRIPTS)
def test_the_same_is_said_of_a_server(pair: Pair, what: str) -> None:
    script = SCRIPTS[what]
    path = pair.folder / "s"
    with lying(path, script):
        for members in ({}, {"export": "exp"}, {"read-only": True}, {"auto-read-only": True}):
            theirs, ours = attempt(pair.theirs, path, **members), attempt(pair.ours, path, **members)
            assert ours == DIFFERENT.get(what, theirs)
