"""Jobs that work on block nodes: listed by query-block-jobs, announced by BLOCK_JOB_* events."""

from __future__ import annotations

from typing import Any, ClassVar

from qmpd.jobs.job import Job, Status


class BlockJob(Job):
    """A job with a device name, a speed limit and block job events.

    speed   bytes per second at most, 0 without limit
    """

    is_block: ClassVar[bool] = True

    def __init__(self, *args: Any, speed: int = 0, **named: Any) -> None:
        super().__init__(*args, **named)
        self.speed = speed

    def to_block_wire(self) -> dict[str, Any]:
        """Return BlockJobInfo."""
        reply: dict[str, Any] = {
            "type": self.job_type,
            "device": self.id,
            "len": self.total,
            "offset": self.current,
            "busy": self.status is Status.RUNNING and not self.user_paused,
            "paused": self.user_paused,
            "speed": self.speed,
            "io-status": "ok",
            "ready": self.status in (Status.READY, Status.STANDBY),
            "status": self.status.value,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        }
        if self.error is not None:
            reply["error"] = self.error
        return reply
