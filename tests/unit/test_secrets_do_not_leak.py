"""A passphrase that a client hands in is found nowhere outside the volume key's derivation.

A real daemon with every trace switch on is led through all that touches secrets, faults included. Then
everything it let out is searched: log file, standard error, replies, events, its command line and
environment, and the dump of its tasks.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.support.daemon import Daemon, RawClient, running

PASSPHRASE = "zaunkönig, 7431 Möwen"
"""Long, with characters that JSON, URLs and shells all write differently; and a comma, for key=value text."""
MASTER_KEY = bytes(range(0xA0, 0xC0))
IV = bytes(range(16))


def spellings(secret: bytes) -> dict[str, bytes]:
    """Return the ways in which a program would spell the secret, by accident or debugging aid."""
    ways = {
        "plain": secret,
        "hex": secret.hex().encode(),
        "base64": base64.b64encode(secret).rstrip(b"="),
        "repr of bytes": repr(secret)[2:-1].encode(),
        "list of numbers": ", ".join(map(str, secret)).encode(),
    }
    with contextlib.suppress(UnicodeDecodeError):
        ways["json"] = json.dumps(secret.decode())[1:-1].encode()
        ways["its start"] = secret[: len(secret) // 2]
    return ways


def encrypted(plain: bytes) -> str:
    padder = padding.PKCS7(128).padder()
    worker = Cipher(algorithms.AES256(MASTER_KEY), modes.CBC(IV)).encryptor()
    return base64.b64encode(worker.update(padder.update(plain) + padder.finalize()) + worker.finalize()).decode()


class Session:
    """A client that keeps all it was told."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.heard: list[bytes] = []

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        reply = self.client.command(name, **arguments)
        self.heard.append(json.dumps(reply, ensure_ascii=False).encode())
        return reply

    def ok(self, name: str, **arguments: Any) -> Any:
        reply = self.ask(name, **arguments)
        assert "return" in reply, reply
        return reply["return"]

    def refused(self, name: str, **arguments: Any) -> str:
        reply = self.ask(name, **arguments)
        assert "error" in reply, (name, arguments.keys())
        return str(reply["error"]["desc"])

    def finish(self) -> bytes:
        self.heard += [json.dumps(event, ensure_ascii=False).encode() for event in self.client.events]
        return b"\n".join(self.heard)


def secret(name: str, **members: str) -> dict[str, str]:
    return {"qom_type": "secret", "id": name, **members}


def touch_everything(session: Session, folder: Path) -> None:
    """Lead the daemon through all that has to do with secrets, the refusals first."""
    encoded = base64.b64encode(PASSPHRASE.encode()).decode()
    wrong = session.refused
    wrong("object-add", **secret("x", data=PASSPHRASE, file=str(folder / "passphrase")))
    wrong("object-add", **secret("1x", data=PASSPHRASE))
    wrong("object-add", **secret("x", data=PASSPHRASE, format="base64"))
    wrong("object-add", **secret("x", data=PASSPHRASE, format="hex"))
    wrong("object-add", **secret("x", data=PASSPHRASE, keyid="nosuch", iv="AA=="))
    wrong("object-add", **secret("x", data=PASSPHRASE, surplus="1"))
    wrong("object-add", **secret("x", data=[PASSPHRASE]))  # type: ignore[arg-type]
    session.ok("object-add", **secret("master", data=base64.b64encode(MASTER_KEY).decode(), format="base64"))
    wrong("object-add", **secret("x", data=PASSPHRASE, keyid="master", iv=base64.b64encode(IV).decode()))
    iv = {"format": "base64", "keyid": "master", "iv": base64.b64encode(IV).decode()}
    session.ok("object-add", **secret("encrypted", data=encrypted(PASSPHRASE.encode()), **iv))
    session.ok("object-add", **secret("given", data=PASSPHRASE))
    wrong("object-add", **secret("given", data=PASSPHRASE))
    session.ok("object-add", **secret("encoded", data=encoded, format="base64"))
    session.ok("object-add", **secret("other", data="something else"))
    session.ok("object-add", **secret("binary", data=base64.b64encode(MASTER_KEY).decode(), format="base64"))

    for name in ("given", "encoded", "encrypted", "master", "onfile"):
        wrong("qom-get", path=f"/objects/{name}", property="data")
        session.ok("qom-list", path=f"/objects/{name}")
        for shown in ("file", "format", "keyid", "iv", "type"):
            session.ok("qom-get", path=name, property=shown)
    session.ok("qom-set", path="given", property="data", value=PASSPHRASE)
    wrong("qom-set", path="given", property="data", value=[PASSPHRASE])
    wrong("qom-set", path="given", property="type", value=PASSPHRASE)
    wrong("qom-set", path="nosuch", property="data", value=PASSPHRASE)

    session.ok("blockdev-add", driver="file", node_name="file0", filename=str(folder / "volume.luks"))
    creation = {"driver": "luks", "file": "file0", "size": 1 << 20, "key-secret": "given", "iter-time": 10}
    session.ok("blockdev-create", job_id="make", options=creation)
    while (jobs := session.ok("query-jobs"))[0]["status"] != "concluded":
        time.sleep(0.05)
    assert "error" not in jobs[0], jobs
    session.ok("job-dismiss", id="make")

    for key, text in (
        ("other", "Invalid password, cannot unlock any keyslot"),
        ("nosuch", "No secret with id 'nosuch'"),
        ("binary", "Data from secret binary is not valid UTF-8"),
    ):
        said = wrong("blockdev-add", driver="luks", node_name="luks0", file="file0", key_secret=key)
        assert said == text
    wrong("blockdev-add", driver="luks", node_name="luks0", file="file0", key_secret="given", header="nosuch")
    for key in ("given", "encoded", "encrypted", "onfile"):
        session.ok("blockdev-add", driver="luks", node_name=f"luks-{key}", file="file0", key_secret=key, read_only=True)
    session.ok("query-named-block-nodes")
    session.ok("query-block")
    session.ok("query-blockstats")
    session.ok("x-debug-query-block-graph")
    session.ok("object-del", id="given")
    wrong("blockdev-add", driver="luks", node_name="luks0", file="file0", key_secret="given")
    for key in ("given", "encoded", "encrypted", "onfile"):
        session.ok("blockdev-del", node_name=f"luks-{key}")
    for key in ("encoded", "encrypted", "master"):
        session.ok("object-del", id=key)


def send_malformed(client: RawClient) -> None:
    """Send the passphrase in requests that are broken: the answers may quote the sender, the log may not."""
    request = json.dumps({"execute": "object-add", "arguments": secret("y", data=PASSPHRASE)}, ensure_ascii=False)
    for text in (request[:-1] + "]", request.replace("}", ""), f'{{"execute": "{PASSPHRASE}"}}', f"'{PASSPHRASE}"):
        client._socket.sendall(text.encode() + b"\n\xff\n")
        with contextlib.suppress(TimeoutError):
            client._socket.settimeout(0.3)
            while True:
                client.receive()
    client._socket.settimeout(30)
    assert client.command("query-version")["return"]


@contextlib.contextmanager
def busy_daemon(folder: Path) -> Iterator[Daemon]:
    """A daemon that logs all it can and has a secret from a file on its command line."""
    (folder / "passphrase").write_text(PASSPHRASE)
    (folder / "passphrase").chmod(0o600)
    given = ("-object", f"secret,id=onfile,file={folder / 'passphrase'}")
    (folder / "volume.luks").touch()
    with running(folder, "-T", "*", "-D", str(folder / "qmpd.log"), *given) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def let_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return everything the daemon let out, by where."""
    folder = tmp_path_factory.mktemp("leak")
    found: dict[str, bytes] = {}
    with busy_daemon(folder) as daemon:
        session = Session(daemon.client())
        touch_everything(session, folder)
        send_malformed(daemon.client())
        os.kill(daemon.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        process = Path(f"/proc/{daemon.process.pid}")
        found["command line"] = (process / "cmdline").read_bytes()
        found["environment"] = (process / "environ").read_bytes()
        found["replies and events"] = session.finish()
    found["standard error"] = (folder / "daemon.log").read_bytes()
    found["log file"] = (folder / "qmpd.log").read_bytes()
    return found


def test_the_log_is_worth_searching(let_out: dict[str, bytes]) -> None:
    """The traces do show commands with arguments, the secret ones hidden."""
    log = let_out["log file"]
    assert b"object-add" in log
    assert b"<hidden>" in log
    assert b"luks-encrypted" in log
    assert b"task" in log


@pytest.mark.parametrize("place", ["log file", "standard error", "replies and events", "command line", "environment"])
def test_no_spelling_of_the_passphrase_is_let_out(let_out: dict[str, bytes], place: str) -> None:
    for what, key in (("passphrase", PASSPHRASE.encode()), ("master key", MASTER_KEY)):
        for spelling, needle in spellings(key).items():
            assert needle not in let_out[place], f"{place} shows the {what}, {spelling}"


def test_words_of_the_command_line_stay_out_of_the_log(tmp_path: Path) -> None:
    """An error line quotes the words it is about; it goes to standard error, where the caller reads it."""
    log = tmp_path / "qmpd.log"
    words = ("-T", "*", "-D", str(log), "-object", f"secret,id=x,format=base64,data={PASSPHRASE.replace(',', ',,')}")
    with pytest.raises(AssertionError, match="the daemon ended before it listened"):
        with running(tmp_path, *words):
            pass
    assert b"invalid characters" in (tmp_path / "daemon.log").read_bytes()
    for needle in spellings(PASSPHRASE.encode()).values():
        assert needle not in (log.read_bytes() if log.exists() else b"")
