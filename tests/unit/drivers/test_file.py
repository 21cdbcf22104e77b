"""The file driver: what it takes for a file, and how it says no."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.graph import Graph
from qmpd.errors import CommandError
from qmpd.events import EventBus
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree


@pytest.fixture
def graph() -> Graph:
    discover(("drivers",))
    return Graph(ObjectTree(), EventBus())


@pytest.mark.parametrize(
    ("driver", "options", "text"),
    [
        ("file", {}, "Could not open '{path}': Is a directory"),
        ("file", {"read-only": True}, "'file' driver requires '{path}' to be a regular file"),
        (
            "host_device",
            {"read-only": True},
            "'host_device' driver requires '{path}' to be either a character or block device",
        ),
    ],
)
async def test_a_directory_is_no_image(
    graph: Graph, tmp_path: Path, driver: str, options: dict[str, Any], text: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CommandError) as caught:
        await graph.blockdev_add({"driver": driver, "node-name": "n", "filename": str(tmp_path), **options})
    assert str(caught.value) == text.format(path=tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("options", [{}, {"read-only": True}])
async def test_a_pipe_without_a_partner_is_refused_at_once(
    graph: Graph, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Opening a pipe for reading waits for a writer: a client's command would never have been answered."""
    os.mkfifo(tmp_path / "pipe")
    async with asyncio.timeout(5):
        with pytest.raises(CommandError, match=r"to be a regular file$"):
            await graph.blockdev_add(
                {"driver": "file", "node-name": "n", "filename": str(tmp_path / "pipe"), **options}
            )
