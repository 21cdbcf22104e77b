"""A monitor of test commands: a schema and handlers of their own, clients on socket pairs, a clock that jumps."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from qmpd.commands.control import qmp_capabilities
from qmpd.context import Context, Services
from qmpd.events import EventBus
from qmpd.monitor.dispatch import Dispatcher
from qmpd.monitor.session import ClientSession, greeting_line
from qmpd.qapi.registry import CommandEntry, Registry
from qmpd.qapi.schema import load_file

SCHEMA = """
{ 'enum': 'Capability', 'data': [ 'oob' ] }
{ 'command': 'qmp_capabilities', 'data': { '*enable': [ 'Capability' ] } }
{ 'command': 'echo', 'data': { 'text': 'str' }, 'returns': 'str' }
{ 'command': 'wait', 'data': { 'for': 'str', '*out': 'bool' } }
{ 'command': 'release', 'data': { 'for': 'str' }, 'allow-oob': true }
{ 'command': 'emit', 'data': { 'text': 'str' } }
{ 'command': 'crash' }
{ 'command': 'keep', 'data': { 'id': 'str',
  'data': { 'type': 'str', 'features': [ 'sensitive' ] }, '*any': 'any' } }
{ 'event': 'TEXT', 'data': { 'text': 'str' } }
{ 'event': 'BLOCK_IO_ERROR', 'data': { 'qom-path': 'str', 'count': 'int' } }
"""

VERSION = {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "test"}


class JumpingClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.time = 0.0
        self._calls: list[tuple[float, Callable[[], None], list[bool]]] = []

    def now(self) -> float:
        return self.time

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        live = [True]
        self._calls.append((self.time + delay, callback, live))

        class Timer:
            def cancel(self) -> None:
                live[0] = False

        return Timer()

    def jump(self, seconds: float) -> None:
        end = self.time + seconds
        while due := [one for one in self._calls if one[0] <= end]:
            first = min(due, key=lambda one: one[0])
            self._calls.remove(first)
            self.time = first[0]
            if first[2][0]:
                first[1]()
        self.time = end


class TestClient:
    """One end of a socket pair, whose other end is a session."""

    __test__ = False

    def __init__(self, sock: socket.socket, session: ClientSession) -> None:
        self._sock = sock
        self.session = session
        self._buffer = b""
        sock.setblocking(False)

    async def send(self, *messages: Any) -> None:
        data = b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in messages)
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def line(self) -> bytes:
        while b"\n" not in self._buffer:
            async with asyncio.timeout(10):
                data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 20)
            if not data:
                raise EOFError
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line + b"\n"

    async def receive(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(await self.line()))

    async def command(self, name: str, **arguments: Any) -> Any:
        await self.send({"execute": name, "arguments": arguments})
        return await self.receive()

    async def negotiate(self, *enable: str) -> TestClient:
        assert await self.command("qmp_capabilities", enable=list(enable)) == {"return": {}}
        return self

    async def silent(self) -> bool:
        """Say whether nothing comes although everything has had its chance."""
        for _ in range(10):
            await asyncio.sleep(0.002)
        try:
            self._buffer += self._sock.recv(1 << 20)
        except BlockingIOError:
            pass
        return not self._buffer

    def close(self) -> None:
        self._sock.close()


class Rig:
    """The monitor and what its handlers did."""

    def __init__(self, folder: Path) -> None:
        path = folder / "test.json"
        path.write_text(SCHEMA)
        self.schema = load_file(path)
        self.clock = JumpingClock()
        self.events = EventBus(self.schema.events)
        self.events.bind(asyncio.get_running_loop())
        self.log: list[str] = []
        self.bugs: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        nothing = cast(Any, None)
        registry = Registry(commands=self._handlers())
        self.services = Services(
            "test", self.schema, registry, self.events, nothing, nothing, None, nothing, quit=lambda _: None
        )
        self.dispatcher = Dispatcher(self.services, self.clock)
        self.dispatcher.on_bug = lambda name, error: self.bugs.append(f"{name}: {error}")
        self.clients: list[TestClient] = []

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    def _handlers(self) -> dict[str, CommandEntry]:
        async def echo(ctx: Context, *, text: str) -> str:
            self.log.append(f"echo {text}")
            return text

        async def wait(ctx: Context, **members: Any) -> None:
            name = members["for_"] if "for_" in members else members["for"]
            self.log.append(f"{name} begins")
            if members.get("out"):
                async with ctx.out_of_turn(), ctx.out_of_turn():
                    await self.gate(name).wait()
            else:
                await self.gate(name).wait()
            self.log.append(f"{name} ends")

        async def release(ctx: Context, **members: Any) -> None:
            self.gate(members["for_"] if "for_" in members else members["for"]).set()

        async def emit(ctx: Context, *, text: str) -> None:
            ctx.events.emit("TEXT", text=text)

        async def crash(ctx: Context) -> None:
            raise ZeroDivisionError("a defect")

        async def keep(ctx: Context, **members: Any) -> None:
            pass

        handlers = {"echo": echo, "wait": wait, "release": release, "emit": emit, "crash": crash, "keep": keep}
        table = {name: CommandEntry(name, handler) for name, handler in handlers.items()}
        return table | {"qmp_capabilities": CommandEntry("qmp_capabilities", qmp_capabilities)}

    async def client(self, *, negotiate: bool = True) -> TestClient:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        session = ClientSession(ours, "test", self.dispatcher, greeting_line(VERSION), self.clock)
        client = TestClient(theirs, session)
        self.clients.append(client)
        assert await client.receive() == {"QMP": {"version": VERSION, "capabilities": ["oob"]}}
        return await client.negotiate() if negotiate else client


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Rig]:
    rig = Rig(folder)
    try:
        yield rig
    finally:
        for gate in rig.gates.values():
            gate.set()
        await rig.dispatcher.stop(5)
        await rig.dispatcher.finish(0)
        for client in rig.clients:
            client.close()
    assert not rig.dispatcher.sessions
