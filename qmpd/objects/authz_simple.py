"""authz-simple: access for one identity.

Options: AuthZSimpleProperties (qapi/qom.json and what it includes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmpd.objects._authz import Authz
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property


@dataclass(frozen=True, slots=True)
class AuthzSimpleOptions:
    """Members of AuthZSimpleProperties."""

    identity: str


def _set_identity(self: AuthzSimple, value: Any) -> None:
    self.identity = values.string("identity", value)


@qom_type("authz-simple", schema="AuthZSimpleProperties", options=AuthzSimpleOptions)
class AuthzSimple(Authz):
    """Lets one identity in."""

    qom_type = "authz-simple"
    abstract = False
    qom_properties = (Property("identity", "string", get=lambda self: self.identity, set=_set_identity),)

    def __init__(self, options: AuthzSimpleOptions) -> None:
        super().__init__()
        self.identity = options.identity

    def is_allowed(self, identity: str) -> bool:
        """Say whether it is the one."""
        return identity == self.identity
