"""vhost-user-blk exports beside qemu-storage-daemon's, and as the disk of a machine that QEMU runs."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proof
from tests.peers.conftest import need
from tests.support.daemon import RawClient, program
from tests.support.nbd_servers import qemu, qmpd
from tests.support.vhost_driver import (
    DISCARD,
    EVENT_IDX,
    FLUSH,
    GET_ID,
    IN,
    INDIRECT_DESC,
    OK,
    OUT,
    SET_CONFIG,
    ZEROES,
    Driver,
)

SEGMENT = struct.Struct("<QII")
SECRET = ("--object", "secret,id=s,data=abc123")
SIZE = 1 << 20
SLOTS = 8


def export(monitor: RawClient, sock: Path, node: str, **members: Any) -> None:
    address = {"type": "unix", "path": str(sock)}
    monitor.ok("block-export-add", type="vhost-user-blk", id="v", node_name=node, addr=address, **members)


@pytest.fixture(params=["qmpd", "qemu"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RawClient, Path, Path]]:
    """A daemon with the node `n` over an image, and where to export it."""
    need("qemu-storage-daemon")
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * (SIZE // 256))
    server = qmpd if request.param == "qmpd" else qemu
    with server(tmp_path / "d", "--blockdev", f"file,node-name=n,filename={image},discard=unmap") as monitor:
        yield monitor, tmp_path / "v.sock", image


ANSWERS: list[tuple[int, int, bytes | int, int]] = [
    (OUT, 8, b"x" * 4096, 0),
    (IN, 8, 4096, 0),
    (FLUSH, 0, b"", 0),
    (IN, 2047, 512, 0),
    (IN, 2048, 512, 1),
    (IN, 2047, 1024, 1),
    (IN, 0, 100, 1),
    (OUT, 0, b"x" * 100, 1),
    (IN, 1 << 54, 512, 1),
    (IN, (1 << 55) - 1, 512, 1),
    (IN, 0, 0, 0),
    (OUT, 0, b"", 0),
    (IN, 1 << 40, 0, 1),
    (IN | 1 << 31, 0, 512, 0),
    (99, 0, b"", 2),
    (GET_ID, 0, 8, 0),
    (DISCARD, 0, SEGMENT.pack(0, 8, 0), 0),
    (DISCARD, 0, SEGMENT.pack(0, 8, 1), 2),
    (DISCARD, 0, SEGMENT.pack(2047, 2, 0), 1),
    (DISCARD, 0, SEGMENT.pack(0, 8, 0) * 2, 2),
    (DISCARD, 0, b"x" * 15, 1),
    (ZEROES, 0, SEGMENT.pack(0, 1, 0), 0),
    (ZEROES, 0, SEGMENT.pack(0, 2048, 1), 0),
    (ZEROES, 0, SEGMENT.pack(0, 1, 2), 2),
    (ZEROES, 0, SEGMENT.pack(2048, 0, 0), 0),
    (ZEROES, 0, SEGMENT.pack(0, 32769, 0), 1),
    (ZEROES, 0, SEGMENT.pack(1 << 54, 1, 0), 1),
    (ZEROES, 0, b"", 1),
]


def test_every_kind_of_request_gets_the_status_that_qemu_gives(served: tuple[RawClient, Path, Path]) -> None:
    """Writable, read-only, and with larger blocks."""
    monitor, sock, _ = served
    export(monitor, sock, "n", writable=True)
    disk = Driver(sock)
    assert [disk.request(kind, sector, data)[0] for kind, sector, data, _ in ANSWERS] == [one[3] for one in ANSWERS]
    disk.close()
    monitor.ok("block-export-del", id="v")
    export(monitor, sock, "n", logical_block_size=4096)
    disk = Driver(sock)
    assert disk.offered & 1 << 5
    assert struct.unpack_from("<I", disk.config(), 20) == (4096,)
    asked = [(OUT, 0, b"x" * 4096), (ZEROES, 0, SEGMENT.pack(0, 8, 0)), (IN, 8, 512), (IN, 1, 512), (FLUSH, 0, b"")]
    assert [disk.request(*one)[0] for one in asked] == [1, 1, 0, 1, 0]
    disk.close()


def test_a_ring_stops_where_it_is_and_goes_on_there(served: tuple[RawClient, Path, Path]) -> None:
    """The index that GET_VRING_BASE tells is that of the next request, also beyond the size of the ring."""
    monitor, sock, _ = served
    export(monitor, sock, "n", writable=True)
    disk = Driver(sock, num=8)
    for number in range(20):
        assert disk.request(IN, number, 512)[0] == OK
    assert disk.stop(disk.rings[0]) == 20
    disk.start(disk.rings[0], base=20)
    assert disk.request(IN, 0, 512)[0] == OK
    disk.close()


def test_a_node_that_grows_is_told_to_the_machine(served: tuple[RawClient, Path, Path]) -> None:
    """The back end's own message comes, and the config space has the new capacity."""
    monitor, sock, _ = served
    export(monitor, sock, "n", writable=True)
    disk = Driver(sock)
    disk.channel.settimeout(20)
    assert struct.unpack_from("<Q", disk.config()) == (SIZE // 512,)
    monitor.ok("block_resize", node_name="n", size=2 * SIZE)
    assert struct.unpack("<III", disk.channel.recv(64)) == (2, 1, 0)
    assert struct.unpack_from("<Q", disk.config()) == (2 * SIZE // 512,)
    assert disk.request(IN, 2 * SIZE // 512 - 1, 512) == (0, bytes(512))
    disk.close()


def test_the_export_goes_although_a_machine_uses_it(served: tuple[RawClient, Path, Path]) -> None:
    """As in QEMU no force is needed; the connection is closed, the socket gone, the node free."""
    monitor, sock, _ = served
    export(monitor, sock, "n", writable=True)
    disk = Driver(sock)
    assert disk.request(IN, 0, 512)[0] == OK
    monitor.ok("block-export-del", id="v")
    assert not disk.wire.is_open()
    assert not sock.exists()
    assert monitor.ok("query-block-exports") == []
    monitor.ok("blockdev-del", node_name="n")
    disk.close()


def test_the_next_machine_is_served_when_the_first_has_gone(served: tuple[RawClient, Path, Path]) -> None:
    """One at a time: the second waits to be accepted."""
    monitor, sock, _ = served
    export(monitor, sock, "n", writable=True)
    first = Driver(sock)
    assert first.request(OUT, 0, b"1" * 512)[0] == OK
    first.close()
    second = Driver(sock, table=True)
    assert second.request(IN, 0, 512) == (0, b"1" * 512)
    second.close()


def detached_disk(folder: Path, size: int) -> list[str]:
    """Make a LUKS volume with its header apart and its payload in qcow2; return what `luks` is over both."""
    header, payload = folder / "header.img", folder / "payload.qcow2"
    made = [
        ("create", *SECRET, "-q", "-f", "luks", "-o", "key-secret=s,detached-header=true,iter-time=10", header),
        ("create", "-q", "-f", "qcow2", payload, str(size)),
    ]
    for words in made:
        subprocess.run([program("qmpd-img"), *map(str, words)], check=True, timeout=60)
    nodes = [
        {"driver": "file", "node-name": "hf", "filename": str(header)},
        {"driver": "file", "node-name": "pf", "filename": str(payload)},
        {"driver": "qcow2", "node-name": "p", "file": "pf"},
        {"driver": "luks", "node-name": "n", "file": "p", "header": "hf", "key-secret": "s"},
    ]
    return [*SECRET, *(word for node in nodes for word in ("--blockdev", json.dumps(node)))]


@pytest.mark.proof
@pytest.mark.parametrize("features", [0, EVENT_IDX, EVENT_IDX | INDIRECT_DESC])
def test_random_requests_of_two_queues_match_a_model(features: int, tmp_path: Path, proof: Proof) -> None:
    """Sixteen requests at a time to the document's disk; then QEMU reads the same."""
    need("qemu-img")
    rng = random.Random(features)
    area = 128 << 10
    model = bytearray(2 * SLOTS * area)
    options = detached_disk(tmp_path, len(model))
    with qmpd(tmp_path / "d", *options) as monitor:
        export(monitor, tmp_path / "v.sock", "n", writable=True, num_queues=2)
        disk = Driver(tmp_path / "v.sock", features=features, queues=2)
        for sector in range(0, len(model) // 512, 256):  # what was never written decrypts to anything
            assert disk.request(OUT, sector, bytes(128 << 10))[0] == OK
        rounds = proof.count(2000)
        for _ in range(rounds):
            one_round(disk, model, rng, area, indirect=bool(features & INDIRECT_DESC))
        assert disk.request(FLUSH)[0] == OK
        disk.close()
    raw = tmp_path / "raw"
    raw.write_bytes(model)
    opened = (
        "driver=luks,key-secret=s,file.driver=qcow2,file.file.filename=payload.qcow2,header.driver=file,"
        "header.filename=header.img"
    )
    words = ["qemu-img", "compare", *SECRET, "--image-opts", opened, "driver=raw,file.filename=raw"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "Images are identical.\n", done.stderr
    proof.record(f"vhost-user-{features:x}", requests=rounds * 2 * SLOTS, seed=features)


def one_round(disk: Driver, model: bytearray, rng: random.Random, area: int, *, indirect: bool) -> None:
    """Do one request in each area of the disk, all at once."""
    expected: list[tuple[Any, bytes | None]] = []
    for ring in disk.rings:
        for slot in range(SLOTS):
            base = (ring.index * SLOTS + slot) * area
            start = rng.randrange(area // 512) * 512
            length = min(rng.randint(1, 160) * 512, area - start)
            kind = rng.choice((IN, IN, OUT, OUT, ZEROES, DISCARD))
            at, sector = base + start, (base + start) // 512
            here = {"pieces": rng.randint(1, 5), "indirect": indirect and rng.random() < 0.5}
            place = ring.index * SLOTS + slot
            want: bytes | None = None
            data: bytes | int = length
            if kind == IN:
                want = bytes(model[at : at + length])
            elif kind == OUT:
                data = rng.randbytes(length)
                model[at : at + length] = data
            elif kind == ZEROES:
                data = SEGMENT.pack(sector, length // 512, rng.choice((0, 1)))
                model[at : at + length] = bytes(length)
            else:
                kind, data = IN, 512
                want = bytes(model[at : at + 512])
            expected.append((disk.begin(ring, place, kind, sector, data, **here), want))
    for ring in disk.rings:
        disk.kick(ring)
    for ring in disk.rings:
        disk.wait(ring, SLOTS)
    for pending, want in expected:
        status, found = disk.result(pending)
        assert status == OK
        assert want is None or found == want


def test_the_machine_is_told_that_writes_are_cached(tmp_path: Path) -> None:
    """QEMU always says that they are not, and then gets no flush; `writethrough` or the machine turn the cache off."""
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    for writethrough in (False, True):
        with qmpd(tmp_path / "d", "--blockdev", f"file,node-name=n,filename={image}") as monitor:
            export(monitor, tmp_path / "v.sock", "n", writable=True, writethrough=writethrough)
            disk = Driver(tmp_path / "v.sock")
            assert disk.config()[32] == (not writethrough)
            assert disk.wire.acknowledged(SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0") == 0
            assert disk.config()[32] == 0
            assert disk.wire.acknowledged(SET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8)) == 1
            assert disk.request(OUT, 0, b"x" * 512)[0] == OK
            disk.close()
            disk = Driver(tmp_path / "v.sock")  # the next machine finds what the export has
            assert disk.config()[32] == (not writethrough)
            disk.close()


@pytest.mark.parametrize("tool", ["qmpd-storage-daemon", "qemu-storage-daemon"])
def test_a_socket_can_be_inherited(tool: str, tmp_path: Path) -> None:
    """As service managers hand them on: `addr.type=fd` on the command line, whose number QMP does not take."""
    need("qemu-storage-daemon")
    path = tmp_path / "v.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        name = program(tool) if tool.startswith("qmpd") else tool
        words = ["--blockdev", f"null-co,node-name=n,size={SIZE},read-zeroes=on"]
        words += ["--export", f"vhost-user-blk,id=v,node-name=n,addr.type=fd,addr.str={listener.fileno()}"]
        with subprocess.Popen([name, *words], pass_fds=[listener.fileno()]) as process:
            disk = Driver(path)
            assert disk.request(IN, 0, 512) == (OK, bytes(512))
            disk.close()
            process.terminate()
            assert process.wait(20) == 0


# A boot sector: BIOS services read sector 1 and write it to sector 2; then it ends the machine with a status.
BOOT = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0 bc007c"  # segments 0, a stack below
    "be407c b442 cd13 721a"  # read by the address packet at 0x7c40, or fail
    "66c706487c02000000"  # the packet's sector is 2 now
    "be407c b80043 cd13 7207"  # write, or fail
    "b010 e6f4 f4 ebfd"  # status 0x10, halt
    "b011 e6f4 f4 ebfd"  # status 0x11, halt
)
PACKET = struct.pack("<HHHHQ", 16, 1, 0x7E00, 0, 1)


def test_a_machine_of_qemu_boots_from_the_detached_disk_and_writes_to_it(tmp_path: Path) -> None:
    """QEMU as the front end, its BIOS as the driver: what it wrote is there, encrypted, for QEMU to read."""
    need("qemu-system-x86_64", "qemu-img")
    boot = (BOOT.ljust(0x40, b"\x90") + PACKET).ljust(510, b"\0") + b"\x55\xaa"
    message = b"from sector one to sector two".ljust(512, b".")
    options = detached_disk(tmp_path, 4 << 20)
    sock = tmp_path / "v.sock"
    with qmpd(tmp_path / "d", *options) as monitor:
        export(monitor, sock, "n", writable=True, num_queues=4)
        disk = Driver(sock)
        assert disk.request(OUT, 0, boot + message)[0] == OK
        disk.close()
        machine = [
            "qemu-system-x86_64", "-nodefaults", "-nographic", "-no-reboot", "-accel", "tcg", "-m", "64M",
            "-object", "memory-backend-memfd,id=m,size=64M,share=on", "-M", "q35,memory-backend=m",
            "-chardev", f"socket,id=c,path={sock}", "-device", "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=1",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
        ]  # fmt: skip
        done = subprocess.run(machine, capture_output=True, timeout=120)
        assert done.returncode == 0x10 << 1 | 1, done.stderr
        assert done.stderr == b""
        disk = Driver(sock)
        assert disk.request(IN, 2, 512) == (OK, message)
        disk.close()
    assert message not in (tmp_path / "payload.qcow2").read_bytes()
