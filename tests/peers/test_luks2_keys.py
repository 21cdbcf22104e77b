"""Key slots of LUKS2 volumes changed by qmpd-img and by cryptsetup in turn: each takes what the other left."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.luks.backup import Bytes
from qmpd.luks.detect import read_header
from tests.peers.conftest import need
from tests.support.daemon import program, running
from tests.unit.luks.test_key_jobs import flocked

PASSPHRASES = {"s": "abc123", "n": "newpass", "m": "third"}
OBJECTS = [text for key in PASSPHRASES for text in ("--object", f"secret,id={key},data={PASSPHRASES[key]}")]
CHEAP = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
COSTS = {
    "pbkdf2": "pbkdf=pbkdf2,iterations=1000",
    "argon2id": "pbkdf=argon2id,iterations=4,pbkdf-memory=64,pbkdf-parallel=1",
}


def cryptsetup(*arguments: str | Path, passphrase: str = "", accept: tuple[int, ...] = (0,)) -> str:
    command = ["cryptsetup", "--batch-mode", *map(str, arguments)]
    done = subprocess.run(command, input=passphrase.encode(), capture_output=True, timeout=60)
    assert done.returncode in accept, (command, done.stderr)
    return done.stdout.decode()


def key_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.key"
    path.write_text(PASSPHRASES[name])
    return path


def peer_opens(image: Path, name: str) -> bool:
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(image)]
    return subprocess.run(command, input=PASSPHRASES[name].encode(), capture_output=True, timeout=60).returncode == 0


def we_open(image: Path, name: str) -> bool:
    async def opened() -> bool:
        source = Bytes(image.read_bytes())
        volume = await read_header(source, detached=True)
        try:
            (await volume.unlock(source, SecretBytes(PASSPHRASES[name].encode()))).wipe()
        except CommandError:
            return False
        return True

    return asyncio.run(opened())


def amend(image: Path, options: str, secret: str = "s") -> None:
    source = f"driver=luks,key-secret={secret},file.filename={image}"
    command = [program("qmpd-img"), "amend", *OBJECTS, "--image-opts", source, "-o", options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def metadata(image: Path) -> dict[str, Any]:
    tree = json.loads(cryptsetup("luksDump", "--dump-json-metadata", image))
    assert isinstance(tree, dict)
    return tree


def volume(folder: Path) -> Path:
    image = folder / "v.luks"
    with image.open("wb") as file:
        file.truncate(18 << 20)
    cryptsetup("luksFormat", "--type", "luks2", *CHEAP, "--key-file=-", image, passphrase=PASSPHRASES["s"])
    return image


def check(image: Path, good: str) -> None:
    """Both programs take the passphrases in `good` and no others; both copies of the header are well."""
    for name in PASSPHRASES:
        assert peer_opens(image, name) == we_open(image, name) == (name in good), name
    cryptsetup("repair", image)
    data = image.read_bytes()
    for spoiled in (0, 16384):  # the other copy says the same
        half = image.with_suffix(".half")
        half.write_bytes(data[: spoiled + 5000] + b"#" + data[spoiled + 5001 :])
        for name in PASSPHRASES:
            assert peer_opens(half, name) == (name in good), (name, spoiled)


@pytest.mark.parametrize("pbkdf", COSTS)
def test_cryptsetup_takes_what_we_changed(tmp_path: Path, pbkdf: str) -> None:
    need("cryptsetup")
    image = volume(tmp_path)
    amend(image, f"state=active,new-secret=n,{COSTS[pbkdf]}")
    check(image, "sn")
    assert metadata(image)["keyslots"]["1"]["kdf"]["type"] == pbkdf
    amend(image, f"state=changed,new-secret=m,old-secret=s,{COSTS[pbkdf]}")
    check(image, "nm")
    amend(image, "state=inactive,old-secret=n", secret="m")
    check(image, "m")


def test_we_take_what_cryptsetup_changed_and_it_takes_ours_again(tmp_path: Path) -> None:
    need("cryptsetup")
    image = volume(tmp_path)
    old, new, third = (key_file(tmp_path, name) for name in "snm")
    cryptsetup("luksAddKey", *CHEAP, "--key-file", old, image, new)
    check(image, "sn")
    cryptsetup("token", "add", "--token-id", "3", "--key-slot", "1", "--key-description", "k", image)
    cryptsetup("config", "--key-slot", "0", "--priority", "prefer", image)
    amend(image, f"state=active,new-secret=m,keyslot=7,{COSTS['pbkdf2']}")
    assert metadata(image)["tokens"]["3"]["keyslots"] == ["1"]
    assert metadata(image)["keyslots"]["0"]["priority"] == 2
    cryptsetup("luksKillSlot", "--key-file", old, image, "7")
    check(image, "sn")
    amend(image, "state=inactive,keyslot=1")
    assert metadata(image)["tokens"]["3"]["keyslots"] == []
    check(image, "s")
    cryptsetup("luksAddKey", *CHEAP, "--key-file", old, image, third)
    check(image, "sm")
    cryptsetup("luksChangeKey", *CHEAP, "--key-file", third, image, new)
    check(image, "sn")


def test_slots_lie_where_cryptsetup_would_put_them(tmp_path: Path) -> None:
    need("cryptsetup")
    places: list[list[str]] = []
    for ours in (True, False):
        folder = tmp_path / str(ours)
        folder.mkdir()
        image = volume(folder)
        old, new = key_file(folder, "s"), key_file(folder, "n")
        for slot in (1, 2, 3):
            cryptsetup("luksAddKey", *CHEAP, "--key-slot", str(slot), "--key-file", old, image, new)
        cryptsetup("luksKillSlot", "--key-file", old, image, "2")
        for slot in (5, 6):
            if ours:
                amend(image, f"state=active,new-secret=m,keyslot={slot},{COSTS['pbkdf2']}")
            else:
                third = key_file(folder, "m")
                cryptsetup("luksAddKey", *CHEAP, "--key-slot", str(slot), "--key-file", old, image, third)
        places.append([slot["area"]["offset"] for _, slot in sorted(metadata(image)["keyslots"].items())])
    assert places[0] == places[1]


def test_cryptsetup_waits_until_a_key_change_of_ours_is_over(tmp_path: Path) -> None:
    """Both add a passphrase at once; with cryptsetup's lock not taken, one of the two headers would be lost."""
    need("cryptsetup")
    header = tmp_path / "h.img"
    header.write_bytes(bytes(18 << 20))
    cryptsetup("luksFormat", "--type", "luks2", *CHEAP, "--key-file=-", header, passphrase=PASSPHRASES["s"])
    with running(tmp_path) as daemon:
        client = daemon.client()
        for name, value in PASSPHRASES.items():
            client.ok("object-add", qom_type="secret", id=name, data=value)
        file = {"driver": "null-co", "size": 18 << 20}
        client.ok(
            "blockdev-add", driver="luks", node_name="v", file=file, key_secret="s",
            header={"driver": "file", "filename": str(header)},
        )  # fmt: skip
        options = {"driver": "luks", "state": "active", "new-secret": "n", "pbkdf": "pbkdf2", "iterations": 400_000}
        client.ok("blockdev-amend", job_id="j", node_name="v", options=options)
        with header.open("rb") as probe:
            deadline = time.monotonic() + 20
            while not flocked(probe.fileno()):
                assert time.monotonic() < deadline
        old, third = key_file(tmp_path, "s"), key_file(tmp_path, "m")
        cryptsetup("luksAddKey", *CHEAP, "--key-file", old, header, third)
        (row,) = client.ok("query-jobs")
        assert row["status"] == "concluded"
        assert "error" not in row
    check(header, "snm")
