"""Growing encrypted images with their space taken at once, and going back to version 2: as qemu-img does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.data_files import call

SECRET = ("--object", "secret,id=s,data=abc123")
KINDS = {
    "luks": ("luks", "key-secret=s,iter-time=10", "driver=luks,key-secret=s,file.filename="),
    "qcow2": ("qcow2", "cluster_size=4k", "driver=qcow2,file.filename="),
    "encrypted": (
        "qcow2",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        "driver=qcow2,encrypt.key-secret=s,file.filename=",
    ),
}


def info(tool: str, name: str) -> Any:
    """Return what the tool tells as JSON; warnings stand before or after it."""
    said = call(tool, "info", "--output=json", name)[1]
    return json.loads(said[said.index("{") : said.rindex("}") + 1])


def runs(told: str) -> list[tuple[dict[str, Any], int]]:
    """Return what a map says but for where it lies in the file, as (what, bytes); neighbours that agree are one."""
    found: list[tuple[dict[str, Any], int]] = []
    for one in json.loads(told):
        what = {key: value for key, value in one.items() if key not in ("start", "length", "offset")}
        if found and found[-1][0] == what:
            found[-1] = (what, found[-1][1] + one["length"])
        else:
            found.append((what, one["length"]))
    return found


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_growing_with_preallocation(kind: str, mode: str) -> None:
    """Both say the same, the maps are the same, and the space is taken where it was asked for."""
    image_format, options, opener = KINDS[kind]
    assert call("qemu-img", "create", "-q", *SECRET, "-f", image_format, "-o", options, "mine", "1M")[0] == 0
    shutil.copyfile("mine", "theirs")
    seen, sizes = [], []
    for tool, name in (("qmpd-img", "mine"), ("qemu-img", "theirs")):
        before = os.stat(name).st_blocks
        said = call(tool, "resize", *SECRET, "--image-opts", f"--preallocation={mode}", opener + name, "3M")
        told = runs(call("qemu-img", "map", "--output=json", *SECRET, "--image-opts", opener + name)[1])
        grown = (os.stat(name).st_blocks - before) * 512 >= 2 << 20
        seen.append((said, told, grown))
        sizes.append(os.path.getsize(name))
        if image_format == "qcow2":
            checked = call("qemu-img", "check", "-q", *SECRET, "--image-opts", opener + name)
            assert checked == (0, "")
    assert seen[0] == seen[1]
    assert seen[0][2] == (mode in ("falloc", "full"))
    assert abs(sizes[0] - sizes[1]) <= 2 * 4096  # the tables that grew may lie elsewhere


def test_version_2_has_no_bitmaps() -> None:
    """They go, with their clusters; qemu-img leaves those behind as leaks, and warns of the image for ever."""
    for tool, name in (("qmpd-img", "mine"), ("qemu-img", "theirs")):
        call("qemu-img", "create", "-q", "-f", "qcow2", name, "3M")
        for words in (("--add", name, "on"), ("--add", "--disable", name, "off")):
            assert call("qemu-img", "bitmap", *words) == (0, "")
        assert call(tool, "amend", "-o", "compat=0.10", name) == (0, "")
        told = info("qmpd-img", name)
        assert told["format-specific"]["data"]["compat"] == "0.10"
    assert call("qemu-img", "check", "-q", "mine") == (0, "")
    assert call("qemu-img", "check", "-q", "theirs")[0] == 3
    for name in ("mine", "theirs"):
        assert call("qmpd-img", "amend", "-o", "compat=1.1", name) == (0, "")
        told = info("qemu-img", name)
        assert "bitmaps" not in told["format-specific"]["data"]
    assert call("qmpd-img", "bitmap", "--add", "mine", "on") == (0, "")
