"""What a program offers before its plug-ins are imported, and what happens when they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmpd.qapi import check, offered
from qmpd.qapi.ir import SchemaError
from qmpd.qapi.offered import TABLES, Offered, declared, load_rest
from qmpd.qapi.registry import CommandEntry, Registry, discover
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, SYSTEM_ROOT, load


def test_the_source_says_what_importing_all_of_it_does() -> None:
    everything = discover()
    for table, modules in declared().items():
        entries = getattr(everything, table)
        assert set(modules) == set(entries)
        for name, module in modules.items():
            one = entries[name]
            assert (one.handler if isinstance(one, CommandEntry) else one.cls).__module__ == module


@pytest.mark.parametrize("root", [SYSTEM_ROOT, STORAGE_DAEMON_ROOT])
def test_a_program_offers_what_its_schema_has(root: str) -> None:
    schema = load(root)
    mine, known = check.offered(schema), check.registry_for(discover(), schema)
    for table in TABLES.values():
        assert dict(getattr(mine, table).items()) == getattr(known, table)


def test_names_import_nothing_and_a_look_imports_one_module() -> None:
    program = """
import sys
from qmpd.qapi import check
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, load
registry = check.offered(load(STORAGE_DAEMON_ROOT))
assert "qcow2" in registry.drivers and len(registry.drivers) == len(list(registry.drivers))
assert "nonsense" not in registry.drivers and registry.drivers.get("nonsense") is None
assert not [name for name in sys.modules if name.startswith("qmpd.drivers.")]
registry.drivers["raw"]
assert [name for name in sys.modules if name.startswith("qmpd.drivers.")] == ["qmpd.drivers.raw"]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[3])


async def _handler(ctx: Any, *, nonsense: int) -> None: ...


def test_an_entry_that_differs_from_the_schema_is_refused_when_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(discover().commands, "query-version", CommandEntry("query-version", _handler))
    mine = check.offered(load(SYSTEM_ROOT))
    assert "query-version" in mine.commands
    with pytest.raises(SchemaError, match=r"_handler\.nonsense is no member of 'query-version'"):
        mine.commands.get("query-version")
    failed = [(module, error) for module, error in load_rest(mine) if error is not None]
    assert [module for module, _ in failed] == ["qmpd.commands.control"]


def test_a_name_that_no_code_declares_keeps_a_program_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = declared()
    del tables["commands"]["query-version"], tables["drivers"]["raw"]
    monkeypatch.setattr(check, "declared", lambda: tables)
    with pytest.raises(SchemaError) as caught:
        check.offered(load(STORAGE_DAEMON_ROOT))
    assert "command 'query-version' has no handler" in str(caught.value)
    assert "'raw' of 'BlockdevOptions' is not served" in str(caught.value)


def test_a_module_that_cannot_be_imported_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = {"broken": "broken_plugin", "raw": "qmpd.drivers.raw"}
    tables: dict[str, Any] = {table: Offered({}, lambda name, module: None) for table in TABLES.values()}
    tables["drivers"] = Offered(modules, offered.declared_entry("drivers", lambda table, entry: None))
    with pytest.raises(ZeroDivisionError):
        tables["drivers"]["broken"]
    outcome = dict(load_rest(Registry(**tables)))
    assert isinstance(outcome["broken_plugin"], ZeroDivisionError)
    assert outcome["qmpd.drivers.raw"] is None
