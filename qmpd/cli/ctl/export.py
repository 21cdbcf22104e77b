"""qmpd-ctl export: serve a node by NBD and print its URI."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from qmpd.cli.client import Client, add_socket_option, connected
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError
from qmpd.protocols.nbd_uri import standard_uri


@subcommand("export", help="serve a node by NBD and print its URI")
class Export:
    """Serve a node by NBD, and print the URI that nbdcopy, nbdinfo, qemu-img and others take."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_socket_option(parser)
        parser.add_argument("node", metavar="NODE", help="name of the node")
        parser.add_argument(
            "--listen",
            metavar="ADDRESS",
            help="start the NBD server at this path or HOST:PORT (default: one that runs already)",
        )
        parser.add_argument("--name", help="what clients ask for (default: the node's name)")
        parser.add_argument("--id", help="id of the export (default: export-NAME)")
        parser.add_argument("--description", help="text for people")
        parser.add_argument("--writable", action="store_true", help="clients may write")

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Start the server if that is asked for, add the export, print."""
        name = args.node if args.name is None else args.name
        options: dict[str, Any] = {"type": "nbd", "node_name": args.node, "name": name, "writable": args.writable}
        options["id"] = args.id or f"export-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}"
        if args.description is not None:
            options["description"] = args.description
        async with connected(args.socket) as client:
            print(await _export(client, options, name, args.listen))
        return 0


async def _export(client: Client, options: dict[str, Any], name: str, listen: str | None) -> str:
    """Return the URI. A server of QEMU does not tell its address: there it must be the one started here."""
    if listen is None:
        reply = await client.execute("block-export-add", report_uri=True, **options)
        uri = reply.get("uri")
    else:
        address = _address(listen)
        data = {key: value for key, value in address.items() if key != "type"}
        await client.execute("nbd-server-start", addr={"type": address["type"], "data": data})
        try:
            await client.execute("block-export-add", **options)
        except CommandError:
            await client.execute("nbd-server-stop")
            raise
        uri = standard_uri(address, name)
    if uri is None:
        raise CommandError("the node is exported, but at an address that no URI can name")
    return str(uri)


def _address(text: str) -> dict[str, str]:
    """Return the SocketAddress that --listen means: HOST:PORT, [HOST]:PORT, else a path."""
    match = re.fullmatch(r"(?:\[([^]]+)\]|([^:/]+)):([0-9]+)", text)
    if match is None:
        return {"type": "unix", "path": os.path.abspath(text)}
    return {"type": "inet", "host": match[1] or match[2], "port": match[3]}
