"""The handler of qapi/hmp.json: a line of the monitor for people.

The commands are in the `_hmp_*` modules; most of them call their counterpart here.
"""

from __future__ import annotations

from qmpd.commands import _hmp_block, _hmp_info, _hmp_machine, _hmp_table
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.qapi.registry import command

PROVIDERS = (_hmp_block, _hmp_info, _hmp_machine)
"""The modules whose import declares the commands."""


@command("human-monitor-command")
async def human_monitor_command(ctx: Context, *, command_line: str, cpu_index: int | None = None) -> str:
    """Run one line and return what it prints, lines ending as on a terminal."""
    cpus = 0 if ctx.machine.options.board == "none" else 1
    if cpu_index is not None and not 0 <= cpu_index < cpus:
        raise CommandError("Parameter 'cpu-index' expects a CPU number")
    printed = await _hmp_table.run(ctx, command_line)
    return printed.replace("\n", "\r\n")
