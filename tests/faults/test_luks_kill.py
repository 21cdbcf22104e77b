"""A real daemon killed with SIGKILL while it rotates passphrases: one opens, those rotated away never do."""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
from pathlib import Path

import pytest

from tests.conftest import Proof
from tests.support.daemon import RawClient, unguarded
from tests.unit.luks.test_key_jobs import SECRETS, amend, header_of, opens

KILLS = 40
NAMES = "snm"


def start(folder: Path, opening: str) -> tuple[subprocess.Popen[bytes], RawClient]:
    """Start a daemon that has the header open with the passphrase `opening`."""
    process, client = unguarded(folder)
    for name in NAMES:
        client.ok("object-add", qom_type="secret", id=name, data=SECRETS[name])
    header = {"driver": "file", "filename": str(folder / "h.img")}
    file = {"driver": "null-co", "size": 1 << 20}
    client.ok("blockdev-add", driver="luks", node_name="v", file=file, header=header, key_secret=opening)
    return process, client


def rotate(client: RawClient, now: str, pairs: list[tuple[str, str]]) -> None:
    """Change the passphrase again and again, noting from which to which, until the daemon is gone."""
    for number in itertools.count():
        following = NAMES[(NAMES.index(now) + 1) % len(NAMES)]
        pairs.append((now, following))
        try:
            if number % 2:
                error = amend(client, "j", "v", state="active", new_secret=following, secret=now)
                assert error is None, error
                error = amend(client, "k", "v", state="inactive", old_secret=now)
            else:
                error = amend(client, "j", "v", state="changed", new_secret=following, old_secret=now)
        except (OSError, EOFError):
            return
        assert error is None, error
        now = following


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", [1, 2])
def test_a_killed_daemon_locks_nobody_out(proof: Proof, tmp_path: Path, version: int) -> None:
    (tmp_path / "h.img").write_bytes(header_of(version))
    now, done, kills = "s", 0, proof.count(KILLS) // 2
    for number in range(kills):
        process, client = start(tmp_path, now)
        pairs: list[tuple[str, str]] = []
        killer = threading.Timer(random.Random(number).uniform(0.1, 1.0), process.kill)
        killer.start()
        try:
            rotate(client, now, pairs)
        finally:
            killer.cancel()
            process.kill()
            process.wait()
            client.close()
        data = (tmp_path / "h.img").read_bytes()
        good = [name for name in NAMES if opens(data, name)]
        assert good
        assert set(good) <= set(pairs[-1]), (good, pairs[-1])
        now, done = good[-1], done + len(pairs) - 1
        if len(good) > 1:  # the job that was killed had added one: the other goes, so that the next round counts
            process, client = start(tmp_path, now)
            assert amend(client, "tidy", "v", state="inactive", old_secret=good[0]) is None
            client.ok("quit")
            assert process.wait(20) == 0
            client.close()
    assert done > 0
    proof.record(f"luks{version}-kill", kills=kills, rotations=done)
