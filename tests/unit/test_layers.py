"""Imports go down only: the table of docs/architecture.md, section 2, checked on every import in qmpd/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RANKS = {
    # 0 leaf
    "errors": 0,
    "units": 0,
    "native": 0,
    "streams": 0,
    "trace": 0,
    "version": 0,
    # 1 pure
    "crypto": 10,
    "qapi": 11,
    "protocols": 11,
    "formats": 11,
    # 2 I/O
    "aio": 20,
    "events": 20,
    # 3 cores, each above those it may import
    "qom": 30,
    "block": 31,
    "luks": 32,
    "jobs": 32,
    "exporting": 32,
    "machine": 33,
    "context": 34,
    # 4 plug-ins
    "drivers": 40,
    "objects": 40,
    "exports": 40,
    "jobtypes": 40,
    "devices": 40,
    "commands": 40,
    # 5 and 6
    "monitor": 50,
    "daemon": 60,
    "cli": 60,
    "manual": 61,
    "__main__": 61,
}
SAME_LAYER = {("formats", "crypto")}
"""What layer 1 may import of its own layer."""
BANNED_IN_LAYER_1 = {"asyncio", "socket", "threading"}


def part_of(module: str) -> str:
    """Return the package or top-level module of qmpd that a dotted name lies in ("" for qmpd itself)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of every module that the code imports when it runs, at whatever depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node):
            for other in node.orelse:
                yield from imports(other, package)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                # `from qmpd import x` and `from qmpd.block import node` name modules by their last part.
                yield node.lineno, f"{base}.{alias.name}" if base.split(".")[0] == "qmpd" else base
        yield from imports(node, package)


def offences(module: str, source: str, package: str) -> list[str]:
    """Return what the source of `module` imports against the table."""
    found = []
    own = part_of(module)
    if own and own not in RANKS:
        return [f"{module}: '{own}' stands in no layer"]
    for line, name in imports(ast.parse(source), package):
        root = name.split(".")[0]
        if own and 10 <= RANKS[own] < 20 and root in BANNED_IN_LAYER_1:
            found.append(f"{module}:{line}: a pure package imports {root}")
        if root != "qmpd":
            continue
        other = part_of(name)
        if other in ("", own):
            continue
        if other not in RANKS:
            found.append(f"{module}:{line}: {name} stands in no layer")
        elif not own or RANKS[other] >= RANKS[own]:
            found.append(f"{module}:{line}: '{own or 'qmpd'}' may not import '{other}'")
        elif RANKS[own] // 10 == 1 and RANKS[other] // 10 == 1 and (own, other) not in SAME_LAYER:
            found.append(f"{module}:{line}: '{own}' may not import '{other}', of its own layer")
    return found


def modules() -> list[tuple[str, Path]]:
    result = []
    for path in sorted((ROOT / "qmpd").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        result.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return result


MODULES = modules()


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[module for module, _ in MODULES])
def test_imports_go_down(module: str, path: Path) -> None:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert not offences(module, path.read_text(), package)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("qmpd.drivers.raw", "from qmpd.block.node import BlockNode", 0),
        ("qmpd.drivers.raw", "from qmpd.objects.secret import Secret", 1),
        ("qmpd.drivers.raw", "import qmpd.monitor.session", 1),
        ("qmpd.drivers.raw", "from qmpd.drivers import _cache", 0),
        ("qmpd.block.node", "def f():\n    from qmpd import drivers", 1),
        ("qmpd.block.node", "if TYPE_CHECKING:\n    from qmpd.jobs.job import Job", 0),
        ("qmpd.luks.volume", "from qmpd.jobs.job import Job", 1),
        ("qmpd.machine.bus", "from qmpd.exporting.server import Server", 0),
        ("qmpd.formats.luks1", "from qmpd.crypto import af", 0),
        ("qmpd.crypto.af", "from qmpd.formats import luks1", 1),
        ("qmpd.protocols.qmp", "import asyncio", 1),
        ("qmpd.protocols.qmp", "from socket import socket", 1),
        ("qmpd.protocols.qmp", "from qmpd.qapi import schema", 1),
        ("qmpd.block.node", "from ..jobs import job", 1),
        ("qmpd.block.node", "from . import perm", 0),
        ("qmpd.novelty", "import os", 1),
        ("qmpd.errors", "from qmpd.units import KiB", 1),
        ("qmpd.cli.main", "from qmpd.daemon import main", 1),
    ],
)
def test_the_check_itself(module: str, source: str, expected: int) -> None:
    assert len(offences(module, source, module.rpartition(".")[0])) == expected
