"""LUKS across versions, ciphers, derivations, sector sizes and places of the header, against cryptsetup.

cryptsetup formats and fills a volume by encrypting a plain file offline, and reads ours by decrypting
it offline: neither needs device-mapper. It has no such thing for LUKS1, but converts headers between
the versions, which leaves the payload alone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.luks import create, create2
from qmpd.luks.create import Luks1Options, create_luks1
from qmpd.luks.create2 import Luks2Options, create_luks2
from tests.peers.conftest import need
from tests.support.peers import find
from tests.unit.luks.memory import MemoryNode, edge, opened

SIZE = 256 * 1024
PLAIN = random.Random(1).randbytes(SIZE)
PASSPHRASE = b"abc123"
ROOM = 32 << 20
"""Bytes behind the payload that cryptsetup wants when it is to put a header before it."""


@dataclass(frozen=True)
class Combo:
    """One combination; `cost` is what the derivation takes, None for the default time."""

    version: int
    cipher: str
    bits: int
    hash: str = "sha256"
    kdf: str = "pbkdf2"
    sector: int = 512
    detached: bool = True
    cost: int | None = 1000

    def __str__(self) -> str:
        place = "detached" if self.detached else "whole"
        cost = "-default-cost" if self.cost is None else ""
        return f"luks{self.version}-{self.cipher}-{self.bits}-{self.hash}-{self.kdf}-{self.sector}-{place}{cost}"

    def arguments(self) -> list[str]:
        """Return cryptsetup's options."""
        words = ["--cipher", self.cipher, "--key-size", str(self.bits), "--hash", self.hash, "--pbkdf", self.kdf]
        words += ["--sector-size", str(self.sector)]
        if self.version == 1:  # or it could not be converted
            words += ["--keyslot-cipher", self.cipher, "--keyslot-key-size", str(self.bits)]
        if self.cost is not None:
            words += ["--pbkdf-force-iterations", str(self.cost)]
            if self.kdf != "pbkdf2":
                words += ["--pbkdf-memory", "64", "--pbkdf-parallel", "1"]
        return words

    def options(self) -> Luks2Options:
        """Return ours."""
        cipher, mode, *rest = self.cipher.split("-", 2)
        iv, _, iv_hash = (rest[0] if rest else "plain64").partition(":")
        argon = self.kdf != "pbkdf2" and self.cost is not None
        return Luks2Options(
            cipher_alg=f"{cipher}-{self.bits // 2 if mode == 'xts' else self.bits}",
            cipher_mode=mode,
            ivgen_alg=iv,
            ivgen_hash_alg=iv_hash or None,
            hash_alg=self.hash,
            iterations=self.cost,
            sector_size=self.sector,
            pbkdf=self.kdf,
            pbkdf_memory=64 if argon else None,
            pbkdf_parallel=1 if argon else None,
        )


def argon(cipher: str, bits: int, kdf: str = "argon2id", sector: int = 512, *, detached: bool = True) -> Combo:
    return Combo(2, cipher, bits, "sha256", kdf, sector, detached, 4)


LUKS1 = [
    Combo(1, cipher, bits, hash_name, detached=detached)
    for cipher, bits, hash_name, detached in (
        ("aes-xts-plain64", 256, "sha256", True),
        ("aes-xts-plain64", 512, "sha256", False),
        ("aes-xts-plain64", 512, "sha512", True),
        ("aes-xts-plain", 512, "sha1", False),
        ("aes-xts-plain64be", 512, "sha256", True),
        ("aes-xts-essiv:sha256", 512, "sha384", True),
        ("aes-cbc-plain", 128, "sha224", True),
        ("aes-cbc-plain64", 192, "sha256", True),
        ("aes-cbc-plain64be", 256, "sha512", False),
        ("aes-cbc-essiv:sha256", 256, "sha1", True),
        ("aes-cbc-essiv:sha256", 128, "sha256", False),
        ("aes-cbc-benbi", 256, "sha256", True),
        ("aes-ctr-plain64", 256, "sha256", True),
        ("camellia-cbc-plain64", 128, "sha256", True),
        ("camellia-cbc-plain64", 192, "sha256", False),
        ("camellia-cbc-essiv:sha256", 256, "ripemd160", True),
        ("camellia-ctr-plain64", 256, "sha256", True),
    )
]
LUKS2 = [
    Combo(2, "aes-xts-plain64", 256),
    Combo(2, "aes-xts-plain64", 512, detached=False),
    Combo(2, "aes-xts-plain64", 512, "sha1"),
    Combo(2, "aes-xts-plain64", 512, "sha384", sector=4096),
    Combo(2, "aes-xts-plain64", 512, "sha512", sector=4096, detached=False),
    Combo(2, "aes-xts-plain64", 256, "sha224", sector=1024),
    Combo(2, "aes-xts-plain64", 512, "ripemd160", sector=2048),
    Combo(2, "aes-xts-plain", 512, detached=False),
    Combo(2, "aes-xts-plain64be", 512, sector=4096),
    Combo(2, "aes-xts-essiv:sha256", 512, sector=2048),
    Combo(2, "aes-cbc-plain", 128),
    Combo(2, "aes-cbc-plain64", 192, sector=4096),
    Combo(2, "aes-cbc-plain64be", 256, detached=False),
    Combo(2, "aes-cbc-essiv:sha256", 256, sector=4096),
    Combo(2, "aes-cbc-essiv:sha256", 128, detached=False),
    Combo(2, "aes-cbc-benbi", 256),
    Combo(2, "aes-ctr-plain64", 128, sector=1024),
    Combo(2, "aes-ctr-plain64", 256),
    Combo(2, "aes-ecb", 256),
    Combo(2, "camellia-cbc-plain64", 128, sector=4096),
    Combo(2, "camellia-cbc-plain64be", 192),
    Combo(2, "camellia-cbc-essiv:sha256", 256, detached=False),
    Combo(2, "camellia-ctr-plain64", 256, sector=2048),
    argon("aes-xts-plain64", 512),
    argon("aes-xts-plain64", 512, sector=4096, detached=False),
    argon("aes-xts-plain64", 256, "argon2i", detached=False),
    argon("aes-cbc-essiv:sha256", 256, "argon2i", 1024),
    argon("aes-cbc-plain64", 256, "argon2i", 4096),
    argon("camellia-cbc-plain64", 256, "argon2id"),
]
DEFAULT_COSTS = [
    Combo(1, "aes-xts-plain64", 512, cost=None),
    Combo(2, "aes-xts-plain64", 512, cost=None),
    Combo(2, "aes-xts-plain64", 512, kdf="argon2id", sector=4096, detached=False, cost=None),
]
COMBOS = LUKS1 + LUKS2 + (DEFAULT_COSTS if os.environ.get("QMPD_PROOF") == "full" else [])


def test_there_are_enough_combinations() -> None:
    assert len({str(combo) for combo in LUKS1 + LUKS2}) >= 40


def cryptsetup(*words: str | Path, passphrase: bytes = PASSPHRASE, expect: int = 0) -> str:
    command = [find("cryptsetup") or "", *map(str, words), "--disable-locks", "--batch-mode"]
    done = subprocess.run(command, input=passphrase, capture_output=True, timeout=120)
    assert done.returncode == expect, (words, done.stderr.decode(errors="replace"))
    return done.stdout.decode(errors="replace")


OFFLINE = ("--force-offline-reencrypt", "--key-file", "-")


def made_by_cryptsetup(combo: Combo, directory: Path) -> tuple[Path, Path | None]:
    """Return payload and header (None: in the payload's file) of a volume that holds PLAIN."""
    payload, header = directory / "p.img", directory / "h.img"
    encrypt = ("reencrypt", "--encrypt", "--type", "luks2", *OFFLINE, *combo.arguments())
    if combo.detached:
        payload.write_bytes(PLAIN)
        cryptsetup(*encrypt, "--header", header, payload)
    else:
        payload.write_bytes(PLAIN)
        os.truncate(payload, SIZE + ROOM)
        cryptsetup(*encrypt, "--reduce-device-size", str(ROOM), payload)
    holder = header if combo.detached else payload
    if combo.version == 1:
        cryptsetup("convert", "--type", "luks1", holder)
    cryptsetup("isLuks", "--type", f"luks{combo.version}", holder)
    return payload, header if combo.detached else None


def read_by_cryptsetup(combo: Combo, payload: Path, header: Path | None) -> bytes:
    """Return what the volume holds, whose files are used up."""
    holder = header or payload
    if combo.version == 1 and header is None:
        holder, payload = apart(combo, payload)
        header = holder
    elif combo.version == 1:
        cryptsetup("convert", "--type", "luks2", holder)
    target = holder if header is not None else payload.with_name("exported")
    cryptsetup("reencrypt", "--decrypt", *OFFLINE, "--header", target, payload)
    return payload.read_bytes()[:SIZE]


def apart(combo: Combo, volume: Path) -> tuple[Path, Path]:
    """Return a LUKS2 header and the payload of a LUKS1 volume that is one file.

    A header with the payload right behind its key slots has no room for LUKS2's, so cryptsetup does not
    convert it: it hands out the volume key, and makes another header for that key.
    """
    dump = cryptsetup("luksDump", volume)
    (offset,) = (int(line.split()[-1]) for line in dump.splitlines() if line.startswith("Payload offset"))
    key, header, payload = (volume.with_name(name) for name in ("key", "apart.header", "apart.payload"))
    cryptsetup("luksDump", "--dump-volume-key", "--volume-key-file", key, "--key-file", "-", volume)
    payload.write_bytes(volume.read_bytes()[offset * 512 :])
    words: list[str | Path] = [
        "luksFormat",
        "--type",
        "luks2",
        "--volume-key-file",
        key,
        "--key-file",
        "-",
        *combo.arguments(),
    ]
    cryptsetup(*words, "--header", header, payload)
    return header, payload


@pytest.mark.proof
@pytest.mark.timeout(180)
@pytest.mark.parametrize("combo", COMBOS, ids=str)
async def test_a_volume_that_cryptsetup_made_and_filled(combo: Combo, tmp_path: Path) -> None:
    need("cryptsetup")
    payload, header = made_by_cryptsetup(combo, tmp_path)
    below = MemoryNode(payload.read_bytes())
    node = await opened(below, MemoryNode(header.read_bytes()) if header else None)
    assert node.request_alignment == combo.sector
    assert bytes(await edge(node).pread(0, SIZE)) == PLAIN
    assert bytes(await edge(node).pread(5000, 77)) == PLAIN[5000:5077]
    data = node.image_info()["format-specific"]["data"]
    assert data.get("version", 1) == combo.version
    assert f"{data['cipher-alg']}-{data['cipher-mode']}".startswith(combo.cipher.split("-")[0])
    assert data["hash-alg"] == combo.hash
    assert data["detached-header"] is combo.detached
    changed = bytearray(PLAIN)
    changed[5000:12345] = random.Random(2).randbytes(7345)
    await edge(node).pwrite(5000, changed[5000:12345])
    payload.write_bytes(below.data)
    assert read_by_cryptsetup(combo, payload, header) == changed


async def made_by_us(combo: Combo, directory: Path) -> tuple[Path, Path | None]:
    """Return payload and header of a volume that holds PLAIN, written in pieces of any length."""
    payload, header = directory / "p.img", directory / "h.img"
    options = combo.options()
    if combo.version == 1:
        luks1 = Luks1Options(**{name: getattr(options, name) for name in Luks1Options.__dataclass_fields__})
        area = MemoryNode(bytes(create.header_length(luks1)))
        await create_luks1(edge(area), luks1, SecretBytes(PASSPHRASE), detached=combo.detached)
    else:
        area = MemoryNode(bytes(create2.header_length()))
        await create_luks2(edge(area), options, SecretBytes(PASSPHRASE), detached=combo.detached)
    head = bytes(area.data)
    below = MemoryNode(bytes(SIZE) if combo.detached else head + bytes(SIZE))
    node = await opened(below, area if combo.detached else None)
    rng, at = random.Random(3), 0
    while at < SIZE:
        length = min(rng.randrange(1, 70_000), SIZE - at)
        await edge(node).pwrite(at, PLAIN[at : at + length])
        at += length
    payload.write_bytes(below.data)
    if combo.detached:
        header.write_bytes(head)
    return payload, header if combo.detached else None


@pytest.mark.proof
@pytest.mark.timeout(180)
@pytest.mark.parametrize("combo", COMBOS, ids=str)
async def test_a_volume_that_we_made_and_filled(combo: Combo, tmp_path: Path) -> None:
    need("cryptsetup")
    payload, header = await made_by_us(combo, tmp_path)
    holder = header or payload
    cryptsetup("isLuks", "--type", f"luks{combo.version}", holder)
    dump = cryptsetup("luksDump", holder)
    if combo.version == 2:
        tree = json.loads(cryptsetup("luksDump", "--dump-json-metadata", holder))
        assert tree["segments"]["0"]["sector_size"] == combo.sector
        assert tree["keyslots"]["0"]["kdf"]["type"] == combo.kdf
    else:
        assert "Key Slot 0: ENABLED" in dump
    test = ("open", "--test-passphrase", "--key-file", "-", holder)
    cryptsetup(*test)
    cryptsetup(*test, passphrase=b"wrong", expect=2)
    assert read_by_cryptsetup(combo, payload, header) == PLAIN
