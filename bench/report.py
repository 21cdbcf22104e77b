"""Tables of what was measured, for people and for programs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.qmp import Figure
from bench.transfer import Row
from qmpd.crypto.cipher import engine_name
from qmpd.units import MiB

WIDTH = 46


def conditions() -> dict[str, Any]:
    """Return what the numbers depend on."""
    version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "engine": engine_name(),
        "qemu": version.stdout.splitlines()[0] if version.stdout else "",
        "load_before": os.getloadavg()[0],
    }


def speed(value: float, unit: str) -> str:
    """Return a number as the tables show it."""
    if unit == "bytes/s":
        return f"{value / MiB:,.0f} MiB/s"
    if unit in ("requests/s", "commands/s"):
        return f"{value:,.0f}/s"
    if unit == "s":
        return f"{value:.3f} s"
    return f"{value:,.2f}" + (f" {unit}" if unit != "times" else "")


def mark(reached: bool | None) -> str:
    """Return the word for a goal reached or not."""
    return {None: "", True: "met", False: "NOT MET"}[reached]


def met(row: Row) -> bool | None:
    """Say whether all goals of a row are reached, None if it has none."""
    pairs = [
        (row.ratio(), row.goal),
        (row.ratio("nbdkit"), row.nbdkit_goal),
        (median(row.scaling) if row.scaling else None, row.scaling_goal),
    ]
    judged = [value >= goal for value, goal in pairs if value is not None and goal is not None]
    return all(judged) if judged else None


def row_line(row: Row) -> str:
    """Return one line of the table of exports."""
    ours, theirs = (median(row.series[name].speeds) for name in ("qmpd", "qsd"))
    ratio, saving, kit = row.ratio(), row.saving(), row.ratio("nbdkit")
    goal = f">= {row.goal:.1f}" if row.goal else ""
    line = f"{row.image:9}{row.name:{WIDTH}}{speed(theirs, row.unit):>14}{speed(ours, row.unit):>14}"
    line += f"{ratio:8.2f} {goal:7}{f'{saving:.2f}' if saving else '':>6}"
    line += f"{f'{kit:.2f}' if kit else '':>8}{f'{median(row.scaling):.2f}' if row.scaling else '':>7}"
    return f"{line}  {mark(met(row))}".rstrip()


def row_head() -> str:
    """Return the line above the table of exports."""
    head = f"{'image':9}{'row':{WIDTH}}{'QSD':>14}{'qmpd':>14}{'ratio':>8} {'goal':7}{'cpu':>6}{'nbdkit':>8}{'4:1':>7}"
    return f"{head}\n{'-' * (len(head) + 9)}"


def figure_line(figure: Figure) -> str:
    """Return one line of the other tables."""
    ours = speed(median(figure.ours), figure.unit)
    theirs = speed(median(figure.theirs), figure.unit) if figure.theirs else ""
    ratio = figure.ratio()
    goal = f">= {figure.goal:.1f}" if figure.goal else ""
    if figure.limit is not None:
        goal = f"{'<=' if figure.better == 'less' else '>='} {speed(figure.limit, figure.unit)}"
    line = f"{figure.name:{WIDTH + 9}}{theirs:>14}{ours:>14}{f'{ratio:.2f}' if ratio else '':>8} {goal:12}"
    return f"{line}  {mark(figure.met())}".rstrip()


def figure_head(peer: str) -> str:
    """Return the line above one of the other tables."""
    head = f"{'row':{WIDTH + 9}}{peer:>14}{'qmpd':>14}{'ratio':>8} {'goal':12}"
    return f"{head}\n{'-' * (len(head) + 9)}"


def closing(rows: Sequence[Row], figures: Sequence[Figure]) -> list[str]:
    """Return the note on goals: how many are reached, and each that is not."""
    judged = [(f"{row.image} {row.name}", met(row)) for row in rows] + [(one.name, one.met()) for one in figures]
    missed = [name for name, reached in judged if reached is False]
    reached = sum(1 for _, state in judged if state)
    lines = [f"{reached} of {reached + len(missed)} rows with a goal reach it."]
    if missed:
        lines.append("Not reached, see docs/performance.md for why:")
        lines += [f"  {name}" for name in missed]
    return lines


def write(path: Path, settings: dict[str, Any], rows: Sequence[Row], figures: Sequence[Figure]) -> None:
    """Write everything as JSON."""
    content = {
        "conditions": settings,
        "exports": [row.as_json() for row in rows],
        "figures": [figure.as_json() for figure in figures],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
