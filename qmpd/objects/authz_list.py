"""authz-list: an access list given with the command.

Options: AuthZListProperties (qapi/qom.json and what it includes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qmpd.objects._authz import POLICIES, AccessList, Authz, check_rules, rules_from_wire
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property


@dataclass(frozen=True, slots=True)
class AuthzListOptions:
    """Members of AuthZListProperties; the rules hold wire names."""

    policy: str = "deny"
    rules: list[dict[str, Any]] | None = None


def _set_policy(self: AuthzList, value: Any) -> None:
    self.access = replace(self.access, policy=values.enum("policy", value, POLICIES))


def _set_rules(self: AuthzList, value: Any) -> None:
    self.access = replace(self.access, rules=check_rules("rules", value))


@qom_type("authz-list", schema="AuthZListProperties", options=AuthzListOptions)
class AuthzList(Authz):
    """Lets in whom its rules allow."""

    qom_type = "authz-list"
    abstract = False
    qom_properties = (
        Property("policy", "QAuthZListPolicy", get=lambda self: self.access.policy, set=_set_policy),
        Property(
            "rules", "QAuthZListRule", get=lambda self: [rule.to_wire() for rule in self.access.rules], set=_set_rules
        ),
    )

    def __init__(self, options: AuthzListOptions) -> None:
        super().__init__()
        self.access = AccessList(options.policy, rules_from_wire(options.rules or ()))

    def is_allowed(self, identity: str) -> bool:
        """Say what the list says."""
        return self.access.is_allowed(identity)
