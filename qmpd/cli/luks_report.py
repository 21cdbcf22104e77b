"""The state of a LUKS header as text for people; the values are LuksHeaderState (qapi/luks-header.json)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lines(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    if "version" in state:
        yield f"LUKS version {state['version']}, uuid {state.get('uuid', 'unreadable')}"
    for copy in state.get("copies", ()):
        name = "secondary" if copy["offset"] else "primary"
        what = copy.get("problem") or f"good, sequence id {copy['seqid']}"
        yield f"  {name} header at {copy['offset']}: {what}"
    for slot in state["slots"]:
        if slot["active"] or not slot["known"] or slot["type"] == "luks2":
            yield f"  slot {slot['slot']}: {_slot(slot)}"
    if state.get("tokens"):
        yield f"  tokens: {state['tokens']}"
    if "free" in state:
        yield f"  free for key slots: {state['free']} bytes"
    for note in state["notes"]:
        yield f"note: {note}"
    for problem in state["problems"]:
        yield f"PROBLEM: {problem}"
    yield "The header is well." if state["healthy"] else "The header is damaged."


def _slot(slot: Mapping[str, Any]) -> str:
    words = [slot["type"]] if not slot["known"] else []
    if "pbkdf" in slot:
        cost = f"{slot['pbkdf']}, {slot.get('iters', '?')} rounds"
        if "pbkdf-memory" in slot:
            cost += f", {slot['pbkdf-memory']} KiB, {slot['pbkdf-parallel']} threads"
        words.append(cost)
    if not slot["active"]:
        words.append("not for this volume")
    if slot.get("priority", 1) != 1:
        words.append("preferred" if slot["priority"] > 1 else "left out unless asked for")
    if "opens" in slot:
        words.append("takes the passphrase" if slot["opens"] else "does not take the passphrase")
    if "damage" in slot:
        words.append("DAMAGED")
    return ", ".join(words)
