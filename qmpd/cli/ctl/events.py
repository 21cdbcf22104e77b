"""qmpd-ctl events: follow the events of a server."""

from __future__ import annotations

import argparse
import fnmatch
import json

from qmpd.cli.client import add_socket_option, connected
from qmpd.cli.subcommand import subcommand


@subcommand("events", help="print events as they happen")
class Events:
    """Print every event on a line of its own, until the server ends or the interrupt key is pressed."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_socket_option(parser)
        parser.add_argument("--count", type=int, metavar="N", help="end after N events")
        parser.add_argument("name", nargs="*", metavar="NAME", help="only these; may hold * and ?")

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Listen and print."""
        left = args.count
        async with connected(args.socket) as client:
            while left is None or left > 0:
                event = await client.next_event()
                if event is None:
                    break
                if args.name and not any(fnmatch.fnmatchcase(event["event"], one) for one in args.name):
                    continue
                print(json.dumps(event, ensure_ascii=False), flush=True)
                if left is not None:
                    left -= 1
        return 0
