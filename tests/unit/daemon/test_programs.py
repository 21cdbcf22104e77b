"""The two programs as processes: start, clients, background, end."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import CommandError
from tests.support.daemon import RawClient, program, running

CORPUS = Path(__file__).resolve().parents[2] / "conformance" / "corpus"
SLOT_0_ITERATIONS = 212
"""Byte offset of the PBKDF2 iterations of key slot 0 in a LUKS1 header."""

SYSTEM = ["-nodefaults", "-S", "-display", "none"]


def run(name: str, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(name), *args], capture_output=True, text=True, timeout=60, check=False, **more)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["qmpd", "qmpd-storage-daemon"])
def test_four_clients_each_get_every_event(tmp_path: Path, name: str) -> None:
    event = "BLOCK_JOB_NOTHING" if name != "qmpd" else "RESUME"
    with running(tmp_path, name=name) as daemon:
        clients = [daemon.client() for _ in range(4)]
        if name == "qmpd":
            clients[1].ok("cont")
            for client in clients:
                assert client.wait_event(event)["event"] == event
        path = tmp_path / "raw.img"
        path.write_bytes(bytes(1 << 20))
        clients[0].ok("blockdev-add", driver="file", node_name="f", filename=str(path))
        options = {"driver": "qcow2", "file": "f", "size": 1 << 20}
        clients[0].ok("blockdev-create", job_id="j", options=options)
        for client in clients:
            states = []
            while not states or states[-1] != "concluded":
                states.append(client.wait_event("JOB_STATUS_CHANGE")["data"]["status"])
            assert states[:2] == ["created", "running"]


def test_sockets_are_closed_to_others_and_removed_at_the_end(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
        (row,) = daemon.client().ok("query-chardev")
        assert row == {
            "label": "compat_monitor0",
            "filename": f"unix:{daemon.socket},server=on",
            "frontend-open": True,
        }
    assert not daemon.socket.exists()


def test_quit_sends_shutdown_before_its_reply_and_the_status_is_0(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        client = daemon.client()
        assert client.send({"execute": "quit", "id": "bye"}) == {"return": {}, "id": "bye"}
        assert client.events[0]["event"] == "SHUTDOWN"
        assert client.events[0]["data"] == {"guest": False, "reason": "host-qmp-quit"}
        with pytest.raises(EOFError):
            client.receive()
        assert daemon.process.wait(20) == 0


def test_sigterm_is_told_to_clients(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        client = daemon.client()
        daemon.process.send_signal(signal.SIGTERM)
        assert client.wait_event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-signal"}
        assert daemon.process.wait(20) == 0


def test_the_storage_daemon_says_nothing_at_its_end(tmp_path: Path) -> None:
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(EOFError):
            client.receive()
        assert daemon.process.wait(20) == 0


def test_daemonize_returns_when_the_socket_listens_and_the_pid_file_is_there(tmp_path: Path) -> None:
    """As libvirt's probe run: standard streams are pipes that must be let go of."""
    monitor, pid_file = tmp_path / "qmp.monitor", tmp_path / "qmp.pid"
    arguments = ["-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=kvm:tcg"]
    arguments += ["-qmp", f"unix:{monitor},server=on,wait=off", "-pidfile", str(pid_file), "-daemonize"]
    done = run("qmpd", *arguments, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pid_file.read_text())
    try:
        assert os.getsid(pid) != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        client = RawClient(monitor)
        assert client.ok("query-version")["qemu"] == {"major": 10, "minor": 0, "micro": 2}
        client.close()
        busy = run("qmpd", *SYSTEM, "-qmp", f"unix:{tmp_path}/b,server=on,wait=off", "-pidfile", str(pid_file))
        assert busy.returncode == 1
        assert "cannot create PID file" in busy.stderr
    finally:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while monitor.exists() or pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_failed_start_in_the_background_is_told(tmp_path: Path) -> None:
    done = run("qmpd", *SYSTEM, "-daemonize", "-qmp", f"unix:{tmp_path}/no/x,server=on,wait=off")
    assert done.returncode == 1
    assert done.stderr.endswith(f"Failed to bind socket to {tmp_path}/no/x: No such file or directory\n")


@contextmanager
def started(*words: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([program("qmpd"), *words], stdin=subprocess.DEVNULL, **more)
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_a_listening_socket_can_be_passed_in(tmp_path: Path) -> None:
    """As libvirt's domain run; clients may come and go."""
    path = tmp_path / "monitor.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        words = [*SYSTEM, "-chardev", f"socket,id=charmonitor,fd={fd},server=on,wait=off"]
        words += ["-mon", "chardev=charmonitor,id=monitor,mode=control"]
        with started(*words, pass_fds=(fd,)):
            for _ in range(2):
                client = RawClient(path)
                assert client.ok("query-chardev")[0]["label"] == "charmonitor"
                client.close()
    assert path.exists(), "the socket is not ours to remove"


def test_socket_activation_and_notification(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        listener.bind(str(path))
        listener.listen()
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        fd = listener.fileno()
        launcher = f"exec 3<&{fd}; LISTEN_PID=$$ LISTEN_FDS=1 exec {program('qmpd')} -nodefaults -S"
        environment = dict(os.environ, NOTIFY_SOCKET=str(tmp_path / "notify"))
        with subprocess.Popen(["bash", "-c", launcher], pass_fds=(fd,), env=environment) as process:
            assert manager.recv(1000).startswith(b"READY=1\n")
            client = RawClient(path)
            assert client.ok("query-status")["status"] == "prelaunch"
            process.terminate()
            assert manager.recv(1000) == b"STOPPING=1"
            client.close()
            assert process.wait(20) == 0


def test_without_a_monitor_named_it_listens_in_the_runtime_directory(tmp_path: Path) -> None:
    path = tmp_path / "qmpd" / "qmp.sock"
    with started(*SYSTEM, env=dict(os.environ, XDG_RUNTIME_DIR=str(tmp_path))):
        wait_for(path)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        client = RawClient(path)
        second = run("qmpd", *SYSTEM, env=dict(os.environ, XDG_RUNTIME_DIR=str(tmp_path)))
        assert second.returncode == 1
        assert "another daemon" in second.stderr
        assert client.ok("query-status")["running"] is False
        client.close()


def test_a_foreign_runtime_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qmpd.daemon.listen import default_path

    (tmp_path / "qmpd").mkdir()
    (tmp_path / "qmpd").chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(CommandError, match="not a directory that only this user can write to"):
        default_path()


def test_objects_then_nodes_then_devices_whatever_the_order_of_words(tmp_path: Path) -> None:
    words = ["-device", "virtio-blk-pci,drive=n,id=d", "-blockdev", '{"driver":"null-co","node-name":"n"}']
    words += ["--object", "secret,id=s,data=x", "-name", "guest=vm,debug-threads=on", "-m", "size=65536k", "-smp", "2"]
    with running(tmp_path, *words, "-uuid", "6b2e9b0a-4c1d-4f7b-9a53-0d1f6f2f8c11") as daemon:
        client = daemon.client()
        assert [row["qdev"] for row in client.ok("query-block")] == ["/machine/peripheral/d/virtio-backend"]
        assert client.ok("query-name") == {"name": "vm"}
        assert client.ok("query-uuid") == {"UUID": "6b2e9b0a-4c1d-4f7b-9a53-0d1f6f2f8c11"}


def test_the_storage_daemon_keeps_the_order_of_words() -> None:
    words = ["--blockdev", "raw,node-name=r,file=n", "--blockdev", "null-co,node-name=n"]
    done = run("qmpd-storage-daemon", *words)
    assert done.returncode == 1
    assert done.stderr == (
        "qmpd-storage-daemon: --blockdev raw,node-name=r,file=n: Cannot find device='n' nor node-name='n'\n"
    )


TEXTS = [
    (["-blockdev", "null-co"], "-blockdev null-co: 'node-name' must be specified for the root node"),
    (["-object", "secret,id=a"], "Either 'file' or 'data' must be provided"),
    (["-device", "nosuch"], "-device nosuch: 'nosuch' is not a valid device model name"),
    (["-device", '{"driver":"nosuch"}'], '-device {"driver":"nosuch"}: \'nosuch\' is not a valid device model name'),
    (["-mon", "chardev=foo,mode=control"], '-mon chardev=foo,mode=control: chardev "foo" not found'),
    (
        ["-mon", "chardev=foo,mode=bar"],
        "-mon chardev=foo,mode=bar: Parameter 'mode' does not accept value 'bar'",
    ),
    (["-uuid", "foo"], "-uuid foo: failed to parse UUID string: wrong format"),
    (["-name", "x,bogus=1"], "-name x,bogus=1: Invalid parameter 'bogus'"),
    (["-msg", "timestamp=maybe"], "-msg timestamp=maybe: Parameter 'timestamp' expects 'on' or 'off'"),
    (["-blockdev", '{"driver":'], '-blockdev {"driver":: JSON parse error, premature EOI'),
    (["-D", "/nodir/p"], "Error opening logfile /nodir/p: No such file or directory"),
    (["-chardev", "socket,id=c"], "-chardev socket,id=c: Unable to parse FD number "),
    (["-accel", "nosuch"], "-accel nosuch: invalid accelerator nosuch"),
    (["-smp", "foo"], "Parameter 'smp.cpus' expects integer"),
    (["-m", "foo=1"], "-m foo=1: Invalid parameter 'foo'"),
]


@pytest.mark.parametrize(("words", "text"), TEXTS, ids=[" ".join(words) for words, _ in TEXTS])
def test_texts_of_the_system_emulator(words: list[str], text: str) -> None:
    done = run("qmpd", *SYSTEM, *words)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"qmpd: {text}")


def test_help_and_version() -> None:
    for name, dashes in (("qmpd", "-"), ("qmpd-storage-daemon", "--")):
        done = run(name, f"{dashes}version")
        assert done.returncode == 0
        assert "10.0.2" in done.stdout
        done = run(name, f"{dashes}help")
        assert done.returncode == 0
        assert f"{dashes}blockdev" in done.stdout
    assert "secret\n" in run("qmpd-storage-daemon", "--object", "help").stdout
    assert run("qmpd-storage-daemon", "--object", "secret,help").stdout == (
        "secret options:\n  data=<string>\n  file=<string>\n  format=<QCryptoSecretFormat>\n"
        "  iv=<string>\n  keyid=<string>\n"
    )


def test_secrets_of_the_command_line_are_not_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run("qmpd", *SYSTEM, "-D", str(log), "-T", "*", "-object", "secret,id=1a,data=hunter2")
    assert done.returncode == 1
    assert "-object secret,id=1a,data=hunter2: Parameter 'id' expects an identifier\n" in done.stderr
    assert "hunter2" not in log.read_text()
    with running(tmp_path, "-D", str(log), "-T", "*", "-object", "secret,id=a,data=hunter2") as daemon:
        client = daemon.client()
        client.ok("object-add", qom_type="secret", id="b", data="hunter2")
        client.command("object-add", qom_type="secret", id="b", data="hunter2")
        client.command("qom-set", path="/objects/b", property="data", value="hunter2")
    assert "object-add" in log.read_text()
    assert "hunter2" not in log.read_text()
    assert "hunter2" not in daemon.log


def test_no_core_dumps_and_no_looking_in(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
        (row,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert row.split()[4:6] == ["0", "0"]


def test_a_command_of_two_seconds_leaves_others_their_answers(tmp_path: Path) -> None:
    """query-status of a second client answers within 50 ms, 99 times of 100, while a key is derived."""
    image = tmp_path / "slow.luks"
    data = bytearray(gzip.decompress((CORPUS / "images" / "luks1-whole.gz").read_bytes()))
    began = time.process_time()
    hashlib.pbkdf2_hmac("sha256", b"x", bytes(32), 100_000, 64)
    cost = int(100_000 * 2.0 / (time.process_time() - began))
    struct.pack_into(">I", data, SLOT_0_ITERATIONS, cost)  # the derived key is wrong then, and takes as long
    image.write_bytes(data)
    with running(tmp_path, "-object", "secret,id=s,data=correct") as daemon:
        slow, other = daemon.client(), daemon.client()
        node = {"driver": "luks", "node-name": "l", "key-secret": "s"}
        node["file"] = {"driver": "file", "filename": str(image)}  # type: ignore[assignment]
        slow._socket.sendall(json.dumps({"execute": "blockdev-add", "arguments": node}).encode())
        began = time.monotonic()
        late: list[float] = []
        count = 0
        while slow.silent(0.0):
            asked = time.monotonic()
            other.ok("query-status")
            count += 1
            if (took := time.monotonic() - asked) > 0.05:
                late.append(took)
            time.sleep(0.005)
        assert slow.receive()["error"]["desc"] == "Invalid password, cannot unlock any keyslot"
        assert time.monotonic() - began > 0.5
        assert count >= 50
        assert len(late) <= count / 100, f"{len(late)} of {count} answers were late: {late}"
