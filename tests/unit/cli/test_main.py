"""The programs' command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.cli.main import ctl_main, img_main
from qmpd.cli.player import shown
from qmpd.version import VERSION


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ctl_main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ("monitor-command", "replay", "graph", "events"):
        assert name in text


@pytest.mark.parametrize(("program", "main"), [("qmpd-ctl", ctl_main), ("qmpd-img", img_main)])
def test_version(program: str, main: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(main)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{program} {VERSION}\n"


def test_nobody_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "qmp.sock"
    assert ctl_main(["graph", "--socket", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"qmpd-ctl: cannot talk to {path}: No such file or directory\n--socket names another place.\n"
    )


@pytest.mark.parametrize(
    ("text", "error"), [("{", "the command is not JSON"), ("[]", "the command is not a JSON object")]
)
def test_command_that_is_none(text: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl_main(["monitor-command", text]) == 1
    assert error in capsys.readouterr().err


def test_secret_data_is_not_shown() -> None:
    message = {"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s", "data": "abc123"}}
    assert "abc123" not in shown(message)
    assert '"id": "s"' in shown(message)


def test_replacement_without_a_sign(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ctl_main(["replay", "--set", "novalue", "file"])
    assert "'novalue' is not OLD=NEW" in capsys.readouterr().err
