"""Rows about exports: every server in turn, in short slices, by the same client."""

from __future__ import annotations

import ctypes.util
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.rows import IMAGES, Work, goal, nbdkit_goal, scaling_goal, works
from bench.servers import Server
from qmpd.units import KiB, MiB

CONNECTIONS = (1, 4)


@dataclass(slots=True)
class Series:
    """What one server reached on one row: speeds (requests or bytes a second), and processor time for them."""

    speeds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Seconds of processor time for a second's worth of speed, slice by slice."""


@dataclass(slots=True)
class Row:
    """One row: name, unit, and the series of each server; slices with one index were measured together."""

    image: str
    name: str
    unit: str
    goal: float | None
    nbdkit_goal: float | None = None
    scaling: list[float] = field(default_factory=list)
    scaling_goal: float | None = None
    series: dict[str, Series] = field(default_factory=dict)

    def ratio(self, server: str = "qsd") -> float | None:
        """Return the median of the ratios of qmpd to `server`, pair by pair."""
        if server not in self.series:
            return None
        pairs = zip(self.series["qmpd"].speeds, self.series[server].speeds, strict=True)
        return median(ours / theirs for ours, theirs in pairs)

    def saving(self) -> float | None:
        """Return how many times the work qmpd does with a second of processor time, beside QSD."""
        ours, theirs = sum(self.series["qmpd"].processor), sum(self.series["qsd"].processor)
        return theirs / ours if ours and theirs else None

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "image": self.image,
            "row": self.name,
            "unit": self.unit,
            "goal": self.goal,
            "ratio": self.ratio(),
            "nbdkit_goal": self.nbdkit_goal,
            "nbdkit_ratio": self.ratio("nbdkit"),
            "processor_ratio": self.saving(),
            "four_to_one": median(self.scaling) if self.scaling else None,
            "four_to_one_goal": self.scaling_goal,
            "speeds": {server: series.speeds for server, series in self.series.items()},
        }


def build_client(folder: Path) -> Path:
    """Compile the client and return its path. It links to the library itself, not to its headers."""
    library = ctypes.util.find_library("nbd")
    if library is None:
        raise SystemExit("libnbd is not installed")
    target = folder / "client"
    source = Path(__file__).with_name("client.c")
    words = ["cc", "-O2", "-Wall", "-Wextra", "-o", target, source, f"-l:{library}", "-lpthread"]
    subprocess.run([str(word) for word in words], check=True)
    return target


def sums(client: Path, servers: Sequence[Server], image: str) -> set[str]:
    """Return what the servers' exports of one image add up to: one value, if they serve the same."""
    found = set()
    for server in servers:
        if image in server.sockets:
            done = subprocess.run([client, server.uri(image), "sum"], check=True, capture_output=True, text=True)
            found.add(done.stdout)
    return found


def _slice(row: Row, server: Server, measure: Callable[[str], float]) -> float:
    series = row.series.setdefault(server.name, Series())
    before = server.processor_seconds()
    began = time.monotonic()
    speed = measure(server.uri(row.image))
    took = time.monotonic() - began
    series.speeds.append(speed)
    series.processor.append((server.processor_seconds() - before) / (speed * took))
    return speed


def _measured(client: Path, work: Work, connections: int, seconds: float) -> Callable[[str], float]:
    def measure(uri: str) -> float:
        words = [client, uri, work.operation, work.size, work.depth, connections, seconds]
        done = subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
        total, took, requests = done.stdout.split()
        return int(requests if work.random else total) / float(took)

    return measure


def by_client(
    client: Path, servers: Sequence[Server], pattern: re.Pattern[str], rounds: int, seconds: float
) -> Iterator[Row]:
    """Measure every row of the table whose name matches, one and four connections side by side."""
    for image in IMAGES:
        present = [server for server in servers if image in server.sockets]
        for work in works():
            rows = []
            for connections in CONNECTIONS:
                name = f"{work.name}, {connections} connection{'s' if connections > 1 else ''}"
                row = Row(image, name, "requests/s" if work.random else "bytes/s", goal(image, work))
                if image == "luks1":
                    row.nbdkit_goal = nbdkit_goal(image, work)
                rows.append(row)
            if not pattern.search(f"{image} {rows[0].name}") and not pattern.search(f"{image} {rows[1].name}"):
                continue
            rows[1].scaling_goal = scaling_goal(image, work)
            for turn in range(rounds):
                ours = []
                for row, connections in zip(rows, CONNECTIONS, strict=True):
                    measure = _measured(client, work, connections, seconds)
                    for server in present if turn % 2 else present[::-1]:
                        speed = _slice(row, server, measure)
                        if server.name == "qmpd":
                            ours.append(speed)
                rows[1].scaling.append(ours[1] / ours[0])
            yield from rows


def _copy(source: Path | None, *, size: int) -> Callable[[str], float]:
    def measure(uri: str) -> float:
        began = time.monotonic()
        words = ["nbdcopy", str(source), uri] if source else ["nbdcopy", uri, "null:"]
        subprocess.run(words, check=True)
        return size / (time.monotonic() - began)

    return measure


def _fio(mode: str, block: int, depth: int, seconds: float) -> Callable[[str], float]:
    def measure(uri: str) -> float:
        words = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", f"--bs={block}"]
        words += [f"--iodepth={depth}", "--time_based", f"--runtime={max(1, round(seconds))}", "--output-format=json"]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        return float(job["read"]["iops"] + job["write"]["iops"])

    return measure


def by_tools(
    folder: Path, servers: Sequence[Server], pattern: re.Pattern[str], rounds: int, seconds: float
) -> Iterator[Row]:
    """Measure with nbdcopy (its defaults: four connections) and fio's nbd engine (one)."""
    size = (folder / "raw.img").stat().st_size
    for image in IMAGES:
        present = [server for server in servers if image in server.sockets]
        read, write = Work("read", 256 * KiB, 64), Work("write", 256 * KiB, 64)
        small = {mode: Work(mode, 4 * KiB, 32) for mode in ("randread", "randwrite")}
        kinds: list[tuple[str, str, float | None, Callable[[str], float]]] = [
            ("nbdcopy of the whole disk", "bytes/s", goal(image, read), _copy(None, size=size)),
            ("nbdcopy onto the whole disk", "bytes/s", goal(image, write), _copy(folder / "raw.img", size=size)),
        ]
        for mode, work in small.items():
            kinds.append((f"fio {work.name}", "requests/s", goal(image, work), _fio(mode, 4 * KiB, 32, seconds)))
        kinds.append(("fio read 1 MiB QD8", "bytes/s", goal(image, read), _scaled(_fio("read", MiB, 8, seconds), MiB)))
        for name, unit, wanted, measure in kinds:
            if not pattern.search(f"{image} {name}"):
                continue
            row = Row(image, name, unit, wanted)
            for turn in range(rounds):
                for server in present if turn % 2 else present[::-1]:
                    _slice(row, server, measure)
            yield row


def _scaled(measure: Callable[[str], float], factor: int) -> Callable[[str], float]:
    return lambda uri: measure(uri) * factor
