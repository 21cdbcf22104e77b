"""Key slots of a LUKS2 header: added, changed, erased; digests and tokens follow, nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks2
from qmpd.formats.luks2_json import dump_json
from qmpd.luks.detect import read_header
from qmpd.luks.keys import KeyslotEdit, edit_keyslots
from qmpd.luks.luks2 import read_copies
from qmpd.luks.update2 import update_header
from tests.gen import luks2 as gen
from tests.unit.luks.test_keys import Recorded

SECRETS = {"s": gen.PASSPHRASE, "n": b"newpass", "m": b"third", "x": b"unknown"}
AREA = 8 * gen.AREA


def secret(name: str) -> SecretBytes:
    return SecretBytes(SECRETS[name])


def header(tree: gen.Tree | None = None) -> Recorded:
    """A volume with room for eight slots, slot 0 taken."""
    tree = gen.tree() if tree is None else tree
    tree["config"]["keyslots_size"] = str(AREA)
    data = gen.header(tree)
    return Recorded(data + bytes(2 * gen.COPY + AREA - len(data)))


async def edit(target: Recorded, force: bool = False, **options: Any) -> None:
    if options["state"] != "inactive":
        options = {"pbkdf": "pbkdf2", "iterations": 1000} | options
    await edit_keyslots(target, KeyslotEdit(**options), secret, "s", detached=True, force=force)


async def opens(data: bytes | bytearray, name: str) -> bool:
    try:
        volume = await read_header(Recorded(bytes(data)), detached=True)
        (await volume.unlock(Recorded(bytes(data)), secret(name))).wipe()
    except CommandError:
        return False
    return True


async def tree_of(target: Recorded) -> gen.Tree:
    found = await read_copies(target, "header")
    assert found.problem is None
    twin = luks2.parse_copy(target.data[gen.COPY : 2 * gen.COPY], gen.COPY, "header")
    assert twin.metadata.tree == found.copy.metadata.tree
    return dict(found.copy.metadata.tree)


async def test_a_passphrase_is_added_changed_and_erased() -> None:
    target = header()
    await edit(target, state="active", new_secret="n")
    assert [await opens(target.data, name) for name in "snmx"] == [True, True, False, False]
    tree = await tree_of(target)
    assert tree["digests"]["0"]["keyslots"] == ["0", "1"]
    assert (await read_copies(target, "header")).copy.binary.seqid == 4
    await edit(target, state="changed", new_secret="m", old_secret="s")
    assert [await opens(target.data, name) for name in "snmx"] == [False, True, True, False]
    await edit(target, state="inactive", old_secret="n")
    assert [await opens(target.data, name) for name in "snmx"] == [False, False, True, False]
    tree = await tree_of(target)
    assert list(tree["keyslots"]) == ["0"], "a changed passphrase stays in its slot"
    assert tree["digests"]["0"]["keyslots"] == ["0"]


@pytest.mark.parametrize("pbkdf", ["argon2i", "argon2id"])
async def test_how_the_new_slot_is_derived(pbkdf: str) -> None:
    target = header()
    options: dict[str, Any] = {"pbkdf": pbkdf, "pbkdf_memory": 64, "pbkdf_parallel": 1, "iterations": 4}
    await edit(target, state="active", new_secret="n", keyslot=31, **options)
    kdf = (await tree_of(target))["keyslots"]["31"]["kdf"]
    assert {name: kdf[name] for name in ("type", "time", "memory", "cpus")} == {
        "type": pbkdf, "time": 4, "memory": 64, "cpus": 1,
    }  # fmt: skip
    assert await opens(target.data, "n")


async def test_what_is_not_ours_stays() -> None:
    tree = gen.tree()
    tree["keyslots"]["0"]["priority"] = 2
    tree["tokens"] = {
        "3": {"type": "mine", "keyslots": ["0"], "deep": {"list": [1, {"two": None}]}},
        "9": {"type": "luks2-keyring", "keyslots": [], "key_description": "k"},
    }
    tree["config"]["flags"] = ["allow-discards", "of-tomorrow"]
    tree["later"] = {"a": [True, 1.5, "ü"]}
    target = header(tree)
    await edit(target, state="active", new_secret="n", keyslot=1)
    now = await tree_of(target)
    for name in ("tokens", "segments", "config", "later"):
        assert now[name] == tree[name]
    await update_header(target, lambda tree: tree["tokens"]["3"]["keyslots"].insert(0, "1"))
    tree["tokens"]["3"]["keyslots"] = ["1", "0"]
    await edit(target, state="changed", new_secret="m", keyslot=0)
    assert (await tree_of(target))["keyslots"]["0"]["priority"] == 2
    assert (await tree_of(target))["tokens"] == tree["tokens"]
    await edit(target, state="inactive", keyslot=1)
    now = await tree_of(target)
    assert now["tokens"]["3"] == tree["tokens"]["3"] | {"keyslots": ["0"]}
    assert now["tokens"]["9"] == tree["tokens"]["9"]


async def test_areas_fill_the_first_gap_until_there_is_none() -> None:
    target = header()
    for slot in range(1, 8):
        await edit(target, state="active", new_secret="n", keyslot=slot)
    with pytest.raises(CommandError, match="No space for a new keyslot: it takes 131072 bytes"):
        await edit(target, state="active", new_secret="m")
    before = {key: slot["area"]["offset"] for key, slot in (await tree_of(target))["keyslots"].items()}
    old = bytes(target.data)
    await edit(target, state="inactive", keyslot=3)
    place = int(before["3"])
    same = sum(a == b for a, b in zip(old[place : place + gen.AREA], target.data[place:], strict=False))
    assert same < gen.AREA // 100, "the material is overwritten"
    await edit(target, state="active", new_secret="m", keyslot=20)
    assert (await tree_of(target))["keyslots"]["20"]["area"]["offset"] == before["3"]
    await edit(target, state="inactive", old_secret="n")
    assert sorted((await tree_of(target))["keyslots"]) == ["0", "20"]


async def test_a_passphrase_is_changed_where_there_is_no_room_for_another() -> None:
    tree = gen.tree()
    tree["tokens"] = {"3": {"type": "mine", "keyslots": ["0"]}}
    tree["keyslots"]["0"]["priority"] = 2
    target = header(tree)
    for slot in range(1, 8):
        await edit(target, state="active", new_secret="n", keyslot=slot)
    await edit(target, state="changed", new_secret="m", keyslot=0)
    now = await tree_of(target)
    assert now["tokens"] == tree["tokens"]
    assert (now["keyslots"]["0"]["priority"], len(now["keyslots"])) == (2, 8)
    assert [await opens(target.data, name) for name in "snm"] == [False, True, True]
    with pytest.raises(CommandError, match="Refusing to overwrite active keyslot 0"):
        await edit(target, state="active", new_secret="s", keyslot=0, secret="n")
    await edit(target, state="inactive", old_secret="m")
    for slot in range(1, 7):
        await edit(target, state="inactive", keyslot=slot)
    assert [await opens(target.data, name) for name in "snm"] == [False, True, False]


@pytest.mark.parametrize("spoiled", [0, gen.COPY])
@pytest.mark.parametrize("state", ["active", "inactive", "changed"])
async def test_a_damaged_copy_is_mended_first(spoiled: int, state: str) -> None:
    target = header()
    await edit(target, state="active", new_secret="n")
    target.data[spoiled + 5000] ^= 1
    options: dict[str, Any] = {"inactive": {}, "active": {"new_secret": "m"}, "changed": {"new_secret": "m"}}[state]
    if state != "active":
        options = options | {"old_secret": "n"}
    await edit(target, state=state, **options)
    assert await opens(target.data, "n") == (state == "active")
    assert await opens(target.data, "m") == (state != "inactive")
    await tree_of(target)


async def test_copies_of_one_age_that_differ_are_both_written() -> None:
    """What the copy that is not believed says must not bring an erased passphrase back."""
    target = header()
    await edit(target, state="active", new_secret="n")
    tree = await tree_of(target)
    other = gen.tree() | {"later": {}}
    other["config"]["keyslots_size"] = str(AREA)
    binary = (await read_copies(target, "header")).copy.binary
    target.data[gen.COPY : 2 * gen.COPY] = luks2.pack_copy(binary, dump_json(other), gen.COPY)
    await edit(target, state="inactive", old_secret="s")
    assert "later" not in await tree_of(target)
    assert tree["digests"]["0"]["salt"] == (await tree_of(target))["digests"]["0"]["salt"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"state": "active"}, "'new-secret' is required to activate a keyslot"),
        ({"state": "active", "new_secret": "n", "old_secret": "s"}, "'old-secret' must not be given when activating"),
        ({"state": "active", "new_secret": "n", "keyslot": 0}, "Refusing to overwrite active keyslot 0"),
        ({"state": "active", "new_secret": "n", "keyslot": 32}, "must be between 0 and 31"),
        ({"state": "active", "new_secret": "n", "secret": "x"}, "Invalid password, cannot unlock any keyslot"),
        ({"state": "active", "new_secret": "n", "iter_time": 5}, "'iterations' and 'iter-time' exclude each other"),
        ({"state": "active", "new_secret": "n", "pbkdf_memory": 64}, "'pbkdf-memory' is for argon2 only"),
        ({"state": "inactive"}, "either explicit keyslot index or the password"),
        ({"state": "inactive", "keyslot": 0}, "Attempt to erase the only active keyslot 0"),
        ({"state": "inactive", "keyslot": 4}, "Given keyslot 4 is already erased"),
        ({"state": "inactive", "old_secret": "x"}, "No keyslots match given"),
        ({"state": "inactive", "old_secret": "s"}, "All the active keyslots match"),
        ({"state": "inactive", "keyslot": 0, "old_secret": "x"}, "doesn't contain the given old password"),
        ({"state": "inactive", "keyslot": 0, "iterations": 4}, "'iterations' must not be given when erasing"),
        ({"state": "changed", "keyslot": 0}, "'new-secret' is required to change a keyslot"),
        ({"state": "changed", "new_secret": "n"}, "To change keyslot"),
        ({"state": "changed", "new_secret": "n", "keyslot": 5}, "Given keyslot 5 is already erased"),
        ({"state": "changed", "new_secret": "n", "old_secret": "x"}, "Invalid password"),
        ({"state": "changed", "new_secret": "n", "old_secret": "x", "secret": "s"}, "No keyslots match"),
    ],
)
async def test_what_would_lock_out_or_makes_no_sense_is_refused_and_changes_nothing(
    options: dict[str, Any], text: str
) -> None:
    target = header()
    before = bytes(target.data)
    with pytest.raises(CommandError, match=text):
        await edit(target, **options)
    assert target.data == before


async def test_the_last_slot_goes_by_force_only() -> None:
    target = header()
    await edit(target, force=True, state="inactive", keyslot=0)
    assert not await opens(target.data, "s")
    found = await read_copies(target, "header")
    assert not found.copy.metadata.keyslots


async def test_an_active_slot_is_replaced_by_force_only() -> None:
    target = header()
    await edit(target, force=True, state="active", new_secret="n", keyslot=0)
    assert [await opens(target.data, name) for name in "sn"] == [False, True]


async def test_a_backup_is_made_before_the_first_write_or_nothing_is_written(tmp_path: Path) -> None:
    target = header()
    before = bytes(target.data)
    name = tmp_path / "h.bak"
    with pytest.raises(CommandError, match="Invalid password"):
        await edit(target, state="active", new_secret="n", secret="x", backup=str(name))
    assert not name.exists()
    await edit(target, state="active", new_secret="n", backup=str(name))
    assert name.read_bytes() == before
    assert name.stat().st_mode & 0o777 == 0o600
    now = bytes(target.data)
    with pytest.raises(CommandError, match=r"Could not create '.*h\.bak': File exists"):
        await edit(target, state="inactive", old_secret="n", backup=str(name))
    assert target.data == now
    assert name.read_bytes() == before
