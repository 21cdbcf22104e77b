"""The handler of qapi/block-reopen.json. Model: qmp_blockdev_reopen of QEMU's blockdev.c."""

from __future__ import annotations

from typing import Any

from qmpd.block.reopen import reopen
from qmpd.context import Context
from qmpd.qapi.registry import command


@command("blockdev-reopen")
async def blockdev_reopen(ctx: Context, *, options: list[dict[str, Any]]) -> None:
    """Give nodes other options, all of them or none."""
    await reopen(ctx.graph, options)
