"""Crashes in the middle of an encryption in place: every state goes on to the right data."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers.luks import LuksNode
from qmpd.errors import CommandError, ImageError
from qmpd.luks.create2 import Luks2Options, header_length
from qmpd.luks.encrypt_header import prepare_header
from qmpd.luks.shared import header_of
from tests.conftest import Proof
from tests.faults.crash import GuestOp, Journal
from tests.gen.qcow2 import MemoryNode, random_delay
from tests.unit.luks.memory import edge, luks_node

STATES = 900
"""Crash states of a full run, over all kinds of volumes together."""

PASSPHRASE = b"abc123"


@dataclass(frozen=True)
class Kind:
    """A payload to encrypt; sizes in bytes."""

    name: str
    size: int
    zone: int
    sector: int = 512


KINDS = (
    Kind("many-zones", 16 * 4096, 4096),
    Kind("odd-end", 7 * 8192 + 1536, 8192),
    Kind("sectors", 49152, 16384, 4096),
)


class Shared(Journal):
    """A journal of one of several files: all count the same moments."""

    clock = 0

    def tick(self) -> int:
        Shared.clock += 1
        self.now = Shared.clock
        return self.now


def draw_moment(journal: Journal, rng: random.Random, first: int, last: int) -> int:
    """Return a moment of a crash, more often one near the end of a flush."""
    moment = rng.choice([*journal.moments(rng, 3)])
    return moment if first < moment <= last else rng.randint(first + 1, last)


async def make_header(header: MemoryNode, kind: Kind) -> None:
    options = Luks2Options(pbkdf="pbkdf2", iterations=1000, sector_size=kind.sector)
    with SecretBytes(PASSPHRASE) as passphrase:
        await prepare_header(edge(header), options, passphrase, kind.size, zone=kind.zone)


async def open_volume(payload: MemoryNode, header: MemoryNode) -> LuksNode:
    """Open the volume as the job does."""
    node, options, _ = luks_node(payload, header)
    header_of(header).admitted = node.name
    await node.open(options)
    await node.unlock()
    return node


async def finish(node: LuksNode) -> None:
    encryption = node.encryption
    assert encryption is not None
    while not encryption.done:
        await encryption.step()
    await node.finish_encryption()


async def write(node: LuksNode, guest: Journal, rng: random.Random, kind: Kind) -> None:
    """Write and flush through the node, as one user of several, until all is ciphertext."""
    disk = edge(node)
    while node.encryption is not None and not node.encryption.done:
        if rng.random() < 0.25:
            begun = guest.tick()
            await disk.flush()
            guest.guest_flushes.append((begun, guest.tick()))
            continue
        offset = rng.randrange(kind.size)
        data = rng.randbytes(min(rng.choice((1, 300, 512, 4096, 9000)), kind.size - offset))
        noted = GuestOp(offset, data, guest.tick())
        guest.guest.append(noted)
        await disk.pwrite(offset, data)
        noted.done = guest.tick()
        assert rng.random() < 0.5 or await disk.pread(0, 1) is not None


async def resumed(payload: bytes, header: bytes, kind: Kind, rng: random.Random, again: int = 1) -> bytes | None:
    """Go on after a crash, sometimes crash once more, and return the plaintext; None if there was no header yet."""
    below, above = MemoryNode(payload, "payload"), MemoryNode(header, "header")
    try:
        node = await open_volume(below, above)
    except (CommandError, ImageError):
        return None
    if node.encryption is not None:
        if again and rng.random() < 0.3:
            journals = [Shared(payload), Shared(header)]
            below.recorder, above.recorder = journals
            begun = Shared.clock
            await finish(node)
            journals[0].now = Shared.clock
            moment = draw_moment(journals[0], rng, begun, Shared.clock)
            states = [journal.state(moment, rng) for journal in journals]
            return await resumed(states[0], states[1], kind, rng, again - 1)
        await finish(node)
    assert node.volume.journal is None
    assert len(below.content) == kind.size
    return bytes(await edge(node).pread(0, kind.size))


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_every_crash_state_goes_on_to_the_right_data(proof: Proof, kind: Kind) -> None:
    count = proof.count(STATES) // len(KINDS)
    before_header = after = 0
    rounds = max(2, count // 40)
    for number in range(rounds):
        rng = random.Random(number)
        plain = rng.randbytes(kind.size)
        payload, header = MemoryNode(plain, "payload"), MemoryNode(bytes(header_length()), "header")
        guest = Shared(plain)
        journals = Shared(bytes(payload.content)), Shared(bytes(header.content))
        payload.recorder, header.recorder = journals
        begun = Shared.clock
        await make_header(header, kind)
        ready = Shared.clock
        payload.delay = header.delay = random_delay(number)
        node = await open_volume(payload, header)
        await asyncio.gather(finish(node), *(write(node, guest, rng, kind) for _ in range(rng.choice((0, 1, 3)))))
        for journal in journals:
            journal.now = Shared.clock
        end = Shared.clock
        for _ in range(count // rounds):
            moment = draw_moment(journals[rng.randrange(2)], rng, ready, end)
            if rng.random() < 0.1:
                moment = rng.randint(begun + 1, ready)
            states = [journal.state(moment, rng) for journal in journals]
            found = await resumed(states[0], states[1], kind, rng)
            if found is None:
                before_header += 1
                guest.check(moment, plain, states[0])
                assert not guest.guest or guest.guest[0].begun > moment
            else:
                after += 1
                guest.check(moment, plain, found)
    assert after > before_header
    proof.record(f"encrypt-crash-{kind.name}", states=after + before_header, before_header=before_header)
