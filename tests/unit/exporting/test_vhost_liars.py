"""Machines that lie to a vhost-user-blk export: they lose their disk, or a queue of it; the daemon loses nothing."""

from __future__ import annotations

import os
import random
import select
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.conftest import Proof
from tests.support.daemon import Daemon, RawClient, running
from tests.support.peers import need
from tests.support.vhost_driver import (
    ADD_MEM,
    GET_BASE,
    GET_CONFIG,
    GUEST,
    IN,
    NEXT,
    OK,
    OUT,
    REM_MEM,
    SET_ADDR,
    SET_CALL,
    SET_CHANNEL,
    SET_CONFIG,
    SET_ENABLE,
    SET_ERR,
    SET_FEATURES,
    SET_KICK,
    SET_MEM_TABLE,
    SET_NUM,
    SET_PROTOCOL,
    USER,
    WRITE,
    Driver,
    Gone,
    Wire,
)


@pytest.fixture(autouse=True)
def _compiled() -> None:
    need("module:qmpd.aio._guest_memory")


U64 = struct.Struct("<Q")
STATE = struct.Struct("<II")
REGION = struct.Struct("<QQQQ")


class Served:
    """A daemon with one export of a null node."""

    def __init__(self, daemon: Daemon, sock: Path) -> None:
        self.daemon, self.sock = daemon, sock
        self.monitor: RawClient = daemon.client()
        self.monitor.ok("blockdev-add", driver="null-co", node_name="n", size=1 << 20, read_zeroes=True)
        address = {"type": "unix", "path": str(sock)}
        self.monitor.ok(
            "block-export-add", type="vhost-user-blk", id="v", node_name="n", addr=address, writable=True, num_queues=2
        )
        self._before = self.descriptors()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def is_well(self) -> None:
        """The monitor answers, the next machine is served, and no descriptor is left of the last one."""
        self.monitor.ok("query-block-exports")
        with closing(Driver(self.sock)) as disk:
            assert disk.request(IN, 0, 512) == (OK, bytes(512))
        with closing(Wire(self.sock)) as wire:  # accepted only when the one before is gone
            assert wire.is_open()
        for _ in range(200):
            if self.descriptors() <= self._before:
                return
            self.monitor.ok("query-block-exports")
        assert self.descriptors() <= self._before + 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        yield Served(daemon, tmp_path / "v.sock")


def error_descriptor(disk: Driver) -> int:
    """Return what is written to when the first queue is broken."""
    told = os.eventfd(0)
    disk.wire.send(SET_ERR, U64.pack(0), [told])
    assert disk.wire.is_open()  # so it has arrived
    return told


def told_ready(told: int, seconds: float = 0) -> bool:
    return bool(select.select([told], [], [], seconds)[0])


def test_a_broken_chain_stops_its_queue_and_no_other(served: Served) -> None:
    """The error descriptor tells; set up anew the queue works again."""
    with closing(Driver(served.sock, queues=2)) as disk:
        broken, other = disk.rings
        told = error_descriptor(disk)
        disk.offer(broken, 0, {0: (GUEST, 16, NEXT, 1), 1: (GUEST, 16, NEXT, 0)})
        disk.kick(broken)
        assert told_ready(told, 20)
        os.close(told)
        pending = disk.begin(other, 8, IN, 0, 512)
        disk.kick(other)
        disk.wait(other, 1)
        assert disk.result(pending) == (OK, bytes(512))
        disk.stop(broken)
        disk.start(broken)
        assert disk.request(IN, 0, 512) == (OK, bytes(512))
    assert "queue 0 is stopped: a chain has more than 1024 descriptors, or goes round" in served.daemon.log
    served.is_well()


@pytest.mark.parametrize(
    ("chain", "text"),
    [
        ({0: (GUEST, 8, NEXT, 1), 1: (GUEST, 1, WRITE, 0)}, "has no header"),
        ({0: (GUEST, 16, 0, 0)}, "no room for its status"),
        ({0: (GUEST, 1, WRITE, 0)}, "has no header"),
        ({0: (0x10, 16, NEXT, 1), 1: (GUEST, 1, WRITE, 0)}, "there is no memory at 0x10"),
        ({0: (GUEST, 16, NEXT, 1), 1: (GUEST + (16 << 20) - 1, 2, WRITE, 0)}, "there is no memory at 0x1010000"),
    ],
)
def test_a_request_that_is_none_stops_the_queue(
    served: Served, chain: dict[int, tuple[int, int, int, int]], text: str
) -> None:
    with closing(Driver(served.sock)) as disk:
        told = error_descriptor(disk)
        disk.offer(disk.rings[0], 0, chain)
        disk.kick(disk.rings[0])
        assert told_ready(told, 20)
        os.close(told)
        assert disk.wire.is_open()
    assert text in served.daemon.log
    served.is_well()


def test_chains_offered_again_and_again_are_no_way_to_fill_the_daemon(served: Served) -> None:
    """A driver has as many requests under way as its ring has descriptors, and no more."""
    served.monitor.ok("blockdev-add", driver="null-co", node_name="slow", size=1 << 20, latency_ns=500_000_000)
    address = {"type": "unix", "path": str(served.sock) + "2"}
    served.monitor.ok("block-export-add", type="vhost-user-blk", id="s", node_name="slow", addr=address)
    with closing(Driver(Path(address["path"]), num=8)) as disk:
        told = error_descriptor(disk)
        ring = disk.rings[0]
        for _ in range(3):
            for _ in range(8):
                disk.begin(ring, 0, IN, 0, 512)
            disk.kick(ring)
            while not told_ready(told) and disk.get(ring.used + 4 + 8 * 8, "H") != ring.next:
                time.sleep(0.001)  # until all of them are taken
        assert told_ready(told, 20)
        os.close(told)
    assert "more requests are under way than the 8 descriptors of the ring can be" in served.daemon.log


def test_memory_that_is_taken_away_ends_the_machine_and_not_the_daemon(served: Served) -> None:
    """A page that is gone would be SIGBUS: with the rings in it, and with the data alone."""
    for kept in (0, 64 << 10):
        with closing(Driver(served.sock)) as disk:
            pending = disk.begin(disk.rings[0], 12, OUT, 0, b"x" * 4096)
            assert pending.data > 1 << 20
            os.ftruncate(disk.fd, kept)
            disk.kick(disk.rings[0])
            with pytest.raises(Gone):
                disk.wire._exact(1)
            os.ftruncate(disk.fd, disk.size)  # for our own mapping
    assert served.daemon.log.count("memory that it shares is gone") == 2
    served.is_well()


def region(guest: int, size: int, user: int, offset: int = 0) -> bytes:
    return bytes(8) + REGION.pack(guest, size, user, offset)


def addresses(descriptors: int, used: int, available: int, queue: int = 0) -> bytes:
    return struct.pack("<IIQQQQ", queue, 0, descriptors, used, available, 0)


END = USER + (16 << 20)


@pytest.mark.parametrize(
    ("number", "payload", "text"),
    [
        (SET_FEATURES, U64.pack(1), "features 0x1 were not offered"),
        (SET_FEATURES, b"1234", "message 2 has a payload of 4 bytes, not 8"),
        (SET_PROTOCOL, U64.pack(1 << 13), "protocol features 0x2000 were not offered"),
        (SET_NUM, STATE.pack(2, 8), "there is no queue 2; there are 2"),
        (SET_NUM, STATE.pack(0xFFFFFFFF, 8), "there is no queue 4294967295"),
        (SET_NUM, STATE.pack(0, 0), "queue 0 of 0 descriptors"),
        (SET_NUM, STATE.pack(0, 100), "queue 0 of 100 descriptors"),
        (SET_NUM, STATE.pack(0, 2048), "queue 0 of 2048 descriptors"),
        (SET_ADDR, addresses(USER + 8, USER, USER), "no multiple of 16"),
        (SET_ADDR, addresses(USER, USER + 2, USER), "no multiple of 4"),
        (SET_ADDR, addresses(USER, USER, USER + 1), "no multiple of 2"),
        (SET_ADDR, addresses(END - 16, USER, USER), "there are no 2048 bytes of shared memory"),
        (SET_ADDR, addresses(USER, END - 4, USER), "there are no 1030 bytes"),
        (SET_ADDR, addresses(USER, USER, END - 4), "there are no 262 bytes"),
        (SET_ADDR, addresses((1 << 64) - 16, USER, USER), "of shared memory at 0xfffffffffffffff0"),
        (SET_KICK, U64.pack(0x100), "is to be polled"),
        (SET_KICK, U64.pack(0), "needs one descriptor has 0"),
        (SET_CALL, U64.pack(7), "there is no queue 7"),
        (SET_ENABLE, STATE.pack(9, 1), "there is no queue 9"),
        (SET_CHANNEL, b"", "needs one descriptor has 0"),
        (SET_MEM_TABLE, STATE.pack(1, 0) + REGION.pack(0, 4096, 0, 0), "1 memory regions come with 0 descriptors"),
        (SET_MEM_TABLE, STATE.pack(9, 0), "9 regions; the limit is 8"),
        (ADD_MEM, region(1 << 40, 4096, 1 << 40), "comes with 0 descriptors"),
        (REM_MEM, region(GUEST, 4096, USER), "there is no memory region of 4096 bytes"),
        (SET_CONFIG, struct.pack("<III", 32, 2, 0) + b"\1\1", "2 bytes of the config space at 32 cannot be changed"),
        (SET_CONFIG, struct.pack("<III", 32, 4096, 0), "4096 bytes of config space"),
        (99, b"", "message 99 is not known"),
    ],
)
def test_a_message_that_cannot_be_is_refused_by_name(served: Served, number: int, payload: bytes, text: str) -> None:
    """With a reply if one was asked for, and the disk goes on; else by hanging up."""
    with closing(Driver(served.sock)) as disk:
        assert disk.wire.acknowledged(number, payload) == 1
        if number not in (SET_ADDR, SET_KICK, SET_MEM_TABLE):  # the queue is as it was
            assert disk.request(IN, 0, 512) == (OK, bytes(512))
    with closing(Driver(served.sock)) as disk:
        disk.wire.send(number, payload)
        assert not disk.wire.is_open()
    assert served.daemon.log.count(text) == 2
    served.is_well()


def test_requests_for_data_that_there_is_not(served: Served) -> None:
    """The config space has an end; a queue that there is not has no index."""
    with closing(Wire(served.sock)) as wire:
        assert wire.ask(GET_CONFIG, struct.pack("<III", 90, 7, 0) + bytes(7)) == b""
        wire.send(GET_BASE, STATE.pack(2, 0))
        assert not wire.is_open()
    served.is_well()


def pipe_end() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize(
    ("number", "payload", "make"),
    [
        (SET_KICK, U64.pack(0), pipe_end),
        (SET_CALL, U64.pack(0), pipe_end),
        (SET_CHANNEL, b"", pipe_end),
        (ADD_MEM, region(1 << 40, 4096, 1 << 40), pipe_end),
        (ADD_MEM, region(1 << 40, 1 << 40, 1 << 40), lambda: os.memfd_create("small")),
        (ADD_MEM, region(GUEST + 4096, 4096, 1 << 40), lambda: os.open("/dev/zero", os.O_RDWR)),
    ],
)
def test_descriptors_of_another_kind_are_refused(
    served: Served, number: int, payload: bytes, make: Callable[[], int]
) -> None:
    with closing(Driver(served.sock)) as disk:
        fd = make()
        assert disk.wire.acknowledged(number, payload, [fd]) == 1
        os.close(fd)
    served.is_well()


def test_a_flood_of_descriptors_is_dropped(served: Served) -> None:
    fds = [os.eventfd(0) for _ in range(64)]
    with closing(Wire(served.sock)) as wire:
        wire.send(SET_CHANNEL, b"", fds, flags=9)
        assert not wire.is_open()
    for _ in range(20):
        with closing(Wire(served.sock)) as wire:  # some that nobody asked for
            wire.send(SET_CALL, U64.pack(0), fds[:8])
    for fd in fds:
        os.close(fd)
    served.is_well()


def test_a_connection_that_ends_at_any_byte_of_a_message_is_forgotten(served: Served) -> None:
    message = struct.pack("<III", SET_NUM, 9, 8) + STATE.pack(0, 8)
    for end in range(len(message)):
        with closing(Wire(served.sock)) as wire:
            wire.sock.sendall(message[:end])
    served.is_well()


@pytest.mark.proof
def test_messages_at_random_leave_the_daemon_as_it_was(served: Served, proof: Proof) -> None:
    """Any number, any payload or one that nearly fits, any descriptors, a request now and then."""
    rng = random.Random(11)
    count = proof.count(3000)
    for _ in range(count):
        with closing(Driver(served.sock)) as disk, suppress(Gone, AssertionError, OSError):
            for _ in range(rng.randint(1, 12)):
                number = rng.randint(0, 45)
                payload = rng.choice(
                    (
                        rng.randbytes(rng.randint(0, 64)),
                        U64.pack(rng.randint(0, 3)),
                        STATE.pack(rng.randint(0, 2), rng.choice((0, 1, 8, 128, 65535))),
                        disk.addresses(disk.rings[0]),
                        region(rng.choice((GUEST, 0, 1 << 30)), 4096 << rng.randint(0, 12), USER),
                    )
                )
                fds = [disk.fd, disk.rings[0].kick, disk.rings[0].call][: rng.randint(0, 3)]
                disk.wire.send(number, payload, fds, flags=1)
                disk.kick(disk.rings[0])
                if rng.random() < 0.3:
                    disk.begin(disk.rings[0], 0, rng.randint(0, 14), rng.randint(0, 3000), rng.randint(0, 9) * 512)
    served.is_well()
    proof.record("vhost-user-liars", connections=count, seed=11)
