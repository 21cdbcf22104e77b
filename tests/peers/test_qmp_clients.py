"""The clients that people use: qmp-shell and qmp-tui of qemu.qmp, virsh's way of sending, several at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support.daemon import Daemon, program, running

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])|[\x0e\x0f]")

END_OF_LINE, DOWN, META_ENTER = "\x05", "\x1b[B", "\x1b\r"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path) as daemon:
        yield daemon


def test_qmp_shell(daemon: Daemon) -> None:
    """It negotiates, runs commands with typed arguments, prints errors, and shows events on an empty line."""
    typed = [
        "query-status",
        "blockdev-add driver=null-co node-name=n0 size=1048576 read-only=true",
        "blockdev-add driver=null-co node-name=n1 size=x",
        "cont",
        "",
        "query-name",
    ]
    done = subprocess.run(
        [program("qmp-shell"), "-v", str(daemon.socket)],
        input="".join(f"{line}\n" for line in typed),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Connected to QEMU 10.0.2" in done.stdout
    assert "'status': 'prelaunch'" in done.stdout.replace('"', "'")
    assert "Invalid parameter type for 'size', expected: integer" in done.stdout
    assert "RESUME" in done.stdout
    nodes = daemon.client().ok("query-named-block-nodes")
    assert [(node["node-name"], node["ro"], node["image"]["virtual-size"]) for node in nodes] == [("n0", True, 1 << 20)]


class Terminal:
    """A program on a terminal of 200 by 60 characters, and everything it has shown."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self._shown = ""

    def wait_for(self, text: str, seconds: float = 30) -> None:
        """Read until the text has been shown since the last call.

        qmp-tui draws what came from the server when a key is pressed, so one without effect is.
        """
        deadline = time.monotonic() + seconds
        while text not in self._shown:
            assert time.monotonic() < deadline, f"{text!r} is not shown:\n{self._shown[-3000:]}"
            if select.select([self._master], [], [], 0.3)[0]:
                data = os.read(self._master, 1 << 16).decode(errors="replace")
                self._shown += ESCAPES.sub("", data)
            else:
                self.type(END_OF_LINE)
        self._shown = self._shown.partition(text)[2]

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def close(self) -> None:
        """End the program."""
        self.process.terminate()
        self.process.wait(20)
        os.close(self._master)


def test_qmp_tui(daemon: Daemon) -> None:
    """On a terminal: it connects, sends what is typed, shows the reply and the events."""
    need("module:urwid", "module:urwid_readline", "module:pygments")
    with contextlib.closing(Terminal(program("qmp-tui"), str(daemon.socket))) as terminal:
        terminal.wait_for("[Connected")
        # The history has the focus at first; its end is passed with the arrow key.
        terminal.type(DOWN * 60)
        terminal.type('{"execute": "query-version"}')
        terminal.wait_for("query-version")
        terminal.type(META_ENTER)
        terminal.wait_for('"major"')
        terminal.type('{"execute": "cont"}')
        terminal.type(META_ENTER)
        terminal.wait_for("RESUME")


def test_four_clients_each_get_every_event(daemon: Daemon) -> None:
    clients = [daemon.client() for _ in range(4)]
    shy = daemon.client(negotiate=False)
    for client in clients:
        assert client.greeting["QMP"]["capabilities"] == ["oob"]
    assert clients[0].ok("cont") == {}
    assert clients[3].ok("stop") == {}
    assert clients[1].ok("cont") == {}
    for client in clients:
        seen = [client.wait_event(name) for name in ("RESUME", "STOP", "RESUME")]
        stamps = [(event["timestamp"]["seconds"], event["timestamp"]["microseconds"]) for event in seen]
        assert stamps == sorted(stamps)
        assert client.silent(0.1)
        assert not client.events
    assert shy.silent(0.1)
    assert shy.command("query-status")["error"]["class"] == "CommandNotFound"
    # What each client is told of the events is the same to the microsecond.
    assert shy.ok("qmp_capabilities") == {}


def test_a_client_that_leaves_disturbs_nobody(daemon: Daemon) -> None:
    staying, leaving = daemon.client(), daemon.client()
    leaving.ok("object-add", qom_type="secret", id="s0", data="x")
    leaving.close()
    assert staying.ok("qom-get", path="/objects/s0", property="type") == "secret"
    assert daemon.client().ok("query-status")["status"] == "prelaunch"


def test_commands_as_libvirt_sends_them(daemon: Daemon) -> None:
    """libvirt numbers its commands and reads replies by that number."""
    client = daemon.client(negotiate=False)
    for number, command in enumerate(("qmp_capabilities", "query-chardev", "query-block", "query-commands"), 1):
        reply = client.send({"execute": command, "id": f"libvirt-{number}"})
        assert reply["id"] == f"libvirt-{number}"
        assert "return" in reply


def test_monitor_command_prints_what_virsh_prints(daemon: Daemon) -> None:
    done = subprocess.run(
        [program("qmpd-ctl"), "monitor-command", "--socket", str(daemon.socket), '{"execute":"query-status","id":"a"}'],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == {"return": {"status": "prelaunch", "running": False}, "id": "a"}
