"""Headers of open volumes and of damaged ones: backups, restored and compared; what a header's state is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, QmpdError
from qmpd.luks.backup import Bytes, header_image
from qmpd.luks.create2 import Luks2Options, header_length
from qmpd.luks.encrypt import drop_journal
from qmpd.luks.encrypt_header import prepare_header
from qmpd.luks.restore import restore_header
from qmpd.luks.update2 import update_header
from qmpd.luks.verify import entropy, verify_header
from tests.conftest import FULL
from tests.gen import luks2 as gen
from tests.support.daemon import RawClient
from tests.unit.luks import test_keys, test_keys2
from tests.unit.luks.test_key_jobs import amend, disks, header_of, opens, slots

EXAMPLES = 1000 if FULL else 100

HEADERS = {version: header_of(version) for version in (1, 2)}


def refused(client: RawClient, command: str, **arguments: Any) -> str:
    reply = client.command(command, **arguments)
    assert "error" in reply, reply
    text = reply["error"]["desc"]
    assert isinstance(text, str)
    return text


def state(client: RawClient, node: str, **arguments: Any) -> dict[str, Any]:
    found = client.ok("x-luks-header-verify", node_name=node, **arguments)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", [1, 2])
def test_a_header_in_use_is_backed_up_and_put_back(tmp_path: Path, version: int) -> None:
    saved = tmp_path / "h.bak"
    with disks(tmp_path, version, "ab") as (_, client):
        size = client.ok("x-luks-header-backup", node_name="a", filename=str(saved))["size"]
        assert saved.stat().st_size == size
        assert saved.stat().st_mode & 0o777 == 0o600
        again = refused(client, "x-luks-header-backup", node_name="h", filename=str(saved))
        assert again == f"Could not create '{saved}': File exists"
        assert client.ok("x-luks-header-compare", node_name="b", filename=str(saved)) == {
            "equal": True, "differences": [],
        }  # fmt: skip
        assert amend(client, "j1", "a", state="active", new_secret="n") is None
        assert amend(client, "j2", "a", state="inactive", old_secret="s") is None
        found = client.ok("x-luks-header-compare", node_name="b", filename=str(saved))["differences"]
        assert found == ["slot 0 is in use in the second header only", "slot 1 is in use in the first header only"]
        client.ok("x-luks-header-restore", node_name="b", filename=str(saved))
        assert slots(client, "a") == slots(client, "b") == [0]
        assert client.ok("x-luks-header-compare", node_name="a", filename=str(saved))["equal"]
        for name in "ab":
            line = f'qemu-io {name} "write -P 7 4096 8192"'
            assert client.ok("human-monitor-command", command_line=line) == ""
    data = (tmp_path / "h.img").read_bytes()
    assert [opens(data, name) for name in "snm"] == [True, False, False]
    if version == 1:
        assert data[4096:] == saved.read_bytes()[4096 : len(data)]


@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_header_is_told_and_mended_from_the_backup(tmp_path: Path, version: int) -> None:
    saved = tmp_path / "h.bak"
    with disks(tmp_path, version, "a") as (_, client):
        client.ok("x-luks-header-backup", node_name="a", filename=str(saved))
        assert state(client, "a")["healthy"]
        with (tmp_path / "h.img").open("r+b") as file:
            file.write(bytes(16384 + 8192))  # both copies of LUKS2, and slot 0 of LUKS1
        found = state(client, "a")
        assert not found["healthy"]
        assert "error" in client.command(
            "blockdev-add", driver="luks", node_name="x", read_only=True, header="h", key_secret="s",
            file={"driver": "null-co", "size": 1 << 20, "read-only": True},
        )  # fmt: skip
        client.ok("x-luks-header-restore", node_name="h", filename=str(saved))
        assert state(client, "h", secret="s")["slots"][0]["opens"]
        assert client.ok("human-monitor-command", command_line='qemu-io a "read 0 4096"') == ""
    assert opens((tmp_path / "h.img").read_bytes(), "s")


@pytest.mark.parametrize("version", [1, 2])
def test_the_header_of_another_volume_is_refused(tmp_path: Path, version: int) -> None:
    tree = gen.tree()
    tree["digests"]["0"]["salt"] = tree["keyslots"]["0"]["kdf"]["salt"]
    other = tmp_path / "other.bak"
    other.write_bytes(header_of(1) if version == 1 else bytes(test_keys2.header(tree).data))
    with disks(tmp_path, version, "a") as (_, client):
        before = (tmp_path / "h.img").read_bytes()
        text = refused(client, "x-luks-header-restore", node_name="a", filename=str(other))
        assert text.startswith("The backup is not of the volume that is open (")
        assert text == refused(client, "x-luks-header-restore", node_name="h", filename=str(other), force=True)
        (tmp_path / "free.img").write_bytes(before)
        client.ok("blockdev-add", driver="file", node_name="free", filename=str(tmp_path / "free.img"))
        text = refused(client, "x-luks-header-restore", node_name="free", filename=str(other))
        assert text.startswith("The backup is of another volume (")
        assert (tmp_path / "free.img").read_bytes() == before
        client.ok("x-luks-header-restore", node_name="free", filename=str(other), force=True)
        assert client.ok("x-luks-header-compare", node_name="free", filename=str(other))["equal"]
        assert not client.ok("x-luks-header-compare", node_name="h", filename=str(other))["equal"]
    assert (tmp_path / "h.img").read_bytes() == before


def test_what_is_no_backup_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    with disks(tmp_path, 2, "a") as (_, client):
        before = (tmp_path / "h.img").read_bytes()
        for name, data, text in (
            ("empty", b"", "Volume is not in LUKS format"),
            ("cut", before[:40000], "LUKS2 header is on a device of 40000 bytes"),
            ("noise", bytes(100_000), "Volume is not in LUKS format"),
        ):
            (tmp_path / name).write_bytes(data)
            found = refused(client, "x-luks-header-restore", node_name="a", filename=str(tmp_path / name), force=True)
            assert text in found
        assert "No such file" in refused(client, "x-luks-header-restore", node_name="a", filename=str(tmp_path / "no"))
        (tmp_path / "small.img").write_bytes(bytes(4096))
        (tmp_path / "good").write_bytes(before)
        client.ok("blockdev-add", driver="file", node_name="small", filename=str(tmp_path / "small.img"))
        found = refused(client, "x-luks-header-restore", node_name="small", filename=str(tmp_path / "good"))
        assert found == f"The LUKS header takes {len(before)} bytes, there are 4096"
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "elsewhere")
        assert "Could not create" in refused(client, "x-luks-header-backup", node_name="a", filename=str(link))
        assert not (tmp_path / "elsewhere").exists()
        reply = client.command("x-luks-header-verify", node_name="a", secret="nobody")
        assert reply["error"]["desc"] == "No secret with id 'nobody'"
    assert (tmp_path / "h.img").read_bytes() == before


def look(data: bytes) -> dict[str, Any]:
    return asyncio.run(verify_header(Bytes(data))).to_qapi()


def test_what_is_found_in_a_luks2_header() -> None:
    good = bytes(test_keys2.header().data)
    found = look(good)
    assert (found["healthy"], found["version"], found["free"]) == (True, 2, 7 * gen.AREA)
    assert [copy["seqid"] for copy in found["copies"]] == [3, 3]
    assert found["notes"] == ["slot 0 is weak: 1000 rounds of pbkdf2 with sha256, 600000 are advised"]
    for offset, text in (
        (4200, "the primary header is damaged: "),
        (gen.COPY + 4200, "the secondary header is damaged: "),
        (0, "the primary header is damaged: "),
    ):
        found = look(good[:offset] + b"\xff" + good[offset + 1 :])
        assert found["problems"][0].startswith(text)
        assert len(found["problems"]) == 1
        assert found["slots"][0]["active"]
    found = look(gen.header(seqids=(3, 4)))
    assert found["problems"] == ["the primary header is damaged: of sequence id 3, the other copy is newer"]
    place = 2 * gen.COPY + 50 * 512
    found = look(good[:place] + bytes(512) + good[place + 512 :])
    damage = f"its key material is damaged at byte {place}: the sector is not random"
    assert found["slots"][0]["damage"] == damage
    assert found["problems"] == [f"slot 0: {damage}"]
    both = look(good[:4200] + b"\xff" + good[4201 : gen.COPY + 4200] + b"\xff" + good[gen.COPY + 4201 :])
    assert (both["healthy"], both["version"], len(both["problems"]), both["slots"]) == (False, 2, 2, [])


def test_unknown_slots_and_requirements_are_named() -> None:
    tree = gen.tree()
    area = {"type": "raw", "offset": str(2 * gen.COPY + gen.AREA), "size": "4096"}
    tree["keyslots"]["4"] = {"type": "of-tomorrow", "key_size": 32, "area": area}
    tree["config"]["requirements"] = {"mandatory": ["of-tomorrow-too"]}
    found = look(bytes(test_keys2.header(tree).data))
    assert found["healthy"]
    assert found["slots"][1] == {"slot": 4, "active": False, "type": "of-tomorrow", "known": False}
    assert "slot 4 is of a kind that is not known: type 'of-tomorrow'" in found["notes"]
    assert "the volume requires 'of-tomorrow-too'" in found["notes"]


def test_what_is_found_in_a_luks1_header() -> None:
    good = header_of(1)
    assert look(good)["healthy"]
    found = look(good[: 4096 + 1024] + bytes(700) + good[4096 + 1724 :])
    assert found["slots"][0]["damage"] == "its key material is damaged at byte 5120: the sector is not random"
    assert look(bytes(4096))["problems"] == ["Volume is not in LUKS format"]
    assert look(good[:208] + b"\0\0\0\1" + good[212:])["problems"] == ["Keyslot 0 state (active/disable) is corrupted"]
    assert look(good[:5000])["problems"] == [
        "slot 0: its key material ends at 132096, behind the end at 5000",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", gen.BROKEN, ids=lambda broken: broken.name)
def test_headers_that_break_a_rule_are_told_and_never_restored(broken: gen.Broken) -> None:
    data = broken.build()
    found = look(data)
    assert not found["healthy"]
    assert all(" header is damaged: " in problem for problem in found["problems"])
    good = bytes(test_keys2.header().data)
    target = test_keys.Recorded(good)
    with pytest.raises(QmpdError):
        asyncio.run(restore_header(target, data, force=True))
    assert target.data == good


@pytest.mark.proof("luks-header-care", examples=EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.booleans(),
)
def test_whatever_is_wrong_with_a_header_is_said_in_words(
    version: int, changes: list[tuple[int, bytes]], force: bool
) -> None:
    good = HEADERS[version]
    data = bytearray(good)
    for offset, piece in changes:
        data[offset : offset + len(piece)] = piece
    look(bytes(data))
    target = test_keys.Recorded(good)
    try:
        asyncio.run(restore_header(target, bytes(data), force=force))
    except QmpdError:
        assert target.data == good
    target = test_keys.Recorded(bytes(data))
    try:
        asyncio.run(restore_header(target, good, force=True))
    except QmpdError:
        assert target.data == data
    else:
        assert opens(bytes(target.data), "s")


async def test_a_restore_that_no_order_makes_safe_is_refused_unless_forced() -> None:
    """A keyslot area that is full with one slot, whose material is not the backup's."""
    image = gen.header()
    target = test_keys.Recorded(image)
    target.data[2 * gen.COPY + 1000] ^= 1
    before = bytes(target.data)
    with pytest.raises(CommandError, match="no room for an order of writes that survives a crash"):
        await restore_header(target, image, force=False)
    assert target.data == before
    await restore_header(target, image, force=True)
    assert await test_keys2.opens(target.data, "s")


async def test_the_header_of_an_encryption_in_place_is_looked_at_and_left_alone() -> None:
    target = test_keys.Recorded(bytes(header_length()))
    options = Luks2Options(pbkdf="pbkdf2", iterations=1000)
    with SecretBytes(b"abc123") as passphrase:
        await prepare_header(target, options, passphrase, 1 << 20)
    image = before = bytes(target.data)
    with pytest.raises(CommandError, match="The volume is being encrypted in place"):
        await header_image(target, detached=True)
    report = (await verify_header(Bytes(image))).to_qapi()
    assert (report["healthy"], len(report["requirements"])) == (True, 1)
    assert [slot["active"] for slot in report["slots"]] == [True, False], "the second is the journal"
    with pytest.raises(CommandError, match="cannot be changed while the volume is being encrypted in place"):
        await test_keys2.edit(target, state="active", new_secret="n")
    with pytest.raises(CommandError, match="The backup is of a volume at work"):
        await restore_header(target, image, force=False)
    done = test_keys.Recorded(before)
    await update_header(done, drop_journal)
    with pytest.raises(CommandError, match=r"The volume is at work .* a backup would undo it"):
        await restore_header(target, await header_image(done, detached=True), force=False)
    assert target.data == before


def test_entropy() -> None:
    assert entropy(bytes(512)) == 0
    assert entropy(bytes(range(256)) * 2) == 1
