"""Starts qmpd's own programs for tests, and talks to them with nothing but a socket."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
REPLY_SECONDS = 30.0


def program(name: str) -> str:
    """Return the path of one of the project's programs in the environment that runs the tests."""
    path = Path(sys.executable).with_name(name)
    assert path.exists(), f"{path} is missing: install the project first (make does it)"
    return str(path)


class RawClient:
    """A QMP client as plain as can be: lines of JSON, replies and events told apart by their members."""

    def __init__(self, path: Path, *, negotiate: bool = True, handshake_seconds: float = REPLY_SECONDS) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(handshake_seconds)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        with contextlib.ExitStack() as unless_greeted:
            unless_greeted.callback(self._socket.close)
            self._socket.connect(str(path))
            self.greeting = self.receive()
            if negotiate:
                assert self.command("qmp_capabilities") == {"return": {}}
            unless_greeted.pop_all()
        self._socket.settimeout(REPLY_SECONDS)

    def receive(self) -> dict[str, Any]:
        """Return the next message; raises EOFError at the end of the stream, TimeoutError after long silence."""
        while b"\n" not in self._buffer:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("the daemon closed the connection")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Send a command (`_` in argument names stands for `-`) and return its reply."""
        return self.send({"execute": name, "arguments": {key.replace("_", "-"): arguments[key] for key in arguments}})

    def send(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return its reply; events that come first are kept in `events`."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            reply = self.receive()
            if "event" not in reply:
                return reply
            self.events.append(reply)

    def ok(self, name: str, **arguments: Any) -> Any:
        """Send a command that must succeed and return what it returned."""
        reply = self.command(name, **arguments)
        assert "return" in reply, reply
        return reply["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """Return the first event of that name, seen already or still to come."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            message = self.receive()
            assert "event" in message, message
            self.events.append(message)

    def silent(self, seconds: float) -> bool:
        """Say whether nothing arrives for so long."""
        return not self._buffer and not select.select([self._socket], [], [], seconds)[0]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class Daemon:
    """One running daemon."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
        self.process, self.socket, self._log = process, path, log
        self._clients: list[RawClient] = []

    @property
    def log(self) -> str:
        """What the daemon has written so far."""
        return self._log.read_text(errors="replace")

    def client(self, *, negotiate: bool = True) -> RawClient:
        """Connect; the connection is closed with the daemon."""
        client = RawClient(self.socket, negotiate=negotiate)
        self._clients.append(client)
        return client

    def stop(self) -> int:
        """End the daemon as an administrator would and return its exit status."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def listens(path: Path) -> bool:
    """Say whether connections are taken at the path; the one made to find out is closed at once."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        return probe.connect_ex(str(path)) == 0


def unguarded(folder: Path, *args: str, name: str = "qmpd") -> tuple[subprocess.Popen[bytes], RawClient]:
    """Start a daemon that the test is going to kill; return it and a client of its monitor."""
    path = folder / "qmp.sock"
    path.unlink(missing_ok=True)
    command = [program(name), *monitor_options(path, system=name == "qmpd"), *args]
    with (folder / "daemon.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + START_SECONDS
    while not listens(path):
        assert process.poll() is None, (folder / "daemon.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process, RawClient(path)


def monitor_options(path: Path, *, system: bool) -> list[str]:
    """Return the options for a monitor on a socket: of a system emulator, QEMU's or ours, or of a storage daemon."""
    if system:
        return ["-machine", "pc", "-nodefaults", "-S", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    return ["--chardev", f"socket,id=qmp0,path={path},server=on,wait=off", "--monitor", "chardev=qmp0"]


@contextlib.contextmanager
def running(folder: Path, *args: str, name: str = "qmpd", start: Sequence[str] = ()) -> Iterator[Daemon]:
    """Run `qmpd` (or `qmpd-storage-daemon`) with a monitor in `folder`, and `args` besides.

    start   the words that run the program, where it is not the installed one

    It must end by itself when told to, with status 0 and without having met an error of its own.
    """
    path, log = folder / "qmp.sock", folder / "daemon.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*(start or [program(name)]), *monitor_options(path, system=name == "qmpd"), *args],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    daemon = Daemon(process, path, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        named = [word.partition("addr.path=")[2].partition(",")[0] for word in args]
        for one in (path, *map(Path, filter(None, named))):  # other sockets come after that of the monitor
            while not listens(one):
                assert process.poll() is None, f"the daemon ended before it listened:\n{daemon.log}"
                assert time.monotonic() < deadline, f"the daemon does not listen at {one}"
                time.sleep(0.02)
        yield daemon
    finally:
        status = daemon.stop()
    assert status in (0, -15), f"status {status}\n{daemon.log}"
    assert "Traceback" not in daemon.log, daemon.log
    assert "internal error" not in daemon.log, daemon.log
