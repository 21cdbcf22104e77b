"""The demonstration runs, holds what it claims, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from qmpd.cli.demo import Checks, sequence
from tests.support.daemon import program

DOCUMENT = Path(__file__).resolve().parents[3] / "shared" / "document" / "luks-detached-header.txt"


def run_demo(folder: Path, *args: str) -> str:
    done = subprocess.run(
        [program("qmpd-ctl"), "demo", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    text = run_demo(tmp_path)
    assert re.search(r"\n([2-9]\d) claims held, 0 did not\n\Z", text)
    assert "<- GenericError: No secret with id 'libvirt-2-format-secret'" in text
    assert "abc123" not in text


def test_demo_with_the_published_document(tmp_path: Path) -> None:
    if not DOCUMENT.exists():
        pytest.skip("the published document does not lie beside this checkout")
    assert " claims held, 0 did not" in run_demo(tmp_path, "--document", str(DOCUMENT))


def test_our_sequence_sends_what_the_document_sends() -> None:
    if not DOCUMENT.exists():
        pytest.skip("the published document does not lie beside this checkout")
    assert [step.message for step in sequence(None)] == [step.message for step in sequence(DOCUMENT)]


def test_a_claim_that_does_not_hold_is_counted_and_shown() -> None:
    lines: list[str] = []
    check = Checks(lines.append)
    check("two and two are four", True)
    check("two and two are five", False)
    assert (check.held, check.failed) == (1, 1)
    assert lines == ["  [ok] two and two are four", "  [FAILED] two and two are five"]
