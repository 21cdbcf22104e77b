"""Jobs move through QEMU's states, accept its verbs in each, and announce every move."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qmpd.errors import CommandError, StateError
from qmpd.events import EventBus
from qmpd.jobs.job import Job, JobManager, Status


class Steps(Job):
    """Counts to three, one pause point each."""

    job_type = "create"
    fails: str | None = None
    aborted = committed = False

    async def run(self) -> None:
        self.total = 3
        for _ in range(3):
            await self.pause_point()
            self.current += 1
        if self.fails:
            raise CommandError(self.fails)

    async def commit(self) -> None:
        self.committed = True

    async def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def manager(heard: list[str]) -> JobManager:
    bus = EventBus()
    bus.subscribe(lambda event: heard.append(event.data["status"] if event.data else ""))
    return JobManager(bus)


def start(manager: JobManager, job_id: str = "j", **options: Any) -> Steps:
    job = manager.add(lambda: Steps(manager, job_id, **options), job_id)
    assert isinstance(job, Steps)
    job.start()
    return job


async def ended(job: Job) -> None:
    assert job.task is not None
    await asyncio.wait_for(job.task, 5)


async def test_a_job_that_succeeds_goes_through_waiting_and_pending(manager: JobManager, heard: list[str]) -> None:
    job = start(manager)
    assert heard == ["created", "running"], "both are announced before the command is answered"
    await ended(job)
    assert heard == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert job.committed
    assert manager.jobs == {}


async def test_a_job_that_fails_aborts_and_keeps_its_error_until_it_is_dismissed(
    manager: JobManager, heard: list[str]
) -> None:
    job = start(manager, auto_dismiss=False)
    job.fails = "no such luck"
    await ended(job)
    assert heard == ["created", "running", "aborting", "concluded"]
    assert job.aborted
    assert not job.committed
    assert job.to_wire() == {
        "id": "j",
        "type": "create",
        "status": "concluded",
        "current-progress": 3,
        "total-progress": 3,
        "error": "no such luck",
    }
    job.dismiss()
    assert heard[-1] == "null"
    with pytest.raises(CommandError, match=r"^Job not found$"):
        manager.find("j")


async def test_without_auto_finalize_a_job_waits_in_pending(manager: JobManager, heard: list[str]) -> None:
    job = start(manager, auto_finalize=False)
    for _ in range(20):
        await asyncio.sleep(0)
    assert job.status is Status.PENDING
    assert not job.committed
    job.finalize()
    await ended(job)
    assert job.committed


async def test_a_paused_job_does_nothing_until_it_is_resumed(manager: JobManager, heard: list[str]) -> None:
    job = start(manager)
    job.pause()
    with pytest.raises(CommandError, match=r"^Job is already paused$"):
        job.pause()
    for _ in range(20):
        await asyncio.sleep(0)
    assert (job.status, job.current) == (Status.PAUSED, 0)
    job.resume()
    with pytest.raises(CommandError, match=r"^Can't resume a job that was not paused$"):
        job.resume()
    await ended(job)
    assert heard == ["created", "running", "paused", "running", "waiting", "pending", "concluded", "null"]


async def test_a_cancelled_job_takes_back_its_work_even_when_it_is_paused(manager: JobManager) -> None:
    job = start(manager, auto_dismiss=False)
    job.pause()
    for _ in range(20):
        await asyncio.sleep(0)
    job.cancel()
    await ended(job)
    assert job.aborted
    assert not job.committed
    assert job.status is Status.CONCLUDED


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "complete", "finalize"])
async def test_a_concluded_job_accepts_only_its_dismissal(manager: JobManager, verb: str) -> None:
    job = start(manager, auto_dismiss=False)
    await ended(job)
    text = f"Job 'j' in state 'concluded' cannot accept command verb '{verb}'"
    with pytest.raises(StateError, match=rf"^{text}$"):
        job.check_verb(verb)


@pytest.mark.parametrize("job_id", ["", "a b", "1a", "é"])
async def test_a_bad_job_id_is_refused(manager: JobManager, job_id: str) -> None:
    with pytest.raises(CommandError, match=rf"^Invalid job ID '{job_id}'$"):
        start(manager, job_id)


async def test_an_id_is_taken_until_the_job_is_dismissed(manager: JobManager) -> None:
    job = start(manager, auto_dismiss=False)
    with pytest.raises(CommandError, match=r"^Job ID 'j' already in use$"):
        start(manager)
    await ended(job)
    job.dismiss()
    await ended(start(manager))
