"""Transactions where QEMU's daemon ends: enabling a bitmap that is not there, or that may not be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.daemon import running


def act(verb: str, name: str) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": "n", "name": name}}


def test_a_failed_enable_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        client.ok("blockdev-add", driver="null-co", node_name="n", size=1 << 20)
        disabled = {"node": "n", "name": "a", "disabled": True}
        assert client.send({"execute": "block-dirty-bitmap-add", "arguments": disabled}) == {"return": {}}

        def recording() -> dict[str, bool]:
            [node] = client.ok("query-named-block-nodes")
            return {one["name"]: one["recording"] for one in node["dirty-bitmaps"]}

        for actions, text in (
            ([act("enable", "a"), act("enable", "nosuch")], "Dirty bitmap 'nosuch' not found"),
            ([act("enable", "a"), act("remove", "a"), act("enable", "a")], "currently in use by another operation"),
            ([act("add", "b"), act("enable", "a"), {"type": "abort", "data": {}}], "Transaction aborted"),
        ):
            reply = client.command("transaction", actions=actions)
            assert text in reply["error"]["desc"]
            assert recording() == {"a": False}
        assert client.command("transaction", actions=[act("enable", "a")]) == {"return": {}}
        assert recording() == {"a": True}
