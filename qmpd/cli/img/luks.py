"""qmpd-img luks: look after a LUKS header that no program has open: backups, its state, passphrases.

IMAGE is a whole volume or a header that lies apart. A passphrase is the whole content of a key file, or
one that a secret object holds, or is asked for on the terminal. Everything is what the daemon does with
an open volume, in the same order of writes.
"""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpd.cli import luks_report
from qmpd.cli.image import workshop
from qmpd.cli.img._common import add_objects, check_exclusive, check_output, common, operands, parse_number, refuse
from qmpd.cli.img._encrypt import encrypt
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode
    from qmpd.cli.image import Workshop
    from qmpd.crypto.secretbytes import SecretBytes

DAMAGED = 2
"""Exit status of `verify` for a header with which something is wrong."""

MAX_KEY_FILE = 8 << 20
"""Bytes of a key file at most; as cryptsetup has it."""

VERBS = {
    "backup": (2, "copy the header of IMAGE to the new file FILE"),
    "restore": (2, "put the backup FILE in place of the header of IMAGE"),
    "compare": (2, "tell how the header of IMAGE differs from the backup FILE"),
    "verify": (1, "tell what state the header of IMAGE is in"),
    "add-key": (1, "add a passphrase to IMAGE"),
    "change-key": (1, "put a passphrase in place of another one"),
    "remove-key": (1, "erase a passphrase, or a key slot"),
    "encrypt": (2, "encrypt the data of IMAGE where it lies, its new header going to FILE; or go on with that"),
}
STATES = {"add-key": "active", "change-key": "changed", "remove-key": "inactive"}


@subcommand("luks", help="look after a LUKS header: backups, its state, passphrases; encrypt an image in place")
class Luks:
    """Look after the header of a LUKS volume, or one that lies apart."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "image_opts", "objects", "output")
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        shown = {verb: f"{verb} IMAGE{' FILE' if count > 1 else ''}" for verb, (count, _) in VERBS.items()}
        parser.epilog = "\n".join(f"  {shown[verb]:<21} {text}" for verb, (_, text) in VERBS.items())
        add = parser.add_argument
        add("-f", "--format", metavar="FMT", help="what the header lies in (default: raw)")
        add("--force", action="store_true", help="also what may make the data unreadable for good")
        add("-d", "--key-file", metavar="FILE", help="the passphrase that there is; - reads standard input")
        add("--new-key-file", metavar="FILE", help="the new passphrase")
        add("--secret", metavar="ID", help="secret object with the passphrase that there is")
        add("--new-secret", metavar="ID", help="secret object with the new passphrase")
        add("-S", "--key-slot", metavar="N", help="the slot; without it any that takes the passphrase, or a free one")
        add("--pbkdf", choices=("pbkdf2", "argon2i", "argon2id"), help="how the new passphrase becomes a key")
        add("--iter-time", metavar="MS", help="milliseconds that this is to take")
        add("--iterations", metavar="N", help="exact rounds, or passes of argon2, instead")
        add("--pbkdf-memory", metavar="KIB", help="KiB that argon2 takes")
        add("--pbkdf-parallel", metavar="N", help="threads that argon2 takes")
        add("--backup", metavar="FILE", help="copy the header to a new file before it is changed")
        operands(parser, "VERB", "IMAGE", "FILE", required=2)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Do it."""
        as_json = check_output(args, "luks")
        verb, *names = args.operands or [""]
        if verb not in VERBS:
            refuse("luks", f"Expecting one of {', '.join(VERBS)}")
        if len(names) != VERBS[verb][0]:
            refuse("luks", f"'{verb}' takes {'an image and a file' if VERBS[verb][0] == 2 else 'one image'}")
        async with workshop() as shop:
            add_objects(shop, args.objects)
            check_exclusive(args)
            if verb == "encrypt":
                await encrypt(shop, args, *names)
                return 0
            return await _Work(shop, args, names[0], as_json=as_json).run(verb, *names[1:])


class _Work:
    """One verb on one image."""

    def __init__(self, shop: Workshop, args: argparse.Namespace, image: str, *, as_json: bool) -> None:
        self.shop, self.args, self.image, self.as_json = shop, args, image, as_json

    async def run(self, verb: str, *names: str) -> int:
        """Return the exit status. Raises QmpdError, OSError."""
        from qmpd.luks import care

        args, graph = self.args, self.shop.graph
        wish = Wish(
            image_format=None if args.image_opts else args.format or "raw",
            image_opts=args.image_opts,
            writable=verb == "restore" or verb in STATES,
        )
        node = (await open_image(self.shop, self.image, wish)).node
        assert node is not None
        if verb == "backup":
            size = await care.backup(graph, node, names[0])
            self._say(f"{size} bytes of header saved in '{names[0]}'")
        elif verb == "restore":
            await care.restore(graph, node, names[0], force=args.force)
            self._say(f"The header of '{self.image}' is that of '{names[0]}'")
        elif verb == "compare":
            found = await care.compare(graph, node, names[0])
            if self.as_json:
                print(json.dumps({"equal": not found, "differences": found}, indent=4))
            else:
                self._say("\n".join(found) or "The headers are equal")
            return 1 if found else 0
        elif verb == "verify":
            return await self._verify(node)
        else:
            await self._edit(verb, node)
        return 0

    def _say(self, text: str) -> None:
        if not self.args.quiet:
            print(text)

    async def _verify(self, node: BlockNode) -> int:
        from qmpd.luks import care

        given = self.args.key_file is not None or self.args.secret is not None
        passphrase = self._passphrase("key") if given else None
        try:
            report = (await care.verify(self.shop.graph, node, passphrase)).to_qapi()
        finally:
            if passphrase is not None:
                passphrase.wipe()
        if self.as_json:
            print(json.dumps(report, indent=4))
        else:
            self._say("\n".join(luks_report.lines(report)))
        return 0 if report["healthy"] else DAMAGED

    # --- passphrases --------------------------------------------------------------------------------

    async def _edit(self, verb: str, node: BlockNode) -> None:
        from qmpd.luks import care
        from qmpd.luks.edits import KeyslotEdit
        from qmpd.luks.keys import edit_keyslots

        args = self.args
        slot = self._number("key-slot")
        by_slot = verb == "remove-key" and slot is not None and args.key_file is None and args.secret is None
        edit = KeyslotEdit(
            state=STATES[verb],
            new_secret=None if verb == "remove-key" else "new",
            old_secret=None if verb == "add-key" or by_slot else "key",
            keyslot=slot,
            iter_time=self._number("iter-time"),
            iterations=self._number("iterations"),
            pbkdf=args.pbkdf,
            pbkdf_memory=self._number("pbkdf-memory"),
            pbkdf_parallel=self._number("pbkdf-parallel"),
            backup=args.backup,
        )
        held: dict[str, SecretBytes] = {}

        def passphrase(name: str) -> SecretBytes:
            if name not in held:
                held[name] = self._passphrase(name)
            return held[name].clone()

        try:
            await care.change(
                self.shop.graph,
                node,
                lambda header: edit_keyslots(header, edit, passphrase, "key", detached=True, force=args.force),
            )
        finally:
            for secret in held.values():
                secret.wipe()

    def _number(self, name: str) -> int | None:
        text = getattr(self.args, name.replace("-", "_"))
        return None if text is None else parse_number(name, text, 0, (1 << 32) - 1)

    def _passphrase(self, name: str) -> SecretBytes:
        """Return the passphrase there is ("key") or the new one ("new"); the caller wipes it. Raises CommandError."""
        from qmpd.crypto.secretbytes import SecretBytes

        new = name == "new"
        secret, file = (self.args.new_secret, self.args.new_key_file) if new else (self.args.secret, self.args.key_file)
        if secret is not None and file is not None:
            refuse("luks", "A secret and a key file exclude each other")
        if secret is not None:
            return self.shop.objects.passphrase(secret)
        if file is not None:
            return SecretBytes.take(_read_key(file))
        if not sys.stdin.isatty():
            option = "--new-key-file" if new else "--key-file"
            raise CommandError(f"There is no terminal to ask for the passphrase: use {option}")
        return _ask(f"{'New passphrase' if new else 'Passphrase'} of '{self.image}': ", twice=new)


def _read_key(name: str) -> bytearray:
    if name == "-":
        data = bytearray(sys.stdin.buffer.read(MAX_KEY_FILE + 1))
    else:
        try:
            with open(name, "rb") as file:
                data = bytearray(file.read(MAX_KEY_FILE + 1))
        except OSError as error:
            raise CommandError(f"Could not open '{name}': {error.strerror}") from error
    if len(data) > MAX_KEY_FILE:
        raise CommandError(f"Key file '{name}' has more than {MAX_KEY_FILE} bytes")
    return data


def _ask(prompt: str, *, twice: bool, ask: Callable[[str], str] = getpass.getpass) -> SecretBytes:
    from qmpd.crypto.secretbytes import SecretBytes

    text = ask(prompt)
    if twice and ask("Once more: ") != text:
        raise CommandError("The passphrases differ")
    return SecretBytes.take(bytearray(text.encode()))
