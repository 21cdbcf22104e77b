"""Known slips in written-down sequences, and the step that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qmpd.cli.client import Client
from qmpd.cli.steps import Step

_NO_SECRET = re.compile(r"No secret with id '(.+)'$")
_NO_NODE = re.compile(r"Cannot find device='.*' nor node-name='(.+)'$")
_NO_FILE = re.compile(r"Could not open '(.+)': No such file or directory$")


@dataclass(frozen=True, slots=True)
class Correction:
    """What seems to be wrong with a step that failed.

    text   the slip, told to the user
    step   the step as it was meant; None if only the user can know
    """

    text: str
    step: Step | None


async def correction(client: Client, step: Step, error: str) -> Correction | None:
    """Return what can be said about a step that the server refused with the text `error`."""
    if match := _NO_FILE.search(error):
        return Correction(f"There is no file '{match[1]}': --set OLD=NEW maps a placeholder to a real path.", None)
    if match := _NO_SECRET.search(error):
        return _instead(step, "secret", match[1], await _secrets(client))
    if match := _NO_NODE.search(error):
        nodes = await client.execute("query-named-block-nodes", flat=True)
        return _instead(step, "node", match[1], [node["node-name"] for node in nodes])
    return None


async def _secrets(client: Client) -> list[str]:
    objects = await client.execute("qom-list", path="/objects")
    return [one["name"] for one in objects if one["type"] in ("child<secret>", "child<secret_keyring>")]


def _instead(step: Step, kind: str, wrong: str, known: list[str]) -> Correction:
    """Propose the only object there is, or the one whose name is most like the wrong one."""
    best = known if len(known) == 1 else difflib.get_close_matches(wrong, known, n=1)
    if not best:
        listed = ", ".join(f"'{name}'" for name in sorted(known)) or "none"
        return Correction(f"No {kind} '{wrong}' was ever added. Those that are there: {listed}.", None)
    meant = best[0]
    message = {**step.message, "arguments": _renamed(step.message.get("arguments", {}), wrong, meant)}
    text = f"No {kind} '{wrong}' was ever added; the one that was is '{meant}'."
    return Correction(text, replace(step, message=message))


def _renamed(value: Any, wrong: str, meant: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(one, wrong, meant) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, wrong, meant) for one in value]
    return meant if value == wrong else value
