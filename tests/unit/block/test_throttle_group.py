"""Throttling: the limits hold over any stretch of time, bursts end, and a drain lets everything go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, Request
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.block.throttle_group import ThrottleState
from qmpd.block.throttle_limits import no_limits
from qmpd.events import EventBus
from qmpd.objects.throttle_group import ThrottleGroup, ThrottleGroupOptions
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

KB = 1024


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def limited(clock: Clock, **limits: int) -> ThrottleState:
    state = ThrottleState(clock)
    state.configure(no_limits() | {name.replace("_", "-"): value for name, value in limits.items()})
    return state


@given(st.lists(st.tuples(st.booleans(), st.integers(512, 64 * KB)), min_size=50, max_size=200))
@settings(max_examples=50, deadline=None)
def test_no_more_bytes_pass_than_the_rate_and_a_tenth_of_a_second_allow(todo: list[tuple[bool, int]]) -> None:
    clock, rate = Clock(), 256 * KB
    state = limited(clock, bps_total=rate)
    passed = 0
    for writing, length in todo:
        while not state.may_pass(writing, length):
            clock.now += state.delay(writing) + 1e-9
        passed += length
        assert passed <= rate * (clock.now + 0.1) + 64 * KB + 1


def test_reads_do_not_wait_for_a_limit_on_writes() -> None:
    state = limited(Clock(), iops_write=1)
    assert state.may_pass(True, 512)
    assert not state.may_pass(True, 512)
    assert all(state.may_pass(False, 512) for _ in range(100))


def test_a_burst_lasts_as_long_as_it_may_and_then_the_rate_holds() -> None:
    clock = Clock()
    state = limited(clock, iops_total=10, iops_total_max=100, iops_total_max_length=5)
    passed = 0
    while clock.now < 20:
        if state.may_pass(False, 512):
            passed += 1
        else:
            clock.now += state.delay(False) + 1e-9
    assert 500 <= passed <= 720, "5 s at 100 a second, then 10 a second"


def test_a_large_request_counts_as_several_when_the_group_says_so() -> None:
    state = limited(Clock(), iops_total=100, iops_size=4 * KB)
    assert state.may_pass(False, 64 * KB)
    assert state.delay(False) == pytest.approx(0.06)


@pytest.fixture
async def throttled() -> Any:
    discover(("drivers", "objects"))
    graph = Graph(ObjectTree(), EventBus())
    limits = {"iops-total": 5}
    group = ThrottleGroup(ThrottleGroupOptions(limits=limits))
    graph.objects.add("g", group)
    tree = {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": {"driver": "null-co"}}
    await graph.blockdev_add(tree)
    user = BlockBackend(graph, lambda: "an unnamed block device", Perm.CONSISTENT_READ, Perm.ALL)
    user.insert(graph.find_node("t"))
    yield graph, user, group
    await graph.close_all()
    assert not group.in_use()


async def test_a_drain_lets_waiting_requests_go_at_once(throttled: Any) -> None:
    graph, user, _ = throttled
    batch = Batch(Request(i * 512, memoryview(bytearray(b"?" * 512))) for i in range(100))
    reading = asyncio.ensure_future(user.preadv(batch))
    await asyncio.sleep(0.05)
    assert not reading.done(), "100 requests take 20 seconds at 5 a second"
    async with asyncio.timeout(2), graph.drained(graph.find_node("t")):
        assert user.in_flight == 0
    await reading
    assert all(bytes(request.view) == bytes(512) for request in batch)


async def test_a_request_that_waits_goes_on_when_the_limits_are_lifted(throttled: Any) -> None:
    _, user, group = throttled
    batch = Batch(Request(i * 512, memoryview(bytearray(512))) for i in range(100))
    reading = asyncio.ensure_future(user.preadv(batch))
    await asyncio.sleep(0.05)
    group.change({"iops-total": 0})
    async with asyncio.timeout(2):
        await reading


async def test_new_limits_hold_for_members_that_are_there_already(throttled: Any) -> None:
    _, user, group = throttled
    group.change({"iops-total": 0})
    async with asyncio.timeout(2):
        for i in range(50):
            await user.pread(i * 512, 512)
