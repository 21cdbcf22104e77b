"""The same requests to QEMU's programs and to ours, each in a folder of its own: the answers have to be equal.

One conversation per rule that recorded conversations do not show.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qmpd.formats.luks1 import ALIGNMENT
from tests.support.daemon import RawClient, running
from tests.support.nbd_wire import Client
from tests.support.peers import need
from tests.support.reference import reference

KiB, MiB = 1 << 10, 1 << 20
HUGE = (1 << 63) - 1
LARGEST = (1 << 63) - (1 << 30)
OURS = {"qemu-storage-daemon": "qmpd-storage-daemon", "qemu-system-x86_64": "qmpd"}
EXPORT = {"type": "nbd", "node-name": "n"}
MASKED = ("filename", "thread-id", "actual-size", "iters", "master-key-iters", "uuid")

Request = tuple[str, dict[str, Any]]


def masked(value: Any) -> Any:
    """Replace what differs between two runs of one program."""
    if isinstance(value, dict):
        return {key: "..." if key in MASKED else masked(value[key]) for key in value}
    return [masked(one) for one in value] if isinstance(value, list) else value


def ask(client: RawClient, name: str, arguments: dict[str, Any]) -> Any:
    """Send a request; of a job that it starts the error counts as well."""
    reply = masked(client.send({"execute": name, "arguments": arguments}))
    if name != "blockdev-create" or "error" in reply:
        return reply
    deadline = time.monotonic() + 60
    while True:
        (job,) = (one for one in client.ok("query-jobs") if one["id"] == arguments["job-id"])
        if job["status"] == "concluded":
            if job["id"] != "kept":
                client.ok("job-dismiss", id=job["id"])
            return job.get("error", "done")
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


@contextlib.contextmanager
def monitor_of(name: str, folder: Path, *args: str) -> Iterator[RawClient]:
    """Run one of the four programs."""
    if name in OURS:
        with reference(folder, *args, name=name) as client:
            yield client
    else:
        with running(folder, *args, name=name) as daemon:
            yield daemon.client()


def converse(
    folder: Path, requests: list[Request], *, theirs: str = "qemu-storage-daemon", args: Sequence[str] = ()
) -> None:
    """Send the requests to both programs and compare."""
    need(theirs)
    answers = []
    for name in (theirs, OURS[theirs]):
        home = folder / name
        home.mkdir()
        for file, size in (("a.img", MiB), ("b.img", MiB), ("c.img", MiB)):
            (home / file).write_bytes(b"")
            with (home / file).open("r+b") as made:
                made.truncate(size)
        with monitor_of(name, home, *args) as client:
            answers.append([ask(client, *request) for request in requests])
    wrong = [
        f"{name} {json.dumps(arguments)[:300]}\n  theirs {json.dumps(one)[:1500]}\n  ours   {json.dumps(two)[:1500]}"
        for (name, arguments), one, two in zip(requests, *answers, strict=True)
        if one != two
    ]
    assert not wrong, "\n".join(wrong)


def wire(members: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): members[key] for key in members}


def node(driver: str, name: str, **members: Any) -> Request:
    return "blockdev-add", {
        "driver": driver,
        "node-name": name,
        **{key.replace("_", "-"): members[key] for key in members},
    }


def create(number: int, driver: str, **members: Any) -> Request:
    options = {"driver": driver, **wire(members)}
    return "blockdev-create", {"job-id": f"j{number}", "options": options}


FILES = [node("file", name, filename=f"{name}.img") for name in "abc"]
SECRET = ("object-add", {"qom-type": "secret", "id": "s", "data": "sesame"})


def luks(number: int, **members: Any) -> Request:
    return create(number, "luks", **{"iter_time": 10, "key_secret": "s", **members})


def test_sizes_that_no_volume_can_have(tmp_path: Path) -> None:
    """Told apart: more than 63 bits, more than a node may have, more than the file system takes."""
    sizes = [-1, LARGEST, 1 << 62]
    requests = [SECRET, *FILES]
    requests += [luks(at, file="a", size=size) for at, size in enumerate(sizes)]
    requests += [luks(at, file="b", header="a", size=size) for at, size in enumerate([-1, HUGE, 1 << 62], 10)]
    requests += [create(at, "qcow2", file="a", size=size) for at, size in enumerate([*sizes, HUGE - 511, 1 << 50], 30)]
    requests += [create(at, "file", filename="new.img", size=size) for at, size in enumerate(sizes, 40)]
    converse(tmp_path, requests)


def test_nodes_are_not_resized_beyond_the_largest_size(tmp_path: Path) -> None:
    requests = [SECRET, *FILES, luks(0, file="a", size=MiB), create(1, "qcow2", file="b", size=MiB)]
    requests += [node("null-co", "n"), node("raw", "r", file="c")]
    requests += [node("luks", "l", file="a", key_secret="s"), node("qcow2", "q", file="b")]
    for name in "nrlq":
        for size in (HUGE, LARGEST + 512, LARGEST, 1 << 62):
            requests.append(("block_resize", {"node-name": name, "size": size}))
    converse(tmp_path, requests)


def test_what_luks_volumes_are_preallocated_with(tmp_path: Path) -> None:
    requests = [SECRET, *FILES]
    requests += [luks(0, file="a", size=ALIGNMENT, preallocation="metadata")]
    requests += [luks(1, file="b", header="a", size=ALIGNMENT, preallocation="metadata")]
    requests += [luks(2, header="a", size=ALIGNMENT, preallocation="metadata")]
    requests += [luks(30, size=0, preallocation="full"), luks(31, header="a", file="x", size=0, key_secret="t")]
    converse(tmp_path, requests)


def test_a_job_that_has_ended_takes_nothing_but_dismissal(tmp_path: Path) -> None:
    requests = [FILES[0], create(0, "qcow2", file="a", size=MiB), create(1, "qcow2", file="a", size=1)]
    requests.append(("blockdev-create", {**create(2, "file", filename="a.img", size=0)[1], "job-id": "kept"}))
    for verb in ("resume", "pause", "resume", "cancel", "complete", "finalize", "dismiss", "resume"):
        requests.append((f"job-{verb}", {"id": "kept"}))
    converse(tmp_path, requests)


def test_character_devices_have_their_place_in_the_tree(tmp_path: Path) -> None:
    requests: list[Request] = [("qom-get", {"path": "/chardevs/qmp0", "property": "connected"})]
    for path in ("/chardevs/qmp0", "/chardevs/zz"):
        requests.append(("qom-get", {"path": path, "property": "type"}))
        requests.append(("qom-set", {"path": path, "property": "connected", "value": False}))
        requests.append(("qom-get", {"path": path, "property": "addr.path"}))
    requests.append(("qom-list", {"path": "zz"}))
    nulls = [word for name in ("a", "b", "zz", "mon1", "x9") for word in ("--chardev", f"null,id={name}")]
    converse(tmp_path, requests, args=nulls)
    (tmp_path / "system").mkdir()
    rows: list[Request] = [("query-chardev", {})]
    converse(tmp_path / "system", rows, theirs="qemu-system-x86_64", args=nulls)


def test_the_write_threshold_is_shown_as_a_signed_number(tmp_path: Path) -> None:
    requests = [node("null-co", "n")]
    for threshold in (-1, 1 << 63, HUGE, 0):
        requests.append(("block-set-write-threshold", {"node-name": "n", "write-threshold": threshold}))
        requests.append(("query-named-block-nodes", {}))
    converse(tmp_path, requests)


def test_io_threads_are_listed_in_the_order_of_the_table_of_objects(tmp_path: Path) -> None:
    """It depends on all objects, and on those deleted."""

    def add(*names: str, kind: str = "iothread") -> list[Request]:
        return [("object-add", {"qom-type": kind, "id": name}) for name in names]

    def remove(*names: str) -> list[Request]:
        return [("object-del", {"id": name}) for name in names]

    look: list[Request] = [("query-iothreads", {})]
    requests = add("io1", "io2") + look + add("zz", "alpha") + add("tg", kind="throttle-group") + look
    requests += add("b", "beta") + look + remove("zz") + look + add("io10", "io11", "io12", "zz", "io14") + look
    requests += remove("io1", "io2", "io10", "io11") + look + remove("io12", "alpha", "tg") + look
    converse(tmp_path, requests, theirs="qemu-system-x86_64")


def test_places_on_the_bus_and_a_drive_without_medium(tmp_path: Path) -> None:
    """Once slot 31 is taken, QEMU plugs nothing in that does not say where."""
    plug = [{"addr": "1e"}, {}, {"addr": "1f"}, {}, {"addr": "5"}, {"addr": "5.1"}, {"addr": "1f.1"}]
    requests: list[Request] = []
    for at, place in enumerate(plug):
        requests.append(node("null-co", f"n{at}"))
        requests.append(("device_add", {"driver": "virtio-blk-pci", "drive": f"n{at}", "id": f"d{at}", **place}))
    requests.append(("device_add", {"driver": "virtio-scsi-pci", "id": "s", "addr": "6"}))
    requests.append(("device_add", {"driver": "scsi-cd", "id": "cd", "bus": "s.0"}))
    limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    requests.append(("block_set_io_throttle", {"id": "cd", **limits}))
    converse(tmp_path, requests, theirs="qemu-system-x86_64")


def ended(folder: Path, name: str, visits: str) -> list[str]:
    """Export a to e, connect to `visits` in this order, stop the server and return who was deleted, in order."""
    folder.mkdir()
    with monitor_of(name, folder) as client:
        client.ok("blockdev-add", driver="null-co", node_name="n")
        client.ok("nbd-server-start", addr={"type": "unix", "data": {"path": "n.sock"}}, max_connections=0)
        for export in "abcde":
            reply = client.send({"execute": "block-export-add", "arguments": EXPORT | {"id": export, "name": export}})
            assert "return" in reply, reply
        peers = []
        for export in visits:
            peers.append(Client(str(folder / "n.sock")))
            peers[-1].go(export.encode())
        client.ok("nbd-server-stop")
        for peer in peers:
            peer.close()
        return [one["data"]["id"] for one in client.events if one["event"] == "BLOCK_EXPORT_DELETED"]


def test_exports_with_clients_end_first_and_in_their_order(tmp_path: Path) -> None:
    need("qemu-storage-daemon")
    for at, visits in enumerate(("", "acd", "dacd", "ebb")):
        theirs = ended(tmp_path / f"theirs{at}", "qemu-storage-daemon", visits)
        assert ended(tmp_path / f"ours{at}", "qmpd-storage-daemon", visits) == theirs, visits
        assert len(theirs) == 5
