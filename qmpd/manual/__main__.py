"""Write the man pages and completions: `python -m qmpd.manual [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

from qmpd.manual.pages import collect
from qmpd.manual.roff import render
from qmpd.manual.shells import bash, fish, zsh

ROOT = Path(__file__).parents[2]


def files() -> dict[str, str]:
    """Return the text of every file, by its path in the project."""
    pages = collect()
    found = {f"man/{page.name}.{page.section}": render(page) for page in pages}
    for page in pages:
        found[f"completions/{page.name}.bash"] = bash(page)
        found[f"completions/_{page.name}"] = zsh(page)
        found[f"completions/{page.name}.fish"] = fish(page)
    return found


def main(words: list[str]) -> int:
    """Write the files, or with --check say which are out of date (status 1)."""
    stale = []
    for name, text in files().items():
        path = ROOT / name
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(name)
        if "--check" not in words:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if stale and "--check" in words:
        sys.stderr.write(f"not what --help says: {', '.join(stale)}; write them anew: python -m qmpd.manual\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
