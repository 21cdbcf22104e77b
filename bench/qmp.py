"""QMP commands per second: pipelined, and one at a time, against qemu-storage-daemon in the same run.

    python bench/qmp.py [COUNT]

Prints wall clock and processor time of the daemon; the ratio of processor times is the steadier one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

COMMANDS = {
    "query-version": b'{"execute": "query-version", "id": "libvirt-123"}\r\n',
    "query-named-block-nodes": b'{"execute": "query-named-block-nodes", "arguments": {"flat": true}, "id": 5}\n',
}
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """Return user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(program: str, command: bytes, count: int) -> tuple[float, float, float]:
    """Return commands per second by wall clock and by processor time, and seconds per single command."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/qmp.sock"
        words = [program, "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "c"]
        with subprocess.Popen(words) as process, socket.socket(socket.AF_UNIX) as client:
            while client.connect_ex(path):
                time.sleep(0.01)
            client.recv(4096)
            client.sendall(b'{"execute": "qmp_capabilities"}')
            client.recv(4096)
            used, began = processor_seconds(process.pid), time.perf_counter()
            threading.Thread(target=client.sendall, args=(command * count,)).start()
            replies = 0
            while replies < count:
                replies += client.recv(1 << 20).count(b"\r\n")
            wall, used = time.perf_counter() - began, processor_seconds(process.pid) - used
            began = time.perf_counter()
            for _ in range(1000):
                client.sendall(command)
                client.recv(1 << 16)
            single = (time.perf_counter() - began) / 1000
            process.terminate()
    return count / wall, count / max(used, 1 / TICKS), single


def main() -> None:
    """Print one line per program and command."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    for name, command in COMMANDS.items():
        for program in ("qemu-storage-daemon", str(Path(sys.executable).with_name("qmpd-storage-daemon"))):
            wall, processor, single = measure(program, command, count)
            print(
                f"{name:24} {Path(program).name:20} {wall:9.0f}/s by the clock {processor:9.0f}/s of processor time"
                f" {single * 1e6:7.0f} us alone"
            )


if __name__ == "__main__":
    main()
