"""What all tests share: hypothesis settings, and the counts of the long checks (`make proof`)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.conformance.summary import pytest_terminal_summary

__all__ = ["FULL", "ROOT", "Proof", "proof", "pytest_terminal_summary"]

ROOT = Path(__file__).resolve().parents[1]
FULL = os.environ.get("QMPD_PROOF") == "full"

settings.register_profile(
    "qmpd", deadline=None, derandomize=not FULL, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("qmpd")


class Proof:
    """How often a long check runs, and where its numbers go.

    `make proof` runs the full count and writes proof/NAME.json; other runs use a fixed seed and one
    tenth of the count, and write nothing.
    """

    full = FULL

    def count(self, full: int) -> int:
        """Return how often to run what `make proof` runs `full` times."""
        return full if FULL else -(-full // 10)

    def record(self, name: str, **facts: Any) -> None:
        """Write the numbers of a full run: counts, seeds, whatever a reader needs to repeat it."""
        if not FULL:
            return
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        folder = ROOT / "proof"
        folder.mkdir(exist_ok=True)
        text = json.dumps({"commit": commit.stdout.strip(), **facts}, indent=2, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n")


@pytest.fixture(scope="session")
def proof() -> Proof:
    """The counts of long checks; mark such a test with `@pytest.mark.proof`."""
    return Proof()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Record what `@pytest.mark.proof(NAME, **counts)` says of a test that held, with the seed of hypothesis."""
    report = (yield).get_result()
    mark = item.get_closest_marker("proof")
    if FULL and mark and mark.args and report.when == "call" and report.passed:
        Proof().record(mark.args[0], **mark.kwargs, seed=item.config.getoption("--hypothesis-seed"))
