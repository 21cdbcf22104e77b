"""Handlers of qapi/job.json: jobs listed, paused, cancelled, finalized and dismissed."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.qapi.registry import command


@command("query-jobs")
async def query_jobs(ctx: Context) -> list[dict[str, Any]]:
    """List every job, newest first."""
    return [job.to_wire() for job in ctx.jobs.newest_first()]


@command("job-pause")
async def job_pause(ctx: Context, *, id: str) -> None:
    """Stop a job at its next pause point."""
    ctx.jobs.find(id).pause()


@command("job-resume")
async def job_resume(ctx: Context, *, id: str) -> None:
    """Let a paused job go on."""
    ctx.jobs.find(id).resume()


@command("job-cancel")
async def job_cancel(ctx: Context, *, id: str) -> None:
    """Stop a job for good."""
    ctx.jobs.find(id).cancel()


@command("job-complete")
async def job_complete(ctx: Context, *, id: str) -> None:
    """Ask a ready job to finish."""
    job = ctx.jobs.find(id)
    job.check_verb("complete")
    job.complete()


@command("job-finalize")
async def job_finalize(ctx: Context, *, id: str) -> None:
    """Let a pending job conclude."""
    ctx.jobs.find(id).finalize()


@command("job-dismiss")
async def job_dismiss(ctx: Context, *, id: str) -> None:
    """Forget a concluded job."""
    ctx.jobs.find(id).dismiss()
