"""qmpd-ctl demo: the main job, shown from start to end; `make demo` runs it."""

from __future__ import annotations

import argparse
from pathlib import Path

from qmpd.cli.subcommand import subcommand


@subcommand("demo", help="show the detached-header sequence on a daemon and images of its own")
class Demo:
    """Make a detached LUKS header and a payload, plug them into a daemon of its own, and check what is claimed."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("--document", type=Path, metavar="FILE", help="take the steps from this text")
        parser.add_argument("--keep", action="store_true", help="leave the images behind")

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Run it."""
        # Only this subcommand needs the block layer; the others start faster without.
        from qmpd.cli.demo import run

        return await run(args.document, args.keep)
