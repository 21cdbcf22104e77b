"""qmpd-ctl monitor-command: send one QMP command, print its reply."""

from __future__ import annotations

import argparse
import json
import sys

from qmpd.cli.client import add_socket_option, connected
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError


@subcommand("monitor-command", help="send one QMP command and print the reply")
class MonitorCommand:
    """Send one QMP command, as `virsh qemu-monitor-command` does, and print the reply. Status 1 for an error."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_socket_option(parser)
        parser.add_argument("--pretty", action="store_true", help="print the reply over several lines")
        parser.add_argument(
            "command", metavar="JSON", help="""the command, such as '{"execute":"query-block"}'; - reads it"""
        )

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Send, print, judge."""
        text = sys.stdin.read() if args.command == "-" else args.command
        try:
            message = json.loads(text)
        except ValueError as error:
            raise CommandError(f"the command is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise CommandError("the command is not a JSON object")
        async with connected(args.socket) as client:
            reply = await client.reply(message)
        print(json.dumps(reply, ensure_ascii=False, indent=2 if args.pretty else None))
        return 1 if "error" in reply else 0
