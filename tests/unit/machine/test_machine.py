"""Plugging, unplugging and run state, on a real graph. Texts and orders are QEMU's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qmpd.block.info import debug_graph
from tests.unit.machine.bench import Bench


async def test_a_drive_in_use_is_refused_by_name_and_nothing_is_left() -> None:
    bench = Bench()
    node = await bench.node()
    assert await bench.add("virtio-blk-pci", id="a", drive=node) == ""
    before = debug_graph(bench.graph), list(bench.machine.peripheral.children)
    assert await bench.add("virtio-blk-pci", id="b", drive=node) == (
        f"Permission conflict on node '{node}': permissions 'write' are both required by block device "
        f"'/machine/peripheral/a/virtio-backend' (uses node '{node}' as 'root' child) and unshared by block device "
        f"'/machine/peripheral/b/virtio-backend' (uses node '{node}' as 'root' child)."
    )
    assert (debug_graph(bench.graph), list(bench.machine.peripheral.children)) == before


async def test_a_device_with_an_id_is_named_by_it_in_conflicts() -> None:
    """Regression: a scsi-hd appeared by its path, where QEMU gives the id."""
    bench = Bench()
    await bench.add("virtio-scsi-pci")
    node = await bench.node()
    await bench.add("scsi-hd", id="h", drive=node)
    assert "unshared by block device 'g'" in await bench.add("scsi-hd", id="g", drive=node)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": 5}, "Parameter 'driver' is missing"),
        ({"driver": "nosuch"}, "'nosuch' is not a valid device model name"),
        ({"driver": "secret"}, "'secret' is not a valid device model name"),
        ({"driver": "virtio-device"}, "Parameter 'driver' expects a non-abstract device type"),
        ({"driver": "i440FX"}, "Parameter 'driver' expects a pluggable device type"),
        ({"driver": "scsi-hd"}, "No 'SCSI' bus found for device 'scsi-hd'"),
        ({"driver": "usb-storage"}, "No 'usb-bus' bus found for device 'usb-storage'"),
        ({"driver": "virtio-blk-device"}, "No 'virtio-bus' bus found for device 'virtio-blk-device'"),
        ({"driver": "ide-hd"}, "Bus 'ide.1' does not support hotplugging"),
        ({"driver": "ide-hd", "bus": "ide.0"}, "Bus 'ide.0' does not support hotplugging"),
        ({"driver": "virtio-blk-pci", "bus": ""}, "Bus '' not found"),
        ({"driver": "virtio-blk-pci", "bus": "ide.0"}, "Device 'virtio-blk-pci' can't go on IDE bus"),
        ({"driver": "virtio-blk-pci", "bus": "isa.0"}, "Device 'virtio-blk-pci' can't go on ISA bus"),
        ({"driver": "virtio-blk-pci", "bus": "main-system-bus"}, "Device 'virtio-blk-pci' can't go on System bus"),
        ({"driver": "virtio-blk-pci", "bus": "pci.0/nosuch"}, "Device 'nosuch' not found"),
        ({"driver": "virtio-blk-pci"}, "drive property not set"),
        ({"driver": "virtio-blk-pci", "drive": ""}, "drive property not set"),
        (
            {"driver": "virtio-blk-pci", "drive": "nosuch"},
            "Property 'virtio-blk-device.drive' can't find value 'nosuch'",
        ),
        ({"driver": "virtio-blk-pci", "iothread": "nosuch"}, "Device 'nosuch' not found"),
        # which of two is reported depends on a hash of their names
        (
            {"driver": "virtio-blk-pci", "bogus": 5, "serial": 5},
            "Invalid parameter type for 'serial', expected: string",
        ),
        ({"driver": "virtio-blk-pci", "bogus": 5, "drive": 5}, "Property 'virtio-blk-pci.bogus' not found"),
        ({"driver": "virtio-blk-pci", "hotplugged": True}, "Property 'virtio-blk-pci.hotplugged' is not writable"),
        (
            {"driver": "virtio-blk-pci", "legacy-iothread": "x"},
            "Property 'virtio-blk-device.legacy-iothread' is not writable",
        ),
    ],
)
async def test_refusals(members: dict[str, Any], error: str) -> None:
    bench = Bench()
    driver = members.pop("driver", None)
    before = debug_graph(bench.graph)
    assert await bench.add(driver, **members) == error
    assert debug_graph(bench.graph) == before
    assert not bench.machine.peripheral_anon.children


async def test_numbers_of_anonymous_devices_are_not_used_again() -> None:
    bench = Bench()
    assert await bench.add("virtio-blk-pci") == "drive property not set"
    assert await bench.add("virtio-scsi-pci") == ""
    assert list(bench.machine.peripheral_anon.children) == ["device[1]"]


async def test_ids_are_checked_in_text_only() -> None:
    bench = Bench()
    assert await bench.add("virtio-scsi-pci", id="a/b") == ""
    assert await bench.add("virtio-scsi-pci", id="a/b") == "Duplicate device ID 'a/b'"
    assert await bench.add("virtio-scsi-pci", text=True, id="1a") == "Parameter 'id' expects an identifier"


async def test_removal_at_reset() -> None:
    """Policy reset: the device stays until the machine is reset, then goes slot by slot."""
    bench = Bench("unplug=reset")
    for name in ("a", "b"):
        await bench.add("virtio-blk-pci", id=name, drive=await bench.node())
    assert await bench.remove("b") == ""
    assert await bench.remove("a") == ""
    assert await bench.remove("a") == "Device a is already in the process of unplug"
    assert bench.deleted() == []
    assert len(bench.machine.block_devices()) == 2
    await bench.machine.system_reset()
    assert bench.events[-1] == ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
    await bench.settle()
    assert bench.deleted() == ["/a/virtio-backend", "/a", "/b/virtio-backend", "/b"]
    assert bench.machine.block_devices() == []
    assert await bench.remove("a") == "Device 'a' not found"


async def test_a_machine_that_has_run_accepts_a_second_request() -> None:
    bench = Bench("unplug=reset", paused=False)
    await bench.add("virtio-scsi-pci", id="s")
    assert await bench.remove("s") == ""
    assert await bench.remove("s") == ""


async def test_an_acknowledging_guest_lets_go_at_once_and_events_follow_the_reply() -> None:
    bench = Bench()
    await bench.add("virtio-blk-pci", id="a", drive=await bench.node())
    await bench.machine.device_del("a")
    assert bench.deleted() == []
    assert "a" not in bench.machine.peripheral.children
    await bench.graph.blockdev_del("n0")
    await bench.settle()
    assert bench.deleted() == ["/a/virtio-backend", "/a"]


async def test_a_refusing_guest_keeps_the_device_and_may_be_asked_again() -> None:
    bench = Bench("unplug=refuse")
    await bench.add("virtio-scsi-pci", id="s")
    for _ in range(2):
        assert await bench.remove("s") == ""
    expected = ("DEVICE_UNPLUG_GUEST_ERROR", {"device": "s", "path": "/machine/peripheral/s"})
    assert bench.events == [expected, expected]
    assert "s" in bench.machine.peripheral.children


async def test_a_slow_guest_lets_go_later() -> None:
    bench = Bench("unplug=delay:20")
    await bench.add("virtio-scsi-pci", id="s")
    assert await bench.remove("s") == ""
    assert await bench.remove("s") == "Device s is already in the process of unplug"
    assert "s" in bench.machine.peripheral.children
    for _ in range(100):
        await asyncio.sleep(0.01)
        if bench.deleted():
            break
    assert bench.deleted() == ["/s/virtio-backend", "/s"]


async def test_close_forgets_a_slow_guest_and_frees_every_node() -> None:
    bench = Bench("unplug=delay:60000")
    await bench.add("virtio-blk-pci", id="a", drive=await bench.node())
    await bench.remove("a")
    await bench.machine.close()
    await bench.graph.blockdev_del("n0")
    assert bench.graph.backends == []


async def test_a_controller_takes_its_disks_along_newest_first() -> None:
    bench = Bench()
    await bench.add("virtio-scsi-pci", id="s")
    for name in ("h0", "h1"):
        await bench.add("scsi-hd", id=name, drive=await bench.node())
    assert await bench.remove("s") == ""
    assert bench.deleted() == ["/h1", "/h0", "/s/virtio-backend", "/s"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nosuch", "Device 'nosuch' not found"),
        ("", " is not a device"),
        ("/machine", "/machine is not a device"),
        ("s/virtio-bus", "s/virtio-bus is not a device"),
        ("s/virtio-backend", "Bus 'virtio-bus' does not support hotplugging"),
        ("/machine/unattached/device[3]", "Device 'PIIX3' does not support hotplugging"),
    ],
)
async def test_what_cannot_be_removed(name: str, error: str) -> None:
    bench = Bench()
    await bench.add("virtio-scsi-pci", id="s")
    assert await bench.remove(name) == error


async def test_a_failure_after_the_backend_was_ready_reports_the_backend_deleted() -> None:
    bench = Bench()
    assert await bench.add("virtio-blk-pci", id="a", drive=await bench.node(), romfile="x") == (
        'failed to find romfile "x"'
    )
    assert bench.deleted() == ["/a/virtio-backend"]
    assert bench.machine.peripheral.children == {}


async def test_express_ports() -> None:
    bench = Bench(machine="q35", cold=True)
    assert await bench.add("pcie-root-port", id="rp", chassis=1) == ""
    assert await bench.add("pcie-root-port", chassis=1) == "Can't add chassis slot, error -16"
    bench.machine.start()
    assert await bench.add("virtio-scsi-pci") == "Bus 'pcie.0' does not support hotplugging"
    assert await bench.add("virtio-scsi-pci", id="a", bus="rp") == ""
    assert bench.machine.find_device("a").get_property("disable-legacy") == "on"
    assert await bench.add("virtio-scsi-pci", id="b", bus="rp") == (
        "PCI: slot 0 function 0 already occupied by virtio-scsi-pci, "
        "new func virtio-scsi-pci cannot be exposed to guest."
    )
    assert await bench.remove("rp") == "Bus 'pcie.0' does not support hotplugging"
    assert await bench.remove("a") == ""


async def test_boot_order_is_freed_with_its_device() -> None:
    bench = Bench()
    assert await bench.add("virtio-blk-pci", id="a", drive=await bench.node(), bootindex=1) == ""
    assert await bench.add("virtio-blk-pci", drive=await bench.node(), bootindex=1) == (
        "The bootindex 1 has already been used"
    )
    bench.machine.find_device("a").set_property("bootindex", 3)
    assert await bench.add("virtio-blk-pci", drive=await bench.node(), bootindex=1) == ""
    await bench.remove("a")
    assert await bench.add("virtio-blk-pci", drive=await bench.node(), bootindex=3) == ""


async def test_run_state_and_its_events() -> None:
    bench = Bench()
    machine = bench.machine
    machine.stop()
    assert (machine.status, machine.virtual_ms, bench.events) == ("prelaunch", 0, [])
    machine.cont()
    machine.cont()
    bench.now += 1.5
    assert machine.running
    machine.stop()
    machine.stop()
    bench.now += 10
    assert machine.status == "paused"
    assert 1500 <= machine.virtual_ms <= 1501
    assert [name for name, _ in bench.events] == ["RESUME", "STOP"]
    await machine.system_reset()
    assert machine.status == "prelaunch"


def test_without_s_the_machine_runs() -> None:
    assert Bench(paused=False).machine.status == "running"


async def test_drives_are_listed_in_order_of_their_making() -> None:
    bench = Bench()
    await bench.add("virtio-scsi-pci", id="s")
    await bench.add("scsi-cd", id="c")
    await bench.add("virtio-blk-pci", drive=await bench.node())
    await bench.add("scsi-hd", id="h", drive=await bench.node(), werror="report", removable=True)
    rows = [one.query_block_row() for one in bench.machine.block_devices()]
    common = {"device": "", "type": "unknown", "locked": False}
    assert rows == [
        common | {"qdev": "c", "removable": True, "tray_open": False, "io-status": "ok"},
        common | {"qdev": "/machine/peripheral-anon/device[0]/virtio-backend", "removable": False, "io-status": "ok"},
        common | {"qdev": "h", "removable": True, "tray_open": False},
    ]
