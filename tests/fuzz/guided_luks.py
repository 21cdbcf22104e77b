"""Header bytes thought of by atheris, guided by what the parsers do with each: `make fuzz`.

Arguments are libFuzzer's, such as -max_total_time=SECONDS. It starts with the headers that the other tests use.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qmpd.formats", "qmpd.luks"]):
    from tests.fuzz.luks_headers import from_bytes, seeds
from tests.gen import luks2

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        texts = [
            b"\x80" + json.dumps(luks2.tree()).encode(),
            *(b"\x80" + text[:12000] for text in luks2.jsons().values()),
        ]
        for number, data in enumerate([*(b"\0" + seed for seed in seeds()), *texts]):
            (Path(folder) / str(number)).write_bytes(data)
        atheris.Setup([*sys.argv, "-max_len=12289", folder], from_bytes)
        atheris.Fuzz()
