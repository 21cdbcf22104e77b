"""Handlers of the block-job-* commands of qapi/block-job.json."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.errors import CommandError, DeviceNotActive
from qmpd.jobs.block_job import BlockJob
from qmpd.jobs.job import Status
from qmpd.jobs.mirror import Mirror
from qmpd.qapi.registry import command


def _find(ctx: Context, name: str) -> BlockJob:
    job = ctx.jobs.jobs.get(name)
    if not isinstance(job, BlockJob):
        raise DeviceNotActive(f"Block job '{name}' not found")
    return job


@command("block-job-set-speed")
async def block_job_set_speed(ctx: Context, *, device: str, speed: int) -> None:
    """Limit how fast a job works."""
    _find(ctx, device).set_speed(speed)


@command("block-job-cancel")
async def block_job_cancel(ctx: Context, *, device: str, force: bool = False) -> None:
    """End a job; one that is ready ends well, unless it is forced."""
    job = _find(ctx, device)
    if job.user_paused and not force:
        raise CommandError(f"The block job for device '{device}' is currently paused")
    if not force and job.status in (Status.READY, Status.STANDBY):
        job.stop_following()
    else:
        job.cancel()


@command("block-job-pause")
async def block_job_pause(ctx: Context, *, device: str) -> None:
    """Stop a job at its next pause point."""
    _find(ctx, device).pause()


@command("block-job-resume")
async def block_job_resume(ctx: Context, *, device: str) -> None:
    """Let a paused job go on."""
    _find(ctx, device).resume()


@command("block-job-complete")
async def block_job_complete(ctx: Context, *, device: str) -> None:
    """Ask a ready job to finish."""
    job = _find(ctx, device)
    job.check_verb("complete")
    job.complete()


@command("block-job-finalize")
async def block_job_finalize(ctx: Context, *, id: str) -> None:
    """Let a pending job conclude."""
    _find(ctx, id).finalize()


@command("block-job-dismiss")
async def block_job_dismiss(ctx: Context, *, id: str) -> None:
    """Forget a concluded job."""
    _find(ctx, id).dismiss()


@command("block-job-change")
async def block_job_change(ctx: Context, *, options: dict[str, Any]) -> None:
    """Change how a job works."""
    job = _find(ctx, options["id"])
    job.check_verb("change")
    if options["type"] != job.job_type or not isinstance(job, Mirror) or job.commits:
        raise CommandError("Job type does not support change")
    job.change_copy_mode(options["copy-mode"])
