"""Opening and creating volumes over children, with the texts of the reference."""

from __future__ import annotations

import asyncio
import os

import pytest

from qmpd.crypto.kdf import MAX_PBKDF2_ITERATIONS
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from qmpd.luks.volume import read_volume
from tests.gen import luks1 as gen
from tests.unit.luks.memory import MemoryNode, edge


async def key_of(data: bytes, passphrase: bytes = gen.PASSPHRASE, *, detached: bool = True) -> bytes:
    child = edge(MemoryNode(data))
    volume = await read_volume(child, detached=detached)
    unlocked = await volume.unlock(child, SecretBytes(passphrase))
    return bytes(unlocked.key)


@pytest.mark.parametrize("detached", [False, True], ids=["whole", "detached"])
@pytest.mark.parametrize("broken", gen.BROKEN, ids=lambda broken: broken.name)
async def test_one_rule_broken(broken: gen.Broken, detached: bool) -> None:
    data = gen.patched(gen.header(detached=detached), *broken.patches)
    expected = broken.detached if detached else broken.whole
    if expected == "":
        assert len(await key_of(data, detached=detached)) == 32
        return
    with pytest.raises(CommandError) as caught:
        await key_of(data, detached=detached)
    assert str(caught.value) == expected


@pytest.mark.parametrize("passphrase", [b"", b"abc12", b"abc1234", b"ABC123", b"abc123\n"])
async def test_wrong_passphrases(passphrase: bytes) -> None:
    with pytest.raises(CommandError, match=r"^Invalid password, cannot unlock any keyslot$"):
        await key_of(gen.header(detached=True), passphrase)


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "Volume is not in LUKS format"),
        (5, "Volume is not in LUKS format"),
        (207, "Keyslot 0 is corrupted (stripes 0 != 4000)"),
        (592, gen.INVALID),
        (8192, gen.INVALID),
        (100_000, gen.INVALID),
    ],
)
async def test_a_volume_that_ends_early_reads_as_zeroes_from_there(length: int, text: str) -> None:
    with pytest.raises(CommandError) as caught:
        await key_of(gen.header(detached=True)[:length])
    assert str(caught.value) == text


async def test_the_second_slot_opens_as_well() -> None:
    """Slot 5 is a copy of slot 0's; slot 0 is given another salt and so never matches."""
    data = gen.header(detached=True)
    header = luks1.parse_header(data, detached=True)
    target = header.slots[5].material_offset
    raw = data[gen.slot(0, "active") : gen.slot(0, "active") + 40]
    material = data[4096 : 4096 + 128000]
    both = gen.patched(data, (gen.slot(5, "active"), raw), (target, material), (gen.slot(0, "salt"), bytes(32)))
    child = edge(MemoryNode(both))
    unlocked = await (await read_volume(child, detached=True)).unlock(child, SecretBytes(gen.PASSPHRASE))
    assert unlocked.slot == 5
    assert bytes(unlocked.key) == await key_of(data)
    assert repr(unlocked) == "<volume key of 32 bytes from slot 5>"
    unlocked.wipe()
    assert unlocked.key == bytes(32)


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        (gen.slot(0, "iterations"), "Keyslot 0 asks for 4294967295 PBKDF2 iterations"),
        (gen.at("mk_digest_iterations"), "The volume key digest asks for 4294967295 PBKDF2 iterations"),
    ],
)
async def test_costs_beyond_the_limit_are_refused_at_once(offset: int, text: str) -> None:
    """A hostile header could keep a thread busy for an hour."""
    data = gen.patched(gen.header(detached=True), (offset, gen.u32(0xFFFFFFFF)))
    with pytest.raises(CommandError, match=f"^{text}, expected 1 to {MAX_PBKDF2_ITERATIONS}$"):
        await asyncio.wait_for(key_of(data), 5)


async def test_only_what_is_needed_is_read() -> None:
    """The header claims nothing that makes us read more than itself and the slots in use."""
    node = MemoryNode(gen.header(detached=True) + bytes(1 << 20))
    child = edge(node)
    volume = await read_volume(child, detached=True)
    assert node.reads == luks1.HEADER_SIZE
    await volume.unlock(child, SecretBytes(gen.PASSPHRASE))
    assert node.reads == luks1.HEADER_SIZE + 128000


CREATED = [
    Luks1Options(iterations=1000),
    Luks1Options("aes-128", "xts", "plain", None, "sha1", iterations=1000),
    Luks1Options("aes-128", "cbc", "essiv", "sha256", "sha512", iterations=1000),
    Luks1Options("aes-192", "cbc", "plain64", None, "sha384", iterations=1000),
    Luks1Options("aes-256", "cbc", "essiv", None, "sha224", iterations=1),
    Luks1Options("aes-256", "ctr", iter_time=0),
    Luks1Options("aes-128", "ecb", iter_time=1),
    Luks1Options("camellia-256", "cbc", "plain64be", iterations=1000),
]


@pytest.mark.parametrize("detached", [False, True], ids=["whole", "detached"])
@pytest.mark.parametrize("options", CREATED, ids=str)
async def test_what_was_created_opens(options: Luks1Options, detached: bool) -> None:
    node = MemoryNode(os.urandom(header_length(options)))
    header = await create_luks1(edge(node), options, SecretBytes(b"pass word"), detached=detached)
    assert node.flushes == 2
    assert header.slots[0].iterations >= 1000
    assert header.phdr.mk_digest_iterations >= 1000
    assert header.payload_offset == (0 if detached else header_length(options))
    volume = await read_volume(edge(node), detached=detached)
    assert volume.spec == options.spec()
    assert len(await key_of(bytes(node.data), b"pass word", detached=detached)) == volume.spec.key_length
    with pytest.raises(CommandError, match="Invalid password"):
        await key_of(bytes(node.data), b"password", detached=detached)


async def test_a_crash_before_the_last_write_leaves_no_volume() -> None:
    """The header proper comes last: what was there before is gone, and nothing half-made is recognised."""
    node = MemoryNode(gen.header(detached=True) + bytes(1 << 20))
    node.fail_at = {4096: 28}
    with pytest.raises(OSError, match="28"):
        await create_luks1(edge(node), gen.OPTIONS, SecretBytes(b"x"), detached=True)
    with pytest.raises(CommandError, match="Volume is not in LUKS format"):
        await read_volume(edge(node), detached=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Luks1Options("aes-192"), "Algorithm 'aes-192' not supported"),
        (Luks1Options("serpent-256"), "Algorithm 'serpent-256' not supported"),
        (Luks1Options("des"), "Algorithm 'des' not supported"),
        (Luks1Options(hash_alg="foo"), "Hash algorithm 'foo' not supported"),
        (Luks1Options("aes-256", "cbc", "essiv", "sha1"), "No AES cipher with key size 20 available"),
        (Luks1Options(ivgen_alg="foo"), "IV generator 'foo' not supported"),
    ],
    ids=str,
)
def test_options_that_are_not_supported(options: Luks1Options, text: str) -> None:
    with pytest.raises(CommandError) as caught:
        header_length(options)
    assert str(caught.value) == text


async def test_a_target_too_small_is_refused_before_anything_is_written() -> None:
    node = MemoryNode(bytes(2068479))
    with pytest.raises(CommandError, match="The LUKS header takes 2068480 bytes, there are 2068479"):
        await create_luks1(edge(node), Luks1Options(), SecretBytes(b"x"), detached=True)
    assert node.flags == []
