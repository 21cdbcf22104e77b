"""`python -m bench [--rows REGEX] [--seconds S] [--rounds N] [--quick]`: measure, print, write, draw."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
import time
from pathlib import Path

from bench import convert, images, plot, qmp, report, servers, transfer
from bench.rows import IMAGES, SERVERS
from qmpd.units import GiB, MiB

RESULTS = Path(__file__).with_name("results")


def arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--rows", default="", help="only rows whose 'IMAGE NAME' matches this expression")
    parser.add_argument("--seconds", type=float, help="length of one slice (default: 0.4, with --quick 0.1)")
    parser.add_argument("--rounds", type=int, help="slices of each server per row (default: 7, with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="the whole table in a few minutes, with more noise")
    parser.add_argument("--name", help="name of the files in bench/results (default: latest, quick, part)")
    parser.add_argument("--folder", help="where the images are made (default: a temporary folder)")
    given = parser.parse_args()
    given.seconds = given.seconds or (0.1 if given.quick else 0.4)
    given.rounds = given.rounds or (3 if given.quick else 7)
    given.name = given.name or ("part" if given.rows else "quick" if given.quick else "latest")
    return given


def exports(given: argparse.Namespace, pattern: re.Pattern[str], folder: Path) -> list[transfer.Row]:
    """Measure all rows about exports."""
    client = transfer.build_client(folder)
    images.make(folder, (128 if given.quick else 256) * MiB)
    rows: list[transfer.Row] = []
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(servers.serving(kind, folder)) for kind in SERVERS]
        for image in IMAGES:
            found = transfer.sums(client, [one for one in running if image in one.sockets], image)
            if len(found) != 1:
                raise SystemExit(f"{image}: the servers do not serve the same bytes: {found}")
        print("\nExports, by bench/client.c over libnbd\n" + report.row_head(), flush=True)
        for row in transfer.by_client(client, running, pattern, given.rounds, given.seconds):
            rows.append(row)
            print(report.row_line(row), flush=True)
        few = max(2, given.rounds // 2)
        print("\nExports, by nbdcopy and by fio's nbd engine\n" + report.row_head(), flush=True)
        for row in transfer.by_tools(folder, running, pattern, few, given.seconds):
            rows.append(row)
            print(report.row_line(row), flush=True)
    return rows


def main() -> None:
    """Measure what was asked for."""
    given = arguments()
    lacking = servers.missing()
    if lacking:
        raise SystemExit(f"not installed: {', '.join(lacking)} (tests/peers/install does it)")
    pattern = re.compile(given.rows)
    settings = report.conditions() | {"seconds": given.seconds, "rounds": given.rounds}
    began = time.monotonic()
    print(f"{settings['qemu']}; {settings['engine']}; load average {settings['load_before']:.2f} before the run")
    rows: list[transfer.Row] = []
    figures: list[qmp.Figure] = []
    with tempfile.TemporaryDirectory(prefix="qmpd-bench-", dir=given.folder) as name:
        folder = Path(name)
        if any(pattern.search(f"{image} {word}") for image in IMAGES for word in _words()):
            rows = exports(given, pattern, folder)
        print("\nMonitor\n" + report.figure_head("QEMU"), flush=True)
        for figure in qmp.figures(folder, pattern, given.rounds):
            figures.append(figure)
            print(report.figure_line(figure), flush=True)
        print("\nqmpd-img\n" + report.figure_head("qemu-img"), flush=True)
        size = GiB if not given.quick else 256 * MiB
        for figure in convert.figures(folder, pattern, 2 if given.quick else 5, size):
            figures.append(figure)
            print(report.figure_line(figure), flush=True)
    settings |= {"load_after": os.getloadavg()[0], "took": round(time.monotonic() - began)}
    print(f"\nLoad average {settings['load_after']:.2f} at the end; took {settings['took']} s.")
    print("\n".join(report.closing(rows, figures)))
    report.write(RESULTS / f"{given.name}.json", settings, rows, figures)
    plot.draw(RESULTS / f"{given.name}.svg", settings, rows, figures)
    print(f"Written: bench/results/{given.name}.json and .svg")


def _words() -> list[str]:
    """Return the names of all rows about exports, as far as a pattern may ask for them."""
    from bench.rows import works

    names = [f"{work.name}, {count} connection{'s' if count > 1 else ''}" for work in works() for count in (1, 4)]
    return [*names, "nbdcopy of the whole disk", "nbdcopy onto the whole disk", "fio read random write"]


if __name__ == "__main__":
    main()
