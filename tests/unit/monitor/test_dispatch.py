"""Turns: whose command runs when."""

from __future__ import annotations

import asyncio
import logging

import pytest

from qmpd import trace
from qmpd.monitor.redact import redacted, redacted_text
from qmpd.qapi.schema import load
from tests.unit.monitor.rig import Rig


async def test_one_handler_has_the_turn(rig: Rig) -> None:
    one, two = await rig.client(), await rig.client()
    await one.send({"execute": "wait", "arguments": {"for": "a"}})
    await asyncio.sleep(0.01)
    await two.send({"execute": "echo", "arguments": {"text": "later"}})
    assert await two.silent()
    rig.gate("a").set()
    assert await two.receive() == {"return": "later"}
    assert rig.log == ["a begins", "a ends", "echo later"]


async def test_out_of_turn_lets_others_run_and_keeps_the_order_of_the_own_client(rig: Rig) -> None:
    one, two = await rig.client(), await rig.client()
    await one.send(
        {"execute": "wait", "arguments": {"for": "a", "out": True}},
        {"execute": "echo", "arguments": {"text": "own"}},
    )
    await asyncio.sleep(0.01)
    assert await two.command("echo", text="other") == {"return": "other"}
    assert rig.log == ["a begins", "echo other"]
    rig.gate("a").set()
    assert await one.receive() == {"return": {}}
    assert await one.receive() == {"return": "own"}
    assert rig.log == ["a begins", "echo other", "a ends", "echo own"]


async def test_the_turn_is_given_back_before_anybody_new_gets_it(rig: Rig) -> None:
    one, two, three = await rig.client(), await rig.client(), await rig.client()
    await one.send({"execute": "wait", "arguments": {"for": "a", "out": True}})
    await asyncio.sleep(0.01)
    await two.send({"execute": "wait", "arguments": {"for": "b"}})
    await asyncio.sleep(0.01)
    await three.send({"execute": "echo", "arguments": {"text": "new"}})
    rig.gate("a").set()
    await asyncio.sleep(0.01)
    assert rig.log == ["a begins", "b begins"]  # two has the turn: a may not end beside it
    rig.gate("b").set()
    assert await three.receive() == {"return": "new"}
    assert rig.log == ["a begins", "b begins", "b ends", "a ends", "echo new"]


async def test_many_out_of_turn_at_once(rig: Rig) -> None:
    clients = [await rig.client() for _ in range(8)]
    for number, client in enumerate(clients):
        await client.send({"execute": "wait", "arguments": {"for": str(number), "out": True}})
    await asyncio.sleep(0.02)
    for number in (3, 1, 7, 0, 2, 6, 5, 4):
        rig.gate(str(number)).set()
        assert await clients[number].receive() == {"return": {}}
    assert rig.log[8:] == [f"{number} ends" for number in (3, 1, 7, 0, 2, 6, 5, 4)]
    assert await clients[0].command("echo", text="x") == {"return": "x"}


async def test_clients_take_turns(rig: Rig) -> None:
    one, two = await rig.client(), await rig.client()
    await one.send({"execute": "wait", "arguments": {"for": "a"}})
    await asyncio.sleep(0.01)
    for client, name in ((one, "one"), (two, "two")):
        await client.send(*({"execute": "echo", "arguments": {"text": f"{name}{number}"}} for number in range(3)))
    await asyncio.sleep(0.01)
    rig.gate("a").set()
    for client in (one, two):
        await client.receive()
    for _ in range(3):
        await two.receive() if not await two.silent() else None
    order = [line.split()[1] for line in rig.log if line.startswith("echo")]
    assert order == ["two0", "one0", "two1", "one1", "two2", "one2"]


async def test_out_of_band_commands_overtake(rig: Rig) -> None:
    client = await (await rig.client(negotiate=False)).negotiate("oob")
    await client.send({"execute": "wait", "arguments": {"for": "a"}, "id": 1})
    await client.send({"exec-oob": "release", "arguments": {"for": "a"}, "id": 2})
    assert await client.receive() == {"return": {}, "id": 2}
    assert await client.receive() == {"return": {}, "id": 1}


async def test_the_command_of_a_client_that_vanished_runs_to_its_end(rig: Rig) -> None:
    one, two = await rig.client(), await rig.client()
    await one.send({"execute": "wait", "arguments": {"for": "a"}}, {"execute": "echo", "arguments": {"text": "never"}})
    await asyncio.sleep(0.01)
    one.close()
    await asyncio.sleep(0.01)
    rig.gate("a").set()
    assert await two.command("echo", text="next") == {"return": "next"}
    assert rig.log == ["a begins", "a ends", "echo next"]


async def test_no_command_begins_after_the_stop(rig: Rig) -> None:
    client = await rig.client()
    await client.send({"execute": "wait", "arguments": {"for": "a"}}, {"execute": "echo", "arguments": {"text": "no"}})
    await asyncio.sleep(0.01)
    stopping = asyncio.ensure_future(rig.dispatcher.stop(5))
    await asyncio.sleep(0.01)
    rig.gate("a").set()
    await stopping
    assert await client.receive() == {"return": {}}
    assert await client.silent()
    assert rig.log == ["a begins", "a ends"]


async def test_the_trace_shows_commands_without_secrets(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    flag = trace.flag("monitor.commands")
    caplog.set_level(logging.INFO, logger="qmpd")
    flag.on = True
    try:
        client = await rig.client()
        await client.command("keep", id="sec0", data="hunter2", any={"x": "hunter2"})
        await client.command("keep", id="sec0", data="hunter2", bogus="hunter2")
        await client.command("echo", text="object_add secret,id=a,data=hunter2,,x,format=raw")
        await client.command("echo", text='object_add {"id": "a", "data": "hunter2", "x": 1}')
    finally:
        flag.on = False
    assert 'keep {"id": "sec0", "data": "<hidden>"' in caplog.text
    assert "hunter2" not in caplog.text
    assert "format=raw" in caplog.text


@pytest.mark.parametrize("root", ["qapi-schema.json", "storage-daemon.json"])
def test_the_secrets_of_the_real_schema_are_hidden(root: str) -> None:
    schema = load(root)
    for arguments in (
        {"qom-type": "secret", "id": "a", "data": "hunter2"},
        {"path": "/objects/a", "property": "data", "value": "hunter2"},
    ):
        assert "hunter2" not in redacted(schema, arguments)
    assert redacted(schema, {"driver": "luks", "key-secret": "sec0"}) == '{"driver": "luks", "key-secret": "sec0"}'


def test_masking_of_command_lines() -> None:
    assert redacted_text("secret,id=a,data=x,,y,format=raw") == "secret,id=a,data=<hidden>,format=raw"
    assert redacted_text("{'data': 'a\\'b', 'id': 'x'}") == "{'data': \"<hidden>\", 'id': 'x'}"
    assert redacted_text("metadata=x") == "metadata=x"
