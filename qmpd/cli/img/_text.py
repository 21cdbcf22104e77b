"""How values are printed: pretty JSON, sizes, and the listing of an image's properties.

The order of members is that of the reference's dictionaries, so that both outputs can be compared line by line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qmpd.protocols.qmp_writer import to_text
from qmpd.qapi.hashorder import dict_order
from qmpd.units import human_size


def pretty(value: Any, indent: int = 0) -> str:
    """Return JSON text, one member a line, four spaces deeper per level, without end of line."""
    inner, outer = " " * (4 * indent + 4), " " * (4 * indent)
    if isinstance(value, dict):
        lines = [f'{inner}"{name}": {pretty(value[name], indent + 1)}' for name in dict_order(list(value))]
        return "{\n" + ",\n".join(lines) + ("\n" if lines else "") + outer + "}"
    if isinstance(value, list | tuple):
        lines = [inner + pretty(one, indent + 1) for one in value]
        return "[\n" + ",\n".join(lines) + ("\n" if lines else "") + outer + "]"
    return to_text(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def dump(value: Any, indent: int, lines: list[str]) -> None:
    """Append the listing of a dictionary or list: names with spaces for dashes, lists by index."""
    pad = " " * (4 * indent)
    if isinstance(value, Mapping):
        items = [(name.replace("-", " "), value[name]) for name in dict_order(list(value))]
    else:
        items = [(f"[{at}]", one) for at, one in enumerate(value)]
    for name, one in items:
        if isinstance(one, dict | list | tuple):
            lines.append(f"{pad}{name}:")
            dump(one, indent + 1, lines)
        else:
            lines.append(f"{pad}{name}: {_scalar(one)}")


def describe(info: Mapping[str, Any], *, indent: str = "", protocol: bool = False) -> list[str]:
    """Return the lines that `info` prints for one image, its children after it."""
    lines: list[str] = []
    name = "filename" if protocol else "image"
    kind = "protocol type" if protocol else "file format"
    size = "file length" if protocol else "virtual size"
    lines.append(f"{name}: {info['filename']}")
    lines.append(f"{kind}: {info['format']}")
    lines.append(f"{size}: {human_size(info['virtual-size'])} ({info['virtual-size']} bytes)")
    lines.append(f"disk size: {human_size(info['actual-size']) if 'actual-size' in info else 'unavailable'}")
    if info.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if info.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if "backing-filename" in info:
        full = info.get("full-backing-filename")
        shown = info["backing-filename"]
        if full is None:
            shown += " (cannot determine actual path)"
        elif full != shown:
            shown += f" (actual path: {full})"
        lines.append(f"backing file: {shown}")
        if "backing-filename-format" in info:
            lines.append(f"backing file format: {info['backing-filename-format']}")
    if info.get("snapshots"):
        lines.append("Snapshot list:")
        lines += snapshot_lines(info["snapshots"])
    data = info.get("format-specific", {}).get("data")
    if data:
        lines.append("Format specific information:")
        dump(data, 1, lines)
    return [indent + line for line in lines]


def snapshot_lines(snapshots: list[dict[str, Any]]) -> list[str]:
    """Return the table of internal snapshots."""
    lines = [f"{'ID':<7} {'TAG':<16} {'VM_SIZE':>8} {'DATE':>19} {'VM_CLOCK':>15} {'ICOUNT':>10}"]
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds = one["vm-clock-sec"]
        clock = f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{one['vm-clock-nsec'] // 1_000_000:03}"
        icount = str(one["icount"]) if "icount" in one else "--"
        state = human_size(one["vm-state-size"])
        lines.append(f"{one['id']:<7} {one['name']:<16} {state:>8} {date:>19} {clock:>15} {icount:>10}")
    return lines
