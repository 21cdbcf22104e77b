"""The same requests to QEMU's programs and to ours, each in a folder of its own: the answers have to be equal."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.daemon import RawClient, running
from tests.support.peers import need
from tests.support.reference import reference

MiB = 1 << 20
OURS = {"qemu-storage-daemon": "qmpd-storage-daemon", "qemu-system-x86_64": "qmpd"}
MASKED = ("filename", "thread-id", "actual-size", "iters", "master-key-iters", "uuid")

Request = tuple[str, dict[str, Any]]


def masked(value: Any) -> Any:
    """Replace what differs between two runs of one program."""
    if isinstance(value, dict):
        return {key: "..." if key in MASKED else masked(value[key]) for key in value}
    if isinstance(value, list):
        return [masked(one) for one in value]
    if isinstance(value, str):
        if value.startswith("json:"):
            return {"json:": json.loads(value.removeprefix("json:"))}
        return re.sub(r"#block\d+", "#block", value)
    return value


def difference(one: Any, two: Any) -> str:
    """Show two values, without the members that are equal."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return ", ".join(f"{key}: {difference(one[key], two[key])}" for key in one if one[key] != two[key])
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return ", ".join(
            f"[{at}] {difference(*both)}" for at, both in enumerate(zip(one, two, strict=True)) if both[0] != both[1]
        )
    return f"theirs {json.dumps(one)[:700]}, ours {json.dumps(two)[:700]}"


def ask(client: RawClient, name: str, arguments: dict[str, Any]) -> Any:
    """Send a request; of a job that it starts the error counts as well."""
    reply = masked(client.send({"execute": name, "arguments": arguments}))
    if name != "blockdev-create" or "error" in reply:
        return reply
    deadline = time.monotonic() + 60
    while True:
        (job,) = (one for one in client.ok("query-jobs") if one["id"] == arguments["job-id"])
        if job["status"] == "concluded":
            if job["id"] != "kept":
                client.ok("job-dismiss", id=job["id"])
            return job.get("error", "done")
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


@contextlib.contextmanager
def monitor_of(name: str, folder: Path, *args: str) -> Iterator[RawClient]:
    """Run one of the four programs."""
    if name in OURS:
        with reference(folder, *args, name=name) as client:
            yield client
    else:
        with running(folder, *args, name=name) as daemon:
            yield daemon.client()


def converse(
    folder: Path,
    requests: list[Request],
    *,
    theirs: str = "qemu-storage-daemon",
    args: Sequence[str] = (),
    prepare: Callable[[Path], None] | None = None,
) -> None:
    """Send the requests to both programs and compare; `prepare` makes images that each gets a copy of."""
    need(theirs)
    answers = []
    for name in (theirs, OURS[theirs]):
        home = folder / name
        home.mkdir()
        if prepare is not None:
            source = folder / "images"
            if not source.exists():
                source.mkdir()
                prepare(source)
            shutil.copytree(source, home, dirs_exist_ok=True)
        for file, size in (("a.img", MiB), ("b.img", MiB), ("c.img", MiB)):
            (home / file).write_bytes(b"")
            with (home / file).open("r+b") as made:
                made.truncate(size)
        with monitor_of(name, home, *args) as client:
            answers.append([ask(client, *request) for request in requests])
    wrong = [
        f"{name} {json.dumps(arguments)[:300]}\n  {difference(one, two)}"
        for (name, arguments), one, two in zip(requests, *answers, strict=True)
        if one != two
    ]
    assert not wrong, "\n".join(wrong)


def wire(members: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): members[key] for key in members}


def node(driver: str, name: str, **members: Any) -> Request:
    return "blockdev-add", {
        "driver": driver,
        "node-name": name,
        **{key.replace("_", "-"): members[key] for key in members},
    }


def create(number: int, driver: str, **members: Any) -> Request:
    options = {"driver": driver, **wire(members)}
    return "blockdev-create", {"job-id": f"j{number}", "options": options}


FILES = [node("file", name, filename=f"{name}.img") for name in "abc"]
SECRET = ("object-add", {"qom-type": "secret", "id": "s", "data": "sesame"})


def luks(number: int, **members: Any) -> Request:
    return create(number, "luks", **{"iter_time": 10, "key_secret": "s", **members})
