"""throttle-group: what QEMU 10.0.2 accepts and refuses, and in which order it looks."""

from __future__ import annotations

from typing import Any

import pytest

from qmpd.block.throttle_limits import LIMITS, no_limits
from qmpd.errors import CommandError, QmpdError
from qmpd.objects.throttle_group import ThrottleGroup, ThrottleGroupOptions
from qmpd.qom.protocols import ThrottleMember, Throttler
from qmpd.qom.tree import ObjectTree

TOTAL_AND_PARTS = "bps/iops/max total values and read/write values cannot be used at the same time"
RANGE = "bps/iops/max values must be within [0, 1000000000000000]"
U64 = 1 << 64


def make(limits: dict[str, int] | None = None, **single: int) -> ThrottleGroup:
    group = ThrottleGroup(ThrottleGroupOptions(limits=limits, **single))
    ObjectTree().add("tg", group)
    return group


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"iops-total": 100, "iops-read": 10}, TOTAL_AND_PARTS),
        ({"iops-total-max": 100, "iops-read-max": 10}, TOTAL_AND_PARTS),
        ({"bps-total": 1, "bps-write": 10}, TOTAL_AND_PARTS),
        ({"bps-total": 1, "iops-size": 4096}, "iops size requires an iops value to be set"),
        ({"iops-size": 2**63 - 1}, "iops size requires an iops value to be set"),
        ({"bps-total": 10**15 + 1}, RANGE),
        ({"iops-total": -1}, RANGE),
        ({"bps-total": 10, "bps-total-max": 10**15 + 1}, RANGE),
        ({"bps-total-max": -1, "bps-total-max-length": 0}, RANGE),
        ({"bps-total": 10, "bps-total-max": 100, "bps-total-max-length": 0}, "the burst length cannot be 0"),
        ({"iops-total-max": 1, "bps-read-max-length": 0}, "the burst length cannot be 0"),
        (
            {"bps-total": 10, "bps-total-max": 100, "bps-total-max-length": -1},
            "burst length too high for this burst rate",
        ),
        (
            {"bps-total": 10, "bps-total-max": 10**9, "bps-total-max-length": 10**9},
            "burst length too high for this burst rate",
        ),
        ({"bps-total-max": 10, "bps-total-max-length": -1}, "burst length too high for this burst rate"),
        (
            {"bps-total": 10, "bps-total-max": 100, "bps-total-max-length": 1 << 32},
            "bps-total-max-length value must be in the range [0, 4294967295]",
        ),
        (
            {"iops-total-max-length": 1 << 33, "bps-write-max-length": 1 << 33, "bps-total-max": -1},
            "bps-write-max-length value must be in the range [0, 4294967295]",
        ),
        ({"bps-total-max-length": 5}, "burst length set without burst rate"),
        ({"bps-total-max-length": -1}, "burst length set without burst rate"),
        ({"bps-total-max": 1, "iops-total": -1}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"iops-total": 100, "iops-total-max": 10}, "bps_max/iops_max cannot be lower than bps/iops"),
    ],
)
def test_limits_that_contradict_each_other(limits: dict[str, int], text: str) -> None:
    with pytest.raises(CommandError) as caught:
        make(limits)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "limits",
    [
        {"iops-total": 100, "bps-read": 1 << 20},
        {"bps-total": 1, "iops-write": 10, "iops-size": -1},
        {"bps-total": 10**15},
        {"bps-total": 10, "bps-total-max": 100, "bps-total-max-length": (1 << 32) - 1},
        {"bps-total": 10, "bps-total-max": 10**6, "bps-total-max-length": 10**9},
        {"bps-total": 10, "bps-total-max-length": 1},
    ],
)
def test_limits_that_are_fine_read_back_whole(limits: dict[str, int]) -> None:
    shown = make(limits).get_property("limits")
    assert shown == {**no_limits(), **{name: value % U64 for name, value in limits.items()}}
    assert set(shown) == set(LIMITS)
    assert len(shown) == 19


@pytest.mark.parametrize(
    ("single", "text"),
    [
        ({"x_iops_total": -5}, "Property values cannot be negative"),
        ({"x_iops_size": -1}, "Property values cannot be negative"),
        ({"x_iops_total": 5, "x_iops_read": 5}, TOTAL_AND_PARTS),
        ({"x_iops_total_max": 5}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"x_iops_total_max_length": 0}, "the burst length cannot be 0"),
        (
            {"x_iops_total_max_length": 1 << 32},
            "x-iops-total-max-length value must be in therange [0, 4294967295]",
        ),
        ({"x_bps_total": 10**15 + 1}, RANGE),
    ],
)
def test_single_properties_that_are_refused(single: dict[str, int], text: str) -> None:
    with pytest.raises(CommandError) as caught:
        make(None, **single)
    assert str(caught.value) == text


def test_single_properties_add_to_the_limits_and_are_fixed_then() -> None:
    group = make({"bps-total": 7}, x_iops_total=5)
    assert group.get_property("limits") == {**no_limits(), "bps-total": 7, "iops-total": 5}
    assert group.get_property("x-iops-total") == 5
    assert group.get_property("x-iops-total-max-length") == 1
    for value in (6, "6", -1):
        with pytest.raises(CommandError, match=r"^Property cannot be set after initialization$"):
            group.set_property("x-iops-total", value)


def test_wrong_limits_are_reported_before_a_name_that_is_taken_wrong_sums_after() -> None:
    tree = ObjectTree()
    tree.add("d", ThrottleGroup(ThrottleGroupOptions()))
    with pytest.raises(CommandError, match="at the same time"):
        tree.add("d", ThrottleGroup(ThrottleGroupOptions(limits={"iops-total": 1, "iops-read": 1})))
    with pytest.raises(CommandError, match="duplicate property 'd'"):
        tree.add("d", ThrottleGroup(ThrottleGroupOptions(x_iops_total=1, x_iops_read=1)))


def test_setting_limits_changes_those_given_or_none() -> None:
    group = make({"bps-total": 8})
    for value, text in (
        ({"bps-read": 9}, TOTAL_AND_PARTS),
        (5, "Invalid parameter type for 'limits', expected: object"),
        ({"zz": 5, "bps-total": "x"}, "Invalid parameter type for 'limits.bps-total', expected: integer"),
        ({"bps-total": 1 << 64}, "Invalid parameter type for 'limits.bps-total', expected: integer"),
        ({"zz": 5}, "Parameter 'limits.zz' is unexpected"),
        ({"zz": 5, "yy": 6, "aa": 1}, "Parameter 'limits.aa' is unexpected"),
    ):
        with pytest.raises(QmpdError) as caught:
            group.set_property("limits", value)
        assert str(caught.value) == text
        assert group.wire_limits() == {**no_limits(), "bps-total": 8}
    group.set_property("limits", {"bps-total": 0, "bps-read": 9, "bps-read-max": 100, "bps-read-max-length": 5})
    with pytest.raises(CommandError, match="burst length set without burst rate"):
        group.set_property("limits", {"bps-read-max": 0})
    assert group.wire_limits() == {**no_limits(), "bps-read": 9, "bps-read-max": 100, "bps-read-max-length": 5}


def test_a_group_with_members_stays_and_tells_them_of_new_limits() -> None:
    class Member:
        told: list[dict[str, Any]]

        def __init__(self) -> None:
            self.told = []

        def limits_changed(self) -> None:
            self.told.append(group.wire_limits())

    tree = ObjectTree()
    group = ThrottleGroup(ThrottleGroupOptions())
    tree.add("tg", group)
    member = Member()
    assert isinstance(group, Throttler)
    assert isinstance(member, ThrottleMember)
    group.join(member)
    with pytest.raises(CommandError, match=r"^object 'tg' is in use, can not be deleted$"):
        tree.remove("tg")
    group.set_property("limits", {"iops-read": 3})
    assert [limits["iops-read"] for limits in member.told] == [3]
    group.leave(member)
    tree.remove("tg")
