"""qmpd-ctl replay: run the QMP steps that stand in a document."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qmpd.cli.client import add_socket_option, connected
from qmpd.cli.player import Player
from qmpd.cli.steps import read_steps
from qmpd.cli.subcommand import subcommand


def replacement(text: str) -> tuple[str, str]:
    """Parse OLD=NEW."""
    old, sign, new = text.partition("=")
    if not old or not sign:
        raise argparse.ArgumentTypeError(f"'{text}' is not OLD=NEW")
    return old, new


@subcommand("replay", help="run the QMP steps that stand in a document")
class Replay:
    """Read `virsh qemu-monitor-command ... '{...}'` steps, or a QMP transcript, and send them one by one.

    Status 1 if a step failed and was not put right.
    """

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_socket_option(parser)
        parser.add_argument(
            "--set",
            dest="replacements",
            action="append",
            type=replacement,
            default=[],
            metavar="OLD=NEW",
            help="put NEW for OLD in every string of the arguments: placeholder paths, ids (may repeat)",
        )
        parser.add_argument("--step", action="store_true", help="wait for the Enter key before each step")
        parser.add_argument("--fix", action="store_true", help="offer the correction of a step with a known slip")
        parser.add_argument("file", type=Path, metavar="FILE", help="the document; - reads standard input")

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Read, send, sum up."""
        text = sys.stdin.read() if str(args.file) == "-" else args.file.read_text()
        steps = [step.with_values(args.replacements) for step in read_steps(text)]
        async with connected(args.socket) as client:
            player = Player(client, fix=args.fix, ask=sys.stdin.isatty(), stepwise=args.step)
            await player.play(steps)
        print(f"{len(steps)} steps, {player.corrected} corrected, {player.failed} failed")
        return 1 if player.failed else 0
