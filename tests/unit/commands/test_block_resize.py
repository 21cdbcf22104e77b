"""block_resize: the image gets its size, and who looks at it through a window sees that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.daemon import running


def test_a_raw_node_follows_the_file_below_it(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(65536))
    with running(tmp_path) as daemon:
        client = daemon.client()
        client.ok("blockdev-add", driver="file", node_name="f", filename=str(tmp_path / "a.img"))
        client.ok("blockdev-add", driver="raw", node_name="r", file="f")
        client.ok("block_resize", node_name="f", size=1 << 20)
        sizes = {
            row["node-name"]: row["image"]["virtual-size"] for row in client.ok("query-named-block-nodes", flat=True)
        }
    assert sizes == {"f": 1 << 20, "r": 1 << 20}
    assert (tmp_path / "a.img").stat().st_size == 1 << 20


def test_a_disk_in_use_can_be_resized_while_it_is_plugged(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(65536))
    with running(tmp_path) as daemon:
        client = daemon.client()
        client.ok("blockdev-add", driver="file", node_name="f", filename=str(tmp_path / "a.img"))
        client.ok("device_add", driver="virtio-blk-pci", drive="f", id="d")
        client.ok("block_resize", node_name="f", size=1 << 20)
        (row,) = client.ok("query-block")
    assert row["inserted"]["image"]["virtual-size"] == 1 << 20


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (-1, "Parameter 'size' expects a >0 size"),
        (1 << 64, "Invalid parameter type for 'size', expected: integer"),
        (4096, "Image format driver does not support resize"),
    ],
)
def test_what_cannot_be_a_size_is_refused(tmp_path: Path, size: int, text: str) -> None:
    with running(tmp_path) as daemon:
        client = daemon.client()
        client.ok("blockdev-add", driver="null-co", node_name="n")
        reply = client.command("block_resize", node_name="n", size=size)
    assert reply["error"]["desc"] == text
