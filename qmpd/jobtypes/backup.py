"""blockdev-backup: the options of the job that is in `qmpd.jobs.backup`."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.jobs.backup import Backup, BackupOptions, Perf, new_backup
from qmpd.qapi.bind import build
from qmpd.qapi.registry import command, jobtype


@jobtype("backup")
class BackupJob(Backup):
    """Backs up one node."""


@command("blockdev-backup")
async def blockdev_backup(
    ctx: Context,
    *,
    device: str,
    target: str,
    sync: str,
    job_id: str | None = None,
    speed: int = 0,
    bitmap: str | None = None,
    bitmap_mode: str | None = None,
    compress: bool = False,
    on_source_error: str = "report",
    on_target_error: str = "report",
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
    filter_node_name: str | None = None,
    x_perf: dict[str, Any] | None = None,
) -> None:
    """Start the job that copies a node as it is now."""
    options = BackupOptions(
        device=device,
        target=target,
        sync=sync,
        job_id=job_id,
        speed=speed,
        bitmap=bitmap,
        bitmap_mode=bitmap_mode,
        compress=compress,
        on_source_error=on_source_error,
        on_target_error=on_target_error,
        auto_finalize=auto_finalize,
        auto_dismiss=auto_dismiss,
        filter_node_name=filter_node_name,
        x_perf=build(Perf, x_perf or {}),
    )
    job = await new_backup(ctx.graph, ctx.jobs, options)
    job.start()
