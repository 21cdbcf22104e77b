"""Handlers of qapi/block-settings.json: limits and histograms of disk devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmpd.block.stats import Histogram
from qmpd.block.throttle_limits import check
from qmpd.context import Context
from qmpd.errors import CommandError, device_not_found
from qmpd.machine.media import find_drive
from qmpd.qapi.registry import command

_U64 = 1 << 64


def _limits(options: dict[str, Any]) -> dict[str, int]:
    """Return the members of ThrottleLimits that a BlockIOThrottle means."""
    limits: dict[str, int] = {}
    for unit in ("bps", "iops"):
        for what, suffix in (("total", ""), ("read", "_rd"), ("write", "_wr")):
            name, limit = unit + suffix, f"{unit}-{what}"
            limits[limit] = options[name] % _U64
            limits[f"{limit}-max"] = options.get(f"{name}_max", 0) % _U64
            limits[f"{limit}-max-length"] = options.get(f"{name}_max_length", 1) % _U64
    limits["iops-size"] = options.get("iops_size", 0) % _U64
    return limits


@command("block_set_io_throttle")
async def block_set_io_throttle(ctx: Context, *, options: dict[str, Any]) -> None:
    """Limit a disk device, or stop limiting it."""
    device, id_ = options.get("device"), options.get("id")
    _, backend = find_drive(ctx.machine, device, id_)
    if backend.node is None:
        raise CommandError("Device has no medium")
    limits = _limits(options)
    check(limits)
    rates = [f"{unit}-{what}" for unit in ("bps", "iops") for what in ("total", "read", "write")]
    group = options.get("group") or (backend.throttle.name if backend.throttle else device or id_ or "")

    async def apply() -> None:
        backend.set_throttle(group, limits if any(limits[rate] for rate in rates) else None)

    await ctx.graph.runner.run(apply())


@command("block-latency-histogram-set")
async def block_latency_histogram_set(
    ctx: Context,
    *,
    id: str,
    boundaries: Sequence[int] | None = None,
    boundaries_read: Sequence[int] | None = None,
    boundaries_write: Sequence[int] | None = None,
    boundaries_zap: Sequence[int] | None = None,
    boundaries_flush: Sequence[int] | None = None,
) -> None:
    """Begin new histograms; without any boundaries, or with an empty list, end those there are."""
    try:
        _, backend = find_drive(ctx.machine, None, id)
    except CommandError as error:
        raise device_not_found(id) from error
    given = {"rd": boundaries_read, "wr": boundaries_write, "zone_append": boundaries_zap, "flush": boundaries_flush}
    if (boundaries is None and all(one is None for one in given.values())) or boundaries == []:
        backend.stats.histograms.clear()
        return
    names = {"rd": "read", "wr": "write", "zone_append": "append write", "flush": "flush"}
    for kind, own in given.items():
        chosen = boundaries if own is None else own
        if chosen is None:
            continue
        try:
            backend.stats.histograms[kind] = Histogram(chosen)
        except ValueError as error:
            raise CommandError(f"Device '{id}' set {names[kind]} boundaries fail") from error
