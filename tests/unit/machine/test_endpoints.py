"""Endpoints: each disk that is plugged gets one from the factory the guest policy names."""

from __future__ import annotations

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.errors import CommandError
from qmpd.qapi.registry import ClassEntry, registry
from tests.unit.machine.bench import Bench


class Recorder:
    """A factory whose endpoints only say that they were made and closed."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail = False

    async def open(
        self, backend: BlockBackend, directory: str, device_id: str, *, read_only: bool, description: str
    ) -> Opened:
        if self.fail:
            raise CommandError("no socket")
        assert backend.node is not None
        self.calls.append(f"open {directory}/{device_id} {'ro' if read_only else 'rw'} {description}")
        return Opened(self, device_id)


class Opened:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.path = recorder, name

    async def close(self) -> None:
        self.recorder.calls.append(f"close {self.path}")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    class Only(Recorder):
        """Whoever asks for one is given the same."""

        def __new__(cls) -> Recorder:  # type: ignore[misc]
            return made

    made = Recorder()
    monkeypatch.setitem(registry.endpoints, "recorder", ClassEntry("recorder", Only, "", None))
    return made


async def test_disks_get_an_endpoint_and_lose_it_when_they_go(recorder: Recorder) -> None:
    bench = Bench("plug=recorder:/run")
    await bench.add("virtio-blk-pci", id="a", drive=await bench.node(), serial="X")
    await bench.add("virtio-scsi-pci", id="s")
    await bench.add("scsi-cd")
    await bench.add("scsi-cd", drive=await bench.node())
    await bench.remove("a")
    await bench.remove("s")
    assert recorder.calls == [
        "open /run/a rw virtio-blk-device, serial X, 1 MiB",
        "open /run/peripheral-anon-device[1] ro scsi-cd, 1 MiB",
        "close a",
        "close peripheral-anon-device[1]",
    ]


async def test_a_disk_without_its_endpoint_is_not_plugged(recorder: Recorder) -> None:
    bench = Bench("plug=recorder:/run")
    recorder.fail = True
    assert await bench.add("virtio-blk-pci", id="a", drive=await bench.node()) == "no socket"
    assert bench.machine.peripheral.children == {}
    assert "/a" not in bench.deleted()
    await bench.graph.blockdev_del("n0")


def test_an_unknown_kind_is_refused_at_start() -> None:
    with pytest.raises(CommandError, match="endpoints of type 'nosuch' are not available"):
        Bench("plug=nosuch:/run")
