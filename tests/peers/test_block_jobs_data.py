"""Jobs that copy while a client writes: no byte is lost, and what is left behind is sound for QEMU."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.daemon import RawClient, running
from tests.support.nbd_wire import ZERO, Client

KiB, MiB = 1 << 10, 1 << 20
SIZE = 6 * MiB


def run(*words: str | Path) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=60).stdout


def content(image: Path) -> bytes:
    out = image.with_suffix(".out")
    run("qemu-img", "convert", "-O", "raw", image, out)
    return out.read_bytes()


class Writer:
    """A client that writes, zeroes and reads at random, and knows what it wrote."""

    def __init__(self, path: Path, export: str, begin: bytes) -> None:
        self.model = bytearray(begin)
        self.seed = random.randrange(1 << 30)
        self.lock, self._stop = threading.Lock(), threading.Event()
        self.writes = 0
        self._failure: BaseException | None = None
        self._disk = Client(str(path)).go(export.encode())
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        rng = random.Random(self.seed)
        try:
            while not self._stop.is_set():
                with self.lock:
                    offset = rng.randrange(0, SIZE - 128 * KiB) // 512 * 512
                    length = rng.randrange(1, 200) * 512
                    if rng.random() < 0.15:
                        assert not self._disk.call(ZERO, offset, length).error
                        self.model[offset : offset + length] = bytes(length)
                    else:
                        data = rng.randbytes(length)
                        self._disk.write(offset, data)
                        self.model[offset : offset + length] = data
                    self.writes += 1
                    if rng.random() < 0.1:
                        at = rng.randrange(0, SIZE - 64 * KiB) // 512 * 512
                        assert self._disk.read(at, 64 * KiB) == self.model[at : at + 64 * KiB]
        except BaseException as error:
            self._failure = error

    def goes_on(self, writes: int = 5) -> None:
        """Wait until it has written so often."""
        target, deadline = self.writes + writes, time.monotonic() + 30
        while self.writes < target:
            assert self._failure is None, (self.seed, self._failure)
            assert time.monotonic() < deadline, "the writer waits"
            time.sleep(0.01)

    def stop(self) -> None:
        """End, and make sure that all went well and what is read is what was written."""
        self._stop.set()
        self._thread.join(60)
        assert self._failure is None, (self.seed, self._failure)
        assert self._disk.read(0, SIZE) == self.model, self.seed
        self._disk.close()


def image(folder: Path, name: str, backing: str | None = None, *writes: str) -> Path:
    below = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
    path = folder / f"{name}.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", *below, path, str(SIZE))
    if writes:
        run("qemu-io", *(word for one in writes for word in ("-c", one)), path)
    return path


def chain(folder: Path) -> bytes:
    """Make a <- b <- c; return what c shows."""
    image(folder, "a", None, "write -P 1 0 3M", "write -P 4 5M 512k")
    image(folder, "b", "a", "write -P 2 1M 2M", "write -z 5M 64k")
    image(folder, "c", "b", "write -P 3 2M 700k")
    return content(folder / "c.qcow2")


def tree(folder: Path, name: str, **members: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(folder / f"{name}.qcow2")}
    return {"driver": "qcow2", "node-name": name, "file": file, **members}


def add(client: RawClient, options: dict[str, Any]) -> None:
    reply = client.send({"execute": "blockdev-add", "arguments": options})
    assert reply == {"return": {}}, reply


def add_chain(client: RawClient, folder: Path) -> None:
    add(client, tree(folder, "a"))
    add(client, tree(folder, "b", backing="a"))
    add(client, tree(folder, "c", backing="b"))


@contextlib.contextmanager
def exported(client: RawClient, folder: Path, node: str, begin: bytes, *, fill: bool = False) -> Iterator[Writer]:
    """Export a node and write to it for as long as the block lasts; `fill`: it does not hold `begin` yet."""
    path = folder / "n.sock"
    client.ok("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    export = {"type": "nbd", "id": "e", "node-name": node, "name": "e", "writable": True}
    assert client.send({"execute": "block-export-add", "arguments": export}) == {"return": {}}
    if fill:
        with Client(str(path)) as disk:
            disk.go(b"e").write(0, begin)
    writer = Writer(path, "e", begin)
    try:
        yield writer
    finally:
        writer.stop()


def wait(client: RawClient, event: str, job: str = "j") -> dict[str, Any]:
    """Return what the first such event of a job says; those of others stay to be waited for."""
    others: list[dict[str, Any]] = []
    try:
        while True:
            found = client.wait_event(event)
            if found["data"].get("device", found["data"].get("id")) == job:
                return dict(found["data"])
            others.append(found)
    finally:
        client.events[:0] = others


def finished(client: RawClient) -> None:
    """Wait for the end of the job, which must be a good one."""
    assert "error" not in wait(client, "BLOCK_JOB_COMPLETED")
    while client.ok("query-jobs"):
        time.sleep(0.01)


def sound(folder: Path, *names: str) -> None:
    for name in names:
        assert "No errors" in run("qemu-img", "check", folder / f"{name}.qcow2")


def test_a_stream_below_a_writer(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        with exported(client, tmp_path, "c", begin) as writer:
            client.ok("block-stream", job_id="j", device="c", base_node="a")
            finished(client)
            client.ok("block-stream", job_id="j", device="c", speed=20 * MiB)
            finished(client)
        client.ok("blockdev-del", node_name="b")
        client.ok("blockdev-del", node_name="a")
    (tmp_path / "b.qcow2").unlink()
    sound(tmp_path, "a", "c")
    assert content(tmp_path / "c.qcow2") == writer.model


def test_a_commit_below_a_writer(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        with exported(client, tmp_path, "c", begin) as writer:
            client.ok("block-commit", job_id="j", device="c", top_node="b", base_node="a")
            finished(client)
            client.ok("blockdev-del", node_name="b")
    (tmp_path / "b.qcow2").unlink()
    sound(tmp_path, "a", "c")
    assert content(tmp_path / "c.qcow2") == writer.model


@pytest.mark.parametrize(("base", "found"), [("a", False), ("b", False), (None, True)])
def test_a_commit_of_what_is_being_written(tmp_path: Path, base: str | None, found: bool) -> None:
    """Into nodes that are writable, and into one that the image opened read-only by itself."""
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        if found:
            add(client, tree(tmp_path, "c"))
        else:
            add_chain(client, tmp_path)
        with exported(client, tmp_path, "c", begin) as writer:
            client.ok("block-commit", job_id="j", device="c", **({} if base is None else {"base_node": base}))
            wait(client, "BLOCK_JOB_READY")
            time.sleep(0.2)
            client.ok("job-complete", id="j")
            finished(client)
            assert client.ok("query-block-exports")[0]["node-name"] == base or found
            writer.goes_on()
    sound(tmp_path, "a", "b", "c")
    assert content(tmp_path / f"{base or 'a'}.qcow2") == writer.model


@pytest.mark.parametrize("mode", ["background", "write-blocking", "changed"])
@pytest.mark.parametrize("sync", ["full", "top"])
def test_a_mirror_of_what_is_being_written(tmp_path: Path, mode: str, sync: str) -> None:
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    image(tmp_path, "t", "b" if sync == "top" else None)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        add(client, tree(tmp_path, "t", backing="b") if sync == "top" else tree(tmp_path, "t"))
        with exported(client, tmp_path, "c", begin) as writer:
            copy_mode = "background" if mode == "changed" else mode
            client.ok("blockdev-mirror", job_id="j", device="c", target="t", sync=sync, copy_mode=copy_mode)
            wait(client, "BLOCK_JOB_READY")
            if mode == "changed":
                client.ok("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
            time.sleep(0.3)
            with writer.lock:
                client.ok("job-pause", id="j")
            client.ok("job-complete", id="j")
            client.ok("job-resume", id="j")
            finished(client)
            assert client.ok("query-block-exports")[0]["node-name"] == "t"
            writer.goes_on()
    sound(tmp_path, "a", "b", "c", "t")
    assert content(tmp_path / "t.qcow2") == writer.model


def test_a_mirror_that_is_ended_without_taking_over(tmp_path: Path) -> None:
    """Both sides are equal at that moment; afterwards only the source is written to."""
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    image(tmp_path, "t")
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        add(client, tree(tmp_path, "t"))
        with exported(client, tmp_path, "c", begin) as writer:
            client.ok("blockdev-mirror", job_id="j", device="c", target="t", sync="full")
            wait(client, "BLOCK_JOB_READY")
            with writer.lock:
                then = bytes(writer.model)
                client.ok("block-job-cancel", device="j")
                finished(client)
            time.sleep(0.1)
        assert client.ok("query-block-exports")[0]["node-name"] == "c"
    sound(tmp_path, "c", "t")
    assert content(tmp_path / "t.qcow2") == then
    assert content(tmp_path / "c.qcow2") == writer.model


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_a_backup_is_the_disk_as_it_was(tmp_path: Path, compress: bool) -> None:
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    image(tmp_path, "t")
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        add(client, tree(tmp_path, "t"))
        with exported(client, tmp_path, "c", begin) as writer:
            time.sleep(0.1)
            with writer.lock:
                then = bytes(writer.model)
                start = {"job_id": "j", "device": "c", "target": "t", "sync": "full", "speed": 8 * MiB}
                client.ok("blockdev-backup", **start, compress=compress)
            finished(client)
            time.sleep(0.1)
    sound(tmp_path, "c", "t")
    assert content(tmp_path / "t.qcow2") == then
    assert content(tmp_path / "c.qcow2") == writer.model


@pytest.mark.parametrize("least", [0, 128 * MiB], ids=["small", "large"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_a_backup_of_the_uppermost_image(tmp_path: Path, least: int, compress: bool) -> None:
    """Above the same backing file, the copy shows the same, whatever is copied as one."""
    need("qemu-img", "qemu-io")
    size = "200M"
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", size)
    run("qemu-io", "-c", "write -P 1 0 1M", "-c", "write -P 2 150M 1M", tmp_path / "a.qcow2")
    for name in ("b", "t"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", tmp_path / f"{name}.qcow2", size)
    run("qemu-io", "-c", "write -P 3 64k 64k", "-c", "write -P 4 100M 64k", "-c", "write -z 150M 512k",
        tmp_path / "b.qcow2")  # fmt: skip
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add(client, tree(tmp_path, "b"))
        add(client, tree(tmp_path, "t"))
        perf = {"min-cluster-size": least} if least else {}
        client.ok("blockdev-backup", job_id="j", device="b", target="t", sync="top", compress=compress, x_perf=perf)
        finished(client)
    sound(tmp_path, "t")
    run("qemu-img", "compare", tmp_path / "b.qcow2", tmp_path / "t.qcow2")


def test_incremental_backups_add_up(tmp_path: Path) -> None:
    """Each copies what was written since the one before; one that is cancelled loses nothing for the next."""
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        bitmap = {"node": "c", "name": "m", "granularity": 64 * KiB}
        assert client.send({"execute": "block-dirty-bitmap-add", "arguments": bitmap}) == {"return": {}}
        (tmp_path / "t.img").write_bytes(begin)
        client.ok("blockdev-add", driver="file", node_name="t", filename=str(tmp_path / "t.img"))
        start = {"job_id": "j", "device": "c", "target": "t", "sync": "incremental", "bitmap": "m"}
        with exported(client, tmp_path, "c", begin) as writer:
            for at in range(6):
                writer.goes_on(20)
                with writer.lock:
                    then = bytes(writer.model)
                    client.ok("blockdev-backup", **start, speed=16 * KiB if at % 2 else 0)
                if at % 2:
                    writer.goes_on()
                    client.ok("job-cancel", id="j")
                    wait(client, "BLOCK_JOB_CANCELLED")
                    while client.ok("query-jobs"):
                        time.sleep(0.01)
                else:
                    finished(client)
                    assert (tmp_path / "t.img").read_bytes() == then, at
    sound(tmp_path, "c")


def test_a_stream_below_an_encrypted_volume(tmp_path: Path) -> None:
    """The payload becomes independent of its backing file while the volume above it is written to."""
    need("qemu-img")
    image(tmp_path, "a")
    (tmp_path / "h.img").write_bytes(b"")
    with running(tmp_path, "--object", "secret,id=s,data=sesame", name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        header = {"driver": "file", "filename": str(tmp_path / "h.img")}
        options = {"driver": "luks", "header": header, "size": SIZE, "key-secret": "s", "iterations": 1000}
        client.ok("blockdev-create", job_id="make", options=options)
        while client.ok("query-jobs")[0]["status"] != "concluded":
            time.sleep(0.01)
        client.ok("job-dismiss", id="make")
        add(client, tree(tmp_path, "a"))
        client.ok("blockdev-add", driver="luks", node_name="vol", file="a", header=header, key_secret="s")
        with exported(client, tmp_path, "vol", bytes(SIZE), fill=True):
            overlay = {"node-name": "a", "snapshot-file": str(tmp_path / "b.qcow2"), "snapshot-node-name": "b"}
            assert client.send({"execute": "blockdev-snapshot-sync", "arguments": overlay}) == {"return": {}}
            time.sleep(0.1)
            client.ok("block-stream", job_id="j", device="b")
            finished(client)
            client.ok("blockdev-del", node_name="a")
            time.sleep(0.1)
    (tmp_path / "a.qcow2").unlink()
    sound(tmp_path, "b")


def job_of(client: RawClient) -> dict[str, Any]:
    return dict(client.ok("query-block-jobs")[0])


def source_and_target(client: RawClient, folder: Path) -> None:
    """Make and open two files: s, full, and t, empty."""
    for name, data in (("s", b"s" * SIZE), ("t", bytes(SIZE))):
        (folder / f"{name}.img").write_bytes(data)
        client.ok("blockdev-add", driver="file", node_name=name, filename=str(folder / f"{name}.img"))


@pytest.mark.parametrize("name", ["blockdev-backup", "blockdev-mirror"])
def test_a_target_that_fails(tmp_path: Path, name: str) -> None:
    """`report` ends the job and `stop` pauses it until it is resumed; the source is none the worse."""
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        source_and_target(client, tmp_path)
        rule = {"event": "none", "iotype": "write", "errno": 28, "once": True, "sector": 1024}
        client.ok("blockdev-add", driver="blkdebug", node_name="d", image="t", inject_error=[rule])
        start = {"job_id": "j", "device": "s", "target": "d", "sync": "full"}
        client.ok(name, **start)
        assert wait(client, "BLOCK_JOB_COMPLETED")["error"] == "No space left on device"
        client.ok("blockdev-del", node_name="d")
        client.ok("blockdev-add", driver="blkdebug", node_name="d", image="t", inject_error=[rule])
        client.ok(name, **start, on_target_error="enospc")
        assert client.wait_event("BLOCK_JOB_ERROR")["data"]["action"] == "report"
        failed = client.wait_event("BLOCK_JOB_ERROR")["data"]
        assert failed == {"device": "j", "operation": "write", "action": "stop"}
        while job_of(client)["status"] != "paused":
            time.sleep(0.01)
        assert job_of(client)["io-status"] == "nospace"
        client.ok("job-resume", id="j")
        if name == "blockdev-mirror":
            wait(client, "BLOCK_JOB_READY")
            client.ok("block-job-cancel", device="j")
        finished(client)
    assert (tmp_path / "t.img").read_bytes() == b"s" * SIZE
    assert (tmp_path / "s.img").read_bytes() == b"s" * SIZE


@pytest.mark.parametrize("name", ["blockdev-backup", "blockdev-mirror"])
def test_a_target_that_fails_all_the_while(tmp_path: Path, name: str) -> None:
    """Copies that fail at the same time pause the job once, and it can still be cancelled."""
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        source_and_target(client, tmp_path)
        rule = {"event": "none", "iotype": "write", "errno": 5}
        client.ok("blockdev-add", driver="blkdebug", node_name="d", image="t", inject_error=[rule])
        client.ok(name, job_id="j", device="s", target="d", sync="full", on_target_error="stop")
        for _ in range(3):
            while job_of(client)["status"] != "paused":
                time.sleep(0.01)
            assert job_of(client)["io-status"] == "failed"
            client.ok("job-resume", id="j")
        client.ok("job-cancel", id="j")
        wait(client, "BLOCK_JOB_CANCELLED")
        while client.ok("query-jobs"):
            time.sleep(0.01)
        client.ok(name, job_id="j", device="s", target="d", sync="full")
        assert wait(client, "BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
        client.ok("blockdev-del", node_name="d")
        client.ok("blockdev-del", node_name="s")


@pytest.mark.parametrize("name", ["block-stream", "block-commit"])
def test_an_image_that_cannot_be_told_its_backing_file_keeps_the_one_it_has(tmp_path: Path, name: str) -> None:
    """The name does not fit into the header: the job fails at its end, and the chain is what it was."""
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        before = client.ok("x-debug-query-block-graph")
        more = {"top_node": "b", "base_node": "a"} if name == "block-commit" else {"base_node": "a"}
        client.ok(name, job_id="j", device="c", backing_file="x" * 1100, **more)
        assert wait(client, "BLOCK_JOB_COMPLETED")["error"] == "Invalid argument"
        while client.ok("query-jobs"):
            time.sleep(0.01)
        assert client.ok("x-debug-query-block-graph") == before
    sound(tmp_path, "a", "b", "c")
    assert content(tmp_path / "c.qcow2") == begin


@pytest.mark.parametrize("mode", ["grouped", "individual"])
def test_backups_of_a_transaction_end_well_together_or_not_at_all(tmp_path: Path, mode: str) -> None:
    for name in "stuv":
        (tmp_path / f"{name}.img").write_bytes(name.encode() * MiB)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        for name in "stuv":
            client.ok("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / f"{name}.img"))
        rule = {"event": "none", "iotype": "write", "errno": 28}
        client.ok("blockdev-add", driver="blkdebug", node_name="d", image="v", inject_error=[rule])
        for first, second in (("t", "u"), ("d", "u")):
            pairs = (("j", "s", first), ("k", "t" if first == "d" else "v", second))
            actions = [
                {
                    "type": "blockdev-backup",
                    "data": {"job-id": job, "device": source, "target": target, "sync": "full", "speed": 4 * MiB},
                }
                for job, source, target in pairs
            ]
            client.ok("transaction", actions=actions, properties={"completion-mode": mode})
            if first == "t":
                assert "error" not in wait(client, "BLOCK_JOB_COMPLETED", "j")
                assert "error" not in wait(client, "BLOCK_JOB_COMPLETED", "k")
            else:
                assert wait(client, "BLOCK_JOB_COMPLETED", "j")["error"] == "No space left on device"
                if mode == "grouped":
                    wait(client, "BLOCK_JOB_CANCELLED", "k")
                else:
                    assert "error" not in wait(client, "BLOCK_JOB_COMPLETED", "k")
            while client.ok("query-jobs"):
                time.sleep(0.01)


@pytest.mark.parametrize("name", ["block-stream", "block-commit"])
def test_no_image_goes_while_something_of_it_was_not_copied(tmp_path: Path, name: str) -> None:
    """With errors ignored the job fails at its end, and the chain stays as it was."""
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add(client, tree(tmp_path, "a"))
        rule = {"event": "none", "iotype": "read", "errno": 5, "sector": 2048, "once": True}
        client.ok("blockdev-add", driver="file", node_name="f", filename=str(tmp_path / "b.qcow2"))
        client.ok("blockdev-add", driver="blkdebug", node_name="d", image="f", inject_error=[rule])
        add(client, {"driver": "qcow2", "node-name": "b", "file": "d", "backing": "a"})
        add(client, tree(tmp_path, "c", backing="b"))
        more = {"top_node": "b", "base_node": "a"} if name == "block-commit" else {"base_node": "a"}
        client.ok(name, job_id="j", device="c", on_error="ignore", **more)
        assert wait(client, "BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
        while client.ok("query-jobs"):
            time.sleep(0.01)
        assert client.wait_event("BLOCK_JOB_ERROR")["data"]["action"] == "ignore"
    sound(tmp_path, "a", "b", "c")
    assert content(tmp_path / "c.qcow2") == begin
    info = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", tmp_path / "c.qcow2"))
    assert len(info) == 3


@pytest.mark.parametrize("name", ["block-stream", "block-commit", "blockdev-mirror", "blockdev-backup"])
def test_a_daemon_that_is_told_to_end_while_a_job_works(tmp_path: Path, name: str) -> None:
    need("qemu-img", "qemu-io")
    begin = chain(tmp_path)
    image(tmp_path, "t")
    more: dict[str, Any] = {"target": "t", "sync": "full"} if name.startswith("blockdev") else {}
    if name == "block-commit":
        more = {"top_node": "b", "base_node": "a"}
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        add_chain(client, tmp_path)
        add(client, tree(tmp_path, "t"))
        client.ok(name, job_id="j", device="c", speed=MiB, **more)
        time.sleep(0.1)
        assert job_of(client)["status"] == "running"
    sound(tmp_path, "a", "b", "c", "t")
    assert content(tmp_path / "c.qcow2") == begin
    info = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", tmp_path / "c.qcow2"))
    assert len(info) == 3
