"""A long-running job: its states, what may be asked of it in each, and its events.

The table of states and the table of verbs are QEMU's (job.c); the order of JOB_STATUS_CHANGE was
taken from recordings. A job runs as a task on the monitor's loop and does its I/O through
backends, so that it can be paused wherever it calls `pause_point`.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar

from qmpd.errors import CommandError, QmpdError, StateError

if TYPE_CHECKING:
    from qmpd.events import EventBus

log = logging.getLogger(__name__)


class Status(enum.Enum):
    """JobStatus on the wire."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


S = Status
_NEXT: dict[Status, frozenset[Status]] = {
    S.UNDEFINED: frozenset({S.CREATED}),
    S.CREATED: frozenset({S.RUNNING, S.ABORTING, S.NULL}),
    S.RUNNING: frozenset({S.PAUSED, S.READY, S.WAITING, S.ABORTING}),
    S.PAUSED: frozenset({S.RUNNING}),
    S.READY: frozenset({S.STANDBY, S.WAITING, S.ABORTING}),
    S.STANDBY: frozenset({S.READY}),
    S.WAITING: frozenset({S.PENDING, S.ABORTING}),
    S.PENDING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.ABORTING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.CONCLUDED: frozenset({S.NULL}),
    S.NULL: frozenset(),
}
_ACTIVE = frozenset({S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY})
_VERBS: dict[str, frozenset[Status]] = {
    "cancel": _ACTIVE | {S.WAITING, S.PENDING},
    "pause": _ACTIVE,
    "resume": _ACTIVE,
    "set-speed": _ACTIVE,
    "complete": frozenset({S.READY, S.STANDBY}),
    "finalize": frozenset({S.PENDING}),
    "dismiss": frozenset({S.CONCLUDED}),
    "change": _ACTIVE,
}
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*\Z")


class Cancelled(Exception):
    """Raised out of `pause_point` when the job was told to stop; never reaches a client."""


class JobGroup:
    """Jobs of which all end well, or none."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._through: set[Job] = set()

    def join(self, job: Job) -> None:
        """Make a job, which has not begun, one of the group."""
        self._jobs.append(job)
        job.group = self

    def through(self, job: Job) -> None:
        """Let all go on to their end if this was the last one that still worked."""
        self._through.add(job)
        if len(self._through) == len(self._jobs):
            for one in self._jobs:
                one.settled.set()

    def failed(self, job: Job) -> None:
        """Stop the others."""
        for one in self._jobs:
            if one is not job and one.status in _VERBS["cancel"]:
                one.cancel()


class Job:
    """One job; a job type is a subclass with `run` (and `complete` where it can become ready).

    job_type       JobType on the wire       is_block  listed by query-block-jobs, BLOCK_JOB_* events
    auto_finalize  False: waits in `pending` for job-finalize
    auto_dismiss   False: waits in `concluded` for job-dismiss
    """

    job_type: ClassVar[str] = ""
    is_block: ClassVar[bool] = False

    def __init__(
        self, manager: JobManager, job_id: str, *, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        self.manager, self.id = manager, job_id
        self.auto_finalize, self.auto_dismiss = auto_finalize, auto_dismiss
        self.status = Status.UNDEFINED
        self.current = self.total = 0
        self.error: str | None = None
        self.user_paused = False
        self._cancelled = False
        self._resume = asyncio.Event()
        self._resume.set()
        self._finalized = asyncio.Event()
        self.settled = asyncio.Event()
        """Set once all jobs of the group are through with their work."""
        self.group: JobGroup | None = None
        self.task: asyncio.Task[None] | None = None

    # --- what a job type writes -------------------------------------------------------------------

    async def run(self) -> None:
        """Do the work. Raises QmpdError or OSError if it cannot be done; calls `pause_point`."""
        raise NotImplementedError

    def validate(self) -> None:
        """Check what only a job that was made is checked for. Raises CommandError."""

    def prepare(self) -> None:
        """Last check before the result counts. Raises QmpdError."""

    async def commit(self) -> None:
        """Make the result count, after the job was finalized."""

    async def abort(self) -> None:
        """Take back what was done, after a failure or cancellation."""

    async def clean(self) -> None:
        """Release everything, whatever the end was."""

    def waits_for_finalize(self) -> None:
        """Called when nothing will happen before job-finalize."""

    def ended(self) -> None:
        """Called when everything is released, before the job counts as concluded."""

    def complete(self) -> None:
        """Leave `ready`: what job-complete asks for."""
        raise CommandError(f"The active block job '{self.id}' cannot be completed")

    # --- state ------------------------------------------------------------------------------------

    def check_verb(self, verb: str) -> None:
        """Raise StateError unless `verb` may be asked of the job now."""
        if self.status not in _VERBS[verb]:
            raise StateError(f"Job '{self.id}' in state '{self.status.value}' cannot accept command verb '{verb}'")

    def move(self, status: Status) -> None:
        """Change the state and tell everybody."""
        assert status in _NEXT[self.status], (self.status, status)
        if status is self.status:
            return
        self.status = status
        self.manager.events.emit("JOB_STATUS_CHANGE", id=self.id, status=status.value)

    @property
    def cancelled(self) -> bool:
        """True once the job was told to stop."""
        return self._cancelled

    def start(self) -> None:
        """Begin; `run` is entered after the command that started the job has been answered."""
        self.move(Status.RUNNING)
        self.task = asyncio.get_running_loop().create_task(self._main(), name=f"job {self.id}")

    async def pause_point(self) -> None:
        """Wait here while paused; raise Cancelled if the job was told to stop."""
        await asyncio.sleep(0)
        if self._cancelled:
            raise Cancelled
        if not self._resume.is_set():
            if self.status in (Status.PAUSED, Status.STANDBY):  # another task of the job has said so
                await self._resume.wait()
            else:
                back = self.status
                self.move(Status.STANDBY if back is Status.READY else Status.PAUSED)
                await self._resume.wait()
                self.move(back)
            if self._cancelled:
                raise Cancelled

    async def _main(self) -> None:
        await asyncio.sleep(0)
        try:
            await self.pause_point()
            await self.run()
            if self._cancelled:
                raise Cancelled
            self.move(Status.WAITING)
            if self.group is not None:
                self.group.through(self)
                await self.settled.wait()
                if self._cancelled:
                    raise Cancelled
            self.prepare()
            self.move(Status.PENDING)
            if not self.auto_finalize:
                self.waits_for_finalize()
                await self._finalized.wait()
                if self._cancelled:
                    raise Cancelled
            await self.commit()
        except Cancelled:
            await self._fail(None)
        except QmpdError as error:
            await self._fail(str(error))
        except OSError as error:
            await self._fail(os.strerror(error.errno) if error.errno else str(error))
        except Exception:
            log.exception("job %s failed by a bug", self.id)
            await self._fail("internal error, see log")
        finally:
            try:
                await self.clean()
            except Exception:
                log.exception("job %s left something behind", self.id)
                self.error = self.error or "internal error, see log"
            self.ended()
        self.move(Status.CONCLUDED)
        if self.auto_dismiss:
            self.forget()

    async def _fail(self, text: str | None) -> None:
        self.error = text
        self.move(Status.ABORTING)
        if self.group is not None:
            self.group.failed(self)
        await self.abort()

    async def discard(self) -> None:
        """End a job that was never started."""
        self._cancelled = True
        self.move(Status.ABORTING)
        await self.clean()
        self.move(Status.CONCLUDED)
        self.forget()

    def forget(self) -> None:
        """Be no more."""
        self.move(Status.NULL)
        self.manager.jobs.pop(self.id, None)

    # --- verbs ------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop at the next pause point. Raises CommandError if it already does."""
        self.check_verb("pause")
        if self.user_paused:
            raise CommandError("Job is already paused")
        self.user_paused = True
        self._resume.clear()

    def resume(self) -> None:
        """Go on after `pause`. Raises CommandError if the job was not paused."""
        if not self.user_paused:
            raise CommandError("Can't resume a job that was not paused")
        self.check_verb("resume")
        self.user_paused = False
        self._resume.set()

    def cancel(self) -> None:
        """Stop the job; it ends in `aborting`."""
        self.check_verb("cancel")
        self._cancelled = True
        self.user_paused = False
        self._resume.set()
        self._finalized.set()
        self.settled.set()

    def finalize(self) -> None:
        """Let a pending job conclude."""
        self.check_verb("finalize")
        self._finalized.set()

    def dismiss(self) -> None:
        """Forget a concluded job."""
        self.check_verb("dismiss")
        self.forget()

    def to_wire(self) -> dict[str, Any]:
        """Return JobInfo."""
        reply: dict[str, Any] = {
            "id": self.id,
            "type": self.job_type,
            "status": self.status.value,
            "current-progress": self.current,
            "total-progress": self.total,
        }
        if self.error is not None:
            reply["error"] = self.error
        return reply


class JobManager:
    """All jobs of a daemon, by id."""

    def __init__(self, events: EventBus) -> None:
        self.events = events
        self.jobs: dict[str, Job] = {}

    async def begin(self, job: Job, prepare: Callable[[], Awaitable[None]], *, created_first: bool = False) -> None:
        """Start a job once its id is known to be good and the graph is as it needs it. Raises QmpdError.

        created_first   it counts as created before the graph is changed for it
        """
        await self.admit(job, prepare, created_first=created_first)
        job.start()

    async def admit(self, job: Job, prepare: Callable[[], Awaitable[None]], *, created_first: bool = False) -> None:
        """Do the same, but leave starting it to the caller."""
        self.check_id(job.id)
        try:
            if created_first:
                self.add(lambda: job, job.id).validate()
                await prepare()
            else:
                await prepare()
                self.add(lambda: job, job.id).validate()
        except BaseException:
            if job.status is Status.CREATED:
                job.forget()
            await job.clean()
            raise

    def check_id(self, job_id: str) -> None:
        """Raise CommandError for an id that is malformed or in use."""
        if not _ID.match(job_id):
            raise CommandError(f"Invalid job ID '{job_id}'")
        if job_id in self.jobs:
            raise CommandError(f"Job ID '{job_id}' already in use")

    def add(self, make: Callable[[], Job], job_id: str) -> Job:
        """Check the id, make the job and announce it as created. Raises CommandError."""
        self.check_id(job_id)
        job = make()
        self.jobs[job_id] = job
        job.move(Status.CREATED)
        return job

    def find(self, job_id: str) -> Job:
        """Return the job `job_id`. Raises CommandError."""
        if job_id not in self.jobs:
            raise CommandError("Job not found")
        return self.jobs[job_id]

    def newest_first(self) -> list[Job]:
        """Return the jobs in the order in which they are listed."""
        return list(reversed(self.jobs.values()))

    async def close(self) -> None:
        """Cancel every job and wait for all: at the end of the program."""
        for job in list(self.jobs.values()):
            if job.status in _VERBS["cancel"]:
                job.cancel()
        tasks = [job.task for job in self.jobs.values() if job.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
