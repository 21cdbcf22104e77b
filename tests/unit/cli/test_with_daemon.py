"""qmpd-ctl against a running qmpd."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd.cli.client import connected, default_socket
from qmpd.cli.main import ctl_main
from qmpd.errors import CommandError
from tests.support.daemon import Daemon, program, running

STEPS = """\
1. Add a secret:

    virsh qemu-monitor-command vm '{"execute":"object-add","arguments":{"qom-type":"secret","id":"sec-a","data":"x"}}'

2. Add a node:

    virsh qemu-monitor-command vm '{"execute":"blockdev-add","arguments":
        {"driver":"file","node-name":"disk-a","filename":"/path/to/disk"}}'

3. Name it wrongly:

    virsh qemu-monitor-command vm '{"execute":"blockdev-add","arguments":
        {"driver":"raw","node-name":"raw-a","file":"disk-b"}}'
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(tmp_path) as daemon:
        yield daemon


def ctl(daemon: Daemon, command: str, *args: str) -> tuple[int, str]:
    done = subprocess.run(
        [program("qmpd-ctl"), command, "--socket", str(daemon.socket), *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    path = tmp_path / "steps.txt"
    path.write_text(STEPS)
    (tmp_path / "disk").write_bytes(bytes(4096))
    return path


def test_replay_shows_failures_and_goes_on(daemon: Daemon, steps: Path) -> None:
    status, text = ctl(daemon, "replay", str(steps))
    assert status == 1
    assert "Could not open '/path/to/disk': No such file or directory" in text
    assert text.endswith("3 steps, 0 corrected, 2 failed\n")
    assert '"data": "***"' in text


def test_replay_with_placeholders_set_and_slips_corrected(daemon: Daemon, steps: Path) -> None:
    status, text = ctl(daemon, "replay", str(steps), "--set", f"/path/to={steps.parent}", "--fix")
    assert (status, text.splitlines()[-1]) == (0, "3 steps, 1 corrected, 0 failed"), text
    assert "No node 'disk-b' was ever added; the one that was is 'disk-a'." in text
    names = [node["node-name"] for node in daemon.client().ok("query-named-block-nodes")]
    assert names == ["raw-a", "disk-a"]


def test_fix_says_what_only_the_user_can_know(daemon: Daemon, steps: Path) -> None:
    status, text = ctl(daemon, "replay", str(steps), "--fix")
    assert status == 1
    assert "--set OLD=NEW maps a placeholder to a real path" in text


def test_graph_of_a_live_daemon(daemon: Daemon) -> None:
    assert ctl(daemon, "graph") == (0, "no nodes\n")
    client = daemon.client()
    client.ok("blockdev-add", driver="null-co", node_name="n")
    client.ok("blockdev-add", driver="raw", node_name="r", file="n", read_only=True)
    status, text = ctl(daemon, "graph")
    assert status == 0
    assert text.splitlines()[:2] == ["r [raw] read-only", "└─ file: n [null-co]"]


def test_events(daemon: Daemon) -> None:
    follower = subprocess.Popen(
        [program("qmpd-ctl"), "events", "--socket", str(daemon.socket), "--count", "2", "STOP", "RES*"],
        stdout=subprocess.PIPE,
        text=True,
    )
    client = daemon.client()
    assert follower.stdout is not None
    # The follower has no sign of being ready, so events are made until it has seen enough.
    while follower.poll() is None:
        client.ok("cont")
        client.ok("stop")
    lines = [json.loads(line) for line in follower.stdout.read().splitlines()]
    follower.stdout.close()
    assert len(lines) == 2
    assert {line["event"] for line in lines} <= {"STOP", "RESUME"}


def test_events_end_with_the_server(daemon: Daemon) -> None:
    async def follow() -> list[str]:
        names = []
        async with connected(daemon.socket) as client:
            await client.execute("quit")
            while (event := await client.next_event()) is not None:
                names.append(event["event"])
        return names

    assert asyncio.run(follow()) == ["SHUTDOWN"]


def test_error_reply_is_printed_and_gives_status_1(daemon: Daemon) -> None:
    status, text = ctl(daemon, "monitor-command", '{"execute":"nope","id":7}')
    assert status == 1
    reply = json.loads(text)
    assert reply == {
        "id": 7,
        "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"},
    }


def test_execute_raises_with_the_servers_text(daemon: Daemon) -> None:
    async def ask() -> None:
        async with connected(daemon.socket) as client:
            await client.execute("blockdev-del", node_name="none")

    with pytest.raises(CommandError, match="Failed to find node with node-name='none'"):
        asyncio.run(ask())


def test_default_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_socket() == Path("/run/user/1000/qmpd/qmp.sock")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_socket() == Path("/run/qmpd/qmp.sock")


def test_document_of_nothing(daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    assert ctl_main(["replay", "--socket", str(daemon.socket), str(empty)]) == 1
    assert capsys.readouterr().err == "qmpd-ctl: the text holds no QMP command\n"
