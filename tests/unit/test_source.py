"""Rules for the text of the project: size of files, how a module opens, what may not be named."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE_LIMIT = 600
CORPUS = Path("tests/conformance/corpus")
OWN = Path("tests/unit/test_source.py")

FORBIDDEN = {
    "an absolute path of one machine": re.compile(r"(^|[^A-Za-z0-9_.])/(work|farm|root)/[A-Za-z.]"),
    "the host of a package registry": re.compile(r"[a-z]+\.debian\.or[g]|py[p]i\.org|python[h]osted|registry\.np[m]js"),
}


def tracked() -> list[Path]:
    """Return the files of the project: those git knows, or would take up."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return sorted(Path(name) for name in set(listing.stdout.split("\0")) if name and (ROOT / name).is_file())


FILES = tracked()
SOURCES = [path for path in FILES if path.suffix == ".py" and not path.is_relative_to(CORPUS)]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_python_file(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert text.count("\n") <= LINE_LIMIT, f"{path} has more than {LINE_LIMIT} lines"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} does not say what it is"
    if len(tree.body) > 1:
        second = tree.body[1]
        assert isinstance(second, ast.ImportFrom), f"{path} does not import annotations from __future__"
        assert second.module == "__future__"
        assert "annotations" in {alias.name for alias in second.names}


def test_nothing_names_this_place() -> None:
    found = []
    for path in FILES:
        if path == OWN or path.suffix == ".gz":
            continue
        text = (ROOT / path).read_text(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            found += [f"{path}:{number}: {what}" for what, pattern in FORBIDDEN.items() if pattern.search(line)]
    assert not found


def test_programs_are_executable() -> None:
    wrong = [
        path for path in FILES if (ROOT / path).read_bytes()[:2] == b"#!" and not (ROOT / path).stat().st_mode & 0o100
    ]
    assert [path for path in wrong if not path.is_relative_to(CORPUS)] == []
