"""Crashes in the middle of changes of a LUKS header: at every moment some passphrase opens the volume.

What is not flushed may be there or not, sector by sector. Once a change is over, nothing that it erased
opens the volume, through neither copy of a LUKS2 header.
"""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from qmpd.block.batch import Batch, WriteFlags
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError
from qmpd.luks.backup import header_image
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from qmpd.luks.detect import read_header
from qmpd.luks.keys import KeyslotEdit, edit_keyslots
from qmpd.luks.luks2 import Luks2Volume
from qmpd.luks.restore import restore_header
from qmpd.luks.volume import HeaderIO, Luks1Volume
from tests.conftest import FULL, Proof
from tests.gen import luks2 as gen
from tests.unit.luks.memory import MemoryNode, edge
from tests.unit.luks.test_keys import Recorded

SECTOR = 512
SUBSETS = 20
"""Random choices of unflushed sectors that a full run tries after each write, beside all that are in order."""

PASSPHRASES = {"s": gen.PASSPHRASE, "n": b"newpass", "m": b"third", "x": b"never"}
ROOM = 8
"""Key slots that find room in the keyslot area of the LUKS2 headers here."""


def secret(name: str) -> SecretBytes:
    return SecretBytes(PASSPHRASES[name])


async def fresh(version: int, slots: int = 1, room: int = ROOM) -> Recorded:
    """A header whose slot 0 takes s; the slots from 1 on take n."""
    if version == 1:
        options = Luks1Options(cipher_alg="aes-128", iterations=1000)
        target = Recorded(bytes(header_length(options)))
        await create_luks1(target, options, secret("s"), detached=True)
    else:
        tree = gen.tree()
        tree["config"]["keyslots_size"] = str(room * gen.AREA)
        data = gen.header(tree)
        target = Recorded(data + bytes(2 * gen.COPY + room * gen.AREA - len(data)))
    for slot in range(1, slots):
        await edit(target, state="active", new_secret="n", keyslot=slot)
    target.log.clear()
    return target


async def edit(target: HeaderIO, *, force: bool = False, **options: object) -> None:
    if options["state"] != "inactive":
        options = {"pbkdf": "pbkdf2", "iterations": 1000} | options
    await edit_keyslots(target, KeyslotEdit(**options), secret, "s", detached=True, force=force)  # type: ignore[arg-type]


Work = Callable[[Recorded], Awaitable[bytes]]
"""Does what is to be crashed, and returns what the header held before the first write that counts."""

_known: dict[object, bool] = {}


async def opens(data: bytes, name: str) -> bool:
    """Say whether a passphrase opens a header; a slot is tried once, however often it is met."""
    source = Recorded(data)
    key: tuple[object, ...]
    try:
        volume = await read_header(source, detached=True)
    except (CommandError, ImageError):
        return False
    if isinstance(volume, Luks1Volume):
        header = volume.header
        for index, slot in enumerate(header.slots):
            material = data[slot.material_offset : slot.material_offset + header.material_length]
            key = (name, slot.salt, slot.iterations, header.phdr.mk_digest, hashlib.sha256(material).digest())
            if slot.enabled and key not in _known:
                _known[key] = await volume.try_slot(source, index, secret(name)) is not None
            if slot.enabled and _known[key]:
                return True
        return False
    assert isinstance(volume, Luks2Volume)
    for number in volume.digest.keyslots:
        area = volume.metadata.keyslots[number]
        assert area.kdf is not None
        material = data[area.area_offset : area.area_offset + area.area_size]
        key = (name, area.kdf, volume.digest.digest, hashlib.sha256(material).digest())
        if key not in _known:
            _known[key] = await volume.try_slot(source, area, secret(name)) is not None
        if _known[key]:
            return True
    return False


def states(before: bytes, log: list[tuple[int, bytes] | None], rng: random.Random, subsets: int) -> Iterator[bytes]:
    """Yield what a crash can leave: of what no flush covers the first sectors, every number of them, or any sectors.

    Of key material, which nothing refers to until it is whole, only some numbers are tried.
    """
    sure = bytearray(before)
    loose: list[tuple[int, bytes]] = []  # sectors, or parts of them, in the order in which they were written
    yield bytes(sure)
    for entry in [*log, None]:
        if entry is not None:
            offset, written = entry
            at = 0
            while at < len(written):
                step = min(SECTOR - (offset + at) % SECTOR, len(written) - at)
                loose.append((offset + at, written[at : at + step]))
                at += step
            continue
        stride = 1 if len(loose) <= 2 * gen.COPY // SECTOR else len(loose) // 4
        for count in range(0, len(loose) + 1, stride):
            yield _with(sure, loose[:count])
        for _ in range(subsets if len(loose) > 1 else 0):
            kept = rng.random()
            yield _with(sure, [piece for piece in loose if rng.random() < kept])
        sure = bytearray(_with(sure, loose))
        loose.clear()
    yield bytes(sure)


def _with(data: bytearray, pieces: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(data)
    for offset, piece in pieces:
        changed[offset : offset + len(piece)] = piece
    return bytes(changed)


@dataclass(frozen=True)
class Case:
    """A change of a header; `always` of the passphrases one opens all the time, `end` are those of the end."""

    name: str
    slots: int
    work: Work
    always: str
    end: str
    versions: tuple[int, ...] = (1, 2)
    room: int = ROOM

    def __str__(self) -> str:
        return self.name

    @property
    def plain(self) -> bool:
        """True for one of a kind; the others do the same at other places."""
        return self.name in ("add", "add-over-the-only-slot", "change", "change-one-of-all", "erase")


def editing(*, spoiled: int | None = None, **options: object) -> Work:
    """Edit the header, one byte of which is wrong."""
    force = bool(options.pop("force", False))

    async def work(target: Recorded) -> bytes:
        if spoiled is not None:
            target.data[spoiled + 4999] ^= 0xFF
        before = bytes(target.data)
        await edit(target, force=force, **options)
        return before

    return work


def restoring(*edits: dict[str, object]) -> Work:
    """Take a backup of the header as it is, change it by `edits`, then restore the backup: only that is recorded."""

    async def work(target: Recorded) -> bytes:
        image = await header_image(target, detached=True)
        for one in edits:
            await edit(target, **one)  # type: ignore[arg-type]
        target.log.clear()
        before = bytes(target.data)
        await restore_header(target, image, force=False)
        return before

    return work


def rotated(*slots: int) -> list[dict[str, object]]:
    return [{"state": "changed", "new_secret": "m", "keyslot": slot, "secret": "s"} for slot in slots]


CASES = [
    Case("add", 1, editing(state="active", new_secret="n"), "s", "sn"),
    Case("add-slot-6", 1, editing(state="active", new_secret="n", keyslot=6), "s", "sn"),
    Case("add-over-the-only-slot", 1, editing(state="active", new_secret="n", keyslot=0, force=True), "sn", "n"),
    Case("add-over-one-of-two", 2, editing(state="active", new_secret="m", keyslot=1, force=True), "s", "sm"),
    Case("change", 1, editing(state="changed", new_secret="n", old_secret="s"), "sn", "n"),
    Case("change-one-of-many", 5, editing(state="changed", new_secret="m", keyslot=3), "s", "snm"),
    Case("change-many-to-one", 4, editing(state="changed", new_secret="m", old_secret="n", secret="s"), "s", "sm"),
    Case("change-one-of-all", 8, editing(state="changed", new_secret="m", keyslot=0), "n", "nm"),
    Case("change-all-but-one", 8, editing(state="changed", new_secret="m", old_secret="n", secret="s"), "s", "sm"),
    Case("erase", 2, editing(state="inactive", old_secret="s"), "n", "n"),
    Case("erase-slot-6", 7, editing(state="inactive", keyslot=6), "s", "sn"),
    Case("erase-many", 8, editing(state="inactive", old_secret="n"), "s", "s"),
    Case("add-primary-damaged", 1, editing(state="active", new_secret="n", spoiled=0), "s", "sn", versions=(2,)),
    Case(
        "change-secondary-damaged",
        1,
        editing(state="changed", new_secret="n", old_secret="s", spoiled=gen.COPY),
        "sn",
        "n",
        versions=(2,),
    ),
    Case("erase-primary-damaged", 2, editing(state="inactive", old_secret="s", spoiled=0), "n", "n", versions=(2,)),
    Case("restore-what-is-there", 2, restoring(), "s", "sn"),
    Case("restore-over-one-more", 1, restoring({"state": "active", "new_secret": "n"}), "s", "s"),
    Case("restore-what-was-changed", 1, restoring(*rotated(0)), "sm", "s"),
    Case("restore-what-was-erased", 3, restoring({"state": "inactive", "keyslot": 0, "secret": "n"}), "sn", "sn"),
    Case(
        "restore-another-in-the-same-slot",
        1,
        restoring(
            {"state": "active", "new_secret": "n", "keyslot": 3},
            {"state": "inactive", "keyslot": 0},
            {"state": "active", "new_secret": "m", "keyslot": 0, "secret": "n"},
            {"state": "inactive", "old_secret": "n"},
        ),
        "sm",
        "s",
    ),
    Case(
        "restore-over-all-slots",
        1,
        restoring(
            *({"state": "active", "new_secret": "n", "keyslot": slot} for slot in range(1, 8)),
            {"state": "inactive", "keyslot": 0},
            {"state": "active", "new_secret": "m", "keyslot": 0, "secret": "n"},
        ),
        "snm",
        "s",
    ),
    Case("restore-without-room", 2, restoring(*rotated(1)), "snm", "sn", versions=(2,), room=3),
]


@pytest.mark.proof
@pytest.mark.parametrize(("case", "version"), [(case, version) for case in CASES for version in case.versions], ids=str)
async def test_some_passphrase_opens_at_every_moment_and_none_that_was_erased_at_the_end(
    proof: Proof, case: Case, version: int
) -> None:
    target = await fresh(version, case.slots, case.room)
    before = await case.work(target)
    rng = random.Random(f"{case.name}{version}")
    assert await bad_state(before, target.log, case.always, rng, proof.count(SUBSETS)) is None
    await check_end(bytes(target.data), case.end, version)


class Failing(Recorded):
    """A header on a disk that fails once: its `left`-th write or flush from now on."""

    def __init__(self, data: bytes, left: int, *, torn: bool) -> None:
        super().__init__(data)
        self.left, self.torn = left, torn

    def _fails(self) -> bool:
        self.left -= 1
        return self.left == 0

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self._fails():
            if self.torn:
                await super().pwrite(offset, data[: len(data) // 2 // SECTOR * SECTOR])
            raise OSError(errno.EIO, "Input/output error")
        await super().pwrite(offset, data)

    async def flush(self) -> None:
        if self._fails():
            raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("case", "version"), [(case, version) for case in CASES for version in case.versions if case.plain], ids=str
)
async def test_an_error_of_the_disk_ends_a_change_with_a_word_and_a_volume_that_opens(case: Case, version: int) -> None:
    before = bytes((await fresh(version, case.slots, case.room)).data)
    for left in range(1, 100, 1 if FULL else 3):
        target = Failing(before, left, torn=bool(left % 2))
        try:
            await case.work(target)
        except (OSError, CommandError):
            assert any([await opens(bytes(target.data), name) for name in case.always]), left
        else:
            assert left > 5
            assert target.left > 0
            await check_end(bytes(target.data), case.end, version)
            return
    pytest.fail("it never ends")


class RecordedNode(MemoryNode):
    """A header as a node of a graph, which only takes whole blocks."""

    def __init__(self, recorded: Recorded, alignment: int) -> None:
        super().__init__(bytes(recorded.data))
        self.data, self.log = recorded.data, recorded.log
        self.request_alignment = alignment

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        for request in batch:
            assert request.offset % self.request_alignment == request.end % self.request_alignment == 0
            self.log.append((request.offset, bytes(request.view)))
        await super().pwritev(batch, flags)
        if flags & WriteFlags.FUA:
            self.log.append(None)

    async def flush(self) -> None:
        self.log.append(None)


@pytest.mark.parametrize("alignment", [512, 4096])
@pytest.mark.parametrize("version", [1, 2])
async def test_a_node_that_takes_whole_blocks_makes_no_difference(proof: Proof, version: int, alignment: int) -> None:
    """The header behind an edge: what is written of a block is read before and written back around it."""
    target = await fresh(version, 2)
    image = await header_image(target, detached=True)
    header = edge(RecordedNode(target, alignment))
    rng = random.Random(alignment + version)
    steps: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        ("s", lambda: edit(header, state="active", new_secret="m", keyslot=6)),
        ("sm", lambda: edit(header, state="inactive", old_secret="n")),
        ("sm", lambda: edit(header, state="changed", new_secret="n", old_secret="s")),
        ("nms", lambda: restore_header(header, image, force=False)),
    ]
    for always, work in steps:
        before = bytes(target.data)
        await work()
        assert await bad_state(before, target.log, always, rng, proof.count(SUBSETS) // 2) is None
        target.log.clear()
    await check_end(bytes(target.data), "sn", version)


async def bad_state(
    before: bytes, log: list[tuple[int, bytes] | None], names: str, rng: random.Random, subsets: int
) -> int | None:
    """Return the number of the first state that none of the passphrases opens."""
    for count, data in enumerate(states(before, log, rng, subsets)):
        for name in names:
            if await opens(data, name):
                break
        else:
            return count
    return None


@pytest.mark.parametrize("version", [1, 2])
async def test_an_order_that_locks_out_is_found(version: int) -> None:
    """A backup written straight over what is there, as everybody does it."""
    target = await fresh(version)
    image = bytes(target.data)
    await edit(target, state="changed", new_secret="m", old_secret="s")
    before = bytes(target.data)
    target.log.clear()
    await target.pwrite(0, image)
    await target.flush()
    assert await bad_state(before, target.log, "sm", random.Random(1), 4) is not None


async def check_end(data: bytes, good: str, version: int) -> None:
    variants = [data]
    if version == 2:
        for spoiled in (0, gen.COPY):
            variants.append(data[: spoiled + 5000] + b"\0\0\0\0" + data[spoiled + 5004 :])
    for variant in variants:
        for name in PASSPHRASES:
            assert await opens(variant, name) == (name in good), name
