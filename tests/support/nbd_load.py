"""Many NBD connections at once, each with a part of an export to itself, whose content it knows.

python -m tests.support.nbd_load SOCKET SEED EXPORT:SIZE... COUNT: prints "ready" once COUNT connections stand, works
until its standard input ends, reads everything once more and prints how much it did, as JSON. Ends with 1 and a line
that says where when a byte is wrong.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Sequence

from tests.support.nbd_wire import FLUSH, FUA, READ, STYLES, WRITE, ZERO, Client

THREADS = 8
LONGEST = 32 << 10


class Share:
    """A connection, the bytes it alone writes, and what they must be."""

    def __init__(self, path: str, export: str, start: int, length: int, rng: random.Random) -> None:
        self.client = Client(path, timeout=60).go(export.encode(), rng.choice(STYLES))
        self.export, self.start, self.rng = export, start, rng
        self.model = bytearray(length)
        self.pending: tuple[int, int, bytes] | None = None
        self.counts = dict.fromkeys(("read", "written", "zeroed", "flushed"), 0)
        self.client.write(start, bytes(length))

    def send(self) -> None:
        """Send one request."""
        rng = self.rng
        command = rng.choices((READ, WRITE, ZERO, FLUSH), (50, 40, 8, 2))[0]
        length = min(rng.randrange(1, LONGEST), len(self.model))
        at = rng.randrange(len(self.model) - length + 1)
        data = b""
        if command == FLUSH:
            self.client.send(FLUSH)
        elif command == READ:
            self.client.send(READ, self.start + at, length)
            data = bytes(self.model[at : at + length])
        else:
            data = rng.randbytes(length) if command == WRITE else bytes(length)
            flags = FUA if rng.random() < 0.05 else 0
            self.client.send(command, self.start + at, length, flags, payload=data if command == WRITE else b"")
            self.model[at : at + length] = data
        self.pending = (command, at, data)

    def receive(self) -> None:
        """Take the answer and look at it."""
        assert self.pending is not None
        command, at, data = self.pending
        result = self.client.results(1)[1]
        if result.error or (command == READ and result.data != data):
            raise AssertionError(f"{self.export} at {self.start + at}, command {command}: error {result.error}")
        name = {READ: "read", WRITE: "written", ZERO: "zeroed", FLUSH: "flushed"}[command]
        self.counts[name] += len(data) if command != FLUSH else 1

    def verify(self) -> None:
        """Read everything once more."""
        if self.client.read(self.start, len(self.model)) != self.model:
            raise AssertionError(f"{self.export} from {self.start}: not what was written")


def work(shares: Sequence[Share], stop: threading.Event, failures: list[str]) -> None:
    """Keep one request in flight on every connection until told to stop."""
    try:
        while not stop.is_set():
            for share in shares:
                share.send()
            for share in shares:
                share.receive()
        for share in shares:
            share.verify()
    except (AssertionError, OSError, EOFError) as error:
        failures.append(f"{type(error).__name__}: {error}")
        stop.set()


def main(path: str, seed: str, *words: str) -> int:
    """Run the load."""
    exports, count = [word.rsplit(":", 1) for word in words[:-1]], int(words[-1])
    each = count // len(exports)
    shares = []
    for export, size in exports:
        length = int(size) // each
        for at in range(each):
            # Odd borders, so that neighbours share sectors and clusters.
            shares.append(Share(path, export, at * length, length, random.Random(f"{seed}/{export}/{at}")))
    print("ready", flush=True)
    stop, failures = threading.Event(), list[str]()
    threads = [threading.Thread(target=work, args=(shares[at::THREADS], stop, failures)) for at in range(THREADS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        print(failures[0], flush=True)
        return 1
    total = {name: sum(share.counts[name] for share in shares) for name in shares[0].counts}
    print(json.dumps(total | {"connections": len(shares)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
