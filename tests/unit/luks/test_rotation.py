"""A passphrase rotated while four clients write through the same node: added, used, the old one erased."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import nbd_wire as nbd
from tests.unit.luks.test_key_jobs import amend, disks, opens, slots

WRITERS = 4
SHARE = (1 << 20) // WRITERS
"""Bytes of the disk that a writer has for itself."""


class Writer(threading.Thread):
    """Writes at random through a connection of its own, flushes now and then, and knows what must be there."""

    def __init__(self, path: Path, number: int, export: bytes) -> None:
        super().__init__(daemon=True)
        self.path, self.number, self.export = path, number, export
        self.model = bytearray(SHARE)
        self.requests = 0
        self.ending = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        rng = random.Random(self.number)
        try:
            with nbd.Client(str(self.path)).go(self.export) as client:
                client.write(self.number * SHARE, bytes(self.model))
                while not self.ending.is_set():
                    length = rng.choice((512, 700, 4096, 20_000))
                    at = rng.randrange(SHARE - length)
                    data = rng.randbytes(length)
                    client.write(self.number * SHARE + at, data)
                    self.model[at : at + length] = data
                    self.requests += 1
                    if rng.random() < 0.1:
                        assert client.call(nbd.FLUSH).error == 0
                    if rng.random() < 0.3:
                        at = rng.randrange(SHARE - 512)
                        assert client.read(self.number * SHARE + at, 512) == self.model[at : at + 512]
        except BaseException as error:
            self.error = error


def wait_for_writes(writers: list[Writer], more: int) -> None:
    """Wait until every writer has done `more` requests from now on."""
    goal = [writer.requests + more for writer in writers]
    deadline = time.monotonic() + 30
    while any(writer.requests < want for writer, want in zip(writers, goal, strict=True)):
        assert all(writer.error is None for writer in writers), [writer.error for writer in writers]
        assert time.monotonic() < deadline, "the writers are held up"
        time.sleep(0.01)


@pytest.mark.parametrize("version", [1, 2])
def test_a_passphrase_is_rotated_under_four_writers(tmp_path: Path, version: int) -> None:
    with disks(tmp_path, version, "") as (_, client):
        (tmp_path / "p").write_bytes(bytes(WRITERS * SHARE))
        file = {"driver": "file", "filename": str(tmp_path / "p")}
        client.ok("blockdev-add", driver="luks", node_name="v", file=file, header="h", key_secret="s")
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}}
        client.ok("nbd-server-start", addr=address, max_connections=0)
        client.ok("block-export-add", type="nbd", id="e", node_name="v", writable=True)
        writers = [Writer(tmp_path / "nbd.sock", number, b"v") for number in range(WRITERS)]
        for writer in writers:
            writer.start()
        wait_for_writes(writers, 20)
        for turn, (old, new) in enumerate((("s", "n"), ("n", "m"), ("m", "s"))):
            unlock: dict[str, Any] = {} if old == "s" else {"secret": old}
            assert amend(client, f"a{turn}", "v", state="active", new_secret=new, **unlock) is None
            wait_for_writes(writers, 5)
            client.ok(
                "blockdev-add", driver="luks", node_name="w", read_only=True, header="h", key_secret=new,
                file={"driver": "null-co", "size": 1 << 20, "read-only": True},
            )  # fmt: skip
            assert amend(client, f"e{turn}", "v", state="inactive", old_secret=old) is None
            assert len(slots(client, "v")) == 1
            wait_for_writes(writers, 5)
            client.ok("blockdev-del", node_name="w")
        assert amend(client, "c", "v", state="changed", old_secret="s", new_secret="n") is None
        wait_for_writes(writers, 5)
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join(30)
            assert writer.error is None, writer.error
        client.ok("block-export-del", id="e", mode="hard")
        client.wait_event("BLOCK_EXPORT_DELETED")
        client.ok("blockdev-del", node_name="v")
        client.ok("blockdev-add", driver="luks", node_name="v", file=file, header="h", key_secret="n")
        client.ok("block-export-add", type="nbd", id="f", node_name="v")
        with nbd.Client(str(tmp_path / "nbd.sock")).go(b"v") as reader:
            for writer in writers:
                assert reader.read(writer.number * SHARE, SHARE) == writer.model
    data = (tmp_path / "h.img").read_bytes()
    assert [opens(data, name) for name in "snm"] == [False, True, False]
    assert sum(writer.requests for writer in writers) > WRITERS * 50
