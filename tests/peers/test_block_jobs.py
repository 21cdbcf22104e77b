"""Jobs that copy between nodes, beside QEMU's: the same checks, the same events, the same nodes afterwards."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.answers import Request, difference, masked, monitor_of, node
from tests.support.daemon import RawClient

MiB = 1 << 20
SHOWN: Request = ("query-named-block-nodes", {})
GRAPH: Request = ("x-debug-query-block-graph", {})
JOBS: Request = ("query-jobs", {})
BLOCK_JOBS: Request = ("query-block-jobs", {})
NAMED = {"JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_PENDING"}


def run(*words: str | Path) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=60).stdout


def prepare(folder: Path) -> None:
    """A chain a <- b <- c, each with something of its own; and empty images."""

    def make(name: str, size: str, backing: str | None = None) -> None:
        below = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *below, folder / f"{name}.qcow2", size)

    make("a", "1M")
    make("b", "1M", "a")
    make("c", "1M", "b")
    make("small", "512K")
    make("empty", "1M")
    make("other", "1M")
    run("qemu-io", "-c", "write -P 1 0 256k", folder / "a.qcow2")
    run("qemu-io", "-c", "write -P 2 128k 256k", "-c", "write -z 512k 64k", folder / "b.qcow2")
    run("qemu-io", "-c", "write -P 3 320k 128k", folder / "c.qcow2")
    (folder / "raw.img").write_bytes(b"r" * MiB)
    (folder / "t.img").write_bytes(bytes(MiB))


def qcow2(name: str, file: str | None = None, **members: Any) -> Request:
    return node("qcow2", name, file={"driver": "file", "filename": f"{file or name}.qcow2"}, **members)


CHAIN = [qcow2("a"), qcow2("b", backing="a"), qcow2("c", backing="b")]
WHOLE = [qcow2("c")]


def job(name: str, **members: Any) -> Request:
    return name, {key.replace("_", "-"): value for key, value in members.items()}


ENDING = ("job-complete", "block-job-complete", "job-cancel", "block-job-cancel")
QUIET = 20
"""Looks, a tenth of a second apart, after which a job that does nothing is taken for one that waits."""


def at_rest(row: dict[str, Any], command: str) -> bool:
    """Say whether a job (BlockJobInfo) stays in its state until it is told something else than `command`."""
    status = row["status"]
    if status == "pending":
        return not row["auto-finalize"] and command != "job-finalize"
    if status == "concluded":
        return not row["auto-dismiss"] and command != "job-dismiss"
    if status == "ready":
        return command not in (*ENDING, "job-pause")
    return status in ("standby", "paused")


def settle(client: RawClient, events: list[dict[str, Any]], command: str = "") -> None:
    """Take events until every job is at rest, or nothing has happened for a while."""
    quiet = 0
    while quiet < QUIET:
        rows = client.ok("query-block-jobs")
        quiet = 0 if client.events else quiet + 1
        events += [one for one in client.events if one["event"] in NAMED]
        client.events.clear()
        rest = all(at_rest(row, command) for row in rows)
        if client.silent(0.1) and rest:
            return


def shown(value: Any) -> Any:
    """Leave out how long files are: clusters are taken in another order."""
    rows = value.get("return")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("drv") == "file" and "image" in row:
            row["image"]["virtual-size"] = "..."
    return value


STORAGE_DAEMONS = ("qemu-storage-daemon", "qmpd-storage-daemon")


def talk(folder: Path, requests: list[Request], programs: tuple[str, str] = STORAGE_DAEMONS) -> None:
    """Send the requests to both programs, each once its jobs have settled; compare replies and events."""
    need(programs[0], "qemu-img")
    (folder / "images").mkdir()
    prepare(folder / "images")
    answers: list[list[Any]] = []
    for name in programs:
        home = folder / name
        run("cp", "-r", folder / "images", home)
        said: list[Any] = []
        with monitor_of(name, home) as client:
            for command, arguments in requests:
                events: list[dict[str, Any]] = []
                reply = shown(masked(client.send({"execute": command, "arguments": arguments})))
                settle(client, events, command if "return" in reply else "")
                happened = [[one["event"], one["data"]] for one in events]
                said.append({"reply": reply, "events": _without_pause(happened)})
        answers.append(said)
    wrong = [
        f"{command} {arguments}\n  {difference(one, two)}"
        for (command, arguments), one, two in zip(requests, *answers, strict=True)
        if one != two
    ]
    assert not wrong, "\n".join(wrong)
    for image in sorted((folder / "images").glob("*.qcow2")):
        theirs, ours = (alone(folder / program / image.name) for program in programs)
        assert "No errors" in run("qemu-img", "check", ours)
        run("qemu-img", "compare", ours, theirs)


def alone(image: Path) -> str:
    """Return a name that opens an image, without its backing file where that is not there."""
    tree: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    below = json.loads(run("qemu-img", "info", "--output=json", image)).get("full-backing-filename")
    if below is not None and not Path(below).exists():
        tree["backing"] = None
    return "json:" + json.dumps(tree)


def _without_pause(events: list[list[Any]]) -> list[list[Any]]:
    """Leave out that QEMU's jobs may pause while nodes are drained, and go on."""
    kept: list[list[Any]] = []
    for one in events:
        status, before = one[1].get("status"), kept[-1][1].get("status") if kept else None
        if (before, status) == ("standby", "ready"):
            kept.pop()
        elif status != "paused" and (not kept or kept[-1] != one):
            kept.append(one)
    return kept


def test_stream(tmp_path: Path) -> None:
    requests = [*CHAIN, qcow2("small")]
    for wrong in (
        {"device": "none"},
        {"device": "c", "base": "x"},
        {"device": "c", "base": "a.qcow2", "base_node": "a"},
        {"device": "c", "base": "a.qcow2", "bottom": "b"},
        {"device": "c", "base_node": "a", "bottom": "b"},
        {"device": "c", "base_node": "c"},
        {"device": "c", "base_node": "small"},
        {"device": "c", "bottom": "small"},
        {"device": "c", "bottom": "none"},
        {"device": "c", "backing_file": "x"},
        {"device": "c", "speed": -1},
        {"device": "c", "filter_node_name": "a"},
        {"device": "c", "filter_node_name": "1"},
    ):
        requests.append(job("block-stream", job_id="j", **wrong))
    requests += [job("block-stream", device="c"), job("block-stream", job_id="1", device="c")]
    requests += [job("block-stream", job_id="j", device="b", backing_file="x", base_node="a"), SHOWN]
    requests += [job("block-stream", job_id="j", device="c", base_node="a", auto_finalize=False, filter_node_name="f")]
    requests += [JOBS, BLOCK_JOBS, ("blockdev-del", {"node-name": "c"}), ("blockdev-del", {"node-name": "b"})]
    requests += [("job-finalize", {"id": "j"}), JOBS, SHOWN, GRAPH, ("blockdev-del", {"node-name": "b"})]
    requests += [job("block-stream", job_id="j", device="c", auto_dismiss=False), BLOCK_JOBS]
    requests += [("block-job-dismiss", {"id": "j"}), SHOWN, GRAPH]
    talk(tmp_path, requests)


@pytest.mark.parametrize("end", [{"bottom": "b"}, {"base": "a.qcow2"}, {"base_node": "b"}, {}], ids=str)
def test_stream_of_an_image_that_found_its_backing_files_itself(tmp_path: Path, end: dict[str, str]) -> None:
    if "base_node" in end or "bottom" in end:
        requests = [*CHAIN]
    else:
        requests = [*WHOLE]
    talk(tmp_path, [*requests, job("block-stream", job_id="j", device="c", **end), SHOWN, GRAPH])


def test_commit_of_what_nobody_writes_to(tmp_path: Path) -> None:
    requests = [*CHAIN, qcow2("small")]
    for wrong in (
        {"device": "none"},
        {"device": "a"},
        {"device": "c", "base_node": "none"},
        {"device": "c", "base_node": "small"},
        {"device": "c", "base_node": "c", "top_node": "b"},
        {"device": "c", "base_node": "a", "top_node": "a"},
        {"device": "c", "base_node": "a", "base": "a.qcow2"},
        {"device": "c", "top_node": "b", "top": "b.qcow2"},
        {"device": "c", "top": "x"},
        {"device": "c", "base": "x"},
        {"device": "c", "base_node": "a", "backing_file": "x"},
        {"device": "c", "top_node": "b", "base_node": "a", "filter_node_name": "c"},
        {"device": "c", "top_node": "b", "base_node": "a", "speed": -1},
    ):
        requests.append(job("block-commit", job_id="j", **wrong))
    requests += [job("block-commit", device="c", top_node="b", base_node="a")]
    start = job("block-commit", job_id="j", device="c", top_node="b", base_node="a", auto_finalize=False)
    requests += [start, BLOCK_JOBS, ("blockdev-del", {"node-name": "b"}), ("blockdev-del", {"node-name": "a"})]
    requests += [("blockdev-snapshot", {"node": "c", "overlay": "small"}), ("job-finalize", {"id": "j"}), SHOWN, GRAPH]
    requests += [("blockdev-del", {"node-name": "b"}), job("block-commit", job_id="j", device="small"), GRAPH]
    requests += [("block-job-complete", {"device": "j"}), SHOWN, GRAPH]
    talk(tmp_path, requests)


def test_commit_with_another_name(tmp_path: Path) -> None:
    named = {"backing_file": "./a.qcow2", "top": "b.qcow2", "base": "a.qcow2", "filter_node_name": "f"}
    talk(tmp_path, [*WHOLE, job("block-commit", job_id="j", device="c", **named), SHOWN, GRAPH])


def test_commit_of_an_image_in_use(tmp_path: Path) -> None:
    requests = [*CHAIN, ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "n.sock"}}})]
    requests += [("block-export-add", {"type": "nbd", "id": "e", "node-name": "c", "writable": True})]
    requests += [job("block-commit", job_id="j", device="c", filter_node_name="f"), JOBS, BLOCK_JOBS]
    requests += [("block-job-set-speed", {"device": "j", "speed": 1000}), ("job-pause", {"id": "j"}), JOBS]
    requests += [("job-complete", {"id": "j"}), ("job-resume", {"id": "j"}), SHOWN, GRAPH, ("query-block-exports", {})]
    requests += [("blockdev-del", {"node-name": "c"}), ("blockdev-del", {"node-name": "b"}), GRAPH]
    talk(tmp_path, requests)


@pytest.mark.parametrize("end", ["block-job-complete", "block-job-cancel"])
def test_commit_into_a_base_that_was_read_only(tmp_path: Path, end: str) -> None:
    """It becomes what is in use, and writable, or read-only again."""
    requests = [*WHOLE, ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "n.sock"}}})]
    requests += [("block-export-add", {"type": "nbd", "id": "e", "node-name": "c", "writable": True})]
    requests += [job("block-commit", job_id="j", device="c"), SHOWN, (end, {"device": "j"}), SHOWN, GRAPH]
    talk(tmp_path, requests)


def test_a_commit_that_is_cancelled(tmp_path: Path) -> None:
    requests = [*CHAIN, job("block-commit", job_id="j", device="c"), ("job-cancel", {"id": "j"}), SHOWN, GRAPH]
    requests += [job("block-commit", job_id="j", device="c"), ("block-job-cancel", {"device": "j"}), SHOWN, GRAPH]
    requests += [job("block-commit", job_id="j", device="c", base_node="b", top_node="c")]
    requests += [("block-job-cancel", {"device": "j", "force": True}), GRAPH]
    talk(tmp_path, requests)


MIRROR_WRONG: list[dict[str, Any]] = [
    {"device": "none", "target": "empty"},
    {"device": "b", "target": "empty"},
    {"device": "c", "target": "none"},
    {"device": "c", "target": "c"},
    {"device": "c", "target": "b"},
    {"device": "c", "target": "empty", "granularity": 100},
    {"device": "c", "target": "empty", "granularity": 3 << 20},
    {"device": "c", "target": "empty", "granularity": 1 << 30},
    {"device": "c", "target": "empty", "sync": "incremental"},
    {"device": "c", "target": "empty", "replaces": "none"},
    {"device": "c", "target": "empty", "replaces": "small"},
    {"device": "c", "target": "empty", "filter_node_name": "c"},
    {"device": "c", "target": "empty", "speed": -1},
    {"device": "c", "target": "small"},
]


def test_mirror(tmp_path: Path) -> None:
    requests = [*CHAIN, qcow2("empty"), qcow2("small"), qcow2("other")]
    for wrong in MIRROR_WRONG:
        requests.append(job("blockdev-mirror", job_id="j", **{"sync": "full", **wrong}))
    start = job("blockdev-mirror", job_id="j", device="c", target="empty", sync="full", filter_node_name="f")
    requests += [start, JOBS, BLOCK_JOBS, job("blockdev-mirror", job_id="k", device="c", target="other", sync="full")]
    requests += [("blockdev-del", {"node-name": name}) for name in ("c", "empty", "f")]
    change = {"id": "j", "type": "mirror", "copy-mode": "write-blocking"}
    requests += [("block-job-change", change), BLOCK_JOBS, ("block-job-change", {**change, "copy-mode": "background"})]
    requests += [("block-job-complete", {"device": "j"}), SHOWN, GRAPH]
    requests += [job("blockdev-mirror", job_id="j", device="c", target="other", sync="top"), JOBS]
    requests += [("block-job-cancel", {"device": "j"}), SHOWN, GRAPH]
    talk(tmp_path, requests)


def test_mirror_and_finalize(tmp_path: Path) -> None:
    requests = [node("file", "r", filename="raw.img"), node("file", "t", filename="t.img")]
    requests += [("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "n.sock"}}})]
    requests += [("block-export-add", {"type": "nbd", "id": "e", "node-name": "r", "writable": True})]
    start = {"device": "r", "target": "t", "sync": "full", "auto_finalize": False, "auto_dismiss": False}
    requests += [job("blockdev-mirror", job_id="j", **start), ("job-complete", {"id": "j"}), JOBS]
    requests += [("job-finalize", {"id": "j"}), JOBS, ("query-block-exports", {}), ("job-dismiss", {"id": "j"}), GRAPH]
    requests += [job("blockdev-mirror", job_id="j", device="t", target="r", sync="none", copy_mode="write-blocking")]
    requests += [BLOCK_JOBS, ("job-complete", {"id": "j"}), ("query-block-exports", {}), SHOWN]
    talk(tmp_path, requests)


BACKUP_WRONG: list[dict[str, Any]] = [
    {"device": "none"},
    {"target": "none"},
    {"target": "c"},
    {"target": "small"},
    {"sync": "bitmap"},
    {"sync": "incremental", "bitmap": "x"},
    {"sync": "incremental", "bitmap": "x", "bitmap_mode": "never"},
    {"sync": "bitmap", "bitmap": "m"},
    {"sync": "bitmap", "bitmap": "x", "bitmap_mode": "never"},
    {"sync": "none", "bitmap": "m", "bitmap_mode": "always"},
    {"bitmap": "m", "bitmap_mode": "never"},
    {"bitmap_mode": "never"},
    {"target": "t", "compress": True},
    {"x_perf": {"max-workers": 0}},
    {"x_perf": {"max-chunk": -1}},
    {"x_perf": {"max-chunk": 512}},
    {"x_perf": {"min-cluster-size": 1000}},
    {"filter_node_name": "c"},
    {"speed": -1},
]


def test_backup(tmp_path: Path) -> None:
    requests = [
        *CHAIN,
        qcow2("empty"),
        qcow2("small"),
        node("file", "t", filename="t.img"),
        node("null-co", "z", size=MiB),
    ]
    requests += [("block-dirty-bitmap-add", {"node": "c", "name": "m"})]
    for wrong in BACKUP_WRONG:
        requests.append(
            job("blockdev-backup", **{"job_id": "j", "device": "c", "target": "empty", "sync": "full", **wrong})
        )
    start = {"job_id": "j", "device": "c", "target": "empty"}
    requests += [job("blockdev-backup", **start, sync="full", auto_finalize=False, filter_node_name="f"), BLOCK_JOBS]
    requests += [("blockdev-del", {"node-name": name}) for name in ("c", "empty", "f")]
    requests += [("job-finalize", {"id": "j"}), SHOWN, GRAPH]
    requests += [job("blockdev-backup", **start, sync="none"), JOBS, ("block-job-cancel", {"device": "j"}), SHOWN]
    requests += [job("blockdev-backup", **{**start, "target": "t"}, sync="top"), JOBS, SHOWN]
    for mode in ("never", "always", "on-success"):
        requests += [job("blockdev-backup", **start, sync="bitmap", bitmap="m", bitmap_mode=mode), SHOWN]
    requests += [job("blockdev-backup", **start, sync="incremental", bitmap="m"), SHOWN]
    start = {**start, "target": "other"}
    requests += [job("blockdev-backup", **start, sync="full", bitmap="m", bitmap_mode="always", compress=True), SHOWN]
    talk(tmp_path, requests)


def test_backups_in_transactions(tmp_path: Path) -> None:
    backup = {"device": "c", "target": "empty", "sync": "full"}
    first, second = {**backup, "job-id": "j"}, {**backup, "job-id": "k", "device": "b", "target": "other"}

    def act(*actions: tuple[str, dict[str, Any]], **properties: Any) -> Request:
        tree: dict[str, Any] = {"actions": [{"type": name, "data": data} for name, data in actions]}
        return "transaction", {**tree, **({"properties": properties} if properties else {})}

    requests = [*CHAIN, qcow2("empty"), qcow2("other")]
    grouped = {"completion-mode": "grouped"}
    requests += [act(("blockdev-backup", first), ("abort", {})), JOBS, GRAPH]
    requests += [act(("blockdev-backup", first), ("blockdev-backup", {**second, "device": "none"})), JOBS, GRAPH]
    requests += [act(("blockdev-backup", first)), JOBS, GRAPH]
    requests += [act(("blockdev-backup", {**first, "auto-dismiss": False}), **grouped), JOBS]
    requests += [("job-dismiss", {"id": "j"}), GRAPH]
    talk(tmp_path, requests)


def test_the_names_of_jobs_that_are_not_there(tmp_path: Path) -> None:
    requests: list[Request] = []
    for verb in ("cancel", "complete", "pause", "resume"):
        requests.append((f"block-job-{verb}", {"device": "j"}))
    requests += [("block-job-finalize", {"id": "j"}), ("block-job-dismiss", {"id": "j"})]
    requests += [("block-job-set-speed", {"device": "j", "speed": 1})]
    requests += [("block-job-change", {"id": "j", "type": "mirror", "copy-mode": "background"})]
    requests += [("block-job-change", {"id": "j", "type": "commit"})]
    talk(tmp_path, requests)


def storage(number: int, filename: str) -> Request:
    return node("file", f"libvirt-{number}-storage", filename=filename, auto_read_only=True, discard="unmap")


def format_node(number: int, **members: Any) -> Request:
    name, below = f"libvirt-{number}-format", f"libvirt-{number}-storage"
    return node("qcow2", name, read_only=False, discard="unmap", file=below, **members)


def made(number: int, size: int, backing: str | None = None) -> list[Request]:
    """An image made as libvirt makes one."""
    options: dict[str, Any] = {"driver": "qcow2", "file": f"libvirt-{number}-storage", "size": size}
    options["cluster-size"] = 65536
    if backing is not None:
        options |= {"backing-file": backing, "backing-fmt": "qcow2"}
    name = f"create-libvirt-{number}-format"
    create: Request = ("blockdev-create", {"job-id": name, "options": options})
    return [create, JOBS, ("job-dismiss", {"id": name})]


def transaction(command: str, **data: Any) -> Request:
    data = {key.replace("_", "-"): value for key, value in data.items()}
    return "transaction", {"actions": [{"type": command, "data": data}]}


def test_what_libvirt_does_with_a_disk(tmp_path: Path) -> None:
    """Snapshot, active commit, copy with and without pivot, backup, pull: its commands in its order."""
    need("qemu-system-x86_64")
    bitmap = {"name": "libvirt-tmp-activewrite", "persistent": False, "disabled": False}
    query: list[Request] = [("query-block", {}), SHOWN, BLOCK_JOBS]
    manual = {"auto_finalize": True, "auto_dismiss": False}
    requests = [storage(1, "empty.qcow2"), format_node(1)]
    disk = {"driver": "virtio-blk-pci", "drive": "libvirt-1-format", "id": "virtio-disk0", "addr": "5"}
    requests += [("device_add", disk)]
    # snapshot-create-as --disk-only, blockcommit --active --pivot
    requests += [node("file", "libvirt-8-storage", filename="small.qcow2", auto_read_only=True, discard="unmap")]
    requests += [*made(8, MiB, "empty.qcow2"), format_node(8, backing=None)]
    requests += [transaction("blockdev-snapshot", node="libvirt-1-format", overlay="libvirt-8-format"), *query]
    job8 = "commit-vda-libvirt-8-format"
    ends = {"top_node": "libvirt-8-format", "base_node": "libvirt-1-format", "backing_mask_protocol": True}
    requests += [job("block-commit", device="libvirt-8-format", job_id=job8, **ends, **manual), BLOCK_JOBS]
    requests += [transaction("block-dirty-bitmap-add", node="libvirt-1-format", **bitmap)]
    requests += [("job-complete", {"id": job8}), JOBS, ("job-dismiss", {"id": job8})]
    name = "libvirt-tmp-activewrite"
    requests += [transaction("block-dirty-bitmap-remove", node="libvirt-1-format", name=name), *query]
    requests += [("blockdev-del", {"node-name": f"libvirt-8-{kind}"}) for kind in ("format", "storage")]
    # blockcopy --pivot, blockcopy and blockjob --abort
    for number, verb in ((9, "job-complete"), (10, "block-job-cancel")):
        source, target = f"libvirt-{1 if number == 9 else 9}-format", f"libvirt-{number}-format"
        file = "other.qcow2" if number == 9 else "small.qcow2"
        requests += [storage(number, file), *made(number, MiB), format_node(number, backing=None)]
        copy = f"copy-vda-{source}"
        start = {"device": source, "target": target, "replaces": source, "sync": "full", **manual}
        requests += [job("blockdev-mirror", job_id=copy, **start), BLOCK_JOBS]
        if number == 9:
            requests += [transaction("block-dirty-bitmap-add", node=target, **bitmap)]
        requests += [(verb, {"id" if number == 9 else "device": copy}), JOBS, ("job-dismiss", {"id": copy}), *query]
        gone = 1 if number == 9 else 10
        requests += [("blockdev-del", {"node-name": f"libvirt-{gone}-{kind}"}) for kind in ("format", "storage")]
    # backup-begin
    backup = "backup-vda-libvirt-9-format"
    requests += [storage(12, "small.qcow2"), *made(12, MiB), format_node(12, backing=None)]
    start = {"device": "libvirt-9-format", "job_id": backup, "target": "libvirt-12-format", "sync": "full", **manual}
    requests += [transaction("blockdev-backup", **start), JOBS, ("job-dismiss", {"id": backup}), *query]
    requests += [("blockdev-del", {"node-name": f"libvirt-12-{kind}"}) for kind in ("format", "storage")]
    # a chain, and blockpull
    requests += [
        storage(13, "c.qcow2"),
        format_node(13),
        ("device_add", {**disk, "drive": "libvirt-13-format", "id": "d", "addr": "6"}),
    ]
    pull = {"device": "libvirt-13-format", "job_id": "pull", "backing_mask_protocol": True, **manual}
    requests += [job("block-stream", **pull), JOBS, ("job-dismiss", {"id": "pull"}), *query]
    talk(tmp_path, requests, ("qemu-system-x86_64", "qmpd"))
