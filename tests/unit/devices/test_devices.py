"""Each device model: its list of properties, and what it refuses in QEMU's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import QmpdError
from qmpd.machine.device import Device
from qmpd.qapi.registry import discover, registry
from tests.unit.machine.bench import Bench

LATE = "after it was realized"
RECORDED = Path(__file__).parents[2] / "conformance" / "corpus"


def by_name(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: str(row["name"]))


@pytest.mark.parametrize("typename", ["virtio-blk-pci", "scsi-hd"])
def test_properties_are_those_that_qemu_lists(typename: str) -> None:
    """Against the recorded answers of device-list-properties, descriptions and defaults included."""
    discover(("devices",))
    (scenario,) = RECORDED.rglob("qom-introspection.json")
    steps = json.loads(scenario.read_text())["steps"]
    replies = json.loads(scenario.with_suffix(".expected.json").read_text())["steps"]
    (recorded,) = [
        reply["reply"]["return"]
        for step, reply in zip(steps, replies, strict=True)
        if step["send"]["execute"] == "device-list-properties" and step["send"]["arguments"]["typename"] == typename
    ]
    cls: type[Device] = registry.devices[typename].cls
    assert by_name(cls.list_properties()) == by_name(recorded)


@pytest.mark.parametrize(
    ("typename", "count"),
    [
        ("virtio-blk-pci", 79), ("virtio-blk-pci-transitional", 77), ("virtio-blk-pci-non-transitional", 77),
        ("virtio-blk-device", 45), ("virtio-scsi-pci", 53), ("virtio-scsi-pci-transitional", 51),
        ("virtio-scsi-pci-non-transitional", 51), ("virtio-scsi-device", 20), ("scsi-hd", 39), ("scsi-cd", 32),
        ("ide-hd", 28), ("ide-cd", 20), ("usb-storage", 21), ("pcie-root-port", 31),
    ],
)  # fmt: skip
def test_number_of_properties(typename: str, count: int) -> None:
    discover(("devices",))
    cls: type[Device] = registry.devices[typename].cls
    names = [row["name"] for row in cls.list_properties()]
    assert len(names) == len(set(names)) == count


@pytest.mark.parametrize(
    ("properties", "error"),
    [
        (
            {"logical_block_size": 4096, "physical_block_size": 512},
            "logical_block_size > physical_block_size not supported",
        ),
        ({"min_io_size": 1000}, "min_io_size must be a multiple of logical_block_size"),
        ({"min_io_size": 512 * 65536}, "min_io_size must not exceed 65535 logical blocks"),
        ({"opt_io_size": 1000}, "opt_io_size must be a multiple of logical_block_size"),
        ({"discard_granularity": 1000}, "discard_granularity must be a multiple of logical_block_size"),
        ({"secs": 100, "heads": 1}, "cyls must be between 1 and 65535"),
        ({"cyls": 5, "heads": 500, "secs": 5}, "heads must be between 1 and 255"),
        ({"num-queues": 0}, "num-queues property must be larger than 0"),
        ({"num-queues": 1025}, "num-queues property must not be larger than 1024"),
        ({"queue-size": 2}, "invalid queue-size property (2), must be > 2"),
        ({"queue-size": 1000}, "invalid queue-size property (1000), must be a power of 2 (max 1024)"),
        ({"max-discard-sectors": 0}, "invalid max-discard-sectors property (0), must be between 1 and 4194303"),
        ({"write-zeroes": False, "max-write-zeroes-sectors": 0}, ""),
        (
            {"disable-legacy": "on", "disable-modern": True},
            "device cannot work as neither modern nor legacy mode is enabled",
        ),
        ({"iommu_platform": True}, "VIRTIO_F_IOMMU_PLATFORM was supported by neither legacy nor transitional device"),
        ({"acpi-index": 16384}, "acpi-index should be less or equal to 16383"),
        ({"romsize": 3}, "ROM size 3 is not a power of two"),
        ({"failover_pair_id": "x"}, "failover primary device must be on PCIExpress bus"),
        ({"addr": "0.0"}, "PCI: slot 0 function 0 not available for virtio-blk-pci, in use by i440FX,id=(null)"),
        (
            {"addr": 3},
            "PCI: slot 0 function 0 already occupied by i440FX, new func virtio-blk-pci cannot be exposed to guest.",
        ),
        ({"iothread-vq-mapping": [{"iothread": "x"}]}, 'IOThread "x" object does not exist'),
        ({"bootindex": -2, "serial": "x" * 300, "bus": 5}, ""),
        ({"rerror": "enospc", "share-rw": True, "write-cache": "off", "romfile": ""}, ""),
    ],
)
async def test_virtio_blk(properties: dict[str, Any], error: str) -> None:
    bench = Bench()
    assert await bench.add("virtio-blk-pci", id="d", drive=await bench.node(), **properties) == error
    assert len(bench.machine.block_devices()) == (not error)


async def test_values_that_realizing_settles() -> None:
    bench = Bench()
    await bench.add("virtio-blk-pci", id="d", drive=await bench.node())
    device = bench.machine.find_device("d")
    settled = {
        "addr": 16, "legacy-addr": "02.0", "vectors": 2, "num-queues": 1, "disable-legacy": "off",
        "logical_block_size": 512, "physical_block_size": 512, "cyls": 2, "heads": 16, "secs": 63,
        "discard_granularity": 4294967295, "drive": "n0", "serial": "", "bootindex": -1, "iothread": "",
        "parent_bus": "/machine/i440fx/pci.0", "realized": True, "hotplugged": True, "hotpluggable": True,
    }  # fmt: skip
    assert {name: device.get_property(name) for name in settled} == settled
    assert device.children["virtio-backend"].get_property("hotpluggable") is False


@pytest.mark.parametrize(
    ("path", "name", "value", "error"),
    [
        ("d", "serial", 5, "Attempt to set property 'serial' on anonymous device (type 'virtio-blk-device') " + LATE),
        ("d", "addr", "5", "Attempt to set property 'addr' on device 'd' (type 'virtio-blk-pci') " + LATE),
        (
            "d",
            "iothread",
            "",
            "Attempt to set link property 'iothread' on device '(null)' (type 'virtio-blk-device') " + LATE,
        ),
        ("d", "iothread", "x", "Device 'x' not found"),
        ("d", "nosuch", 1, "Property 'virtio-blk-pci.nosuch' not found"),
        ("d", "type", "x", "Property 'virtio-blk-pci.type' is not writable"),
        ("d", "virtio-backend", "x", "Property 'virtio-blk-pci.virtio-backend' is not writable"),
        ("d/virtio-backend", "addr", 1, "Property 'virtio-blk-device.addr' not found"),
        ("d", "drive", "nosuch", "Cannot find device='' nor node-name='nosuch'"),
        ("d", "bootindex", "x", "Invalid parameter type for 'bootindex', expected: integer"),
    ],
)
async def test_setting_properties_of_a_running_device(path: str, name: str, value: Any, error: str) -> None:
    bench = Bench()
    await bench.add("virtio-blk-pci", id="d", drive=await bench.node())
    with pytest.raises(QmpdError) as caught:
        bench.machine.find_device(path).set_property(name, value)
    assert str(caught.value) == error


async def test_the_node_of_a_running_device_can_be_replaced() -> None:
    bench = Bench()
    await bench.add("virtio-blk-pci", id="d", drive=await bench.node())
    other, taken = await bench.node(), await bench.node()
    await bench.add("virtio-blk-pci", drive=taken)
    device = bench.machine.find_device("d")
    with pytest.raises(QmpdError, match="Permission conflict"):
        device.set_property("drive", taken)
    assert device.get_property("drive") == "n0"
    device.set_property("drive", other)
    assert device.get_property("drive") == other
    await bench.graph.blockdev_del("n0")


@pytest.mark.parametrize(
    ("properties", "error"),
    [
        ({"bus": "s.0", "scsi-id": 0, "lun": 0}, "lun already used by 'h'"),
        ({"bus": "s.0", "scsi-id": 300}, "bad scsi device id: 300"),
        ({"bus": "s.0", "lun": 16384}, "bad scsi device lun: 16384"),
        ({"bus": "s.0", "channel": 1}, "bad scsi channel id: 1"),
        ({"bus": "s"}, "Bus 's' not found"),
        ({"bus": "pci.0/s"}, "Bus 'pci.0/s' is full"),
        ({"bus": "pci.0"}, "Device 'scsi-hd' can't go on PCI bus"),
        ({"serial": "x" * 37}, "The serial number can't be longer than 36 characters"),
        ({"discard_granularity": 1000}, "discard_granularity must be a multiple of logical_block_size"),
    ],
)
async def test_scsi_hd(properties: dict[str, Any], error: str) -> None:
    bench = Bench()
    await bench.add("virtio-scsi-pci", id="s")
    await bench.add("scsi-hd", id="h", drive=await bench.node())
    assert await bench.add("scsi-hd", drive=await bench.node(), **properties) == error
    assert await bench.add("scsi-hd", id="g") == "drive property not set"


async def test_scsi_addresses_are_given_out() -> None:
    bench = Bench()
    await bench.add("virtio-scsi-pci", id="s")
    for properties in ({}, {"lun": 5}, {"scsi-id": 0}, {"scsi-id": 255}):
        assert await bench.add("scsi-hd", drive=await bench.node(), **properties) == ""
    places = [(one.device.values["scsi-id"], one.device.values["lun"]) for one in bench.machine.block_devices()]
    assert places == [(0, 0), (0, 5), (0, 1), (255, 0)]


@pytest.mark.parametrize(
    ("devices", "error"),
    [
        ([("ide-hd", {})], "No drive specified"),
        ([("ide-hd", {"drive": "ro"})], "Block node is read-only"),
        ([("ide-hd", {"drive": "n0", "unit": 5})], "Can't create IDE unit 5, bus supports only 2 units"),
        ([("ide-hd", {"drive": "n0", "discard_granularity": 1024})], "discard_granularity must be 512 for ide"),
        ([("ide-hd", {"drive": "n0", "cyls": 1, "heads": 17, "secs": 1})], "heads must be between 1 and 16"),
        ([("ide-cd", {"bus": "ide.0", "unit": 0}), ("ide-cd", {"bus": "ide.0", "unit": 0})], "IDE unit 0 is in use"),
        ([("ide-cd", {})] * 3, "IDE unit 1 is in use"),
        ([("ide-cd", {"drive": "nosuch"})], "Property 'ide-cd.drive' can't find value 'nosuch'"),
    ],
)
async def test_ide(devices: list[tuple[str, dict[str, Any]]], error: str) -> None:
    bench = Bench(cold=True)
    await bench.node()
    await bench.node(node_name="ro", read_only=True)
    answers = [await bench.add(driver, **properties) for driver, properties in devices]
    assert answers == [""] * (len(devices) - 1) + [error]


async def test_ide_serial_numbers() -> None:
    bench = Bench(cold=True)
    await bench.add("ide-cd", id="c", bus="ide.1")
    assert bench.machine.find_device("c").get_property("serial") == "QM00003"


async def test_usb_storage_hands_its_drive_to_a_scsi_disk() -> None:
    bench = Bench(usb=True)
    assert await bench.add("usb-storage") == "drive property not set"
    node = await bench.node()
    assert await bench.add("usb-storage", id="u", drive=node, serial="ABC", removable=True) == ""
    disk = "/machine/peripheral/u/u.0/legacy[0]"
    assert [one.qdev for one in bench.machine.block_devices()] == [disk]
    assert bench.machine.find_device(disk).get_property("serial") == "ABC"
    assert bench.machine.find_device("u").get_property("drive") == ""
    assert await bench.add("usb-storage", port="9", drive=await bench.node()) == (
        "usb port 9 (bus usb-bus.0) not found (in use?)"
    )
    for _ in range(10):
        assert await bench.add("usb-storage", drive=await bench.node()) == ""
    assert await bench.remove("u") == ""
    assert bench.deleted()[:2] == ["/u/u.0/legacy[0]", "/u"]
    await bench.graph.blockdev_del(node)


@pytest.mark.parametrize(
    ("properties", "error"),
    [
        ({"num_queues": 0}, "Invalid number of queues (= 0), must be a positive integer less than 1022."),
        ({"virtqueue_size": 2}, "invalid virtqueue_size property (= 2), must be > 2"),
        ({"virtqueue_size": 2048}, "invalid virtqueue_size property (= 2048), must not be larger than 1024"),
        ({"virtqueue_size": 3}, ""),
    ],
)
async def test_virtio_scsi(properties: dict[str, Any], error: str) -> None:
    assert await Bench().add("virtio-scsi-pci", **properties) == error


@pytest.mark.parametrize(
    ("mapping", "queues", "error"),
    [
        ([("io", None), ("io", None)], 1, 'duplicate IOThread name "io" in iothread-vq-mapping'),
        ([("io", [0, 1])], 1, 'vq index 1 for IOThread "io" must be less than num_queues 1 in iothread-vq-mapping'),
        (
            [("io", [0]), ("ip", None)],
            2,
            "either all items in iothread-vq-mapping must have vqs or none of them must have it",
        ),
        ([("io", [0]), ("ip", [0])], 2, 'cannot assign vq 0 to IOThread "ip" because it is already assigned'),
        ([("io", [0])], 2, "missing vq 1 IOThread assignment in iothread-vq-mapping"),
        ([("io", [0]), ("ip", [1])], 2, ""),
    ],
)
async def test_queues_of_iothreads(mapping: list[tuple[str, Any]], queues: int, error: str) -> None:
    bench = Bench()
    for name in ("io", "ip"):
        bench.objects.create({"qom-type": "iothread", "id": name})
    entries = [{"iothread": name} | ({} if vqs is None else {"vqs": vqs}) for name, vqs in mapping]
    members = {"iothread-vq-mapping": entries, "num-queues": queues}
    assert await bench.add("virtio-blk-pci", drive=await bench.node(), **members) == error
    both = {"iothread": "io", "iothread-vq-mapping": [{"iothread": "ip"}]}
    assert await bench.add("virtio-blk-pci", drive=await bench.node(), **both) == (
        "iothread and iothread-vq-mapping properties cannot be set at the same time"
    )
    bench.objects.close()
