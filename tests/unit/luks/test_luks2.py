"""Unlocking LUKS2 volumes over children, and refusing what is not ours to open."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError
from qmpd.luks import memory
from qmpd.luks.luks2 import Luks2Volume, parse_encryption, read_copies
from tests.gen import luks2 as gen
from tests.unit.luks.memory import MemoryNode, edge

Change = Callable[[dict[str, Any]], None]


async def volume_of(data: bytes) -> tuple[Luks2Volume, Any]:
    child = edge(MemoryNode(data))
    return Luks2Volume(await read_copies(child, "h.img")), child


async def test_the_key_is_the_one_that_was_stored() -> None:
    volume, child = await volume_of(gen.header())
    unlocked = await volume.unlock(child, SecretBytes(gen.PASSPHRASE))
    assert bytes(unlocked.key) == gen.KEY
    assert (volume.version, volume.payload_offset, volume.payload_length, volume.first_sector) == (2, 0, None, 0)
    with pytest.raises(CommandError, match=r"^Invalid password, cannot unlock any keyslot$"):
        await volume.unlock(child, SecretBytes(b"abc1234"))


async def test_segment_fields_reach_the_driver() -> None:
    tree = gen.tree(offset=1 << 20, sector_size=4096)
    tree["segments"]["0"] |= {"size": "8192", "iv_tweak": "77"}
    volume, _ = await volume_of(gen.header(tree))
    assert (volume.payload_offset, volume.payload_length, volume.first_sector) == (1 << 20, 8192, 77)
    assert volume.spec.sector_size == 4096
    info = volume.info()
    assert (info["version"], info["sector-size"], info["payload-offset"]) == (2, 4096, 1 << 20)
    slot = {"active": True, "key-offset": 32768, "iters": 1000, "stripes": 4000}
    assert info["slots"] == [slot | {"slot": 0, "pbkdf": "pbkdf2", "priority": 1}]


@pytest.mark.parametrize("damaged", [0, 1])
async def test_one_damaged_copy_is_reported_and_does_not_matter(damaged: int) -> None:
    data = bytearray(gen.header())
    data[damaged * gen.COPY + 5000] ^= 1
    node = MemoryNode(bytes(data))
    volume = Luks2Volume(await read_copies(edge(node), "h.img"))
    assert volume.problem is not None
    assert volume.problem.startswith(f"the {('primary', 'secondary')[damaged]} header is damaged: h.img: byte ")
    assert (await volume.unlock(edge(node), SecretBytes(gen.PASSPHRASE))).slot == 0
    assert bytes(node.data) == bytes(data)  # reading never repairs


async def test_a_damaged_first_size_does_not_hide_the_second_copy() -> None:
    volume, _ = await volume_of(gen.with_binary(0, hdr_size=1 << 62))
    assert "hdr_size" in (volume.problem or "")


async def test_what_is_read_is_bounded() -> None:
    """A header that claims 4 MiB costs no more than that for each copy; noise costs a probe per place."""
    node = MemoryNode(bytes(16 << 20))
    with pytest.raises(ImageError):
        await read_copies(edge(node), "h.img")
    assert node.reads == 10 * 4096


async def test_a_header_cut_behind_its_copies_is_refused() -> None:
    with pytest.raises(ImageError, match="LUKS2 header is on a device of 163839 bytes, expected at least 163840"):
        await volume_of(gen.header()[:-1])


def slots(tree: dict[str, Any], *rows: tuple[str, int]) -> None:
    """Add slots with priorities, all with the salt of slot 0 spoiled except those in slot 0's place."""
    tree["config"]["keyslots_size"] = str((len(rows) + 1) * gen.AREA)
    for i, (name, priority) in enumerate(rows):
        slot = copy.deepcopy(tree["keyslots"]["0"])
        slot["area"]["offset"] = str(2 * gen.COPY + (i + 1) * gen.AREA)
        slot["priority"] = priority
        tree["keyslots"][name] = slot
        tree["digests"]["0"]["keyslots"].append(name)


@pytest.mark.parametrize(
    ("rows", "own", "expected"),
    [((("1", 2),), 1, 1), ((("1", 1),), 1, 0), ((("1", 0),), 0, None), ((("1", 1), ("2", 2)), 1, 2)],
)
async def test_preferred_slots_come_first_and_ignored_ones_never(
    rows: tuple[tuple[str, int], ...], own: int, expected: int | None
) -> None:
    tree = gen.tree()
    tree["keyslots"]["0"]["priority"] = own
    slots(tree, *rows)
    data = gen.header(tree)
    area = data[2 * gen.COPY :]
    volume, child = await volume_of(data + area * len(rows))
    if expected is None:
        with pytest.raises(CommandError, match="Invalid password"):
            await volume.unlock(child, SecretBytes(gen.PASSPHRASE))
    else:
        assert (await volume.unlock(child, SecretBytes(gen.PASSPHRASE))).slot == expected


def _require(name: str) -> Change:
    return lambda tree: tree["config"].update(requirements={"mandatory": [name]})


def _segment(**changes: Any) -> Change:
    return lambda tree: tree["segments"]["0"].update(changes)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_require("from-the-future"), "The volume requires 'from-the-future', which is not supported"),
        (_require("offline-reencrypt"), "The volume is being reencrypted (requirement 'offline-reencrypt'); finish"),
        (_segment(type="linear"), "Segment type 'linear' is not supported"),
        (_segment(encryption="cipher_null-ecb"), "Segment encryption 'cipher_null-ecb' is none: refused"),
        (_segment(encryption="aes"), "Unexpected cipher mode string format ''"),
        (_segment(encryption="serpent-xts-plain64"), "Algorithm 'serpent' with key size 16 bytes not supported"),
        (_segment(encryption="aes-xts-random"), "IV generator 'random' not supported"),
        (_segment(sector_size=512 * 3), "Sector size 1536 not supported"),
        (
            _segment(integrity={"type": "none", "journal_encryption": "none", "journal_integrity": "none"}),
            "A volume with integrity protection is not supported",
        ),
    ],
)
async def test_valid_volumes_that_are_not_ours_to_open(change: Change, text: str) -> None:
    tree = gen.tree()
    change(tree)
    with pytest.raises(CommandError) as caught:
        await volume_of(gen.header(tree))
    assert str(caught.value).startswith(text)


def _kdf(**members: Any) -> Change:
    return lambda tree: tree["keyslots"]["0"].update(kdf={"salt": tree["keyslots"]["0"]["kdf"]["salt"]} | members)


def _argon2(time: int, memory: int, cpus: int) -> Change:
    return _kdf(type="argon2id", time=time, memory=memory, cpus=cpus)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_kdf(type="pbkdf2", hash="sha256", iterations=0), "Keyslot 0 asks for 0 PBKDF2 iterations"),
        (_kdf(type="pbkdf2", hash="sha256", iterations=(1 << 32) - 1), "Keyslot 0 asks for 4294967295 PBKDF2"),
        (_argon2(4, (1 << 32) - 1, 4), "Keyslot 0 asks for 4294967295 argon2 KiB of memory, expected 32 to 4194304"),
        (_argon2(0, 1024, 4), "Keyslot 0 asks for 0 argon2 passes, expected 1 to 1000"),
        (_argon2((1 << 32) - 1, 1024, 4), "Keyslot 0 asks for 4294967295 argon2 passes, expected 1 to 1000"),
        (_argon2(4, 1024, 0), "Keyslot 0 asks for 0 argon2 threads, expected 1 to 16"),
        (_argon2(4, 1 << 20, 1 << 24), "Keyslot 0 asks for 16777216 argon2 threads, expected 1 to 16"),
        (_argon2(4, 7, 1), "Keyslot 0 asks for 7 argon2 KiB of memory, expected 8 to 4194304"),
        (_kdf(type="scrypt"), "Invalid password, cannot unlock any keyslot"),
        (_kdf(type="pbkdf2", hash="foo", iterations=1000), "Hash algorithm 'foo' not supported"),
        (_kdf(type="pbkdf2", hash="sha256", iterations=1000, salt="!"), "Keyslot 0 salt is not valid base64"),
        (_kdf(type="pbkdf2", hash="sha256", iterations=1000, salt="AA=="), "Keyslot 0 salt has 1 bytes, expected 8"),
    ],
)
async def test_costs_and_contents_of_a_slot_are_checked_first(change: Change, text: str) -> None:
    tree = gen.tree()
    change(tree)
    volume, child = await volume_of(gen.header(tree))
    with pytest.raises(CommandError) as caught:
        await asyncio.wait_for(volume.unlock(child, SecretBytes(gen.PASSPHRASE)), 20)
    assert str(caught.value).startswith(text)


def test_encryption_texts() -> None:
    spec = parse_encryption("aes-cbc-essiv:sha256", 32)
    assert (spec.cipher, spec.mode, spec.iv, spec.iv_hash) == ("aes", "cbc", "essiv", "sha256")
    with pytest.raises(CommandError, match="Hash algorithm 'foo' not supported"):
        parse_encryption("aes-cbc-essiv:foo", 32)


def test_ecb_needs_no_initial_values_and_null_ones_are_refused() -> None:
    assert parse_encryption("aes-ecb", 32).mode == "ecb"
    with pytest.raises(CommandError, match="IV generator 'null' not supported"):
        parse_encryption("aes-cbc-null", 32)


async def test_a_slot_of_unknown_derivation_is_shown_without_one() -> None:
    tree = gen.tree()
    _kdf(type="scrypt")(tree)
    volume, _ = await volume_of(gen.header(tree))
    assert "pbkdf" not in volume.info()["slots"][0]


async def test_a_slot_without_memory_for_it_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another slot may open the volume; if none does, the answer says what was not tried."""
    monkeypatch.setattr(memory, "available", lambda root: 1 << 20)
    tree = gen.tree()
    slots(tree, ("1", 1))
    _argon2(4, 1 << 20, 1)(tree)
    data = gen.header(tree)
    volume, child = await volume_of(data + data[2 * gen.COPY :])
    assert (await volume.unlock(child, SecretBytes(gen.PASSPHRASE))).slot == 1
    with pytest.raises(memory.NotEnoughMemory, match=r"^Keyslot 0 needs 1048576 KiB of memory, only 1048576 KiB are"):
        await volume.unlock(child, SecretBytes(b"wrong"))
