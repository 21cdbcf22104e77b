"""qmpd-ctl graph: draw the live node graph."""

from __future__ import annotations

import argparse

from qmpd.cli.client import add_socket_option, connected
from qmpd.cli.draw import dot, mermaid, tree
from qmpd.cli.draw_svg import svg
from qmpd.cli.node_graph import read_graph
from qmpd.cli.subcommand import subcommand

FORMATS = {"tree": tree, "dot": dot, "mermaid": mermaid, "svg": svg}


@subcommand("graph", help="draw the live node graph")
class Graph:
    """Draw the nodes, who uses them, and the edges between: device over luks over qcow2 over file."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_socket_option(parser)
        parser.add_argument("--format", choices=FORMATS, default="tree", help="default: %(default)s")

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Ask, draw."""
        async with connected(args.socket) as client:
            graph = await read_graph(client)
        print(FORMATS[args.format](graph))
        return 0
