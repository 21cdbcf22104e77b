"""Events to everybody, rates, and clients that do not read."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from qmpd.events import Event
from qmpd.monitor import outbox
from qmpd.monitor.outbox import RateLimiter
from tests.unit.monitor.rig import JumpingClock, Rig


async def test_events_of_a_handler_precede_its_reply_and_reach_everybody(rig: Rig) -> None:
    one, two, fresh = await rig.client(), await rig.client(), await rig.client(negotiate=False)
    await one.send({"execute": "emit", "arguments": {"text": "x"}, "id": 1})
    event = await one.receive()
    assert list(event) == ["timestamp", "event", "data"]
    assert list(event["timestamp"]) == ["seconds", "microseconds"]
    assert (event["event"], event["data"]) == ("TEXT", {"text": "x"})
    assert await one.receive() == {"return": {}, "id": 1}
    assert await two.receive() == event
    assert await fresh.silent()


async def test_events_from_other_threads_arrive(rig: Rig) -> None:
    client = await rig.client()
    await asyncio.to_thread(rig.events.emit, "TEXT", text="thread")
    assert (await client.receive())["data"] == {"text": "thread"}


async def test_an_event_that_the_schema_lacks_is_not_sent(rig: Rig) -> None:
    client = await rig.client()
    rig.events.emit("SHUTDOWN", guest=False)
    assert await client.silent()


def io_error(path: str, count: int) -> Event:
    return Event("BLOCK_IO_ERROR", {"qom-path": path, "count": count}, 0.0)


def test_rate_limited_events_are_one_per_second_and_the_newest_counts() -> None:
    clock, sent = JumpingClock(), list[tuple[str, int]]()
    limiter = RateLimiter(lambda event: sent.append((event.data["qom-path"], event.data["count"])), clock)  # type: ignore[index]
    for count in range(5):
        limiter(io_error("a", count))
        limiter(io_error("b", count))
    assert sent == [("a", 0), ("b", 0)]
    clock.jump(1.0)
    assert sent[2:] == [("a", 4), ("b", 4)]
    limiter(io_error("a", 5))
    clock.jump(0.5)
    assert len(sent) == 4
    clock.jump(0.5)
    assert sent[4:] == [("a", 5)]
    clock.jump(5)
    limiter(io_error("a", 6))
    assert sent[5:] == [("a", 6)]
    limiter.close()


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SOFT_LIMIT", 1 << 20)
    monkeypatch.setattr(outbox, "HARD_LIMIT", 4 << 20)


async def test_a_slow_reader_keeps_its_replies_but_its_commands_wait(rig: Rig, small_limits: None) -> None:
    slow, quick = await rig.client(), await rig.client()
    text = "y" * 100_000
    requests = [{"execute": "echo", "arguments": {"text": text}, "id": number} for number in range(25)]
    sending = asyncio.ensure_future(slow.send(*requests))
    for _ in range(100):
        await asyncio.sleep(0.001)
        assert await quick.command("echo", text="x") == {"return": "x"}
    done = sum(line.startswith("echo y") for line in rig.log)
    assert 10 <= done < 25, "its commands should have stopped at the soft limit"
    for count in range(50):  # far below the rate in time: only the slow client's are merged
        rig.events.emit("BLOCK_IO_ERROR", qom_path=f"p{count % 2}", count=count)
        rig.clock.jump(1.0)
        if count % 100 == 0:
            await asyncio.sleep(0)
    received = [await slow.receive() for _ in range(25 + 2)]
    await sending
    assert [one["id"] for one in received if "return" in one] == list(range(25))
    assert [one["data"]["count"] for one in received if "event" in one] == [48, 49]


async def test_a_reader_beyond_the_hard_limit_is_closed(
    rig: Rig, small_limits: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="qmpd")
    slow, quick = await rig.client(), await rig.client()
    for _ in range(60):
        rig.events.emit("TEXT", text="z" * 100_000)
        await quick.receive()
    assert slow.session.gone
    assert "does not read" in caplog.text
    assert await quick.command("echo", text="x") == {"return": "x"}


async def test_a_reader_without_progress_is_closed_after_a_minute(rig: Rig, small_limits: None) -> None:
    slow = await rig.client()
    for _ in range(20):
        rig.events.emit("TEXT", text="z" * 100_000)
    rig.clock.jump(59)
    assert not slow.session.gone
    assert json.loads(await slow.line())["event"] == "TEXT"
    await asyncio.sleep(0.01)
    rig.clock.jump(59)
    assert not slow.session.gone, "it did read something a minute ago"
    rig.clock.jump(2)
    assert slow.session.gone
