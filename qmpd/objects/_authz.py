"""What the authz types share: their abstract base, and access lists with their matching."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qmpd.errors import ValidationError
from qmpd.qom import values
from qmpd.qom.object import QomObject

POLICIES = ("deny", "allow")
FORMATS = ("exact", "glob")


class Authz(QomObject):
    """An object that says who may connect (Authorizer)."""

    qom_type = "authz"
    abstract = True
    interfaces = ("user-creatable",)

    def is_allowed(self, identity: str) -> bool:
        """Say whether `identity` may connect."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of an access list; format None means exact and was not given."""

    match: str
    policy: str
    format: str | None = None

    def matches(self, identity: str) -> bool:
        """Say whether the rule is about `identity`; in a glob only `*` and `?` are special."""
        if self.format != "glob":
            return self.match == identity
        return _glob(self.match, identity)

    def to_wire(self) -> dict[str, str]:
        """Return QAuthZListRule (wire)."""
        row = {"match": self.match, "policy": self.policy}
        return row if self.format is None else {**row, "format": self.format}


@dataclass(frozen=True, slots=True)
class AccessList:
    """Rules in order; the first that matches decides, `policy` decides when none does."""

    policy: str = "deny"
    rules: tuple[Rule, ...] = ()

    def is_allowed(self, identity: str) -> bool:
        """Say whether `identity` may connect."""
        for rule in self.rules:
            if rule.matches(identity):
                return rule.policy == "allow"
        return self.policy == "allow"


def _glob(pattern: str, text: str) -> bool:
    """Match in time proportional to the product of the lengths, whatever the pattern."""
    at = place = 0  # in the text, in the pattern
    star, resume = -1, 0  # the last star met, and where in the text to go on when it takes one more
    while at < len(text):
        if place < len(pattern) and pattern[place] == "*":
            star, resume = place, at
            place += 1
        elif place < len(pattern) and pattern[place] in ("?", text[at]):
            at, place = at + 1, place + 1
        elif star >= 0:
            resume += 1
            at, place = resume, star + 1
        else:
            return False
    return not pattern[place:].strip("*")


def rules_from_wire(rules: Iterable[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Return validated QAuthZListRule members as rules."""
    return tuple(Rule(rule["match"], rule["policy"], rule.get("format")) for rule in rules)


def check_rules(name: str, value: Any) -> tuple[Rule, ...]:
    """Return the rules in a JSON value of unknown shape. Raises ValidationError."""
    if not isinstance(value, list):
        raise values.wrong_type(name, "array")
    return tuple(_check_rule(f"{name}[{index}]", one) for index, one in enumerate(value))


def _check_rule(name: str, value: Any) -> Rule:
    rule = values.struct(name, value)
    for member in ("match", "policy"):
        if member not in rule:
            raise ValidationError(f"Parameter '{name}.{member}' is missing")
    match = values.string(f"{name}.match", rule["match"])
    policy = values.enum(f"{name}.policy", rule["policy"], POLICIES)
    style = values.enum(f"{name}.format", rule["format"], FORMATS) if "format" in rule else None
    values.no_more(name, rule, ["match", "policy", "format"])
    return Rule(match, policy, style)
