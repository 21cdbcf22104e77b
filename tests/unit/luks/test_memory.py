"""What may be taken by a key derivation, from made-up /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.luks.memory import NotEnoughMemory, available, check_memory

MEMINFO = "MemTotal: 4096000 kB\nMemFree: 10 kB\nMemAvailable: 2048000 kB\n"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup/system.slice/qmpd.service/memory"
V1 = "sys/fs/cgroup/memory/box/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 2048000),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/system.slice/qmpd.service\n",
                f"{V2}.max": "max\n",
                f"{V2}.current": "5\n",
            },
            2048000,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/system.slice/qmpd.service\n",
                f"{V2}.max": str(100 << 20),
                f"{V2}.current": str(90 << 20),
                f"{V2}.stat": f"anon 7\ninactive_file {40 << 20}\n",
            },
            50 << 10,
        ),
        (
            {
                "proc/self/cgroup": "0::/system.slice/qmpd.service\n",
                "sys/fs/cgroup/system.slice/memory.max": str(30 << 20),
                "sys/fs/cgroup/system.slice/memory.current": str(40 << 20),
                f"{V2}.max": str(100 << 20),
                f"{V2}.current": "0",
            },
            0,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "2:cpu:/\n4:memory:/box\n0::/\n",
                f"{V1}.limit_in_bytes": str(64 << 20),
                f"{V1}.usage_in_bytes": str(1 << 20),
            },
            63 << 10,
        ),
    ],
)
def test_the_tightest_limit_counts(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    assert available(system(tmp_path, files)) == expected


def test_a_reserve_is_left(tmp_path: Path) -> None:
    root = system(tmp_path, {"proc/meminfo": "MemAvailable: 100000 kB\n"})
    check_memory(80000, "Keyslot 3", root)
    with pytest.raises(NotEnoughMemory, match=r"^Keyslot 3 needs 90000 KiB of memory, only 100000 KiB are available$"):
        check_memory(90000, "Keyslot 3", root)


def test_where_nothing_tells_nothing_is_refused(tmp_path: Path) -> None:
    check_memory(1 << 40, "Keyslot 0", tmp_path)


def test_this_machine_tells() -> None:
    assert (available() or 0) > 0
