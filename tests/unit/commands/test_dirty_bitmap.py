"""What the bitmap commands look at first."""

from __future__ import annotations

from pathlib import Path

from tests.support.daemon import running


def test_an_empty_name_is_refused_before_a_node_that_there_is_not(tmp_path: Path) -> None:
    add = {"type": "block-dirty-bitmap-add", "data": {"node": "nosuch", "name": ""}}
    with running(tmp_path) as daemon:
        client = daemon.client()
        for reply in (
            client.send({"execute": "block-dirty-bitmap-add", "arguments": add["data"]}),
            client.command("transaction", actions=[add]),
        ):
            assert reply["error"]["desc"] == "Bitmap name cannot be empty"
