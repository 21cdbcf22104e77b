"""Rows about the monitor: commands one at a time and in a row, nodes by the thousand, start-up, memory."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.images import run
from bench.servers import PASSPHRASE, Server, cached_environment, program
from qmpd.units import GiB, MiB

QUERY = b'{"execute": "query-version", "id": "libvirt-123"}\r\n'
NODES = (10, 1_000, 10_000)
ADDED = 100
"""Nodes added at a time where the cost of adding is measured."""

DISKS = 1_000
SINGLES = 300
PIPELINED = 1_000
START_SECONDS = 30.0


@dataclass(slots=True)
class Figure:
    """One row: what both programs needed (better says which way), and the ratio that is aimed at.

    better   "more" for rates, "less" for times and sizes; the ratio is above 1 where qmpd is better
    limit    an absolute goal for qmpd instead of a ratio, in `unit`
    """

    name: str
    unit: str
    better: str
    peer: str
    goal: float | None = None
    limit: float | None = None
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def ratio(self) -> float | None:
        """Return the median of the ratios, pair by pair."""
        if not self.theirs:
            return None
        both = zip(self.ours, self.theirs, strict=True)
        return median(a / b if self.better == "more" else b / a for a, b in both)

    def met(self) -> bool | None:
        """Say whether the goal is reached, None without one."""
        if self.limit is not None:
            value = median(self.ours)
            return value <= self.limit if self.better == "less" else value >= self.limit
        ratio = self.ratio()
        return None if self.goal is None or ratio is None else ratio >= self.goal

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "row": self.name,
            "unit": self.unit,
            "better": self.better,
            "peer": self.peer,
            "goal": self.goal,
            "limit": self.limit,
            "ratio": self.ratio(),
            "ours": self.ours,
            "theirs": self.theirs,
        }


class Monitor:
    """A daemon and one connection to its monitor."""

    def __init__(self, words: list[str], path: Path) -> None:
        path.unlink(missing_ok=True)
        began = time.monotonic()
        self.process = subprocess.Popen(words, env=cached_environment())
        self._socket = socket.socket(socket.AF_UNIX)
        self._rest = b""
        while self._socket.connect_ex(str(path)):
            if self.process.poll() is not None or time.monotonic() > began + START_SECONDS:
                raise SystemExit(f"{words[0]} does not listen")
            time.sleep(0.001)
        self.receive()
        self.started = time.monotonic() - began
        self.command("qmp_capabilities")

    def receive(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\n" not in self._rest:
            data = self._socket.recv(1 << 20)
            if not data:
                raise SystemExit("the daemon hung up")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a command that must succeed."""
        message = {"execute": name, "arguments": {key.replace("_", "-"): arguments[key] for key in arguments}}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while "event" in (reply := self.receive()):
            pass
        if "return" not in reply:
            raise SystemExit(f"{self.process.args!r}: {name}: {reply}")
        return reply["return"]

    def singly(self, command: bytes, count: int) -> float:
        """Return how many times a second one command and its reply can go to and fro."""
        began = time.perf_counter()
        for _ in range(count):
            self._socket.sendall(command)
            while not self._socket.recv(1 << 20).endswith(b"\n"):
                pass
        return count / (time.perf_counter() - began)

    def in_a_row(self, commands: bytes, count: int) -> float:
        """Return commands per second when all are sent without waiting for replies; none may fail."""
        began = time.perf_counter()
        sender = threading.Thread(target=self._socket.sendall, args=(commands,))
        sender.start()
        replies, tail = 0, b""
        while replies < count:
            data = tail + self._socket.recv(1 << 20)
            if b'"error"' in data:
                raise SystemExit(f"{self.process.args!r}: a command failed: {data[:500]!r}")
            whole, newline, tail = data.rpartition(b"\n")
            replies += (whole + newline).count(b'"return"')
        took = time.perf_counter() - began
        sender.join()
        return count / took

    def close(self) -> None:
        """End the daemon."""
        self._socket.close()
        self.process.terminate()
        self.process.wait()


def storage(kind: str, folder: Path, *more: str) -> Monitor:
    """Start a storage daemon, "qsd" or "qmpd"."""
    path = folder / f"{kind}.qmp"
    name = "qemu-storage-daemon" if kind == "qsd" else program("qmpd-storage-daemon")
    return Monitor([name, "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "c", *more], path)


def machine(kind: str, folder: Path) -> Monitor:
    """Start the program with a machine, "qemu" or "qmpd"."""
    path = folder / f"{kind}.qmp"
    words = ["-nodefaults", "-S", "-qmp", f"unix:{path},server=on,wait=off"]
    if kind == "qemu":
        return Monitor(["qemu-system-x86_64", *words, "-display", "none", "-accel", "tcg"], path)
    return Monitor([program("qmpd"), *words], path)


@contextlib.contextmanager
def both(make: Callable[[str, Path], Monitor], peer: str, folder: Path) -> Iterator[tuple[Monitor, Monitor]]:
    """Run qmpd and its peer until the block ends; ours is the first."""
    ours = make("qmpd", folder)
    try:
        theirs = make(peer, folder)
        try:
            yield ours, theirs
        finally:
            theirs.close()
    finally:
        ours.close()


def _alternate(figure: Figure, rounds: int, measure: Callable[[Monitor], float], pair: tuple[Monitor, Monitor]) -> None:
    for turn in range(rounds):
        for monitor in pair if turn % 2 else pair[::-1]:
            (figure.ours if monitor is pair[0] else figure.theirs).append(measure(monitor))


def _adding(first: int, count: int) -> bytes:
    text = '{{"execute": "blockdev-add", "arguments": {{"driver": "null-co", "node-name": "n{}", "size": 65536}}}}\n'
    return "".join(text.format(number) for number in range(first, first + count)).encode()


def _deleting(first: int, count: int) -> bytes:
    text = '{{"execute": "blockdev-del", "arguments": {{"node-name": "n{}"}}}}\n'
    return "".join(text.format(number) for number in range(first, first + count)).encode()


def commands(folder: Path, rounds: int) -> Iterator[Figure]:
    """Measure plain commands and blockdev-add beside QSD."""
    with both(storage, "qsd", folder) as pair:
        single = Figure("query-version, one at a time", "commands/s", "more", "qsd", goal=1.5)
        _alternate(single, rounds, lambda monitor: monitor.singly(QUERY, SINGLES), pair)
        yield single
        row = Figure("query-version, pipelined", "commands/s", "more", "qsd", goal=3.0)
        _alternate(row, rounds, lambda monitor: monitor.in_a_row(QUERY * PIPELINED, PIPELINED), pair)
        yield row
        there = 0
        costs = []
        for nodes in NODES:
            for monitor in pair:
                monitor.in_a_row(_adding(there, nodes - there), nodes - there)
            there = nodes
            goal = 3.0 if nodes == NODES[-1] else None
            row = Figure(f"blockdev-add with {nodes:,} nodes there, pipelined", "commands/s", "more", "qsd", goal=goal)

            def add(monitor: Monitor, first: int = nodes) -> float:
                rate = monitor.in_a_row(_adding(first, ADDED), ADDED)
                monitor.in_a_row(_deleting(first, ADDED), ADDED)
                return rate

            _alternate(row, rounds, add, pair)
            costs.append(row)
            yield row
        flat = Figure("cost of blockdev-add at 10,000 nodes beside that at 10", "times", "less", "qsd", limit=1.25)
        for name in ("ours", "theirs"):
            few, many = (getattr(figure, name) for figure in (costs[0], costs[-1]))
            getattr(flat, name).append(median(few) / median(many))
        yield flat


def disks(folder: Path, rounds: int) -> Iterator[Figure]:
    """Measure query-block with many disks beside qemu-system (QSD has no devices)."""
    with both(machine, "qemu", folder) as pair:
        for monitor in pair:
            monitor.command("device_add", driver="virtio-scsi-pci", id="s")
            for number in range(DISKS):
                monitor.command("blockdev-add", driver="null-co", node_name=f"n{number}", size=65536)
                place = {"bus": "s.0", "scsi-id": number // 4, "lun": number % 4}
                monitor.command("device_add", driver="scsi-hd", id=f"d{number}", drive=f"n{number}", **place)
        row = Figure(f"query-block with {DISKS:,} disks", "commands/s", "more", "qemu-system", goal=1.0)
        _alternate(row, rounds, lambda monitor: monitor.singly(b'{"execute": "query-block"}\n', 3), pair)
        yield row


def start(folder: Path, rounds: int) -> Iterator[Figure]:
    """Measure the time from start to greeting, and memory with the document's disk open."""
    for name, make, peer in (("storage daemon", storage, "qsd"), ("qmpd, qemu-system", machine, "qemu")):
        row = Figure(f"start to greeting, {name}", "s", "less", peer, limit=0.3)
        for turn in range(rounds):
            for kind in ("qmpd", peer) if turn % 2 else (peer, "qmpd"):
                monitor = make(kind, folder)
                (row.ours if kind == "qmpd" else row.theirs).append(monitor.started)
                monitor.close()
        yield row
    row = Figure("resident memory with the detached-header disk open", "MB", "less", "qsd", limit=60.0)
    secret = f"secret,id=s,data={PASSPHRASE}"
    header = ("-o", "key-secret=s,iter-time=10,detached-header=true")
    run(program("qmpd-img"), "create", "-q", "--object", secret, "-f", "luks", *header, folder / "small-header.img")
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "large.qcow2", str(200 * GiB))
    for kind in ("qmpd", "qsd"):
        monitor = storage(kind, folder, "--object", secret)
        for name, file in (("h", "small-header.img"), ("p", "large.qcow2")):
            monitor.command("blockdev-add", driver="file", node_name=name, filename=str(folder / file))
        monitor.command("blockdev-add", driver="raw", node_name="header", file="h", read_only=True)
        monitor.command("blockdev-add", driver="qcow2", node_name="payload", file="p")
        options = {"key_secret": "s", "file": "payload", "header": "header"}
        monitor.command("blockdev-add", driver="luks", node_name="disk", **options)
        resident = Server(kind, monitor.process, {}).resident() / MiB
        (row.ours if kind == "qmpd" else row.theirs).append(resident)
        monitor.close()
    yield row


def figures(folder: Path, pattern: re.Pattern[str], rounds: int) -> Iterator[Figure]:
    """Measure the groups of rows whose name matches: "qmp commands", "qmp disks", "qmp start"."""
    for name, group in (("qmp commands", commands), ("qmp disks", disks), ("qmp start", start)):
        if pattern.search(name):
            yield from group(folder, rounds)
