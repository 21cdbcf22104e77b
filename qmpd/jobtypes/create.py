"""blockdev-create: an image made by the driver that will read it.

A driver declares how with `@creator`. Whatever goes wrong after the options fit the schema is the
job's error, as the reference has it; the job always waits for job-dismiss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmpd.block.graph import Graph
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.job import Job, JobManager
from qmpd.qapi.bind import build
from qmpd.qapi.registry import ClassEntry, command, jobtype


@jobtype("create")
class CreateJob(Job):
    """Runs one creator; progress is one step."""

    job_type = "create"

    def __init__(
        self, manager: JobManager, job_id: str, graph: Graph, entry: ClassEntry, options: Mapping[str, Any]
    ) -> None:
        super().__init__(manager, job_id, auto_dismiss=False)
        self._graph, self._entry, self._options = graph, entry, options
        self.total = 1

    async def run(self) -> None:
        """Make the image; nothing that was opened for it stays open."""
        try:
            assert self._entry.options is not None
            await self._entry.cls(self._graph).create(build(self._entry.options, self._options))
        finally:
            self.current = 1


@command("blockdev-create")
async def blockdev_create(ctx: Context, *, job_id: str, options: dict[str, Any]) -> None:
    """Start the job that makes an image."""
    name = options["driver"]
    entry = ctx.services.registry.creators.get(name)
    if entry is None:
        raise CommandError("Driver does not support blockdev-create")
    members = {key: value for key, value in options.items() if key != "driver"}
    job = ctx.jobs.add(lambda: CreateJob(ctx.jobs, job_id, ctx.graph, entry, members), job_id)
    job.start()
