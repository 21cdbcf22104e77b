"""The monitor for people: how a line finds its command, and what comes back. Texts are QEMU's."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import pytest

from qmpd.commands import hmp
from qmpd.context import Services
from qmpd.errors import CommandError
from qmpd.jobs.job import JobManager
from qmpd.qapi import schema
from qmpd.qapi.registry import discover
from tests.unit.machine.bench import Bench


class Here:
    """A context for handlers on a bench."""

    def __init__(self, bench: Bench) -> None:
        self.asked_to_quit: list[str] = []
        self.services = Services(
            program="qmpd",
            schema=schema.load("qapi-schema.json"),
            registry=discover(),
            events=bench.machine.events,
            objects=bench.objects,
            graph=bench.graph,
            machine=bench.machine,
            jobs=JobManager(bench.machine.events),
            quit=self.asked_to_quit.append,
        )
        self.graph, self.objects, self.events = bench.graph, bench.objects, bench.machine.events
        self.machine, self.jobs = bench.machine, self.services.jobs
        self.session = None

    def out_of_turn(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()


async def ask(bench: Bench, line: str, **arguments: Any) -> str:
    context: Any = Here(bench)
    reply = await hmp.human_monitor_command(context, command_line=line, **arguments)
    assert "\n" not in reply.replace("\r\n", "")
    return reply.replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("", ""),
        ("   ", ""),
        ("nosuch", "unknown command: 'nosuch'\n"),
        ("info nosuch x", "unknown command: 'info nosuch'\n"),
        ("info/status", "unknown command: 'info'\n"),
        ("  info   status  ", "VM status: paused (prelaunch)\n"),
        (
            "info status 5",
            'status: extraneous characters at the end of line\nTry "help info status" for more information\n',
        ),
        ("stop now", 'stop|s: extraneous characters at the end of line\nTry "help stop" for more information\n'),
        ("info block -x", 'block: unsupported option -x\nTry "help info block" for more information\n'),
        (
            "info block -nv n0",
            'block: extraneous characters at the end of line\nTry "help info block" for more information\n',
        ),
        ("device_del", 'device_del: string expected\nTry "help device_del" for more information\n'),
        ("drive_del", 'drive_del: block device name expected\nTry "help drive_del" for more information\n'),
        ("change cd", 'change: filename expected\nTry "help change" for more information\n'),
        ("block_resize n0 x", 'invalid size\nTry "help block_resize" for more information\n'),
        ("block_resize n0 2M", "Error: Cannot find device='n0' nor node-name=''\n"),
        ('device_del "a b"', "Error: Device 'a b' not found\n"),
        ('device_del "a\\"b"', "Error: Device 'a\"b' not found\n"),
        ("device_add", "Error: Parameter 'driver' is missing\n"),
        ("device_add virtio-blk-pci,,x", "Error: 'virtio-blk-pci,x' is not a valid device model name\n"),
        ("device_add virtio-scsi-pci,bogus=1", "Error: Property 'virtio-scsi-pci.bogus' not found\n"),
        ("device_add virtio-scsi-pci,id=1a", 'Try "help device_add" for more information\n'),
        ("system_wakeup", "Error: Unable to wake up: guest is not in suspended state\n"),
        ("info uuid", "00000000-0000-0000-0000-000000000000\n"),
        ("info name", ""),
        ("info vnc", "None\n"),
        ("info block-jobs", "No active jobs\n"),
        ("info snapshots", "no block device can store vmstate for snapshot\n"),
        ("commit nosuch", "Device 'nosuch' not found\n"),
        ("drive_del nosuch", "Device 'nosuch' not found\n"),
        ("eject nosuch", "Error: Device 'nosuch' not found\n"),
        ("eject -x y", 'eject: unsupported option -x\nTry "help eject" for more information\n'),
        ("savevm", "Error: Device 'n0' is writable but does not support snapshots\n"),
        ("qemu-io nosuch length", "Error: Cannot find device='' nor node-name='nosuch'\n"),
        ("qemu-io -d nosuch length", "Error: Device 'nosuch' not found\n"),
        ("qom-list", "/\n"),
        ("qom-get /machine type", '"pc-i440fx-10.0-machine"\n'),
        ("help nosuch", "unknown command: 'nosuch'\n"),
        ("? info nosuch", "unknown command: 'info nosuch'\n"),
        ("object_add secret", "Error: Parameter 'id' is missing\n"),
        ("object_del nosuch", "Error: object 'nosuch' not found\n"),
    ],
)
async def test_answers(line: str, printed: str) -> None:
    bench = Bench()
    await bench.node()
    assert await ask(bench, line) == printed


async def test_an_unterminated_string_is_told_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert await ask(Bench(), 'info block "n0') == (
        'block: block device name expected\nTry "help info block" for more information\n'
    )
    assert capsys.readouterr().out == "unterminated string\n"


async def test_info_block() -> None:
    bench = Bench()
    await bench.add("virtio-scsi-pci")
    await bench.node()
    name = 'json:{"driver": "null-co", "size": 1048576}'
    node = f"n0: {name} (null-co)\n    Cache mode:       writeback\n"
    assert await ask(bench, "info block") == ""
    assert await ask(bench, "info block n0") == node
    assert await ask(bench, "info block -n") == node
    await bench.add("scsi-cd", id="c")
    await bench.add("scsi-hd", drive="n0", **{"write-cache": "off"})
    assert await ask(bench, "info block -v") == (
        "c: [not inserted]\n    Attached to:      c\n    Removable device: not locked, tray closed\n\n"
        f"n0: {name} (null-co)\n    Attached to:      /machine/peripheral-anon/device[1]\n"
        "    Cache mode:       writethrough\n\nImages:\n"
        f"image: {name}\nfile format: null-co\nvirtual size: 1 MiB (1048576 bytes)\ndisk size: 0 B\n"
    )


async def test_devices_come_and_go() -> None:
    bench = Bench()
    await bench.node()
    assert await ask(bench, "device_add virtio-blk-pci,drive=n0,id=v,logical_block_size=512") == ""
    assert await ask(bench, "device_add virtio-blk-pci,drive=n0,id=v") == "Error: Duplicate device ID 'v'\n"
    assert (await ask(bench, "info blockstats")).startswith(": rd_bytes=0 wr_bytes=0 rd_operations=0 ")
    assert await ask(bench, "drive_del n0") == "Node n0 is in use\n"
    assert await ask(bench, "device_del v") == ""
    assert await ask(bench, "drive_del n0") == ""
    assert bench.graph.nodes() == []


async def test_run_state() -> None:
    bench = Bench()
    for line, status in (("c", "running"), ("s", "paused"), ("cont", "running"), ("system_reset", "running")):
        assert await ask(bench, line) == ""
        assert bench.machine.status == status
    assert [name for name, _ in bench.events] == ["RESUME", "STOP", "RESUME", "RESET"]


async def test_objects_and_properties() -> None:
    bench = Bench()
    assert await ask(bench, "object_add iothread,id=io,poll-max-ns=5") == ""
    assert await ask(bench, "qom-get /objects/io poll-max-ns") == "5\n"
    assert await ask(bench, "qom-set /objects/io poll-max-ns 6") == ""
    assert await ask(bench, "qom-set -j /objects/io poll-max-ns 7") == ""
    assert (await ask(bench, "info iothreads")).splitlines()[2] == "  poll-max-ns=7"
    assert await ask(bench, "object_del io") == ""


async def test_help_names_every_command_once() -> None:
    bench = Bench()
    everything = (await ask(bench, "help")).splitlines()
    assert len({line.split()[0] for line in everything}) == len(everything) > 20
    assert all(" -- " in line for line in everything)
    assert await ask(bench, "help stop") == next(line for line in everything if line.startswith("stop|s ")) + "\n"
    assert await ask(bench, "help info") == await ask(bench, "info")


async def test_the_processor_must_exist() -> None:
    assert await ask(Bench(), "info status", cpu_index=0) == "VM status: paused (prelaunch)\n"
    for index in (1, -1):
        with pytest.raises(CommandError, match="Parameter 'cpu-index' expects a CPU number"):
            await ask(Bench(), "info status", cpu_index=index)
