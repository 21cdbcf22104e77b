"""The texts that tests/unit/qapi expects, asked of the real storage daemon."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.qapi.hashorder import first_left
from tests.support.peers import need
from tests.unit.qapi.texts import NOT_NEGOTIATED, OPTIONS, REFUSED

DAEMON = "qemu-storage-daemon"
SEED = 20260801


class Reference:
    """A connection to a storage daemon of its own."""

    def __init__(self, folder: Path) -> None:
        path = folder / "qmp"
        self.process = subprocess.Popen(
            [DAEMON, "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"]
        )
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline, f"{DAEMON} does not listen"
            time.sleep(0.01)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.stream = self.socket.makefile("rw", encoding="utf-8")
        self.stream.readline()

    def ask(self, command: str, arguments: dict[str, Any]) -> str | None:
        """Return the text of the error, None if there is none."""
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}))
        self.stream.flush()
        reply = json.loads(self.stream.readline())
        return reply["error"]["desc"] if "error" in reply else None

    def close(self) -> None:
        self.stream.close()
        self.socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def reference(tmp_path: Path) -> Iterator[Reference]:
    need(DAEMON)
    made = Reference(tmp_path)
    yield made
    made.close()


def test_every_refusal_is_the_references(reference: Reference) -> None:
    wrong = []
    for command, arguments, text in [*NOT_NEGOTIATED, ("qmp_capabilities", {}, None), *REFUSED]:
        if (said := reference.ask(command, arguments)) != text:
            wrong.append((command, arguments, said, text))
    assert wrong == []


def test_of_several_unexpected_members_the_same_one_is_named(reference: Reference) -> None:
    assert reference.ask("qmp_capabilities", {}) is None
    chance = random.Random(SEED)
    for count in [2] * 60 + [*range(3, 23)] * 4 + [40, 80, 200]:
        names = ["".join(chance.choices("abcdefgh-xyz01é", k=chance.randint(1, 9))) for _ in range(count)]
        sent = dict.fromkeys(names, 1)
        node = {"driver": "null-co", "node-name": "n", **sent}
        for command, arguments, known in (
            ("query-version", sent, []),
            ("blockdev-add", node, ["driver", "node-name"]),
        ):
            expected = first_left(list(arguments), known)
            assert reference.ask(command, arguments) == f"Parameter '{expected}' is unexpected", list(arguments)


def keyval(value: Any, prefix: str = "") -> str:
    """Return a tree as key=value text."""
    if isinstance(value, str):
        return f"{prefix}={value.replace(',', ',,')}"
    items = enumerate(value) if isinstance(value, list) else value.items()
    return ",".join(keyval(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in items)


@pytest.mark.parametrize(("option", "tree", "text"), OPTIONS, ids=lambda value: str(value)[:60])
def test_every_refused_option_is_the_references(option: str, tree: dict[str, Any], text: str | None) -> None:
    need(DAEMON)
    # a chardev that cannot be made ends the program when the options before it were accepted
    run = subprocess.run(
        [DAEMON, option, keyval(tree), "--chardev", "socket,id=c,path=/nonexistent/s,server=on,wait=off"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert run.returncode == 1
    said = run.stderr.rpartition("\n")[0].rpartition("\n")[2]
    expected = text or "Failed to bind socket to /nonexistent/s: No such file or directory"
    assert said.endswith(f": {expected}"), run.stderr
