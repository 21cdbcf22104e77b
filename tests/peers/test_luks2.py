"""LUKS2 against cryptsetup: its headers unlocked by us, and the same verdict on damaged ones."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError
from qmpd.luks.luks2 import Luks2Volume, read_copies
from qmpd.luks.volume import Unlocked
from tests.gen import luks2 as gen
from tests.peers.conftest import need
from tests.support.peers import find
from tests.unit.luks.memory import MemoryNode, edge


def cryptsetup(*arguments: str | Path, data: bytes = b"") -> int:
    command = [find("cryptsetup") or "", *map(str, arguments), "--disable-locks", "--batch-mode"]
    return subprocess.run(command, input=data, capture_output=True, timeout=60).returncode


async def unlocked(data: bytes, passphrase: bytes = gen.PASSPHRASE) -> tuple[Luks2Volume, Unlocked]:
    child = edge(MemoryNode(data))
    volume = Luks2Volume(await read_copies(child, "h.img"))
    return volume, await volume.unlock(child, SecretBytes(passphrase))


PBKDF2 = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


def argon(kind: str, memory: int, cpus: int) -> tuple[str, ...]:
    costs = ("--pbkdf-memory", str(memory), "--pbkdf-parallel", str(cpus), "--pbkdf-force-iterations", "4")
    return ("--pbkdf", kind, *costs)


@pytest.mark.parametrize(
    "options",
    [
        PBKDF2,
        (*PBKDF2, "--hash", "sha512", "--key-size", "512"),
        (*PBKDF2, "--hash", "sha1", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"),
        (*PBKDF2, "--sector-size", "4096", "--label", "mine"),
        (*PBKDF2, "--luks2-metadata-size", "64k", "--luks2-keyslots-size", "1m"),
        (*PBKDF2, "--luks2-metadata-size", "4m"),
        argon("argon2i", 64, 1),
        argon("argon2id", 1024, 1),
        argon("argon2id", 65536, 4),
    ],
    ids=" ".join,
)
async def test_a_header_that_cryptsetup_made(options: tuple[str, ...], tmp_path: Path) -> None:
    need("cryptsetup")
    payload, header = tmp_path / "p.img", tmp_path / "h.img"
    payload.write_bytes(bytes(1 << 20))
    made = cryptsetup("luksFormat", "--type", "luks2", *options, "--header", header, payload, "-", data=b"abc123")
    assert made == 0
    volume, key = await unlocked(header.read_bytes())
    assert key.slot == 0
    assert volume.problem is None
    with pytest.raises(CommandError, match="Invalid password"):
        await unlocked(header.read_bytes(), b"abc1234")


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_data_that_cryptsetup_encrypted(sector_size: int, tmp_path: Path) -> None:
    """Its offline encryption works on plain files: the payload must decrypt to what it was."""
    need("cryptsetup")
    payload, header = tmp_path / "p.img", tmp_path / "h.img"
    plain = random.Random(sector_size).randbytes(1 << 20)
    payload.write_bytes(plain)
    size = ("--sector-size", str(sector_size))
    command = ("reencrypt", "--encrypt", "--type", "luks2", "--force-offline-reencrypt", *PBKDF2, *size)
    assert cryptsetup(*command, "--header", header, payload, "--key-file", "-", data=b"abc123") == 0
    volume, key = await unlocked(header.read_bytes())
    assert volume.spec.sector_size == sector_size
    buffer = memoryview(bytearray(payload.read_bytes()))
    assert bytes(buffer) != plain
    crypto = BlockCrypto(volume.spec, key.key, first=volume.first_sector)
    crypto.decrypt([(volume.first_sector, buffer, buffer)])
    assert bytes(buffer) == plain


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_a_header_of_our_own_making_opens_in_cryptsetup(sector_size: int, tmp_path: Path) -> None:
    need("cryptsetup")
    data = gen.header(gen.tree(sector_size=sector_size))
    _, key = await unlocked(data)
    assert bytes(key.key) == gen.KEY
    path = tmp_path / "h.img"
    path.write_bytes(data)
    test = ("open", "--test-passphrase", "--key-file", "-", path)
    assert cryptsetup(*test, data=gen.PASSPHRASE) == 0
    assert cryptsetup(*test, data=b"wrong") == 2


async def verdicts(data: bytes, path: Path) -> tuple[bool, bool]:
    """Return whether we and whether cryptsetup take the header for a LUKS2 header."""
    path.write_bytes(data)
    try:
        await read_copies(edge(MemoryNode(data)), str(path))
        ours = True
    except ImageError:
        ours = False
    return ours, cryptsetup("luksDump", path) == 0


@pytest.mark.parametrize("broken", gen.BROKEN, ids=lambda broken: broken.name)
async def test_the_same_verdict_on_one_rule_broken(broken: gen.Broken, tmp_path: Path) -> None:
    need("cryptsetup")
    assert await verdicts(broken.build(), tmp_path / "h.img") == (False, False)


@pytest.mark.parametrize("name", gen.jsons())
async def test_the_same_verdict_on_areas_that_hold_no_object(name: str, tmp_path: Path) -> None:
    need("cryptsetup")
    assert await verdicts(gen.header(text=gen.jsons()[name]), tmp_path / "h.img") == (False, False)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("at", [0, 7, 15, 23, 80, 140, 170, 256, 460, 4096, 4200, 16383])
async def test_the_same_verdict_on_one_damaged_byte(at: int, index: int, tmp_path: Path) -> None:
    """One copy is enough, for both; but the version behind an intact first magic decides alone."""
    need("cryptsetup")
    data = bytearray(gen.header())
    data[index * gen.COPY + at] ^= 0x55
    accepted = (at, index) != (7, 0)
    assert await verdicts(bytes(data), tmp_path / "h.img") == (accepted, accepted)


@pytest.mark.parametrize("missing", [1, 4096, gen.AREA])
async def test_the_same_verdict_on_a_device_too_small(missing: int, tmp_path: Path) -> None:
    need("cryptsetup")
    assert await verdicts(gen.header()[:-missing], tmp_path / "h.img") == (False, False)
