"""What the tests of external data files share: both tools, called alike."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmpd.cli.main import img_main

PLAIN, RAW = "data_file=d.raw", "data_file=d.raw,data_file_raw=on"


def qemu_img(*arguments: str | Path, folder: Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def call(tool: str, *words: str) -> tuple[int, str]:
    """Run qemu-img or, in this process, qmpd-img; return the status and all that it said, its own name left out."""
    if tool == "qemu-img":
        done = subprocess.run([tool, *words], capture_output=True, timeout=60)
        return done.returncode, (done.stdout + done.stderr).decode(errors="surrogateescape").replace("qemu-img: ", "")
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = img_main(list(words))
        except SystemExit as end:
            status = int(end.code or 0)
    return status, (out.getvalue() + err.getvalue()).replace("qmpd-img: ", "")


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    """Do the block in a folder: data files lie where the program runs."""
    folder.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def comparable(status: int, text: str) -> tuple[int, Any]:
    """Return what is to be equal: of JSON the values, without the space that files take."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        for one in value if isinstance(value, list) else [value, *(child["info"] for child in value["children"])]:
            for member in ("actual-size", "children"):
                one.pop(member, None)
        return status, value
    lines = [
        line for line in text.splitlines() if not re.search(r"hint|You can use|qe?mpd?u?-img rebase|only supp", line)
    ]
    return status, lines
