"""What starts QEMU's daemons for other tests: one that takes a client and then says nothing is started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import reference
from tests.support.peers import find, need

HANGS_ONCE = """#!/bin/sh
[ -e {mark} ] && exec {real} "$@"
touch {mark}
exec {python} -c '
import socket, time
listener = socket.socket(socket.AF_UNIX)
listener.bind("{socket}")
listener.listen()
client, _ = listener.accept()
client.sendall(b"{{}}\\n")
time.sleep(60)
'
"""


def test_a_daemon_that_greets_and_hangs_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(reference.STORAGE_DAEMON, "python3")
    folder, mark = tmp_path / "d", tmp_path / "started"
    script = tmp_path / reference.STORAGE_DAEMON
    names = {"mark": mark, "real": find(script.name), "socket": folder / reference.SOCKET, "python": find("python3")}
    script.write_text(HANGS_ONCE.format(**names))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(reference, "HANDSHAKE_SECONDS", 0.5)
    with reference.reference(folder) as monitor:
        assert mark.exists()
        assert monitor.ok("query-version")["qemu"]["major"] >= 10
