"""Making LUKS2 headers: what is written, in which order, and what is refused before anything is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers.luks_create import LuksCreateOptions
from qmpd.errors import CommandError
from qmpd.formats import luks2
from qmpd.luks import create2, memory
from qmpd.luks.create2 import Luks2Options, costs_for, create_luks2
from tests.unit.luks.memory import MemoryNode, edge, opened

CHEAP = {"pbkdf": "pbkdf2", "iterations": 1000}
ARGON = {"pbkdf": "argon2id", "iterations": 4, "pbkdf_memory": 64, "pbkdf_parallel": 1}


class Recorder(MemoryNode):
    """Remembers every write between two flushes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.steps: list[tuple[str, int]] = []

    async def pwritev(self, batch: Any, flags: Any) -> None:
        self.steps += [("write", request.offset) for request in batch]
        await super().pwritev(batch, flags)

    async def flush(self) -> None:
        self.steps.append(("flush", 0))


async def make(options: dict[str, Any], *, detached: bool = True, payload: int = 0, old: bytes = b"") -> Recorder:
    node = Recorder(old.ljust(create2.header_length() + payload, b"\0"))
    made = Luks2Options(**options)
    await create_luks2(edge(node), made, SecretBytes(b"abc123"), detached=detached, random=random.Random(1).randbytes)
    return node


@pytest.mark.parametrize("options", [CHEAP, ARGON, {**ARGON, "pbkdf": "argon2i"}], ids=lambda one: one["pbkdf"])
async def test_a_header_opens_again(options: dict[str, Any]) -> None:
    header = await make(options)
    payload = MemoryNode(bytes(8192))
    node = await opened(payload, header)
    await edge(node).pwrite(0, b"a" * 512)
    data = node.image_info()["format-specific"]["data"]
    assert (data["version"], data["detached-header"], data["slots"][0]["pbkdf"]) == (2, True, options["pbkdf"])
    assert await edge(await opened(payload, header)).pread(0, 512) == b"a" * 512
    with pytest.raises(CommandError, match="Invalid password"):
        await opened(payload, header, secret="wrong")


async def test_a_whole_volume() -> None:
    whole = await make(
        {**CHEAP, "sector_size": 4096, "label": "mine", "subsystem": "ours"}, detached=False, payload=8192
    )
    node = await opened(whole)
    assert (node.size, node.request_alignment) == (8192, 4096)
    data = node.image_info()["format-specific"]["data"]
    assert (data["label"], data["subsystem"], data["payload-offset"]) == ("mine", "ours", 16 << 20)


async def test_both_copies_are_there_and_come_last() -> None:
    """Whatever was a header before is gone first, wherever its second copy was."""
    node = await make(CHEAP, old=b"\x5a" * (8 << 20))
    flushes = [i for i, step in enumerate(node.steps) if step == ("flush", 0)]
    assert node.steps[flushes[1] + 1 :] == [("write", 0), ("flush", 0)]
    before = {offset for kind, offset in node.steps[: flushes[0]] if kind == "write"}
    assert before == {0, *luks2.COPY_SIZES}
    for at in (0, create2.COPY_SIZE):
        spoiled = bytearray(node.data)
        spoiled[at : at + 4096] = bytes(4096)
        assert (await opened(MemoryNode(bytes(512)), MemoryNode(bytes(spoiled)))).size == 512


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sector_size": 1536}, "Sector size 1536 not supported"),
        ({"sector_size": 0}, "Sector size 0 not supported"),
        ({"sector_size": 8192}, "Sector size 8192 not supported"),
        ({"cipher_alg": "serpent-256"}, "Algorithm 'serpent-256' not supported"),
        ({"hash_alg": "crc32"}, "Hash algorithm 'crc32' not supported"),
        ({"label": "x" * 48}, "Parameter 'label' takes up to 47 bytes"),
        ({"subsystem": "x\0"}, "Parameter 'subsystem' takes up to 47 bytes"),
        ({"pbkdf": "pbkdf2", "pbkdf_memory": 64}, "Parameter 'pbkdf-memory' is for argon2 only"),
        ({"pbkdf": "pbkdf2", "pbkdf_parallel": 1}, "Parameter 'pbkdf-parallel' is for argon2 only"),
        ({"pbkdf_memory": 31}, "Parameter 'pbkdf-memory' expects at least 32 KiB"),
        ({"pbkdf_memory": 5 << 20}, "The new key slot asks for 5242880 argon2 KiB of memory, expected 8 to 4194304"),
        ({"pbkdf_memory": 32, "pbkdf_parallel": 5}, "The new key slot asks for 32 argon2 KiB of memory, expected 40"),
        ({"pbkdf_parallel": 0}, "The new key slot asks for 0 argon2 threads"),
        ({"pbkdf_parallel": 17}, "The new key slot asks for 17 argon2 threads"),
        ({"iterations": 1001}, "The new key slot asks for 1001 argon2 passes"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(CommandError) as caught:
        Luks2Options(**options).checked()
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("name", ["sector_size", "pbkdf", "pbkdf_memory", "pbkdf_parallel", "label", "subsystem"])
def test_what_is_luks2s_is_refused_for_luks1(name: str) -> None:
    with pytest.raises(CommandError, match=f"Parameter '{name.replace('_', '-')}' is for LUKS version 2 only"):
        LuksCreateOptions(size=0, **{name: "x"}).luks1()


async def test_nothing_is_written_to_a_target_too_small() -> None:
    node = Recorder(bytes(create2.header_length() - 1))
    with pytest.raises(CommandError, match="The LUKS header takes 16777216 bytes, there are 16777215"):
        await create_luks2(edge(node), Luks2Options(**CHEAP), SecretBytes(b"x"), detached=True)
    assert node.steps == []


async def test_a_time_buys_costs() -> None:
    kdf = await costs_for(Luks2Options(pbkdf="argon2id", iter_time=20, pbkdf_memory=1 << 17, pbkdf_parallel=1))
    assert kdf.memory >= 32
    assert kdf.time >= 4
    assert kdf.memory <= 1 << 17
    longer = await costs_for(Luks2Options(pbkdf="argon2id", iter_time=2000, pbkdf_memory=128, pbkdf_parallel=1))
    assert longer.memory == 128
    assert longer.time > 100  # no more memory allowed: the time goes into passes
    assert (await costs_for(Luks2Options(pbkdf="pbkdf2", iter_time=10))).iterations >= 1000


@pytest.mark.parametrize(("rounds", "passes"), [(1, 4), (4, 4), (9, 9)])
async def test_exact_costs_are_never_below_the_floor(rounds: int, passes: int) -> None:
    kdf = await costs_for(Luks2Options(iterations=rounds, pbkdf_memory=64, pbkdf_parallel=2))
    assert (kdf.time, kdf.memory, kdf.cpus) == (passes, 64, 2)
    assert (await costs_for(Luks2Options(pbkdf="pbkdf2", iterations=rounds))).iterations == 1000


async def test_the_default_takes_half_of_the_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create2, "available", lambda: 100 << 10)
    kdf = await costs_for(Luks2Options(iterations=4, pbkdf_parallel=1))
    assert kdf.memory == ((100 << 10) - memory.RESERVE_KIB) // 2


async def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda root: 1 << 20)
    with pytest.raises(memory.NotEnoughMemory, match="The new key slot needs 4194304 KiB of memory"):
        await make({**ARGON, "pbkdf_memory": 4 << 20})
