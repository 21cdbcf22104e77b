"""The bench's own parts: goals, ratios, table, picture. What it measures needs a quiet machine, not a test."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import plot, report
from bench.convert import mixed
from bench.qmp import Figure
from bench.rows import IMAGES, Work, goal, scaling_goal, works
from bench.transfer import Row, Series
from qmpd.units import KiB, MiB


def row(ours: list[float], theirs: list[float], wanted: float | None = 1.0) -> Row:
    made = Row("raw", "read 2 MiB QD4, 1 connection", "bytes/s", wanted)
    made.series = {"qmpd": Series(ours, [1.0] * len(ours)), "qsd": Series(theirs, [3.0] * len(theirs))}
    return made


def test_a_ratio_is_the_median_of_pairs_not_a_ratio_of_medians() -> None:
    made = row([10.0, 200.0, 30.0], [10.0, 100.0, 60.0])
    assert made.ratio() == 1.0
    assert made.saving() == 3.0
    assert report.met(made) is True
    assert report.met(row([1.0], [2.0])) is False
    assert report.met(row([1.0], [2.0], None)) is None


def test_goals() -> None:
    assert len(list(works())) == 12
    assert goal("luks1", Work("read", 64 * KiB, 16)) == 3.0
    assert goal("luks1", Work("randread", 4 * KiB, 32)) == 4.0
    assert goal("luks1", Work("randwrite", 4 * KiB, 1)) == 1.5
    assert goal("luks2", Work("read", 2 * MiB, 4)) == 5.0
    assert goal("raw", Work("randread", 4 * KiB, 32)) == 1.5
    assert all(goal("raw", work) is not None for work in works())
    assert scaling_goal("luks1", Work("read", 64 * KiB, 16)) == 1.3


def test_times_compare_the_other_way_round() -> None:
    figure = Figure("start", "s", "less", "qsd", goal=2.0, ours=[1.0], theirs=[3.0])
    assert figure.ratio() == 3.0
    assert figure.met() is True
    assert Figure("memory", "MB", "less", "qsd", limit=60.0, ours=[61.0]).met() is False


@pytest.mark.parametrize("with_figures", [False, True])
def test_table_json_and_picture(tmp_path: Path, with_figures: bool) -> None:
    rows = [row([10.0], [20.0])]
    figures = [Figure("a < b & c", "s", "less", "qsd", goal=1.0, ours=[1.0], theirs=[2.0])] if with_figures else []
    settings = {"qemu": "qemu-storage-daemon version 10.0.2"}
    assert "NOT MET" in report.row_line(rows[0])
    assert "read 2 MiB" in "\n".join(report.closing(rows, figures))
    report.write(tmp_path / "results" / "x.json", settings, rows, figures)
    assert json.loads((tmp_path / "results" / "x.json").read_text())["exports"][0]["ratio"] == 0.5
    plot.draw(tmp_path / "x.svg", settings, rows, figures)
    words = [element.text for element in ET.parse(tmp_path / "x.svg").iter() if element.text]
    assert IMAGES["raw"] in words
    assert ("a < b & c" in words) is with_figures


def test_mixed_data_has_holes_and_is_as_long_as_asked(tmp_path: Path) -> None:
    mixed(tmp_path / "m", 20 * MiB)
    found = (tmp_path / "m").stat()
    assert found.st_size == 20 * MiB
    assert found.st_blocks * 512 < 20 * MiB
