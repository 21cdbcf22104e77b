"""x-blockdev-amend, blockdev-amend: options of an open image changed by a job, while it is used.

A node that can be amended has `async amend(options, force)`; options that do not fit the schema are
refused at once, everything else is the job's error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmpd.block.amend import Amendable
from qmpd.block.hold import held
from qmpd.block.node import BlockNode
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.job import Job, JobManager
from qmpd.qapi.registry import command, jobtype


@jobtype("amend")
class AmendJob(Job):
    """Amends one node; progress is one step."""

    job_type = "amend"

    def __init__(
        self, manager: JobManager, job_id: str, node: BlockNode, options: Mapping[str, Any], *, force: bool
    ) -> None:
        super().__init__(manager, job_id, auto_dismiss=False)
        self._node, self._options, self._force = node, options, force
        self.total = 1

    async def run(self) -> None:
        """Let the driver do it."""
        node = self._node
        assert isinstance(node, Amendable)
        try:
            with held(node, f"job '{self.id}'"):
                await node.amend(self._options, force=self._force)
        finally:
            self.current = 1


def _start(ctx: Context, name: str, job_id: str, node_name: str, options: dict[str, Any], force: bool) -> None:
    node = ctx.graph.lookup(None, node_name)
    if options["driver"] != node.driver_name:
        raise CommandError(f"{name} doesn't support changing the block driver")
    if not isinstance(node, Amendable):
        raise CommandError(f"Driver does not support {name}")
    members = {key: value for key, value in options.items() if key != "driver"}
    job = ctx.jobs.add(lambda: AmendJob(ctx.jobs, job_id, node, members, force=force), job_id)
    job.start()


@command("x-blockdev-amend")
async def x_blockdev_amend(
    ctx: Context, *, job_id: str, node_name: str, options: dict[str, Any], force: bool = False
) -> None:
    """Start the job that amends a node."""
    _start(ctx, "x-blockdev-amend", job_id, node_name, options, force)


@command("blockdev-amend")
async def blockdev_amend(
    ctx: Context, *, job_id: str, node_name: str, options: dict[str, Any], force: bool = False
) -> None:
    """Start the job that amends a node, options of our own included."""
    _start(ctx, "blockdev-amend", job_id, node_name, options, force)
