"""iothread: a real thread, and QEMU 10.0.2's checks of its numbers."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from qmpd.errors import CommandError, QmpdError
from qmpd.objects.iothread import IoThread, IothreadOptions
from qmpd.qom.protocols import DataThread
from qmpd.qom.tree import ObjectTree

BAD_POOL = "bad thread-pool-min/thread-pool-max values"
NUMBERS = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max")


def out_of_range(name: str) -> str:
    return f"{name} value must be in range [0, 9223372036854775807]"


async def test_its_thread_id_is_that_of_a_thread_of_this_process_which_runs_work() -> None:
    tree = ObjectTree()
    tree.add("io0", IoThread(IothreadOptions(poll_grow=2)))
    thread = tree.resolve("io0")
    assert isinstance(thread, DataThread)
    assert thread.wire_info() == {
        "id": "io0",
        "thread-id": thread.wire_info()["thread-id"],
        "poll-max-ns": 32768,
        "poll-grow": 2,
        "poll-shrink": 0,
        "aio-max-batch": 0,
    }
    own = Path(f"/proc/self/task/{thread.wire_info()['thread-id']}")
    assert own.exists()

    async def where() -> int:
        return threading.get_native_id()

    assert await thread.data_loop.run(where()) == thread.wire_info()["thread-id"] != threading.get_native_id()
    tree.remove("io0")
    deadline = time.monotonic() + 5
    while own.exists() and time.monotonic() < deadline:  # the kernel is a moment behind the join
        await asyncio.sleep(0.005)
    assert not own.exists()


@pytest.mark.parametrize("name", NUMBERS)
def test_negative_numbers_are_refused_before_the_name_is_looked_at(name: str) -> None:
    tree = ObjectTree()
    tree.add("io0", IoThread(IothreadOptions()))
    with pytest.raises(CommandError) as caught:
        tree.add("io0", IoThread(IothreadOptions(**{name.replace("-", "_"): -1})))
    assert str(caught.value) == out_of_range(name)
    tree.close()


@pytest.mark.parametrize(
    ("least", "most", "fine"),
    [
        (0, 64, True),
        (64, 64, True),
        (0, (1 << 31) - 1, True),
        (5, 2, False),
        (65, 64, False),
        (0, 0, False),
        (0, 1 << 31, False),
    ],
)
def test_sizes_of_the_thread_pool(least: int, most: int, fine: bool) -> None:
    tree = ObjectTree()
    thread = IoThread(IothreadOptions(thread_pool_min=least, thread_pool_max=most))
    if fine:
        tree.add("io", thread)
    else:
        with pytest.raises(CommandError, match=f"^{BAD_POOL}$"):
            tree.add("io", thread)
        assert tree.get("io") is None
    tree.close()


def test_numbers_can_be_set_later_and_a_refused_one_changes_nothing() -> None:
    tree = ObjectTree()
    tree.add("io", IoThread(IothreadOptions()))
    thread = tree.resolve("io")
    for name in NUMBERS:
        with pytest.raises(CommandError) as caught:
            thread.set_property(name, -1)
        assert str(caught.value) == out_of_range(name)
        for value in ("x", 1.5, 3.0, True, 1 << 63):
            with pytest.raises(QmpdError) as wrong:
                thread.set_property(name, value)
            assert str(wrong.value) == f"Invalid parameter type for '{name}', expected: integer"
    thread.set_property("poll-max-ns", (1 << 63) - 1)
    assert thread.get_property("poll-max-ns") == (1 << 63) - 1
    for name, value in (("thread-pool-max", 0), ("thread-pool-min", 65)):
        with pytest.raises(CommandError, match=f"^{BAD_POOL}$"):
            thread.set_property(name, value)
    assert [thread.get_property(f"thread-pool-{which}") for which in ("min", "max")] == [0, 64]
    tree.close()


def test_properties_are_listed_with_their_types() -> None:
    thread = IoThread(IothreadOptions())
    assert {one.name: one.type for one in thread.properties().values()} == {
        "type": "string",
        **dict.fromkeys(NUMBERS, "int"),
    }
