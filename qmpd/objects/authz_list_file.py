"""authz-list-file: an access list in a JSON file, read again when the file changes.

Options: AuthZListFileProperties (qapi/qom.json and what it includes). The schema calls the type
`authz-listfile`, the QOM tree `authz-list-file`: names as in the reference, where this mismatch
keeps the type from being created at all.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

from qmpd.errors import CommandError, QmpdError
from qmpd.objects._authz import POLICIES, AccessList, Authz, check_rules
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property
from qmpd.qom.tree import ObjectTree

_log = logging.getLogger("qmpd.authz")

MAX_FILE = 16 << 20
"""Bytes of an access list at most; a hundred thousand rules fit."""

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class AuthzListFileOptions:
    """Members of AuthZListFileProperties."""

    filename: str
    refresh: bool = True


def _set_filename(self: AuthzListFile, value: Any) -> None:
    self.filename = values.string("filename", value)


def _set_refresh(self: AuthzListFile, value: Any) -> None:
    self.refresh = values.boolean("refresh", value)


@qom_type("authz-listfile", schema="AuthZListFileProperties", options=AuthzListFileOptions)
class AuthzListFile(Authz):
    """Lets in whom the rules in its file allow; nobody while the file cannot be understood."""

    qom_type = "authz-list-file"
    abstract = False
    qom_properties = (
        Property("filename", "string", get=lambda self: self.filename, set=_set_filename),
        Property("refresh", "bool", get=lambda self: self.refresh, set=_set_refresh),
    )

    def __init__(self, options: AuthzListFileOptions) -> None:
        super().__init__()
        self.filename, self.refresh = options.filename, options.refresh
        self._access: AccessList | None = None
        self._stamp: _Stamp | None = None

    def complete(self, objects: ObjectTree) -> None:
        """Read the file."""
        self._stamp = _stamp(self.filename)
        self._access = read_access_list(self.filename)

    def is_allowed(self, identity: str) -> bool:
        """Say what the list says, the one in the file now if `refresh` is on."""
        if self.refresh:
            stamp = _stamp(self.filename)
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
        return self._access is not None and self._access.is_allowed(identity)

    def _reload(self) -> None:
        try:
            self._access = read_access_list(self.filename)
        except QmpdError as error:
            self._access = None
            _log.warning("authz '%s' lets nobody in: %s", self.id, error)


def read_access_list(name: str) -> AccessList:
    """Return the access list in a JSON file. Raises CommandError, ValidationError."""
    try:
        with open(name, "rb") as file:
            text = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "No such file or directory"
        raise CommandError(f"Unable to read '{name}': Failed to open file “{name}”: {reason}") from error
    if len(text) > MAX_FILE:
        raise CommandError(f"Unable to read '{name}': File is larger than {MAX_FILE} bytes")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"File '{name}' is not valid JSON") from error
    if not isinstance(tree, dict):
        raise CommandError(f"File '{name}' must contain a JSON object")
    policy = values.enum("policy", tree["policy"], POLICIES) if "policy" in tree else "deny"
    rules = check_rules("rules", tree["rules"]) if "rules" in tree else ()
    values.no_more("", tree, ["policy", "rules"])
    return AccessList(policy, rules)


def _stamp(name: str) -> _Stamp | None:
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
