"""Header backups are cryptsetup's, byte by byte, and go both ways; what a crash leaves, cryptsetup opens."""

from __future__ import annotations

import asyncio
import random
import subprocess
from pathlib import Path

import pytest

from qmpd.luks.backup import Bytes, header_image
from qmpd.luks.restore import restore_header
from tests.conftest import Proof
from tests.faults.test_luks_crash import CASES, PASSPHRASES, fresh, states
from tests.gen import luks2 as gen
from tests.peers.conftest import need
from tests.support.daemon import program
from tests.unit.luks.test_keys import Recorded

CHEAP = ["--pbkdf-force-iterations", "1000"]
OLD, NEW = "abc123", "newpass"
STATES = 200
"""Crash states of a full run that cryptsetup is asked to open."""


def cryptsetup(*arguments: str | Path, passphrase: str = "", accept: tuple[int, ...] = (0,)) -> int:
    command = ["cryptsetup", "--batch-mode", *map(str, arguments)]
    done = subprocess.run(command, input=passphrase.encode(), capture_output=True, timeout=60)
    assert done.returncode in accept, (command, done.stderr)
    return done.returncode


def luks(*arguments: str | Path) -> None:
    done = subprocess.run([program("qmpd-img"), "luks", *map(str, arguments)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def opens(image: Path, passphrase: str) -> bool:
    arguments = ("open", "--test-passphrase", "--key-file=-", image)
    return cryptsetup(*arguments, passphrase=passphrase, accept=(0, 1, 2)) == 0


def volume(folder: Path, version: str) -> Path:
    image = folder / "v.luks"
    with image.open("wb") as file:
        file.truncate(18 << 20)
    kdf = ["--pbkdf", "pbkdf2"] if version == "luks2" else []
    cryptsetup("luksFormat", "--type", version, *kdf, *CHEAP, "--key-file=-", image, passphrase=OLD)
    return image


def add_key(folder: Path, image: Path, version: str) -> None:
    (folder / "old.key").write_text(OLD)
    (folder / "new.key").write_text(NEW)
    kdf = ["--pbkdf", "pbkdf2"] if version == "luks2" else []
    cryptsetup("luksAddKey", *kdf, *CHEAP, "--key-file", folder / "old.key", image, folder / "new.key")


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_a_backup_is_what_cryptsetup_makes_and_takes(tmp_path: Path, version: str) -> None:
    need("cryptsetup")
    image = volume(tmp_path, version)
    ours, theirs = tmp_path / "ours.bak", tmp_path / "theirs.bak"
    cryptsetup("luksHeaderBackup", image, "--header-backup-file", theirs)
    luks("backup", image, ours)
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_mode & 0o777 == 0o600
    cryptsetup("luksDump", ours)
    cryptsetup("isLuks", "--type", version, ours)
    assert opens(ours, OLD)
    add_key(tmp_path, image, version)
    assert opens(image, NEW)
    cryptsetup("luksHeaderRestore", image, "--header-backup-file", ours)
    assert [opens(image, text) for text in (OLD, NEW)] == [True, False]
    luks("compare", image, ours)


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_we_restore_what_cryptsetup_saved(tmp_path: Path, version: str) -> None:
    need("cryptsetup")
    image = volume(tmp_path, version)
    saved = tmp_path / "theirs.bak"
    cryptsetup("luksHeaderBackup", image, "--header-backup-file", saved)
    add_key(tmp_path, image, version)
    cryptsetup("luksKillSlot", image, "0", "--key-file", tmp_path / "new.key")
    assert [opens(image, text) for text in (OLD, NEW)] == [False, True]
    luks("restore", image, saved)
    assert [opens(image, text) for text in (OLD, NEW)] == [True, False]
    cryptsetup("repair", image)
    data = image.read_bytes()
    image.write_bytes(bytes(1 << 20) + data[1 << 20 :])
    assert not opens(image, OLD)
    luks("restore", image, saved)
    assert opens(image, OLD)
    assert data[16 << 20 :] == image.read_bytes()[16 << 20 :]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.proof
def test_cryptsetup_opens_what_a_crash_leaves(tmp_path: Path, proof: Proof, version: int) -> None:
    """States from the middle of changes, as cryptsetup sees them: LUKS1 at its least, recovery of LUKS2 copies."""
    need("cryptsetup")
    rng = random.Random(version)
    chosen: list[tuple[str, str, bytes]] = []
    for case in CASES:
        if version in case.versions and case.name in ("add", "change", "erase", "restore-what-was-changed"):
            chosen += asyncio.run(sample(case.name, version, proof.count(STATES) // 8, rng))
    assert len(chosen) >= 8
    image = tmp_path / "state"
    for name, always, data in chosen:
        image.write_bytes(data)
        assert any(opens(image, PASSPHRASES[one].decode()) for one in always), name


async def sample(name: str, version: int, count: int, rng: random.Random) -> list[tuple[str, str, bytes]]:
    case = next(one for one in CASES if one.name == name)
    target = await fresh(version, case.slots, case.room)
    before = await case.work(target)
    found = list(states(before, target.log, rng, 2))
    return [(name, case.always, data) for data in rng.sample(found, min(count, len(found)))]


async def test_a_restored_luks2_header_is_the_backup_but_for_its_sequence_id() -> None:
    target = await fresh(2, 2)
    image = await header_image(target, detached=True)
    await target.pwrite(2 * gen.COPY, bytes(4096))
    await restore_header(target, image, force=False)
    again = Recorded(bytes(target.data))
    assert again.data[2 * gen.COPY :] == image[2 * gen.COPY :]
    assert again.data[4096 : gen.COPY] == Bytes(image)._data[4096 : gen.COPY]
