"""Sends written-down steps one by one and tells each with its reply; for `replay` and `demo`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qmpd.cli.client import Client, compact
from qmpd.cli.slips import correction
from qmpd.cli.steps import Step

Show = Callable[[str], None]
SENSITIVE = {"data", "password"}
"""Arguments of object-add that are not shown."""


def shown(message: Mapping[str, Any]) -> str:
    """Return a message as it may stand on a screen: on one line, secrets left out."""
    arguments = message.get("arguments")
    if message.get("execute") == "object-add" and isinstance(arguments, Mapping):
        hidden = {key: "***" if key in SENSITIVE else value for key, value in arguments.items()}
        message = {**message, "arguments": hidden}
    return compact(message)


class Player:
    """Plays steps on one session.

    fix       offer the correction of a known slip
    ask       before a correction is sent; without, it is sent at once
    stepwise  wait for the Enter key before each step
    failed    steps that failed and were not put right    corrected  those that were
    """

    def __init__(
        self, client: Client, show: Show = print, *, fix: bool = False, ask: bool = True, stepwise: bool = False
    ) -> None:
        self._client, self._show, self._fix, self._ask, self._stepwise = client, show, fix, ask, stepwise
        self.failed = self.corrected = 0

    async def play(self, steps: Iterable[Step]) -> None:
        """Play the steps in order; a failed one does not stop those after it."""
        steps = list(steps)
        for number, step in enumerate(steps, 1):
            if self._stepwise:
                question = f"Step {number} is {step.name}: Enter sends it, n leaves it out. "
                if not await self._agreed(question):
                    continue
            await self.play_one(step, number, len(steps))

    async def play_one(self, step: Step, number: int, count: int) -> dict[str, Any]:
        """Send step `number` of `count`, its correction too if one is wanted and known; returns the last reply."""
        title = f": {step.title}" if step.title else ""
        self._show(f"Step {number} of {count}, line {step.line}{title}")
        reply = await self._send(step)
        if "error" not in reply:
            return reply
        self.failed += 1
        if not self._fix:
            return reply
        slip = await correction(self._client, step, reply["error"]["desc"])
        if slip is None:
            return reply
        self._show(f"     {slip.text}")
        if slip.step is None:
            return reply
        if self._ask and not await self._agreed(f"     Send {shown(slip.step.message)} instead? [Y/n] "):
            return reply
        reply = await self._send(slip.step)
        if "error" not in reply:
            self.failed -= 1
            self.corrected += 1
        return reply

    async def _send(self, step: Step) -> dict[str, Any]:
        self._show(f"  -> {shown(step.message)}")
        reply = await self._client.reply(step.message)
        if "error" in reply:
            self._show(f"  <- {reply['error']['class']}: {reply['error']['desc']}")
        else:
            self._show(f"  <- {compact(reply['return'])}")
        return reply

    async def _agreed(self, question: str) -> bool:
        answer = await asyncio.to_thread(input, question)
        return answer.strip().lower() not in ("n", "no")
