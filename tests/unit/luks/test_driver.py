"""The luks driver over nodes in memory: I/O, errors, permissions, descriptions, and what it forgets."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.perm import Perm
from qmpd.crypto.cipher import CipherSpec, open_cipher
from qmpd.drivers import luks
from qmpd.errors import CommandError
from qmpd.luks.shared import header_of
from tests.gen import luks1 as gen
from tests.unit.luks.memory import MemoryNode, edge, luks_node, opened

MiB = 1 << 20
HEADER = gen.header(detached=True)
WHOLE = gen.header(detached=False)


async def test_whole_volume() -> None:
    payload = MemoryNode(WHOLE + bytes(64 * 512))
    node = await opened(payload)
    assert node.size == 64 * 512
    child = edge(node)
    text = os.urandom(3000)
    await child.pwrite(100, text)
    assert await child.pread(100, 3000) == text
    assert bytes(payload.data[: len(WHOLE)]) == WHOLE
    assert text not in bytes(payload.data)


async def test_detached_volume() -> None:
    payload, header = MemoryNode(bytes(64 * 512)), MemoryNode(HEADER)
    node = await opened(payload, header)
    assert node.size == 64 * 512
    await edge(node).pwrite(0, b"\1" * 512)
    assert bytes(header.data) == HEADER
    again = await opened(MemoryNode(bytes(payload.data)), header)
    assert await edge(again).pread(0, 512) == b"\1" * 512


async def test_the_payload_is_what_the_cipher_makes_of_its_sector_numbers() -> None:
    payload = MemoryNode(WHOLE + bytes(64 * 512))
    node = await opened(payload)
    await edge(node).pwrite(1024, b"x" * 1024)
    key_source = edge(MemoryNode(WHOLE))
    from qmpd.crypto.secretbytes import SecretBytes
    from qmpd.luks.volume import read_volume

    unlocked = await (await read_volume(key_source, detached=False)).unlock(key_source, SecretBytes(gen.PASSPHRASE))
    stored = bytearray(payload.data[len(WHOLE) + 1024 : len(WHOLE) + 2048])
    spec = CipherSpec("aes", "xts", "plain64", None, 32)
    open_cipher(spec, unlocked.key, engine="reference").decrypt([(2, stored, stored)])
    assert stored == b"x" * 1024


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        (None, "Parameter 'key-secret' is required for cipher"),
        ("nosuch", "No secret with id 'nosuch'"),
        ("wrong", "Invalid password, cannot unlock any keyslot"),
        ("empty", "Invalid password, cannot unlock any keyslot"),
    ],
)
async def test_secrets(secret: str | None, text: str) -> None:
    with pytest.raises(CommandError) as caught:
        await opened(MemoryNode(WHOLE), secret=secret)
    assert str(caught.value) == text


@pytest.mark.parametrize("secret", [None, "nosuch"])
async def test_the_secret_is_looked_up_before_the_header_is_read(secret: str | None) -> None:
    payload = MemoryNode(bytes(4096))
    with pytest.raises(CommandError, match="secret"):
        await opened(payload, secret=secret)
    assert payload.reads == 0


async def test_header_and_payload_swapped() -> None:
    with pytest.raises(CommandError, match="Volume is not in LUKS format"):
        await opened(MemoryNode(HEADER), MemoryNode(bytes(MiB)))


async def test_a_payload_that_is_a_volume_itself_is_only_data() -> None:
    node = await opened(MemoryNode(WHOLE + bytes(512)), MemoryNode(HEADER))
    assert node.size == len(WHOLE) + 512
    assert bytes(await edge(node).pread(0, 6)) != b"LUKS\xba\xbe"


@pytest.mark.parametrize("missing", [512, 65536])
async def test_a_payload_that_starts_behind_the_end(missing: int) -> None:
    """A header with an offset keeps it when it is used apart from its payload."""
    with pytest.raises(CommandError, match=r"^Could not refresh total sector count: Input/output error$"):
        await opened(MemoryNode(bytes(len(WHOLE) - missing)), MemoryNode(WHOLE))
    assert (await opened(MemoryNode(bytes(len(WHOLE))), MemoryNode(WHOLE))).size == 0


@pytest.mark.parametrize("secret", ["s", "wrong"])
async def test_passphrase_and_key_are_forgotten(secret: str) -> None:
    node, options, secrets = luks_node(MemoryNode(WHOLE + bytes(512)), secret=secret)
    await node.open(options)
    assert [len(one) for one in secrets.given] == [len(b"abc123") + (secret == "wrong")]
    try:
        await node.unlock()
        crypto = node.crypto
    except CommandError:
        crypto = None
    assert [len(one) for one in secrets.given] == [0]
    await node.close()
    if crypto is not None:
        with pytest.raises(ValueError, match="wiped"):
            crypto.decrypt([(0, bytearray(512), bytearray(512))])


async def test_a_header_that_is_refused_leaves_no_passphrase() -> None:
    node, options, secrets = luks_node(MemoryNode(bytes(MiB)))
    with pytest.raises(CommandError):
        await node.open(options)
    assert [len(one) for one in secrets.given] == [0]


async def test_nodes_on_one_header_share_one_object() -> None:
    header = MemoryNode(HEADER)
    first = await opened(MemoryNode(bytes(1024)), header)
    second = await opened(MemoryNode(bytes(2048)), header)
    assert header_of(header).users == 2
    await edge(first).pwrite(0, b"a" * 512)
    await edge(second).pwrite(0, b"b" * 512)
    assert await edge(first).pread(0, 512) == b"a" * 512
    await first.close()
    await second.close()
    assert header_of(header).users == 0


async def test_a_failed_unlock_leaves_no_user() -> None:
    header = MemoryNode(HEADER)
    with pytest.raises(CommandError):
        await opened(MemoryNode(bytes(1024)), header, secret="wrong")
    assert header_of(header).users == 0


async def test_the_object_goes_with_its_node() -> None:
    from qmpd.luks import shared

    gc.collect()
    before = len(shared._shared)
    node = await opened(MemoryNode(bytes(1024)), MemoryNode(HEADER))
    assert len(shared._shared) == before + 1
    await node.close()
    del node
    gc.collect()
    assert len(shared._shared) <= before


async def test_errors_stay_with_their_request() -> None:
    payload = MemoryNode(WHOLE + bytes(8 * 512))
    node = await opened(payload)
    await edge(node).pwrite(0, b"q" * 4096)
    payload.fail_at = {len(WHOLE) + 512: errno.ENOSPC}
    views = [memoryview(bytearray(512)) for _ in range(3)]
    batch = Batch(Request(i * 512, view) for i, view in enumerate(views))
    await node.preadv(batch)
    assert [request.error for request in batch] == [0, errno.ENOSPC, 0]
    assert views[0] == views[2] == b"q" * 512
    writes = Batch(Request(i * 512, memoryview(b"r" * 512)) for i in range(3))
    await node.pwritev(writes, WriteFlags.NONE)
    assert [request.error for request in writes] == [0, errno.ENOSPC, 0]


async def test_an_error_of_the_child_is_that_of_every_request() -> None:
    payload = MemoryNode(WHOLE + bytes(4 * MiB))
    node = await opened(payload)

    async def broken(batch: Batch, flags: WriteFlags) -> None:
        raise OSError(errno.ENOSPC, "full")

    payload.pwritev = broken  # type: ignore[method-assign]
    batch = Batch(Request(i * MiB, memoryview(bytes(MiB))) for i in range(3))
    await node.pwritev(batch, WriteFlags.NONE)
    assert [request.error for request in batch] == [errno.ENOSPC] * 3


@pytest.mark.parametrize("sizes", [[4 * MiB], [MiB - 512, 1024, 512], [300 * 512] * 12, [512]])
async def test_large_and_many_writes(sizes: list[int]) -> None:
    payload = MemoryNode(WHOLE + bytes(5 * MiB))
    node = await opened(payload)
    plain = [os.urandom(size) for size in sizes]
    batch, at = Batch(), 0
    for text in plain:
        batch.append(Request(at, memoryview(text)))
        at += len(text)
    await node.pwritev(batch, WriteFlags.NONE)
    assert not any(request.error for request in batch)
    assert bytes(await edge(node).pread(0, at)) == b"".join(plain)
    assert b"".join(plain) == b"".join(bytes(request.view) for request in batch)


async def test_flags_go_down_and_flush_leaves_the_header_alone() -> None:
    payload, header = MemoryNode(bytes(4096)), MemoryNode(HEADER)
    payload.supports_fua = True
    node = await opened(payload, header)
    await edge(node).pwritev(Batch.single(0, memoryview(bytes(512))), WriteFlags.FUA)
    assert payload.flags == [WriteFlags.FUA]
    await node.flush()
    assert (payload.flushes, header.flushes) == (1, 0)


async def test_zeroes_are_written_encrypted() -> None:
    payload = MemoryNode(WHOLE + bytes(8192))
    node = await opened(payload)
    await edge(node).pwrite_zeroes(512, 2048)
    stored = bytes(payload.data[len(WHOLE) + 512 : len(WHOLE) + 2560])
    assert stored.count(0) < 100
    assert await edge(node).pread(512, 2048) == bytes(2048)


@pytest.mark.parametrize(
    ("mine", "below", "expected"),
    [
        ("unmap", "unmap", [(len(WHOLE) + 1024, 512)]),
        (None, "unmap", []),
        ("ignore", "unmap", []),
        ("unmap", None, []),
    ],
)
async def test_discard_reaches_the_payload_only_if_both_want_it(
    mine: str | None, below: str | None, expected: list[tuple[int, int]]
) -> None:
    payload = MemoryNode(WHOLE + bytes(8192), discard=below)
    node = await opened(payload, discard=mine)
    await edge(node).pdiscard(1000, 1000)
    assert payload.discarded == expected


async def test_resize() -> None:
    payload = MemoryNode(WHOLE + bytes(8192))
    node = await opened(payload)
    await node.truncate(MiB)
    assert (node.size, payload.size) == (MiB, MiB + len(WHOLE))
    with pytest.raises(CommandError, match="too large"):
        await node.truncate((1 << 63) - 1)


@pytest.mark.parametrize(
    ("perm", "shared"),
    [
        (Perm.NONE, Perm.ALL),
        (Perm.CONSISTENT_READ | Perm.WRITE, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED | Perm.RESIZE),
        (Perm.CONSISTENT_READ, Perm.ALL & ~Perm.RESIZE),
    ],
)
def test_permissions(perm: Perm, shared: Perm) -> None:
    """As x-debug-query-block-graph of the reference shows them for `file`; our own rule for `header`."""
    node, _, _ = luks_node(MemoryNode(WHOLE), MemoryNode(HEADER))
    roles = luks.LuksNode.child_roles
    assert node.child_perm("file", roles["file"], perm, shared) == (perm | Perm.CONSISTENT_READ, shared)
    assert node.child_perm("header", roles["header"], perm, shared) == (Perm.CONSISTENT_READ, Perm.ALL)


async def test_description() -> None:
    payload = MemoryNode(bytes(4096))
    node = await opened(payload, MemoryNode(HEADER))
    info = node.image_info()
    assert info["encrypted"] is True
    assert info["format-specific"]["type"] == "luks"
    assert info["format-specific"]["data"]["detached-header"] is True
    assert "dirty-flag" not in info
    payload.image_info = lambda: {"cluster-size": 65536, "dirty-flag": True}  # type: ignore[method-assign]
    assert (node.image_info()["cluster-size"], node.image_info()["dirty-flag"]) == (65536, False)
    assert "abc123" not in repr(node) + repr(vars(node))


@given(seed=st.integers(0, 1 << 32), big=st.booleans())
def test_random_requests_against_a_model(seed: int, big: bool) -> None:
    """Up to 32 at once, unaligned and overlapping, the child delayed at random; writes that overlap
    are ordered by awaiting them, so that the model knows the outcome."""
    asyncio.run(_random_requests(random.Random(seed), 3 * MiB if big else 64 * 512))


async def _random_requests(rng: random.Random, size: int) -> None:
    payload = MemoryNode(WHOLE + rng.randbytes(size), delays=rng)
    node = await opened(payload)
    child = edge(node)
    model = await child.pread(0, size)
    for _ in range(4):
        free = [(0, size)]
        work = []
        for _ in range(rng.randrange(1, 32)):
            low, high = free.pop(rng.randrange(len(free)))
            start, end = sorted((rng.randrange(low, high), rng.randrange(low, high) + 1))
            if end <= start:
                free.append((low, high))
                continue
            free += [one for one in ((low, start), (end, high)) if one[0] < one[1]]
            kind = rng.randrange(3)
            if kind == 0:
                text = rng.randbytes(end - start)
                model[start:end] = text
                work.append(child.pwrite(start, text))
            elif kind == 1:
                model[start:end] = bytes(end - start)
                work.append(child.pwrite_zeroes(start, end - start))
            else:
                work.append(_expect(child, start, bytes(model[start:end])))
            if not free:
                break
        await asyncio.gather(*work)
        assert await child.pread(0, size) == model


async def _expect(child: object, start: int, expected: bytes) -> None:
    assert await child.pread(start, len(expected)) == expected  # type: ignore[attr-defined]
