"""One conversation with QEMU's programs and with ours per rule that recorded conversations do not show."""

from __future__ import annotations

from pathlib import Path

from qmpd.formats.luks1 import ALIGNMENT
from tests.support.answers import FILES, SECRET, MiB, Request, converse, create, luks, monitor_of, node
from tests.support.nbd_wire import Client
from tests.support.peers import need

HUGE = (1 << 63) - 1
LARGEST = (1 << 63) - (1 << 30)
EXPORT = {"type": "nbd", "node-name": "n"}


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


def test_a_node_is_not_moved_under_its_users(tmp_path: Path) -> None:
    def move(name: str, thread: object, **more: bool) -> Request:
        return "x-blockdev-set-iothread", {"node-name": name, "iothread": thread, **more}

    requests = [node("null-co", "n"), node("raw", "r", file="n"), ("object-add", {"qom-type": "iothread", "id": "t"})]
    requests += [move("n", "t"), move("r", "t"), move("r", None), move("x", None), move("n", "zz"), move("n", "")]
    requests.append(("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "n.sock"}}}))
    requests.append(("block-export-add", {"type": "nbd", "id": "e", "node-name": "r"}))
    requests += [move("r", "t"), move("r", "t", force=True), move("n", None), move("r", 3), move("r", "zz", force=True)]
    converse(tmp_path, requests)
