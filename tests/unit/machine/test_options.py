"""The machine on the command line: names, accelerators, and how the guest behaves."""

from __future__ import annotations

import pytest

from qmpd.errors import CommandError
from qmpd.machine.options import GuestPolicy, Unplug, parse_machine, parse_uuid, resolve_machine


@pytest.mark.parametrize(
    ("texts", "policy"),
    [
        ([], GuestPolicy(Unplug.ACK)),
        (["unplug=ack"], GuestPolicy(Unplug.ACK)),
        (["unplug=delay:250"], GuestPolicy(Unplug.DELAY, 250)),
        (["unplug=reset,unplug=refuse"], GuestPolicy(Unplug.REFUSE)),
        (["unplug=refuse", "unplug=reset"], GuestPolicy(Unplug.RESET)),
        (["plug=nbd:/run/a:b", "unplug=delay:1"], GuestPolicy(Unplug.DELAY, 1, ("nbd", "/run/a:b"))),
    ],
)
def test_guest_policies(texts: list[str], policy: GuestPolicy) -> None:
    assert GuestPolicy.parse(texts) == policy


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("unplug=never", "Parameter 'unplug' does not accept value 'never'"),
        ("unplug=delay", "Parameter 'unplug' does not accept value 'delay'"),
        ("unplug=delay:x", "Parameter 'unplug' does not accept value 'delay:x'"),
        ("unplug=ack:5", "Parameter 'unplug' does not accept value 'ack:5'"),
        ("bogus=1", "Invalid parameter 'bogus'"),
        ("plug=nbd", "Parameter 'plug' does not accept value 'nbd'"),
    ],
)
def test_bad_guest_policies(text: str, error: str) -> None:
    with pytest.raises(CommandError, match=error):
        GuestPolicy.parse([text])


@pytest.mark.parametrize(
    ("name", "board", "qom_type"),
    [
        ("pc", "pc", "pc-i440fx-10.0-machine"),
        ("pc-i440fx-2.12", "pc", "pc-i440fx-2.12-machine"),
        ("q35", "q35", "pc-q35-10.0-machine"),
        ("pc-q35-4.0.1", "q35", "pc-q35-4.0.1-machine"),
        ("none", "none", "none-machine"),
    ],
)
def test_machine_names(name: str, board: str, qom_type: str) -> None:
    assert resolve_machine(name) == (board, qom_type)


@pytest.mark.parametrize("name", ["nosuch", "", "pc-i440fx-11.0", "pc-i440fx-2.13", "microvm"])
def test_unknown_machines(name: str) -> None:
    with pytest.raises(CommandError) as caught:
        resolve_machine(name)
    assert str(caught.value) == f'unsupported machine type: "{name}"'
    assert caught.value.hint == "Use -machine help to list supported machines"


def test_machine_option() -> None:
    choice = parse_machine("pc-q35-10.0,usb=off,accel=kvm:tcg,dump-guest-core=off,memory-backend=pc.ram")
    assert (choice.name, choice.usb, choice.kvm) == ("pc-q35-10.0", False, True)
    assert parse_machine("accel=tcg").name is None
    with pytest.raises(CommandError, match="invalid accelerator bogus"):
        parse_machine("pc,accel=bogus")
    with pytest.raises(CommandError, match="Parameter 'usb' expects 'on' or 'off'"):
        parse_machine("pc,usb=maybe")


def test_uuid() -> None:
    assert parse_uuid("6B2E9B0A-4C1D-4F7B-9A53-0D1F6F2F8C11") == "6b2e9b0a-4c1d-4f7b-9a53-0d1f6f2f8c11"
    with pytest.raises(CommandError, match="failed to parse UUID string: wrong format"):
        parse_uuid("6b2e9b0a4c1d4f7b9a530d1f6f2f8c11")
