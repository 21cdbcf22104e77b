"""Key slots of an open LUKS1 volume are added and erased by a job while it is used, and by no crash lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from qmpd.luks.keys import KeyslotEdit, edit_keyslots
from qmpd.luks.volume import read_volume
from tests.support.daemon import RawClient, running

OPTIONS = Luks1Options(cipher_alg="aes-128", iterations=1000)
SECRETS = {"s": b"abc123", "n": b"newpass", "x": b"unknown"}


def secret(name: str) -> SecretBytes:
    return SecretBytes(SECRETS[name])


class Recorded:
    """A header in memory that remembers every write and flush."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.log: list[tuple[int, bytes] | None] = []

    @property
    def size(self) -> int:
        return len(self.data)

    async def pread(self, offset: int, length: int) -> bytearray:
        return self.data[offset : offset + length]

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.data[offset : offset + len(data)] = data
        self.log.append((offset, bytes(data)))

    async def flush(self) -> None:
        self.log.append(None)


async def header() -> Recorded:
    made = Recorded(bytes(header_length(OPTIONS)))
    await create_luks1(made, OPTIONS, secret("s"), detached=True)
    made.log.clear()
    return made


async def edit(target: Recorded, force: bool = False, **options: Any) -> None:
    options.setdefault("iter_time", 1 if options["state"] == "active" else None)
    await edit_keyslots(target, KeyslotEdit(**options), secret, "s", detached=True, force=force)


async def opens(data: bytes, name: str) -> bool:
    volume = await read_volume(Recorded(data), detached=True)
    try:
        (await volume.unlock(Recorded(data), secret(name))).wipe()
    except CommandError:
        return False
    return True


@pytest.mark.parametrize("slot", range(1, 8))
async def test_a_passphrase_is_added_to_any_slot_and_erased_again(slot: int) -> None:
    target = await header()
    await edit(target, state="active", new_secret="n", keyslot=slot)
    assert await opens(target.data, "n")
    await edit(target, state="inactive", old_secret="n")
    assert not await opens(target.data, "n")
    assert await opens(target.data, "s")


def states(before: bytes, log: list[tuple[int, bytes] | None]) -> Iterator[bytes]:
    """Yield what a crash can leave: every write done up to each of its 512-byte sectors."""
    data = bytearray(before)
    yield bytes(data)
    for entry in log:
        if entry is None:
            continue
        offset, written = entry
        cuts = [0, *range(512 - offset % 512, len(written), 512), len(written)]
        step = max(1, len(cuts) // 4)
        for start, end in zip(cuts, [*cuts[1:], len(written)], strict=True):
            data[offset + start : offset + end] = written[start:end]
            if len(cuts) < 6 or start // 512 % step == 0:
                yield bytes(data)
    yield bytes(data)


@pytest.mark.parametrize("slot", [1, 6])
async def test_at_every_moment_of_a_change_some_valid_passphrase_opens_the_volume(slot: int) -> None:
    target = await header()
    first = bytes(target.data)
    await edit(target, state="active", new_secret="n", keyslot=slot)
    for data in states(first, target.log):
        assert await opens(data, "s")
    second = bytes(target.data)
    target.log.clear()
    await edit(target, state="inactive", old_secret="s")
    for data in states(second, target.log):
        assert await opens(data, "n")
    assert not await opens(target.data, "s")
    offset = luks1.parse_header(target.data, detached=True).slots[0].material_offset
    assert target.data[offset : offset + 4096] != first[offset : offset + 4096], "the material is overwritten"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"state": "active"}, "'new-secret' is required to activate a keyslot"),
        ({"state": "active", "new_secret": "n", "keyslot": 0}, "Refusing to overwrite active keyslot 0"),
        ({"state": "active", "new_secret": "n", "keyslot": 8}, "Invalid keyslot 8 specified, must be between 0 and 7"),
        ({"state": "inactive"}, "either explicit keyslot index or the password"),
        ({"state": "inactive", "keyslot": 0}, "Attempt to erase the only active keyslot 0"),
        ({"state": "inactive", "keyslot": 4}, "Given keyslot 4 is already erased"),
        ({"state": "inactive", "old_secret": "x"}, "No keyslots match given"),
        ({"state": "inactive", "old_secret": "s"}, "All the active keyslots match"),
        ({"state": "inactive", "keyslot": 0, "old_secret": "x"}, "doesn't contain the given old password"),
    ],
)
async def test_what_would_lock_out_or_makes_no_sense_is_refused_and_changes_nothing(
    options: dict[str, Any], text: str
) -> None:
    target = await header()
    with pytest.raises(CommandError, match=text):
        await edit(target, **options)
    assert target.log == []


async def test_the_last_slot_goes_by_force_only() -> None:
    target = await header()
    await edit(target, force=True, state="inactive", keyslot=0)
    assert not await opens(target.data, "s")


def amend(client: RawClient, job: str, node: str, **options: Any) -> str | None:
    """Run an amend job to its end and return its error."""
    wire = {"driver": "luks", **{key.replace("_", "-"): value for key, value in options.items()}}
    client.ok("x-blockdev-amend", job_id=job, node_name=node, options=wire)
    while True:
        (row,) = client.ok("query-jobs")
        if row["status"] == "concluded":
            client.ok("job-dismiss", id=job)
            return row.get("error")


def test_a_key_change_through_one_disk_is_seen_by_the_other_and_disturbs_neither(tmp_path: Path) -> None:
    made = asyncio.run(header())
    (tmp_path / "h.img").write_bytes(made.data)
    with running(tmp_path) as daemon:
        client = daemon.client()
        for name, value in SECRETS.items():
            client.ok("object-add", qom_type="secret", id=name, data=value.decode())
        client.ok("blockdev-add", driver="file", node_name="h", filename=str(tmp_path / "h.img"))
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(bytes(1 << 20))
            file = {"driver": "file", "filename": str(tmp_path / name)}
            client.ok("blockdev-add", driver="luks", node_name=name, file=file, header="h", key_secret="s")
            client.ok("device_add", driver="virtio-blk-pci", drive=name, id=f"disk-{name}", share_rw=True)
        assert amend(client, "j1", "a", state="active", new_secret="n", iter_time=1) is None
        assert amend(client, "j2", "b", state="inactive", old_secret="s") is None
        for name in ("a", "b"):
            line = f'qemu-io {name} "write -P 7 4096 8192"'
            assert client.ok("human-monitor-command", command_line=line) == ""
        rows = {row["node-name"]: row for row in client.ok("query-named-block-nodes", flat=True)}
        for name in ("a", "b"):
            slots = rows[name]["image"]["format-specific"]["data"]["slots"]
            assert [slot["active"] for slot in slots][:2] == [False, True]
        error = amend(client, "j3", "a", state="active", new_secret="x", iter_time=1)
        assert error == "Invalid password, cannot unlock any keyslot", "the node's own secret was erased"
        assert amend(client, "j4", "a", state="active", new_secret="x", secret="n", iter_time=1) is None
    data = (tmp_path / "h.img").read_bytes()
    assert [asyncio.run(opens(data, name)) for name in ("s", "n", "x")] == [False, True, True]
