"""The texts that tests/unit/qapi expects, asked of the real storage daemon."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qmpd.qapi.hashorder import first_left
from tests.support.daemon import RawClient
from tests.support.peers import need
from tests.support.reference import SOCKET, STORAGE_DAEMON, reference
from tests.unit.qapi.texts import NOT_NEGOTIATED, OPTIONS, REFUSED

SEED = 20260801


Ask = Callable[[str, dict[str, Any]], str | None]


@pytest.fixture(name="ask")
def _ask(tmp_path: Path) -> Iterator[Ask]:
    """Ask a storage daemon of QEMU's; gives the text of the error, None if there is none."""
    need(STORAGE_DAEMON)
    with reference(tmp_path) as ready:
        ready.close()
        with closing(RawClient(tmp_path / SOCKET, negotiate=False)) as client:

            def ask(command: str, arguments: dict[str, Any]) -> str | None:
                reply = client.send({"execute": command, "arguments": arguments})
                return reply["error"]["desc"] if "error" in reply else None

            yield ask


def test_every_refusal_is_the_references(ask: Ask) -> None:
    wrong = []
    for command, arguments, text in [*NOT_NEGOTIATED, ("qmp_capabilities", {}, None), *REFUSED]:
        if (said := ask(command, arguments)) != text:
            wrong.append((command, arguments, said, text))
    assert wrong == []


def test_of_several_unexpected_members_the_same_one_is_named(ask: Ask) -> None:
    assert ask("qmp_capabilities", {}) is None
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
            assert ask(command, arguments) == f"Parameter '{expected}' is unexpected", list(arguments)


def keyval(value: Any, prefix: str = "") -> str:
    """Return a tree as key=value text."""
    if isinstance(value, str):
        return f"{prefix}={value.replace(',', ',,')}"
    items = enumerate(value) if isinstance(value, list) else value.items()
    return ",".join(keyval(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in items)


@pytest.mark.parametrize(("option", "tree", "text"), OPTIONS, ids=lambda value: str(value)[:60])
def test_every_refused_option_is_the_references(option: str, tree: dict[str, Any], text: str | None) -> None:
    need(STORAGE_DAEMON)
    # a chardev that cannot be made ends the program when the options before it were accepted
    run = subprocess.run(
        [STORAGE_DAEMON, option, keyval(tree), "--chardev", "socket,id=c,path=/nonexistent/s,server=on,wait=off"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert run.returncode == 1
    said = run.stderr.rpartition("\n")[0].rpartition("\n")[2]
    expected = text or "Failed to bind socket to /nonexistent/s: No such file or directory"
    assert said.endswith(f": {expected}"), run.stderr
