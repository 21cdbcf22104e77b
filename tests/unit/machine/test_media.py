"""Trays and media: the order of checks, events, and what is released. Answers are QEMU's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import QmpdError
from qmpd.machine import media
from tests.unit.machine.bench import MIB, Bench


@pytest.fixture
async def bench() -> Bench:
    """A machine with an empty CD drive `cd`, a disk `hd` and a virtio disk `v`."""
    bench = Bench()
    await bench.add("virtio-scsi-pci", id="s")
    await bench.add("scsi-cd", id="cd")
    await bench.add("scsi-hd", id="hd", drive=await bench.node())
    await bench.add("virtio-blk-pci", id="v", drive=await bench.node())
    return bench


def trays(bench: Bench) -> list[bool]:
    return [data["tray-open"] for name, data in bench.events if name == "DEVICE_TRAY_MOVED" and data]


async def change(bench: Bench, id_: str, filename: str, image_format: str | None = None, mode: str = "retain") -> None:
    await media.change_medium(
        bench.machine, None, id_, filename, image_format=image_format, mode=mode, slow=nullcontext
    )


async def test_a_tray_moves_once(bench: Bench) -> None:
    for _ in range(2):
        media.open_tray(bench.machine, None, "cd")
    for _ in range(2):
        media.close_tray(bench.machine, None, "cd")
    event = {"device": "", "id": "cd", "tray-open": True}
    assert bench.events == [("DEVICE_TRAY_MOVED", event), ("DEVICE_TRAY_MOVED", event | {"tray-open": False})]


@pytest.mark.parametrize(
    ("device", "id_", "error"),
    [
        (None, None, "Need exactly one of 'device' and 'id'"),
        ("cd", "cd", "Need exactly one of 'device' and 'id'"),
        ("cd", None, "Device 'cd' not found"),
        ("", None, "Device '' not found"),
        (None, "nosuch", "Device 'nosuch' not found"),
        (None, "", " is not a device"),
        (None, "v", "Device does not have a block device backend"),
        (None, "hd", "Device 'hd' is not removable"),
        (
            None,
            "/machine/peripheral/v/virtio-backend",
            "Device '/machine/peripheral/v/virtio-backend' is not removable",
        ),
    ],
)
async def test_drives_without_a_tray(bench: Bench, device: str | None, id_: str | None, error: str) -> None:
    for move in (media.open_tray, media.close_tray):
        with pytest.raises(QmpdError) as caught:
            move(bench.machine, device, id_)
        assert str(caught.value) == error
    with pytest.raises(QmpdError) as caught:
        await media.eject(bench.machine, device, id_)
    assert str(caught.value) == error


async def test_inserting_checks_node_then_tray_then_slot(bench: Bench) -> None:
    node = await bench.node()

    def refusal(id_: str, name: str) -> str:
        with pytest.raises(QmpdError) as caught:
            media.insert_medium(bench.machine, id_, name)
        return str(caught.value)

    assert refusal("cd", "nosuch") == "Node 'nosuch' not found"
    assert refusal("hd", node) == "Device is not removable"
    assert refusal("cd", node) == "Tray of the device is not open"
    media.open_tray(bench.machine, None, "cd")
    assert refusal("cd", "n0") == "Node 'n0' is already in use"
    media.insert_medium(bench.machine, "cd", node)
    assert refusal("cd", await bench.node()) == "There already is a medium in the device"


async def test_a_medium_is_taken_out_of_an_open_tray_only(bench: Bench) -> None:
    node = await bench.node()
    media.open_tray(bench.machine, None, "cd")
    media.insert_medium(bench.machine, "cd", node)
    media.close_tray(bench.machine, None, "cd")
    with pytest.raises(QmpdError, match="Tray of device 'cd' is not open"):
        await media.remove_medium(bench.machine, None, "cd")
    with pytest.raises(QmpdError, match=f"Node {node} is in use"):
        await bench.graph.blockdev_del(node)
    await media.eject(bench.machine, None, "cd")
    await media.eject(bench.machine, None, "cd")
    assert trays(bench) == [True, False, True]
    await bench.graph.blockdev_del(node)


async def test_changing_a_medium_opens_first_and_closes_what_it_opened(bench: Bench, tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    image.write_bytes(bytes(MIB))
    nodes = len(bench.graph.nodes())
    with pytest.raises(QmpdError, match="No such file or directory"):
        await change(bench, "cd", str(tmp_path / "nosuch"))
    with pytest.raises(QmpdError, match="Unknown driver 'nosuch'"):
        await change(bench, "cd", str(image), "nosuch")
    assert (trays(bench), len(bench.graph.nodes())) == ([], nodes)
    for image_format in (None, "raw", "file"):
        await change(bench, "cd", str(image), image_format)
    assert trays(bench) == [True, False] * 3
    await media.eject(bench.machine, None, "cd")
    assert len(bench.graph.nodes()) == nodes


async def test_a_refused_change_closes_the_image(bench: Bench, tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    image.write_bytes(bytes(MIB))
    nodes = len(bench.graph.nodes())
    with pytest.raises(QmpdError, match="Device 'hd' is not removable"):
        await change(bench, "hd", str(image), "raw")
    assert len(bench.graph.nodes()) == nodes


@pytest.mark.parametrize(
    ("modes", "read_only"),
    [(["retain"], True), (["read-write", "retain"], False), (["read-write", "read-only", "retain"], True)],
)
async def test_read_only_is_kept_from_the_last_medium(
    bench: Bench, tmp_path: Path, modes: list[str], read_only: bool
) -> None:
    image = tmp_path / "a.iso"
    image.write_bytes(bytes(MIB))
    for mode in modes:
        await change(bench, "cd", str(image), "raw", mode)
    node: Any = bench.machine.block_devices()[0].backend.node
    assert node.read_only is read_only


async def test_a_reset_shuts_trays_silently(bench: Bench) -> None:
    media.open_tray(bench.machine, None, "cd")
    await bench.machine.system_reset()
    assert trays(bench) == [True]
    assert bench.machine.block_devices()[0].query_block_row()["tray_open"] is False


async def test_a_node_is_free_when_the_drive_that_was_made_empty_is_gone(bench: Bench) -> None:
    """QEMU keeps such a node in use for good; we do not (docs/differences.md)."""
    node = await bench.node()
    media.open_tray(bench.machine, None, "cd")
    media.insert_medium(bench.machine, "cd", node)
    await bench.remove("cd")
    await bench.graph.blockdev_del(node)
