"""`blockdev-reopen` beside QEMU's: the same nodes, the same new options, the same answers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.answers import Request, converse, node, wire
from tests.support.nbd_servers import qemu, serving

MiB = 1 << 20
ARGUMENTS = [
    *("--object", "secret,id=s,data=sesame", "--object", "secret,id=s2,data=sesame"),
    *("--object", "throttle-group,id=t", "--object", "throttle-group,id=t2"),
]
GONE = object()
"""The option is left out."""
SHOWN: Request = ("query-named-block-nodes", {"flat": True})
GRAPH: Request = ("x-debug-query-block-graph", {})


def reopen(*trees: dict[str, Any]) -> Request:
    return "blockdev-reopen", {"options": [wire(tree) for tree in trees]}


def delete(name: str) -> Request:
    return "blockdev-del", {"node-name": name}


def each(base: dict[str, Any], changes: list[dict[str, Any]]) -> list[Request]:
    """For every change: open `base`, reopen it with the change, look at it, go back, close it."""
    requests: list[Request] = []
    for change in changes:
        tree = {name: value for name, value in {**base, **change}.items() if value is not GONE}
        requests += [("blockdev-add", wire(base)), reopen(tree), SHOWN, reopen(base), delete(base["node_name"])]
    return requests


def prepare(folder: Path) -> None:
    """Make images in the folder that both programs are going to have copies of."""

    def run(*words: str | Path) -> None:
        subprocess.run(words, check=True, timeout=60)

    secret = ["--object", "secret,id=s,data=sesame"]
    encrypted = ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "q.qcow2", "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "q.qcow2", "-F", "qcow2", folder / "o.qcow2")
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", *encrypted, folder / "e.qcow2", "1M")
    run("qemu-img", "create", "-q", *secret, "-f", "luks", "-o", "key-secret=s,iter-time=10", folder / "l.luks", "1M")


FILE = {"driver": "file", "node_name": "f", "filename": "a.img"}
FILE_CHANGES: list[dict[str, Any]] = [
    {},
    {"read_only": True},
    {"read_only": False},
    {"auto_read_only": True},
    {"cache": {"direct": True}},
    {"cache": {"direct": True, "no-flush": True}},
    {"locking": "on"},
    {"locking": "auto"},
    {"drop_cache": False},
    {"x_check_cache_dropped": True},
    {"force_share": False},
    {"read_only": True, "force_share": True},
    {"discard": "unmap"},
    {"detect_zeroes": "unmap"},
    {"detect_zeroes": "on"},
    {"discard": "unmap", "detect_zeroes": "unmap"},
    {"active": True},
    {"aio": "native"},
    {"aio_max_batch": 3},
    {"pr_manager": "x"},
    {"filename": "b.img"},
    {"read_only": True, "locking": "off", "aio_max_batch": 2, "filename": "b.img"},
    {"node_name": GONE},
]
GIVEN = {**FILE, "locking": "on", "aio": "threads", "drop_cache": True, "discard": "unmap"}


def test_files(tmp_path: Path) -> None:
    requests = each(FILE, FILE_CHANGES)
    requests += each(GIVEN, [{}, *({name: GONE} for name in ("locking", "aio", "drop_cache", "discard"))])
    requests += each(GIVEN, [{"locking": GONE, "aio": GONE, "drop_cache": GONE}, {"locking": "off"}])
    shared = {**FILE, "read_only": True, "force_share": True}
    requests += each(shared, [{}, {"force_share": GONE}, {"read_only": False}, {"read_only": GONE}])
    converse(tmp_path, requests, args=ARGUMENTS)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (
            {"driver": "raw", "file": "f"},
            [
                {"offset": 512},
                {"size": 1024},
                {"offset": 512, "size": 512},
                {"size": 1 << 30},
                {"size": 513},
                {"offset": 1 << 30},
                {"file": "g"},
                {"file": "n"},
                {"file": "none"},
            ],
        ),
        ({"driver": "raw", "file": "f", "offset": 512, "size": 1024}, [{"size": GONE}, {"offset": GONE}]),
        ({"driver": "null-co", "size": 1024}, [{"size": 2048}, {"size": GONE}, {"read_zeroes": True}]),
        ({"driver": "null-aio", "latency_ns": 3}, [{"latency_ns": 4}, {"latency_ns": GONE}]),
        (
            {"driver": "blkdebug", "image": "f"},
            [{"align": 512}, {"inject_error": [{"event": "read_aio"}]}, {"set_state": []}, {"image": "g"}],
        ),
        (
            {"driver": "throttle", "file": "f", "throttle_group": "t"},
            [{"throttle_group": "t2"}, {"throttle_group": "none"}, {"file": "g"}],
        ),
        (
            {"driver": "preallocate", "file": "f", "prealloc_size": 4 * MiB},
            [{"prealloc_align": 2 * MiB}, {"prealloc_size": 2 * MiB}, {"prealloc_size": GONE}, {"prealloc_align": 9}],
        ),
        ({"driver": "blkverify", "test": "f", "raw": "g"}, []),
        ({"driver": "copy-on-read", "file": "f"}, [{"bottom": "f"}]),
        ({"driver": "copy-before-write", "file": "f", "target": "g"}, [{"cbw_timeout": 3}]),
        ({"driver": "snapshot-access", "file": "f"}, []),
        ({"driver": "compress", "file": "q"}, []),
    ],
    ids=lambda value: value["driver"] if isinstance(value, dict) else "",
)
def test_drivers(base: dict[str, Any], changes: list[dict[str, Any]], tmp_path: Path) -> None:
    need("qemu-img")
    common: list[dict[str, Any]] = [{}, {"read_only": True}, {"cache": {"direct": True}}, {"discard": "unmap"}]
    requests = [node("file", "f", filename="a.img"), node("file", "g", filename="b.img")]
    requests.append(node("qcow2", "q", file={"driver": "file", "filename": "q.qcow2"}))
    requests += each({**base, "node_name": "n"}, [*common, *changes])
    converse(tmp_path, requests, args=ARGUMENTS, prepare=prepare)


FILE_OF_N = {"driver": "file", "filename": "q.qcow2", "node-name": "nf"}


def test_children_that_were_opened_for_a_node(tmp_path: Path) -> None:
    need("qemu-img")
    base = {"driver": "qcow2", "node_name": "n", "file": FILE_OF_N}
    changes: list[dict[str, Any]] = [
        {"file": "nf"},
        {"file": {"driver": "file", "filename": "q.qcow2"}},
        {"file": {**FILE_OF_N, "node-name": "zz"}},
        {"file": {**FILE_OF_N, "locking": "on"}},
        {"file": {**FILE_OF_N, "filename": "a.img"}},
        {"file": {**FILE_OF_N, "driver": "host_device"}},
        {"file": {**FILE_OF_N, "read-only": True}},
        {"file": {**FILE_OF_N, "cache": {"direct": True}}},
        {"cache": {"direct": True}},
        {"read_only": True},
        {"read_only": True, "file": {**FILE_OF_N, "read-only": False}},
        {"read_only": True, "file": "nf"},
        {"backing": None},
        {"backing": "z"},
        {"backing": {"driver": "null-co"}},
        {"data_file": "z"},
        {"data_file": "nf"},
    ]
    requests = [node("null-co", "z", size=MiB), *each(base, changes)]
    whole = {**base, "backing": {"driver": "null-co", "node-name": "bk", "size": MiB}}
    requests += each(whole, [{}, {"backing": "bk"}, {"backing": "z"}, {"backing": None}, {"backing": GONE}])
    requests += each(whole, [{"backing": {"driver": "null-co", "node-name": "bk", "size": 2 * MiB}}, {"backing": "n"}])
    overlay = {"driver": "qcow2", "node_name": "n", "file": {"driver": "file", "filename": "o.qcow2"}}
    requests += [("blockdev-add", wire(overlay)), reopen(overlay), reopen({**overlay, "backing": None}), SHOWN]
    requests += [reopen(overlay), reopen({**overlay, "backing": "z"}), SHOWN, GRAPH, delete("n")]
    converse(tmp_path, requests, args=ARGUMENTS, prepare=prepare)


def test_options_of_qcow2(tmp_path: Path) -> None:
    need("qemu-img")
    base = {"driver": "qcow2", "node_name": "n", "file": {"driver": "file", "filename": "q.qcow2"}}
    changes: list[dict[str, Any]] = [
        {"l2_cache_size": 1},
        {"cache_size": MiB, "l2_cache_size": 2 * MiB},
        {"lazy_refcounts": True},
        {"overlap_check": "all"},
        {"overlap_check": {"template": "none", "main-header": True}},
        {"l2_cache_entry_size": 100},
        {"l2_cache_entry_size": 65536},
        {"cache_clean_interval": -1},
        {"pass_discard_other": True, "discard": "unmap"},
        {"discard_no_unref": True},
    ]
    requests = [node("file", "e", filename="e.qcow2"), *each(base, changes)]
    encrypted = {"driver": "qcow2", "node_name": "n", "file": "e", "encrypt": {"format": "luks", "key-secret": "s"}}
    requests += each(encrypted, [{}, {"encrypt": GONE}, {"read_only": True}])
    for options in ({"key-secret": "s2"}, {}, {"key-secret": "none"}, {"format": "aes", "key-secret": "s"}):
        requests += each(encrypted, [{"encrypt": {"format": "luks", **options}}])
    converse(tmp_path, requests, args=ARGUMENTS, prepare=prepare)


def test_options_of_luks(tmp_path: Path) -> None:
    need("qemu-img")
    base = {"driver": "luks", "node_name": "n", "file": "l", "key_secret": "s"}
    changes: list[dict[str, Any]] = [
        {},
        {"read_only": True},
        {"discard": "unmap"},
        {"key_secret": "s2"},
        {"key_secret": GONE},
        {"header": "l"},
        {"header": {"driver": "file", "filename": "l.luks"}},
        {"file": "copy"},
    ]
    requests = [node("file", "l", filename="l.luks"), node("raw", "copy", file="l"), *each(base, changes)]
    converse(tmp_path, requests, args=ARGUMENTS, prepare=prepare)


def test_several_nodes_and_who_uses_them(tmp_path: Path) -> None:
    """Writable users keep nodes writable, unless they are changed in the same command."""
    f, g = FILE, {"driver": "file", "node_name": "g", "filename": "b.img"}
    r = {"driver": "raw", "node_name": "r", "file": "f"}
    requests = [("blockdev-add", wire(one)) for one in (f, g, r)]
    requests += [reopen({**f, "read_only": True}), reopen({**r, "read_only": True}, {**f, "read_only": True}), SHOWN]
    requests += [reopen({**r, "file": "g"}), reopen({**r, "file": "g"}, g, {"driver": "file", "node_name": "x"}), GRAPH]
    requests += [reopen(f, {**r, "file": "g"}), GRAPH, reopen({**r, "read_only": True}, {**r, "size": 512}), SHOWN]
    requests += [reopen({**g, "read_only": True}, {**r, "file": "g"}), SHOWN]
    converse(tmp_path, requests, args=ARGUMENTS)


def test_nodes_on_a_server(tmp_path: Path) -> None:
    need("qemu-storage-daemon")
    options = ["--blockdev", f"null-co,node-name=z,size={MiB}"]
    options += serving(tmp_path, "nbd,id=e,node-name=z", "nbd,id=w,node-name=z,name=w,writable=on")
    base = {"driver": "nbd", "node_name": "n", "server": {"type": "unix", "path": str(tmp_path / "n.sock")}}
    changes: list[dict[str, Any]] = [
        {},
        {"read_only": True},
        {"read_only": False},
        {"auto_read_only": True},
        {"export": "w"},
        {"export": "z"},
        {"export": GONE},
        {"reconnect_delay": 3},
        {"server": {"type": "unix", "path": "x"}},
    ]
    requests = each({**base, "export": "z", "read_only": True}, changes)
    requests += each({**base, "export": "z", "auto_read_only": True}, changes)
    requests += each({**base, "export": "w"}, changes)
    with qemu(tmp_path / "server", *options):
        converse(tmp_path, requests, args=ARGUMENTS)
