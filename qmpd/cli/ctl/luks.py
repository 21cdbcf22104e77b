"""qmpd-ctl luks: look after the LUKS header of an open volume, through the daemon that has it open."""

from __future__ import annotations

import argparse
import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

from qmpd.cli import luks_report
from qmpd.cli.client import Client, add_socket_option, connected
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

DAMAGED = 2
"""Exit status of `verify` for a header with which something is wrong."""

POLL = 0.1
"""Seconds between two looks at a job."""

STATES = {"add-key": "active", "change-key": "changed", "remove-key": "inactive"}


@subcommand("luks", help="look after the LUKS header of an open volume")
class Luks:
    """Look after the LUKS header of an open volume: backups, its state, passphrases (secrets of the daemon)."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the verbs and their options."""
        verbs = parser.add_subparsers(metavar="VERB", dest="verb", required=True)

        def verb(name: str, text: str, *, file: bool = False) -> argparse.ArgumentParser:
            sub = verbs.add_parser(name, help=text, description=text)
            add_socket_option(sub)
            sub.add_argument("node", metavar="NODE", help="a luks node, or the node that the header lies on")
            if file:
                sub.add_argument("file", metavar="FILE", help="the backup, a file of the daemon's host")
            return sub

        verb("backup", "copy the header to a new file", file=True)
        restore = verb("restore", "put a backup in place of the header", file=True)
        verb("compare", "tell how the header differs from a backup", file=True)
        verify = verb("verify", "tell what state the header is in")
        verify.add_argument("--secret", metavar="ID", help="try the passphrase of this secret")
        verify.add_argument("--json", action="store_true", help="print it as JSON")
        for name, text in (
            ("add-key", "add a passphrase"),
            ("change-key", "put a passphrase in place of another one"),
            ("remove-key", "erase a passphrase, or a key slot"),
        ):
            _key_options(verb(name, text), name)
        restore.add_argument("--force", action="store_true", help="also the header of another volume")

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Do it."""
        async with connected(args.socket) as client:
            if args.verb in STATES:
                await _edit(client, args)
                return 0
            if args.verb == "verify":
                return await _verify(client, args)
            file = str(Path(args.file).absolute())
            if args.verb == "backup":
                size = (await client.execute("x-luks-header-backup", node_name=args.node, filename=file))["size"]
                print(f"{size} bytes of header saved in '{file}'")
            elif args.verb == "restore":
                arguments = {"node_name": args.node, "filename": file, "force": args.force}
                await client.execute("x-luks-header-restore", **arguments)
            else:
                found = await client.execute("x-luks-header-compare", node_name=args.node, filename=file)
                print("\n".join(found["differences"]) or "The headers are equal")
                return 0 if found["equal"] else 1
        return 0


def _key_options(parser: argparse.ArgumentParser, verb: str) -> None:
    add = parser.add_argument
    add("--secret", metavar="ID", help="secret that unlocks the volume; without it the node's own")
    add("--key-slot", type=int, metavar="N", help="the slot")
    add("--backup", metavar="FILE", help="copy the header to a new file before it is changed")
    add("--force", action="store_true", help="also what may make the data unreadable for good")
    if verb != "add-key":
        add("--old-secret", metavar="ID", help="secret with the passphrase that goes")
    if verb == "remove-key":
        return
    add("--new-secret", metavar="ID", required=True, help="secret with the new passphrase")
    add("--pbkdf", choices=("pbkdf2", "argon2i", "argon2id"), help="how the new passphrase becomes a key")
    add("--iter-time", type=int, metavar="MS", help="milliseconds that this is to take")
    add("--iterations", type=int, metavar="N", help="exact rounds, or passes of argon2, instead")
    add("--pbkdf-memory", type=int, metavar="KIB", help="KiB that argon2 takes")
    add("--pbkdf-parallel", type=int, metavar="N", help="threads that argon2 takes")


async def _verify(client: Client, args: argparse.Namespace) -> int:
    arguments = {"node_name": args.node} | ({"secret": args.secret} if args.secret else {})
    state: dict[str, Any] = await client.execute("x-luks-header-verify", **arguments)
    print(json.dumps(state, indent=4) if args.json else "\n".join(luks_report.lines(state)))
    return 0 if state["healthy"] else DAMAGED


async def _edit(client: Client, args: argparse.Namespace) -> None:
    """Run the job to its end. Raises CommandError with its error."""
    options: dict[str, Any] = {"driver": "luks", "state": STATES[args.verb]}
    names = ("secret", "new-secret", "old-secret", "pbkdf", "iter-time", "iterations", "pbkdf-memory", "pbkdf-parallel")
    for name in names:
        value = getattr(args, name.replace("-", "_"), None)
        if value is not None:
            options[name] = value
    if args.key_slot is not None:
        options["keyslot"] = args.key_slot
    if args.backup is not None:
        options["backup"] = str(Path(args.backup).absolute())
    job = f"qmpd-ctl-{uuid.uuid4().hex[:8]}"
    await client.execute("blockdev-amend", job_id=job, node_name=args.node, options=options, force=args.force)
    while True:
        row = next(row for row in await client.execute("query-jobs") if row["id"] == job)
        if row["status"] == "concluded":
            break
        await asyncio.sleep(POLL)
    await client.execute("job-dismiss", id=job)
    if "error" in row:
        raise CommandError(row["error"])
