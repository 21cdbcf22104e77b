"""blkdebug: rules hit what they name, when they are armed and nowhere else; without rules nothing changes."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.filename import node_filename
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.drivers._qcow2_create import create_qcow2
from qmpd.errors import CommandError
from qmpd.events import EventBus
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

SIZE = 1 << 20


async def opened(tmp_path: Path, size: int = SIZE, **options: Any) -> tuple[Graph, BlockBackend]:
    """A file and the filter above it."""
    discover(("drivers",))
    graph = Graph(ObjectTree(), EventBus())
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(size)
    image = {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk"), "discard": "unmap"}
    await graph.blockdev_add(image)
    tree = {"driver": "blkdebug", "node-name": "debug", "image": "file", "discard": "unmap"}
    await graph.blockdev_add(tree | {name.replace("_", "-"): options[name] for name in options})
    return graph, user_of(graph, "debug")


def user_of(graph: Graph, name: str) -> BlockBackend:
    user = BlockBackend(graph, lambda: "an unnamed block device", Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    user.insert(graph.find_node(name))
    return user


async def errno_of(work: Any) -> int:
    try:
        await work
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("read", {"read"}),
        ("write", {"write"}),
        ("write-zeroes", {"zero"}),
        ("discard", {"discard"}),
        ("flush", {"flush"}),
        ("block-status", {"status"}),
        (None, {"read", "write", "zero", "discard", "flush"}),
    ],
)
async def test_a_rule_hits_its_kind_of_request(tmp_path: Path, kind: str | None, expected: set[str]) -> None:
    rule = {"event": "none", "errno": errno.ENOSPC} | ({"iotype": kind} if kind else {})
    graph, user = await opened(tmp_path, inject_error=[rule])
    works = {
        "read": user.pread(0, 512),
        "write": user.pwrite(0, b"x" * 512),
        "zero": user.pwrite_zeroes(0, 4096, WriteFlags.NO_FALLBACK),
        "discard": user.pdiscard(0, 4096),
        "flush": user.flush(),
        "status": user.block_status(0, 4096),
    }
    met = {name: await errno_of(work) for name, work in works.items()}
    assert {name for name in met if met[name]} == expected
    assert set(met.values()) <= {0, errno.ENOSPC}
    await graph.close_all()


async def test_a_rule_for_a_sector_and_for_one_time(tmp_path: Path) -> None:
    graph, user = await opened(tmp_path, inject_error=[{"event": "none", "sector": 3, "once": True}])
    batch = Batch(Request(at, memoryview(bytearray(512))) for at in range(0, 4096, 512))
    await user.preadv(batch)
    assert [request.error for request in batch] == [0, 0, 0, errno.EIO, 0, 0, 0, 0]
    assert await errno_of(user.pread(0, 4096)) == 0
    await graph.close_all()


async def test_states_lead_from_one_rule_to_the_next(tmp_path: Path) -> None:
    graph, user = await opened(
        tmp_path,
        inject_error=[{"event": "pwritev", "state": 2}, {"event": "pwritev", "state": 3, "errno": errno.ENOSPC}],
        set_state=[
            {"event": "pwritev_done", "state": 1, "new_state": 2},
            {"event": "pwritev_done", "state": 2, "new_state": 3},
        ],
    )
    errors = [await errno_of(user.pwrite(0, b"1" * 512)) for _ in range(4)]
    assert errors == [0, errno.EIO, errno.ENOSPC, errno.ENOSPC]
    await graph.close_all()


@pytest.mark.parametrize("seed", range(4))
async def test_random_requests_match_a_bytearray_through_odd_limits(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    limits = rng.choice(
        [
            {},
            {"align": 4096, "max_transfer": 8192},
            {"align": 512, "opt_write_zero": 3072, "max_write_zero": 6144, "opt_discard": 1536},
            {"align": 65536, "max_discard": 65536, "max_transfer": 65536},
        ]
    )
    size = SIZE
    graph, user = await opened(tmp_path, size, **limits)
    model = bytearray(size)
    for _ in range(150):
        at = rng.randrange(size)
        length = rng.randint(1, min(size - at, 200_000))
        kind = rng.choice(("read", "write", "zero", "discard"))
        if kind == "read":
            assert await user.pread(at, length) == model[at : at + length]
        elif kind == "write":
            data = rng.randbytes(length)
            await user.pwrite(at, data)
            model[at : at + length] = data
        elif kind == "zero":
            await user.pwrite_zeroes(at, length, rng.choice((WriteFlags.NONE, WriteFlags.MAY_UNMAP)))
            model[at : at + length] = bytes(length)
        else:
            await user.pdiscard(at, length)
            got = await user.pread(at, length)
            assert all(a in (0, b) for a, b in zip(got, model[at : at + length], strict=True))
            model[at : at + length] = got
    assert await user.pread(0, size) == model
    await graph.close_all()
    assert (tmp_path / "disk").read_bytes()[:size] == model


@pytest.mark.parametrize("event", ["l2_load", "read_aio", "write_aio", "cluster_alloc", "l2_update", "flush_to_disk"])
async def test_qcow2_tells_of_what_it_does(tmp_path: Path, event: str) -> None:
    discover(("drivers",))
    graph = Graph(ObjectTree(), EventBus())
    (tmp_path / "a").touch()
    await graph.blockdev_add({"driver": "file", "node-name": "file", "filename": str(tmp_path / "a")})
    maker = BlockBackend(graph, lambda: "an unnamed block device", Perm.WRITE | Perm.RESIZE, Perm.ALL)
    maker.may_grow = True
    maker.insert(graph.find_node("file"))
    await create_qcow2(maker, size=SIZE, cluster_size=4096)
    await maker.remove()
    rule = {"event": event, "errno": errno.ENOSPC}
    debug = {"driver": "blkdebug", "node-name": "debug", "image": "file", "inject-error": [rule]}
    await graph.blockdev_add(debug)
    await graph.blockdev_add({"driver": "qcow2", "node-name": "q", "file": "debug"})
    user = user_of(graph, "q")
    node = graph.find_node("debug")
    assert await errno_of(user.pread(0, 4096)) == 0
    outcomes = [
        await errno_of(user.pwrite(0, b"a" * 4096)),
        await errno_of(user.flush()),
        await errno_of(user.pread(0, 4096)),
    ]
    assert errno.ENOSPC in outcomes, outcomes
    assert set(outcomes) <= {0, errno.ENOSPC}
    node.rules._inject.clear()  # type: ignore[attr-defined]
    node.rules._armed.clear()  # type: ignore[attr-defined]
    await user.pwrite(8192, b"b" * 4096)
    await user.flush()
    assert await user.pread(8192, 4096) == b"b" * 4096
    await graph.close_all()


GOOD = '# rules\n\n[inject-error "one"]\nevent = "none"\nerrno = "0x1c"\nonce = "on"\n[set-state]\nevent = "pwritev"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("garbage\n", "no group defined"),
        ('event = "read_aio"\n', "no group defined"),
        ("   \n", "parse error"),
        ('[nosuch]\nevent = "read_aio"\n', "There is no option group 'nosuch'"),
        ('[inject-error]\nfoo = "x"\n', "Invalid parameter 'foo'"),
        ('[inject-error]\nevent = "x"\n', "invalid parameter value: x"),
        ('[inject-error]\nerrno = "5"\n', "Missing event name for rule"),
        ('[inject-error]\nevent = "none"\nerrno = "x"\n', "Parameter 'errno' expects a number"),
        ('[inject-error]\nevent = "none"\nonce = "x"\n', "Parameter 'once' expects 'on' or 'off'"),
        ('[inject-error]\nevent = "none"\niotype = "x"\n', "invalid parameter value: x"),
        ('[set-state]\nevent = "none"\nstate="-1"\n', "Invalid parameter 'state=\"-1\"'"),
        ('[inject-error "a b"]\nevent = "none"\n', "Parameter 'id' expects an identifier"),
        ('[set-state "a"]\nevent = "none"\n[set-state "a"]\n', "Duplicate ID 'a' for set-state"),
        (
            '[inject-error]\nevent = "none"\nerrno = "99999999999999999999999"\n',
            "Value '99999999999999999999999' is too large for parameter 'errno'",
        ),
    ],
)
async def test_configuration_errors_are_the_references(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rules").write_text(text)
    with pytest.raises(CommandError) as caught:
        await opened(tmp_path, config=str(tmp_path / "rules"))
    assert str(caught.value) == message


async def test_a_configuration_file_holds_rules(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text(GOOD)
    graph, user = await opened(tmp_path, config=str(tmp_path / "rules"))
    assert [await errno_of(user.pread(0, 512)) for _ in range(2)] == [errno.ENOSPC, 0]
    assert node_filename(graph.find_node("debug")) == f"blkdebug:{tmp_path}/rules:{tmp_path}/disk"
    await graph.close_all()


async def test_a_configuration_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"^Could not read blkdebug config file: No such file or directory$"):
        await opened(tmp_path, config=str(tmp_path / "nosuch"))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"align": 1000}, "Cannot meet constraints with align 1000"),
        ({"align": -1}, "Value '-1' is out of range for parameter 'align'"),
        ({"align": 1 << 32}, "Cannot meet constraints with align 4294967296"),
        ({"align": 512, "max_transfer": 1000}, "Cannot meet constraints with max-transfer 1000"),
        ({"align": 512, "opt_write_zero": 4096, "max_write_zero": 1024}, "Cannot meet constraints with max-write-zero"),
        ({"align": 512, "opt_discard": 7}, "Cannot meet constraints with opt-discard 7"),
    ],
)
async def test_limits_that_contradict_each_other(tmp_path: Path, limits: dict[str, int], message: str) -> None:
    with pytest.raises(CommandError) as caught:
        await opened(tmp_path, **limits)
    assert str(caught.value).startswith(message)


async def test_permissions_are_taken_and_denied(tmp_path: Path) -> None:
    graph, user = await opened(tmp_path, take_child_perms=["resize"], unshare_child_perms=["write"])
    edge = graph.find_node("debug").children["image"]
    assert edge.perm == Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
    assert edge.shared == Perm.ALL & ~Perm.WRITE
    with pytest.raises(CommandError, match="permissions 'write' are both required by"):
        user_of(graph, "file")
    await user.remove()
    await graph.close_all()
