"""Trays and media of the devices that have them.

A drive is meant by its id or path (`id`), or by the name of its -drive (`device`). Model:
block/qapi-sysemu.c of QEMU; texts and order of checks as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.block import backing, opening, protocol_names
from qmpd.block.backend import BlockBackend
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions
from qmpd.errors import CommandError, device_not_found
from qmpd.machine.disk import DiskDevice

if TYPE_CHECKING:
    from qmpd.block.graph import Slow
    from qmpd.machine.machine import Machine


def find_drive(machine: Machine, device: str | None, id_: str | None) -> tuple[DiskDevice, BlockBackend]:
    """Return the device that `device` or `id_` means, with its backend.

    Raises DeviceNotFound, CommandError.
    """
    if (device is None) == (id_ is None):
        raise CommandError("Need exactly one of 'device' and 'id'")
    if id_ is not None:
        found = machine.find_device(id_)
        if not isinstance(found, DiskDevice) or found.backend is None:
            raise CommandError("Device does not have a block device backend")
        return found, found.backend
    assert device is not None
    for one in machine.block_devices():
        if device and one.backend.name == device:
            return one.device, one.backend
    raise device_not_found(device)


def _removable(machine: Machine, device: str | None, id_: str | None) -> DiskDevice:
    disk, _ = find_drive(machine, device, id_)
    if not disk.removable:
        raise CommandError(f"Device '{_shown(device, id_)}' is not removable")
    return disk


def _shown(device: str | None, id_: str | None) -> str:
    return id_ if id_ is not None else device or ""


def open_tray(machine: Machine, device: str | None, id_: str | None) -> None:
    """Open the tray; nothing happens if it is. Raises CommandError."""
    _removable(machine, device, id_).move_tray(opened=True)


def close_tray(machine: Machine, device: str | None, id_: str | None) -> None:
    """Close the tray; nothing happens if it is. Raises CommandError."""
    _removable(machine, device, id_).move_tray(opened=False)


async def remove_medium(machine: Machine, device: str | None, id_: str | None) -> None:
    """Take the medium out of the open tray, if there is one. Raises CommandError."""
    disk = _removable(machine, device, id_)
    if not disk.tray_open:
        raise CommandError(f"Tray of device '{_shown(device, id_)}' is not open")
    await disk.take_medium()


def insert_medium(machine: Machine, id_: str, node_name: str) -> None:
    """Put the node `node_name` into the empty open tray. Raises CommandError."""
    disk, _ = find_drive(machine, None, id_)
    node = machine.graph.get(node_name)
    if node is None:
        raise CommandError(f"Node '{node_name}' not found")
    if any(isinstance(edge.parent, BlockBackend) for edge in node.parents):
        raise CommandError(f"Node '{node_name}' is already in use")
    _insert(disk, node)


def _insert(disk: DiskDevice, node: BlockNode) -> None:
    assert disk.backend is not None
    if not disk.removable:
        raise CommandError("Device is not removable")
    if not disk.tray_open:
        raise CommandError("Tray of the device is not open")
    if disk.node is not None:
        raise CommandError("There already is a medium in the device")
    disk.backend.insert(node)


async def eject(machine: Machine, device: str | None, id_: str | None) -> None:
    """Open the tray and take the medium out. Raises CommandError."""
    open_tray(machine, device, id_)
    await remove_medium(machine, device, id_)


async def change_medium(
    machine: Machine,
    device: str | None,
    id_: str | None,
    filename: str,
    *,
    image_format: str | None,
    mode: str,
    slow: Slow,
) -> None:
    """Open an image and put it in place of the medium: tray open, out, in, tray closed.

    image_format  None: found by looking at the image     mode  "retain", "read-only", "read-write"
    Raises CommandError; an image that cannot be opened changes nothing.
    """
    disk, _ = find_drive(machine, device, id_)
    present = disk.node
    retained = disk.medium_was_read_only if present is None else present.read_only
    read_only = {"retain": retained, "read-only": True, "read-write": False}[mode]
    node = await _open_image(machine, filename, image_format, read_only=read_only, slow=slow)
    try:
        disk = _removable(machine, device, id_)
        disk.move_tray(opened=True)
        await disk.take_medium()
        _insert(disk, node)
    except BaseException:
        await machine.graph.drop_unreferenced(node)
        raise
    disk.move_tray(opened=False)


async def _open_image(
    machine: Machine, filename: str, image_format: str | None, *, read_only: bool, slow: Slow
) -> BlockNode:
    graph = machine.graph
    options = NodeOptions(read_only=read_only)
    if filename.startswith("json:"):
        tree = backing.json_tree(graph, filename, image_format)
        return await opening.open_tree(graph, {"read-only": read_only, **tree}, slow)
    if image_format is not None and image_format not in graph.registry.drivers:
        raise CommandError(f"Unknown driver '{image_format}'")
    file = protocol_names.options_of(graph.registry, filename)
    filename = file.get("filename", filename)
    if not filename:
        raise CommandError("The 'file' block driver requires a file name")
    if image_format is None:
        return await backing.open_probed(graph, filename, options, slow, 0)
    if graph.registry.drivers[image_format].cls.is_protocol:
        return await opening.open_tree(graph, {**file, "driver": image_format}, slow, options)
    return await opening.open_tree(graph, {"driver": image_format, "file": file}, slow, options)
