"""How drives and images are shown to people: the text of `info block`.

Layout: block/monitor/block-hmp-cmds.c and block/qapi.c of QEMU.
"""

from __future__ import annotations

from typing import Any

from qmpd.qapi.hashorder import dict_order
from qmpd.units import human_size


def drive(row: dict[str, Any] | None, inserted: dict[str, Any] | None, *, verbose: bool) -> str:
    """Return the lines for a drive (BlockInfo) with its medium, or for a node (BlockDeviceInfo)."""
    printed = _title(row, inserted)
    if inserted is None:
        printed += ": [not inserted]\n"
    else:
        marks = ", read-only" * inserted["ro"] + ", encrypted" * inserted["encrypted"]
        printed += f": {inserted['file']} ({inserted['drv']}{marks})\n"
    if row is not None:
        printed += _attachment(row)
    if inserted is None:
        return printed
    printed += _medium(inserted)
    if verbose:
        printed += "\nImages:\n"
        image: dict[str, Any] | None = inserted["image"]
        while image is not None:
            printed += node_info(image)
            image = image.get("backing-image")
    return printed


def _title(row: dict[str, Any] | None, inserted: dict[str, Any] | None) -> str:
    name = (inserted or {}).get("node-name", "")
    if row is not None and row["device"]:
        return f"{row['device']} ({name})" if name else str(row["device"])
    return name or (row or {}).get("qdev", "") or "<anonymous>"


def _attachment(row: dict[str, Any]) -> str:
    printed = f"    Attached to:      {row['qdev']}\n" if row.get("qdev") else ""
    if row.get("io-status", "ok") != "ok":
        printed += f"    I/O status:       {row['io-status']}\n"
    if row["removable"]:
        lock = "" if row["locked"] else "not "
        tray = "open" if row.get("tray_open") else "closed"
        printed += f"    Removable device: {lock}locked, tray {tray}\n"
    return printed


def _medium(inserted: dict[str, Any]) -> str:
    cache = inserted["cache"]
    mode = "writeback" if cache["writeback"] else "writethrough"
    marks = ", direct" * cache["direct"] + ", ignore flushes" * cache["no-flush"]
    printed = f"    Cache mode:       {mode}{marks}\n"
    if "backing_file" in inserted:
        depth = inserted["backing_file_depth"]
        printed += f"    Backing file:     {inserted['backing_file']} (chain depth: {depth})\n"
    if inserted["detect_zeroes"] != "off":
        printed += f"    Detect zeroes:    {inserted['detect_zeroes']}\n"
    return printed


def node_info(image: dict[str, Any]) -> str:
    """Return the lines for an image (ImageInfo)."""
    size = image["virtual-size"]
    disk = human_size(image["actual-size"]) if "actual-size" in image else "unavailable"
    printed = (
        f"image: {image['filename']}\nfile format: {image['format']}\n"
        f"virtual size: {human_size(size)} ({size} bytes)\ndisk size: {disk}\n"
    )
    if image.get("encrypted"):
        printed += "encrypted: yes\n"
    if "cluster-size" in image:
        printed += f"cluster_size: {image['cluster-size']}\n"
    if image.get("dirty-flag"):
        printed += "cleanly shut down: no\n"
    if "backing-filename" in image:
        printed += f"backing file: {image['backing-filename']}"
        full = image.get("full-backing-filename", image["backing-filename"])
        printed += f" (actual path: {full})\n" if full != image["backing-filename"] else "\n"
        if "backing-filename-format" in image:
            printed += f"backing file format: {image['backing-filename-format']}\n"
    specific = image.get("format-specific", {}).get("data")
    if specific:
        printed += "Format specific information:\n" + _members(specific, 1)
    return printed


def _members(values: dict[str, Any], depth: int) -> str:
    """Return one line per member, nested ones below, in the order the reference walks them."""
    printed = ""
    for name in dict_order(values):
        printed += _entry(name.replace("-", " "), values[name], depth)
    return printed


def _entry(label: str, value: Any, depth: int) -> str:
    indent = "    " * depth
    if isinstance(value, dict):
        return f"{indent}{label}:\n{_members(value, depth + 1)}"
    if isinstance(value, list):
        lines = "".join(_entry(f"[{index}]", one, depth + 1) for index, one in enumerate(value))
        return f"{indent}{label}:\n{lines}"
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{indent}{label}: {shown}\n"
