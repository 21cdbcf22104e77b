"""Handlers of qapi/luks-header.json: backups of LUKS headers, and the state that they are in."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.luks import care
from qmpd.qapi.registry import command

_READ_FAILED = "Could not access the LUKS header"


@command("x-luks-header-backup")
async def luks_header_backup(ctx: Context, *, node_name: str, filename: str) -> dict[str, Any]:
    """Copy a header to a new file."""
    node = ctx.graph.lookup(None, node_name)
    async with ctx.out_of_turn():
        try:
            return {"size": await care.backup(ctx.graph, node, filename)}
        except OSError as error:
            raise CommandError(f"{_READ_FAILED}: {error.strerror}") from error


@command("x-luks-header-restore")
async def luks_header_restore(ctx: Context, *, node_name: str, filename: str, force: bool = False) -> None:
    """Put a backup in place of a header."""
    node = ctx.graph.lookup(None, node_name)
    async with ctx.out_of_turn():
        try:
            await care.restore(ctx.graph, node, filename, force=force)
        except OSError as error:
            raise CommandError(f"{_READ_FAILED}: {error.strerror}") from error


@command("x-luks-header-compare")
async def luks_header_compare(ctx: Context, *, node_name: str, filename: str) -> dict[str, Any]:
    """Say how a header differs from a backup."""
    node = ctx.graph.lookup(None, node_name)
    async with ctx.out_of_turn():
        try:
            found = await care.compare(ctx.graph, node, filename)
        except OSError as error:
            raise CommandError(f"{_READ_FAILED}: {error.strerror}") from error
    return {"equal": not found, "differences": found}


@command("x-luks-header-verify")
async def luks_header_verify(ctx: Context, *, node_name: str, secret: str | None = None) -> dict[str, Any]:
    """Say what state a header is in."""
    node = ctx.graph.lookup(None, node_name)
    passphrase = None if secret is None else ctx.graph.objects.passphrase(secret)
    try:
        async with ctx.out_of_turn():
            return (await care.verify(ctx.graph, node, passphrase)).to_qapi()
    except OSError as error:
        raise CommandError(f"{_READ_FAILED}: {error.strerror}") from error
    finally:
        if passphrase is not None:
            passphrase.wipe()
