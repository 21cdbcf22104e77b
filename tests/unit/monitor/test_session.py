"""One client's conversation: order of checks, negotiation, the echo of its ids."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from typing import Any

import pytest

from tests.unit.monitor.rig import Rig

EXPECTING = "Expecting capabilities negotiation with 'qmp_capabilities'"


def error(text: str, name: str = "GenericError", **rest: Any) -> dict[str, Any]:
    return {"error": {"class": name, "desc": text}, **rest}


async def test_replies_have_the_bytes_of_the_reference(rig: Rig) -> None:
    client = await rig.client()
    await client.send(b'{"execute":"echo","arguments":{"text":"\xc3\xa9"},"id":{"b":[1.50,null]}}')
    assert await client.line() == b'{"return": "\\u00E9", "id": {"b": [1.5, null]}}\r\n'
    await client.send(b'{"execute":"nope","id":1}')
    assert await client.line() == (
        b'{"id": 1, "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}\r\n'
    )
    await client.send(b"nope\n")
    assert await client.line() == (
        b'{"error": {"class": "GenericError", "desc": "JSON parse error, invalid keyword \'nope\'"}}\r\n'
    )


async def test_before_negotiation_the_shape_is_checked_first(rig: Rig) -> None:
    client = await rig.client(negotiate=False)
    for request, answer in [
        ({"execute": "echo"}, error(EXPECTING, "CommandNotFound")),
        ({"execute": "nope"}, error(EXPECTING, "CommandNotFound")),
        ({"exec-oob": "release"}, error("QMP input member 'exec-oob' is unexpected")),
        ({"execute": 1}, error("QMP input member 'execute' must be a string")),
        (
            {"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}},
            error("Parameter 'null' does not accept value 'x'"),
        ),
        ({"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "oob"]}}, {"return": {}}),
        (
            {"execute": "qmp_capabilities"},
            error("Capabilities negotiation is already complete, command ignored", "CommandNotFound"),
        ),
    ]:
        await client.send(request)
        assert await client.receive() == answer


SHAPES: list[tuple[Any, str]] = [
    ([], "QMP input must be a JSON object"),
    (5, "QMP input must be a JSON object"),
    ({}, "QMP input lacks member 'execute'"),
    ({"arguments": {}}, "QMP input lacks member 'execute'"),
    ({"event": "X"}, "QMP input member 'event' is unexpected"),
    ({"execute": "echo", "bogus": 1}, "QMP input member 'bogus' is unexpected"),
    ({"execute": "echo", "arguments": None}, "QMP input member 'arguments' must be an object"),
    ({"execute": ["echo"]}, "QMP input member 'execute' must be a string"),
    # With several faults the reference's hash table decides which one is named.
    ({"zz": 1, "yy": 2, "execute": 5}, "QMP input member 'execute' must be a string"),
]


@pytest.mark.parametrize(("request_", "text"), SHAPES, ids=[text for _, text in SHAPES])
async def test_the_shape_of_requests(rig: Rig, request_: Any, text: str) -> None:
    client = await rig.client()
    await client.send(request_, b"\n")
    assert await client.receive() == error(text)
    if isinstance(request_, dict):
        await client.send({**request_, "id": [1]})
        assert await client.receive() == error(text, id=[1])


async def test_execute_and_exec_oob_clash_once_oob_is_enabled(rig: Rig) -> None:
    client = await (await rig.client(negotiate=False)).negotiate("oob")
    await client.send({"execute": "echo", "exec-oob": "release", "id": 4})
    assert await client.receive() == error("QMP input member 'execute' clashes with 'exec-oob'", id=4)
    await client.send({"exec-oob": "echo", "arguments": {"text": "x"}})
    assert await client.receive() == error("The command echo does not support OOB")
    await client.send({"exec-oob": "nope"})
    assert await client.receive() == error("The command nope has not been found", "CommandNotFound")


async def test_a_defect_costs_one_reply_and_is_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    client = await rig.client()
    await client.send({"execute": "crash", "id": 1})
    assert await client.receive() == error("internal error, see log", id=1)
    assert "ZeroDivisionError" in caplog.text
    assert "'crash'" in caplog.text
    assert rig.bugs == ["crash: a defect"]
    assert await client.command("echo", text="alive") == {"return": "alive"}


async def test_many_requests_in_one_write_are_answered_in_order(rig: Rig) -> None:
    client = await rig.client()
    await client.send(*({"execute": "echo", "arguments": {"text": "x"}, "id": number} for number in range(3000)))
    assert [(await client.receive())["id"] for _ in range(3000)] == list(range(3000))


async def test_requests_beyond_the_queue_wait_in_the_socket(rig: Rig) -> None:
    client = await rig.client()
    await client.send({"execute": "wait", "arguments": {"for": "gate"}})
    await client.send(*[b'{"execute":"echo","arguments":{"text":"x"}}\n'] * 1000)
    assert await client.silent()
    assert len(client.session.requests) < 2000
    rig.gate("gate").set()
    for _ in range(1001):
        await client.receive()


async def test_descriptors_come_along_and_are_closed_when_nobody_takes_them(rig: Rig) -> None:
    client = await rig.client()
    readers = []
    for _ in range(20):
        reader, writer = os.pipe()
        readers.append(reader)
        client._sock.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))])
        os.close(writer)
        assert await client.command("echo", text="x") == {"return": "x"}
    assert os.read(readers[0], 1) == b""  # the oldest were let go of
    taken = client.session.take_fd()
    assert taken is not None
    assert not os.get_inheritable(taken)
    os.close(taken)
    client.close()
    await asyncio.sleep(0.05)
    for reader in readers:
        assert os.read(reader, 1) == b""
        os.close(reader)
