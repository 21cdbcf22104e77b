"""From options to a daemon that serves: the order of creation of both programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from qmpd.block.options import OpenFlags
from qmpd.daemon import process
from qmpd.daemon.chardev import adopt_socket, listen_at, open_chardev, open_compat
from qmpd.daemon.config import Configurator, HelpWanted
from qmpd.daemon.daemon import Daemon
from qmpd.daemon.listen import default_path
from qmpd.daemon.options import Given
from qmpd.daemon.start import Done, Failure, Start
from qmpd.errors import QmpdError
from qmpd.monitor.dispatch import CommandContext
from qmpd.qapi import schema as qapi_schema
from qmpd.qapi.ir import SchemaError


async def run(program: str, start: Start, background: process.Background) -> int:
    """Build the daemon, serve, take it down; return the exit status."""
    storage = program == "qmpd-storage-daemon"
    root = qapi_schema.STORAGE_DAEMON_ROOT if storage else qapi_schema.SYSTEM_ROOT
    try:
        daemon = Daemon(program, qapi_schema.load(root))
    except SchemaError as error:
        start.complaints.say(f"code and schema differ:\n{error}")
        return 1
    pid_file: process.PidFile | None = None
    status = 0
    try:
        await (_apply_storage if storage else _apply_system)(daemon, start)
        if start.pid_path is not None:
            pid_file = _write_pid(start.pid_path)

        def ready() -> None:
            background.ready()
            process.notify(f"READY=1\nMAINPID={os.getpid()}")

        await daemon.serve(ready)
        process.notify("STOPPING=1")
    except Done as done:
        print(done)
    except Failure as failure:
        start.complaints.say(str(failure), words=failure.words, hint=failure.hint)
        status = 1
    finally:
        await daemon.close()
        if pid_file is not None:
            pid_file.remove()
    return status


def _write_pid(path: str) -> process.PidFile:
    try:
        return process.PidFile(path)
    except BlockingIOError as error:
        raise Failure(f"cannot create PID file: Failed to lock PID file '{path}': {error.strerror}") from error
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Failure(f"cannot create PID file: Could not create '{path}': {reason}") from error


class _Words:
    """Turns refusals inside the block into a Failure that names the option's words."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if isinstance(error, QmpdError):
            raise Failure(str(error), words=self._words, hint=error.hint) from error
        if isinstance(error, HelpWanted):
            raise Done(str(error).rstrip("\n")) from error


def _take_policy(start: Start) -> None:
    """Set what LUKS volumes must be like, before any is opened."""
    for one in start.given:
        if one.name == "luks-policy":
            from qmpd.luks.policy import parse_policy, set_policy

            with _Words(one.words):
                set_policy(parse_policy(one.value))


async def _apply_storage(daemon: Daemon, start: Start) -> None:
    """Apply every option in the order given."""
    _take_policy(start)
    configure = Configurator(daemon.services, daemon.monitors)
    ctx = daemon.context()
    for one in start.given:
        with _Words(one.words):
            match one.name:
                case "":
                    raise Failure("Unexpected argument", words=one.words)
                case "object":
                    await configure.add_object(ctx, configure.read_object(one.value))
                case "blockdev":
                    await configure.add_blockdev(ctx, configure.read(one.value, "driver", "BlockdevOptions"))
                case "chardev":
                    daemon.monitors.open_chardev(one.value)
                case "monitor":
                    configure.add_monitor(one.value, storage=True)
                case "export":
                    daemon.heed_signals()
                    await _add_export(configure, ctx, one)
                case "nbd-server":
                    await configure.start_nbd_server(ctx, one.value)
                case "luks-policy":
                    pass
                case name:
                    raise AssertionError(name)
    _adopt_passed(daemon)


async def _add_export(configure: Configurator, ctx: CommandContext, one: Given) -> None:
    value = configure.read_export(one.value)
    await configure.add_export(ctx, value)


def _adopt_passed(daemon: Daemon) -> bool:
    """Put monitors on the sockets of the service manager; say whether there were any."""
    sockets = process.passed_sockets()
    for number, sock in enumerate(sockets):
        name = f"systemd{number}"
        daemon.monitors.add(adopt_socket(name, sock, server=True))
        daemon.monitors.monitor(name)
    return bool(sockets)


async def _apply_system(daemon: Daemon, start: Start) -> None:
    """Read every value in the order given, as QEMU does, then create things in QEMU's order."""
    from qmpd.daemon import system_options
    from qmpd.machine.machine import Machine

    _take_policy(start)
    daemon.services.graph.open_flags |= OpenFlags.NO_AES
    configure = Configurator(daemon.services, daemon.monitors)
    ctx = daemon.context()
    objects: list[dict[str, Any]] = []
    later: dict[str, list[tuple[Given, Any]]] = {}
    described = system_options.SystemOptions()
    for one in start.given:
        value: Any = None
        with _Words("" if one.name == "smp" else one.words):  # a property of the machine, named in the text
            match one.name:
                case "object":
                    objects.append(configure.read_object(one.value))
                case "blockdev":
                    value = configure.read(one.value, "driver", "BlockdevOptions")
                case "export":
                    value = configure.read_export(one.value)
                case "device":
                    value = system_options.read_device(one.value)
                case _:
                    system_options.take(described, start.complaints, one)
        later.setdefault(one.name, []).append((one, value))

    with _Words(""):
        services = daemon.services
        parts = services.graph, services.objects, services.events
        machine = Machine(*parts, described.build(), registry=services.registry)
        services.machine = machine
        daemon.at_end.append(machine.close)
    for members in objects:
        with _Words(""):
            await configure.add_object(ctx, members)
    for one, _ in later.get("chardev", []):
        with _Words(one.words):
            daemon.monitors.add(open_chardev(one.value))
    for number, (one, _) in enumerate(later.get("qmp", [])):
        with _Words(one.words):
            daemon.monitors.add(open_compat(one.value, f"compat_monitor{number}"))
            daemon.monitors.monitor(f"compat_monitor{number}")
    await _each(later.get("blockdev", []), lambda value: configure.add_blockdev(ctx, value))
    for one, _ in later.get("mon", []):
        with _Words(one.words):
            configure.add_monitor(one.value, storage=False)
    daemon.heed_signals()  # a device may serve its disk (`plug=`), as exports do
    await _each(later.get("device", []), lambda value: system_options.add_device(configure, ctx, value))
    for one, _ in later.get("nbd-server", []):
        with _Words(one.words):
            await configure.start_nbd_server(ctx, one.value)
    await _each(later.get("export", []), lambda value: configure.add_export(ctx, value))
    if not _adopt_passed(daemon) and not daemon.monitors.used:
        with _Words(""):
            path = default_path()
            daemon.monitors.add(listen_at("default", path))
            daemon.monitors.monitor("default")
    machine.start()


async def _each(todo: list[tuple[Given, Any]], work: Callable[[Any], Any]) -> None:
    for one, value in todo:
        with _Words(one.words):
            await work(value)
