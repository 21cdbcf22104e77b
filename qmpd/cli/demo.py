"""The demonstration: the detached-header sequence on real images, every claim checked as it is made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable
from importlib import resources
from pathlib import Path

from qmpd.cli.client import Client, connected
from qmpd.cli.draw import tree
from qmpd.cli.image import create_image, workshop
from qmpd.cli.node_graph import read_graph
from qmpd.cli.player import Player
from qmpd.cli.steps import Step, read_steps
from qmpd.errors import CommandError, QmpdError
from qmpd.units import KiB, MiB

PASSPHRASE = "abc123"  # noqa: S105 - the one in every copy of the sequence
ITER_TIME = "20"
"""Milliseconds of key derivation: a demonstration need not withstand an attacker."""
PATTERN, LENGTH, OFFSET = 0xA5, 64 * KiB, 3 * MiB
SHOWN_OF_INSERTED = ("node-name", "drv", "ro", "encrypted", "cache")
STEP_WITH_SLIP = 6
SLIP = "No secret with id 'libvirt-2-format-secret'"
START_SECONDS = 30.0


class Checks:
    """Says of each claim whether it holds, and counts."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.held = self.failed = 0

    def __call__(self, claim: str, holds: bool) -> None:
        """Show one claim."""
        self._show(f"  {'[ok]' if holds else '[FAILED]'} {claim}")
        if holds:
            self.held += 1
        else:
            self.failed += 1


def sequence(document: Path | None) -> list[Step]:
    """Return the seven steps, of the given document or of our own."""
    if document is not None:
        return read_steps(document.read_text())
    return read_steps(resources.files("qmpd.cli.ctl").joinpath("hotplug.txt").read_text())


async def answers(path: Path) -> bool:
    """Say whether a server takes connections at the path."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


class Demo:
    """One run in one folder."""

    def __init__(self, folder: Path, document: Path | None, show: Callable[[str], None] = print) -> None:
        self._folder, self._show = folder, show
        self.check = Checks(show)
        self.steps = [step.with_values([("/path/to", str(folder))]) for step in sequence(document)]
        self._header, self._payload = folder / "test-header.img", folder / "test-payload.qcow2"

    def _chapter(self, title: str) -> None:
        self._show(f"\n== {title}")

    async def run(self) -> None:
        """Tell the whole story."""
        await self._make_images()
        async with self._daemon() as (client, output):
            await self._hotplug(client)
            await self._look(client)
            await self._use(client, output)
            await self._unplug(client)
        await self._read_without_daemon()

    async def _make_images(self) -> None:
        self._chapter("Make a LUKS header without payload, and a qcow2 image for the payload")
        secret = {"qom-type": "secret", "id": "sec0", "data": PASSPHRASE}
        options = {"cipher-alg": "aes-256", "cipher-mode": "xts", "key-secret": "sec0", "iter-time": ITER_TIME}
        await create_image(str(self._header), "luks", options, header_only=True, objects=[secret])
        await create_image(str(self._payload), "qcow2", {}, size="200G")
        self.check("the header begins as LUKS does", self._header.read_bytes()[:6] == b"LUKS\xba\xbe")
        self.check("the payload is a qcow2 image and holds no header", self._payload.read_bytes()[:4] == b"QFI\xfb")
        self.check("and nothing in it says LUKS", b"LUKS" not in self._payload.read_bytes())

    @contextlib.asynccontextmanager
    async def _daemon(self) -> AsyncIterator[tuple[Client, Path]]:
        """Run qmpd; yields a session and the file of its output. It has to end by `quit` with status 0."""
        self._chapter("Start qmpd")
        path, output = self._folder / "qmp.sock", self._folder / "qmpd.log"
        command = ["-m", "qmpd", "-nodefaults", "-S", "-qmp", f"unix:{path},server=on,wait=off"]
        with output.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await answers(path):
                    if process.returncode is not None:
                        raise CommandError(f"qmpd ended with status {process.returncode}:\n{output.read_text()}")
                    await asyncio.sleep(0.02)
            async with connected(path) as client:
                version = await client.execute("query-version")
                level = version["qemu"]
                self._show(
                    f"  {version['package'].strip()}, at the level of QEMU "
                    f"{level['major']}.{level['minor']}.{level['micro']}"
                )
                yield client, output
                self._chapter("End qmpd")
                await client.execute("quit")
            async with asyncio.timeout(START_SECONDS):
                self.check("it ends with status 0", await process.wait() == 0)
            self.check("and leaves no socket behind", not path.exists())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _hotplug(self, client: Client) -> None:
        self._chapter("The sequence as it is printed: step 6 names a secret that was never added")
        literal = Player(client, self._show)
        replies = [await literal.play_one(step, number, len(self.steps)) for number, step in enumerate(self.steps, 1)]
        failed = {number: reply["error"]["desc"] for number, reply in enumerate(replies, 1) if "error" in reply}
        self.check(f"step {STEP_WITH_SLIP} fails with: {SLIP}", failed.pop(STEP_WITH_SLIP, "") == SLIP)
        self.check("and only step 7, which builds on it, fails as well", set(failed) == {7})

        self._chapter("Steps 6 and 7 again, corrected")
        corrected = Player(client, self._show, fix=True, ask=False)
        for number in (6, 7):
            await corrected.play_one(self.steps[number - 1], number, len(self.steps))
        self.check("the correction was known, and both succeed", (corrected.corrected, corrected.failed) == (1, 0))

    async def _look(self, client: Client) -> None:
        self._chapter("What query-block shows (of `inserted` an excerpt)")
        blocks = await client.execute("query-block")
        for block in blocks:
            shown = {**block, "inserted": {key: block["inserted"][key] for key in SHOWN_OF_INSERTED}}
            self._show(textwrap.indent(json.dumps(shown, indent=2), "  "))
        disks = [(block["qdev"], block["inserted"]["node-name"], block["inserted"]["encrypted"]) for block in blocks]
        self.check("the disk is plugged in and encrypted", disks == [(self._disk, "libvirt-3-format", True)])
        self._chapter("The node graph")
        graph = await read_graph(client)
        self._show("\n".join(f"  {line}" for line in tree(graph).splitlines()))
        edges = {(graph.vertices[edge.parent].name, edge.role, graph.vertices[edge.child].name) for edge in graph.edges}
        self.check("header and payload hang below the luks node", {
            ("libvirt-3-format", "file", "libvirt-2-format"),
            ("libvirt-3-format", "header", "libvirt-1-format"),
        } <= edges)  # fmt: skip

    @property
    def _disk(self) -> str:
        return "/machine/peripheral/virtio-disk2/virtio-backend"

    async def _io(self, client: Client, output: Path, command: str) -> str:
        """Run a qemu-io command on the disk and return what it printed."""
        before = output.stat().st_size
        self._show(f'  qemu-io {self._disk} "{command}"')
        line = f'qemu-io -d {self._disk} "{command}"'
        answer = await client.execute("human-monitor-command", command_line=line)
        with output.open("rb") as log:
            log.seek(before)
            text = str(answer) + log.read().decode(errors="replace")
        for row in text.split("\n"):
            if row:
                self._show(f"    {row}")
        return text

    async def _use(self, client: Client, output: Path) -> None:
        self._chapter("Write a pattern through the disk, and look for it in the payload file")
        text = await self._io(client, output, f"write -P {PATTERN:#x} {OFFSET} {LENGTH}")
        self.check("it is written", f"wrote {LENGTH}/{LENGTH} bytes" in text)
        await self._io(client, output, "flush")
        stored = self._payload.read_bytes()
        self.check(f"the payload file has grown to hold it ({len(stored)} bytes)", len(stored) >= LENGTH)
        self.check("and nowhere holds even 16 bytes of the pattern", bytes([PATTERN]) * 16 not in stored)
        text = await self._io(client, output, f"read -P {PATTERN:#x} {OFFSET} {LENGTH}")
        good = f"read {LENGTH}/{LENGTH} bytes" in text and "verification failed" not in text
        self.check("through the disk it reads back", good)
        text = await self._io(client, output, f"read -P {PATTERN ^ 0xFF:#x} {OFFSET} {LENGTH}")
        self.check("(and another pattern would have been noticed)", "verification failed" in text)

    async def _unplug(self, client: Client) -> None:
        self._chapter("Unplug the disk; the payload alone is no LUKS volume")
        await client.execute("device_del", id="virtio-disk2")
        async with asyncio.timeout(START_SECONDS):
            event = await client.next_event()
            while event is not None and event.get("data", {}).get("device") != "virtio-disk2":
                event = await client.next_event()
        self.check("DEVICE_DELETED tells that it is gone", event is not None and event["event"] == "DEVICE_DELETED")
        self.check("query-block is empty", await client.execute("query-block") == [])
        message = {"driver": "luks", "node-name": "alone", "file": "libvirt-2-format"}
        reply = await client.reply(
            {"execute": "blockdev-add", "arguments": {**message, "key-secret": "libvirt-4-format-secret"}}
        )
        refusal = reply.get("error", {}).get("desc", "")
        self.check(f"opening it without the header fails: {refusal}", refusal == "Volume is not in LUKS format")
        self._chapter("Delete everything in reverse")
        for number in (3, 2, 1):
            for kind in ("format", "storage"):
                name = f"libvirt-{number}-{kind}"
                if name != "libvirt-3-storage":
                    self._show(f"  blockdev-del {name}")
                    await client.execute("blockdev-del", node_name=name)
        self._show("  object-del libvirt-4-format-secret")
        await client.execute("object-del", id="libvirt-4-format-secret")
        self.check("no node is left", await client.execute("query-named-block-nodes") == [])
        objects = await client.execute("qom-list", path="/objects")
        self.check("no secret is left", all(one["type"] != "child<secret>" for one in objects))

    async def _read_without_daemon(self) -> None:
        self._chapter("Open header and payload once more, in another process")
        good = await self._opens(PASSPHRASE)
        self.check("with header and passphrase the pattern is there", good == bytes([PATTERN]) * LENGTH)
        try:
            await self._opens("abc124")
            refusal = "it opened"
        except QmpdError as error:
            refusal = str(error)
        wanted = "Invalid password, cannot unlock any keyslot"
        self.check(f"with another passphrase: {refusal}", refusal == wanted)

    async def _opens(self, passphrase: str) -> bytes:
        """Open the volume by the library and return what lies where the pattern was written."""
        async with workshop() as shop:
            shop.add_object({"qom-type": "secret", "id": "sec0", "data": passphrase})
            return await shop.read(
                {
                    "driver": "luks",
                    "node-name": "volume",
                    "read-only": True,
                    "key-secret": "sec0",
                    "header": {"driver": "file", "filename": str(self._header)},
                    "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(self._payload)}},
                },
                OFFSET,
                LENGTH,
            )


async def run(document: Path | None, keep: bool) -> int:
    """Run the demonstration in a temporary folder; 0 if every claim held."""
    folder = Path(tempfile.mkdtemp(prefix="qmpd-demo-"))
    try:
        demo = Demo(folder, document)
        await demo.run()
    finally:
        if not keep:
            shutil.rmtree(folder)
    if keep:
        print(f"\nThe images are kept in {folder}")
    else:
        demo.check("the folder is gone", not folder.exists())
    print(f"\n{demo.check.held} claims held, {demo.check.failed} did not")
    return 1 if demo.check.failed else 0
