"""The same bytes to qemu-storage-daemon and to qmpd: the same replies, but for the deviations named here."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import pytest

from tests.peers.conftest import need
from tests.support import nbd_wire as wire
from tests.support.nbd_servers import qemu, qmpd, serving
from tests.support.nbd_wire import STYLES, Client, info_data, meta_data

SIZE = 1 << 20
LONG = b"n" * 4096
CONTEXTS = (b"base:allocation", b"qemu:allocation-depth")
Pair = tuple[str, str]
"""Socket paths: QEMU's and ours."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Serve the same sparse file, and a read-only null node, by both."""
    need("qemu-storage-daemon")
    folder = tmp_path_factory.mktemp("wire")
    with contextlib.ExitStack() as stack:
        paths = []
        for name, server in (("qemu", qemu), ("qmpd", qmpd)):
            own = folder / name
            own.mkdir()
            with (own / "image").open("wb") as image:
                image.truncate(SIZE)
                image.seek(65536)
                image.write(b"abc" * 1000)
                image.seek(SIZE // 2)
                image.write(bytes(131072))
            exports = (
                "nbd,id=e1,node-name=n,name=ro,description=text",
                "nbd,id=e2,node-name=f,name=d,writable=on,allocation-depth=on",
            )
            nodes = (
                "--blockdev", f"file,node-name=f,filename={own / 'image'},discard=unmap",
                "--blockdev", "null-co,node-name=n,size=65536,read-only=on,read-zeroes=on",
            )  # fmt: skip
            stack.enter_context(server(own, *nodes, *serving(own, *exports)))
            paths.append(str(own / "n.sock"))
        yield paths[0], paths[1]


Answer = list[tuple[int, bytes]] | str


def ask(path: str, options: list[tuple[int, bytes]], flags: int = 3) -> list[Answer]:
    """Return the replies to options sent one after the other; "end" once the server has hung up."""
    answers: list[Answer] = []
    with Client(path, flags=flags) as client:
        for number, data in options:
            try:
                answers.append(client.ask(number, data))
            except (EOFError, ConnectionError):
                answers.append("end")
                break
    return answers


CONVERSATIONS: list[list[tuple[int, bytes]]] = [
    *([(number, b""), (number, b"")] for number in range(14) if number not in (1, 2)),
    *([(number, b"x"), (wire.LIST, b"")] for number in range(14) if number not in (1, 2)),
    [(wire.ABORT, b"data")],
    [(wire.EXPORT_NAME, b"nosuch")],
    [(wire.INFO, info_data(LONG)), (wire.INFO, info_data(LONG + b"n")), (wire.INFO, b"\xff\xff\xff\xff\0\0")],
    *([(wire.INFO, info_data(b"n" * length))] for length in (78, 79, 80, 81)),
    [(wire.INFO, info_data(b"ro", 3, 3, 3)), (wire.INFO, info_data(b"ro", 0, 1, 2, 3, 4, 9))],
    [(wire.INFO, info_data(b"ro") + b"z"), (wire.INFO, info_data(b"ro", 1, 2)[:-1]), (wire.GO, info_data(b"d"))],
    [(wire.GO, info_data(b"\xff\xfe")), (wire.GO, info_data(b"")), (wire.GO, info_data(b"d", 0, 1, 2, 3))],
    [(wire.STRUCTURED, b""), (wire.EXTENDED, b""), (wire.STRUCTURED, b""), (wire.EXTENDED, b"")],
    [(wire.STRUCTURED, b""), (wire.SET_META, meta_data(b"d", *CONTEXTS)), (wire.GO, info_data(b"d"))],
    [(wire.EXTENDED, b""), (wire.SET_META, meta_data(b"d", *CONTEXTS)), (wire.GO, info_data(b"d"))],
    [(wire.EXTENDED, b""), (wire.SET_META, meta_data(b"ro", *CONTEXTS)), (wire.GO, info_data(b"d"))],
    [(wire.EXTENDED, b""), (wire.GO, info_data(b"d"))],
    [
        (wire.STRUCTURED, b""),
        *(
            (number, meta_data(name, *queries))
            for number in (wire.LIST_META, wire.SET_META)
            for name, queries in (
                (b"d", ()), (b"ro", ()), (b"nosuch", ()), (b"d", (b"base:",)), (b"d", (b"qemu:",)), (b"d", CONTEXTS),
                (b"d", CONTEXTS[::-1]), (b"d", (b"qemu:dirty-bitmap:",)), (b"d", (b"qemu:dirty-bitmap:b",)),
                (b"d", (b"",)), (b"d", (b"x" * 5000, b"base:" + b"x" * 5000)), (b"d", (b"foo:", b"nocolon", b"base:x")),
                (b"d", (b"base:allocation",) * 5000),
            )
        ),
        (wire.SET_META, meta_data(b"d", b"base:allocation", count=2)),
        (wire.SET_META, struct.pack(">I", 5000) + b"n" * 5000 + bytes(4)),
        (wire.SET_META, struct.pack(">I", 50) + b"nnnnn"),
        (wire.SET_META, struct.pack(">IcII", 1, b"d", 1, 0xFFFFFFFF)),
        (wire.LIST_META, struct.pack(">IcH", 1, b"d", 0)),
    ],
]  # fmt: skip


@pytest.mark.parametrize("options", CONVERSATIONS)
def test_options(pair: Pair, options: list[tuple[int, bytes]]) -> None:
    theirs, ours = (ask(path, options) for path in pair)
    assert ours == theirs


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 4, 7, 0xFFFFFFFF])
def test_client_flags(pair: Pair, flags: int) -> None:
    theirs, ours = (ask(path, [(wire.LIST, b"")], flags) for path in pair)
    assert ours == theirs


REQUESTS = [
    (wire.READ, SIZE - 5, 10), (wire.READ, SIZE, 0), (wire.READ, 0, 0), (wire.READ, SIZE + 1, 0),
    (wire.READ, 0, 33 << 20), (wire.READ, 0, 32 << 20), (wire.READ, 2**64 - 1, 2), (wire.READ, 0, SIZE, wire.DF),
    (wire.READ, 0, SIZE), (wire.READ, 65536, 65536), (wire.READ, 0, 10, wire.FUA), (wire.READ, 0, 10, 2),
    (wire.READ, 0, 10, 8), (wire.READ, 0, 10, 0x80), (wire.READ, 0, 10, 0x8000),
    (wire.WRITE, SIZE - 2, 4, 0, b"abcd"), (wire.WRITE, 0, 4, 2, b"abcd"), (wire.WRITE, 0, 4, 1, b"abcd"),
    (wire.FLUSH, 0, 0), (wire.FLUSH, 5, 5), (wire.FLUSH, 0, 0, 1), (wire.FLUSH, 0, 0, 2),
    (wire.TRIM, SIZE - 4, 8), (wire.TRIM, 0, 0), (wire.TRIM, 4096, 4096), (wire.TRIM, 0, 2**32 - 1),
    (wire.TRIM, SIZE, 1), (wire.TRIM, 0, 8, 2), (wire.TRIM, 0, 4096, 1),
    (wire.CACHE, 0, 4096), (wire.CACHE, SIZE, 4), (wire.CACHE, 0, 33 << 20), (wire.CACHE, 0, 5, 1),
    (wire.CACHE, 0, 5, 2),
    (wire.ZERO, 16384, 4096), (wire.ZERO, SIZE - 4, 8), (wire.ZERO, 16384, 4096, 2), (wire.ZERO, 16384, 4096, 16),
    (wire.ZERO, 16384, 4096, 18), (wire.ZERO, 0, 2**32 - 1), (wire.ZERO, 16384, 4096, 4), (wire.ZERO, 0, 0),
    (wire.STATUS, 0, SIZE), (wire.STATUS, 0, SIZE, 8), (wire.STATUS, 65600, 8), (wire.STATUS, 0, 0),
    (wire.STATUS, SIZE - 5, 10), (wire.STATUS, 0, SIZE, 2), (wire.STATUS, 0, SIZE, 1),
    (8, 0, 5), (200, 0, 5), (200, 0, 5, 1), (65535, 0, 0),
]  # fmt: skip


def send(path: str, export: bytes, style: str, request: tuple[object, ...]) -> tuple[int, bytes, str]:
    """Return error, data and text of one request, or what it is that QEMU says in other chunks."""
    command, offset, length, flags, payload = (*request, 0, b"")[:5] if len(request) < 5 else request
    if len(request) == 4:
        payload = b""
    assert isinstance(command, int)
    assert isinstance(offset, int)
    assert isinstance(length, int)
    assert isinstance(flags, int)
    assert isinstance(payload, bytes)
    with Client(path) as client:
        client.go(export, style, () if style == "simple" else CONTEXTS)
        result = client.call(command, offset, length, flags, payload=payload)
        assert not client.call(wire.FLUSH, cookie=2).error, "the session does not go on"
    text = result.chunks[-1].text if result.error and style != "simple" else ""
    data = result.data
    if command == wire.STATUS and not result.error:
        data = b"".join(chunk.data for chunk in result.chunks)
    return result.error, data, text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("export", [b"d", b"ro"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_requests(pair: Pair, style: str, export: bytes, request_: tuple[int, ...]) -> None:
    """QEMU answers every refusal with EINVAL; we say EPERM and ENOSPC where the document does."""
    (error, data, text), ours = (send(path, export, style, request_) for path in pair)
    if export == b"ro" and request_[0] in (wire.WRITE, wire.TRIM, wire.ZERO):
        error = 1
    elif error and request_[0] in (wire.WRITE, wire.ZERO) and request_[1] + request_[2] > SIZE:
        error = 28
    assert ours == (error, data, text)


@pytest.mark.parametrize("style", ["structured", "extended"])
def test_a_payload_beyond_the_limit_is_answered_before_the_end(pair: Pair, style: str) -> None:
    found = []
    for path in pair:
        with Client(path) as client:
            client.go(b"d", style)
            client.send(wire.WRITE, 0, (32 << 20) + 1, wire.PAYLOAD if style == "extended" else 0)
            chunk = client.chunk()
            found.append((chunk.error, chunk.text))
            with pytest.raises((EOFError, ConnectionError)):
                client.chunk()
    assert found[0] == found[1]


PAYLOADS = [
    struct.pack(">QI", 4096, 0), struct.pack(">QI", 4096, 5), struct.pack(">QII", 4096, 0, 0),
    struct.pack(">QII", 4096, 1, 0), struct.pack(">Q", 4096), b"123456789", bytes(4096),
]  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS)
def test_block_status_with_payload(pair: Pair, payload: bytes) -> None:
    found = []
    for path in pair:
        with Client(path) as client:
            client.go(b"d", "extended", CONTEXTS)
            assert client.flags & (1 << 12)
            result = client.call(wire.STATUS, 0, len(payload), payload=payload)
            found.append((result.error, sorted(chunk.data for chunk in result.chunks)))
            assert not client.call(wire.FLUSH).error
    assert found[0] == found[1]
