"""ObjectTree: the QOM tree of one daemon, its paths and the objects clients create.

/            container            /objects   what object-add makes
/chardevs    container            /backend   container
/machine     added by the machine core, in programs that have one
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, device_not_found
from qmpd.qapi.bind import build
from qmpd.qapi.hashorder import HashTable
from qmpd.qapi.registry import ClassEntry, Registry, registry
from qmpd.qom.object import Container, QomObject
from qmpd.qom.protocols import SecretSource, TlsCredentials
from qmpd.qom.types import TypeTable

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


def id_well_formed(text: str) -> bool:
    """Say whether `text` follows the rule of ids: a letter, then letters, digits and `-._`."""
    return _ID.fullmatch(text) is not None


class ObjectTree:
    """The tree. All methods belong to the monitor's loop."""

    def __init__(self, known: Registry = registry) -> None:
        self.root: QomObject = Container()
        self.root.name = "/"
        self.types = TypeTable(known)
        self._registry = known
        self._order = HashTable()
        for name in ("objects", "chardevs", "backend"):
            self.root.add_child(name, Container())

    # --- objects of the user ----------------------------------------------------------------

    @property
    def objects(self) -> dict[str, QomObject]:
        """The user's objects by id, in order of creation."""
        return self.root.children["objects"].children

    def get(self, object_id: str) -> QomObject | None:
        """Return the object `object_id`, None if there is none."""
        return self.objects.get(object_id)

    def add(self, object_id: str, obj: QomObject) -> None:
        """Put `obj` below /objects and complete it.

        Raises CommandError: name taken, or the object's own refusal; the object is out of the
        tree again then, and released.
        """
        self.root.children["objects"].add_child(object_id, obj)
        self._order.insert(object_id)
        try:
            obj.complete(self)
        except BaseException:
            self._take_out(object_id)
            obj.delete()
            raise

    def create(self, members: Mapping[str, Any]) -> QomObject:
        """Make an object from a validated ObjectOptions tree (wire names) and return it.

        Order of checks, as the reference: form of the id, type, values of the options, id taken,
        what the object itself requires. Raises CommandError or ValidationError.
        """
        own = dict(members)
        name, object_id = str(own.pop("qom-type")), str(own.pop("id"))
        if not id_well_formed(object_id):
            raise CommandError("Parameter 'id' expects an identifier", hint=ID_HINT)
        entry = self._registry.qom_types.get(name)
        if entry is None:
            raise CommandError(f"invalid object type: {name}")
        obj = self._new(entry, own)
        self.add(object_id, obj)
        return obj

    @staticmethod
    def _new(entry: ClassEntry, members: Mapping[str, Any]) -> QomObject:
        assert entry.options is not None, f"{entry.name} has no options class"
        obj = entry.cls(build(entry.options, members))
        assert isinstance(obj, QomObject), f"{entry.name} is not a QOM object"
        return obj

    def remove(self, object_id: str) -> None:
        """Delete the object `object_id`. Raises CommandError: unknown, or in use."""
        obj = self.get(object_id)
        if obj is None:
            raise CommandError(f"object '{object_id}' not found")
        obj.check_delete()
        self._take_out(object_id)
        obj.delete()

    def _take_out(self, object_id: str) -> None:
        self.root.children["objects"].remove_child(object_id)
        self._order.remove(object_id)

    def hash_order(self) -> list[QomObject]:
        """Return the user's objects in the order in which QEMU's table of them is walked."""
        return [self.objects[name] for name in self._order.names()]

    def close(self) -> None:
        """Release every user's object, newest first: the end of the daemon."""
        for object_id in reversed(list(self.objects)):
            self.root.children["objects"].remove_child(object_id).delete()

    # --- lookups ----------------------------------------------------------------------------

    def secret(self, object_id: str) -> SecretBytes:
        """Return a copy of the secret `object_id`, which the caller wipes. Raises CommandError."""
        obj = self.get(object_id)
        if obj is None:
            raise CommandError(f"No secret with id '{object_id}'")
        if not isinstance(obj, SecretSource):
            raise CommandError(f"Object with id '{object_id}' is not a secret")
        return obj.reveal()

    def passphrase(self, object_id: str) -> SecretBytes:
        """Return the secret `object_id` like `secret`, checked to be text in UTF-8 without NUL."""
        found = self.secret(object_id)
        with found.view() as view:
            if not _is_text(view):
                found.wipe()
                raise CommandError(f"Data from secret {object_id} is not valid UTF-8")
        return found

    def tls_credentials(self, object_id: str) -> TlsCredentials:
        """Return the TLS credentials `object_id`. Raises CommandError."""
        obj = self.get(object_id)
        if obj is None:
            raise CommandError(f"No TLS credentials with id '{object_id}'")
        if not isinstance(obj, TlsCredentials):
            raise CommandError(f"Object with id '{object_id}' is not TLS credentials")
        return obj

    # --- paths ------------------------------------------------------------------------------

    def find(self, path: str) -> tuple[QomObject | None, bool]:
        """Return the object at `path`, and whether a partial path fits more than one.

        A path that starts with `/` counts from the root. Any other is partial: it fits every
        object below which it leads somewhere. Empty components are skipped.
        """
        parts = path.split("/") if path else []
        if parts and parts[0] == "":
            return _descend(self.root, parts[1:]), False
        return _search(self.root, parts)

    def resolve(self, path: str) -> QomObject:
        """Return the object at `path`. Raises DeviceNotFound, also if the path is ambiguous."""
        found, _ambiguous = self.find(path)
        if found is None:
            raise device_not_found(path)
        return found


ID_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
"""The second line of that refusal on a command line; QMP does not carry it."""


def _is_text(view: memoryview) -> bool:
    try:
        str(view, "utf-8")
    except UnicodeDecodeError as error:
        error.object = b""
        return False
    return 0 not in view


def _descend(start: QomObject, parts: list[str]) -> QomObject | None:
    """Follow `parts` through children and links."""
    current: QomObject | None = start
    for part in parts:
        if part and current is not None:
            current = current.children.get(part) or current.link_target(part)
    return current


def _search(start: QomObject, parts: list[str]) -> tuple[QomObject | None, bool]:
    """Look for `parts` from `start` and from everything below it."""
    found = _descend(start, parts)
    for child in start.children.values():
        below, ambiguous = _search(child, parts)
        if ambiguous or (below is not None and found is not None):
            return None, True
        found = found or below
    return found, False
