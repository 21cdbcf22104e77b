"""The policy: how it is written, what it refuses and names, what it makes of new volumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.crypto.cipher import CipherSpec
from qmpd.errors import CommandError
from qmpd.formats.luks2_json import Kdf
from qmpd.luks.policy import Cost, Policy, parse_policy

SPEC = CipherSpec("aes", "xts", "plain64", None, 64)
DIGEST = Cost("pbkdf2", "sha256", 1000)
SLOTS = {0: Cost("pbkdf2", "sha256", 2000), 5: Cost("argon2id", "", 4, 65536, 4)}


def test_both_ways_of_writing_mean_the_same(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('versions = [2]\nciphers = ["aes-256-xts-*", "camellia-*"]\npbkdf2-min-iterations = 5000\n')
    expected = Policy(versions=(2,), ciphers=("aes-256-xts-*", "camellia-*"), pbkdf2_min_iterations=5000)
    assert parse_policy(str(file)) == expected
    assert parse_policy("versions=2,ciphers=aes-256-xts-*:camellia-*,pbkdf2-min-iterations=5000") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("colour=red", "there is no rule 'colour', only versions, ciphers"),
        ("versions=2,versions=1", "the rule 'versions' is given twice"),
        ("versions=two", "the rule 'versions' takes numbers, not 'two'"),
        ("argon2-min-memory=-1", "takes numbers, not '-1'"),
        ("argon2-min-memory=4294967296", "takes numbers from 0 to 4294967295, not 4294967296"),
        ("pbkdf2-min-iterations=1:2", "the rule 'pbkdf2-min-iterations' takes one number, not '1:2'"),
        ("ciphers=", "the rule 'ciphers' takes words, not ''"),
        ("versions=2,x", "'x' is no RULE=VALUE"),
        ("/nonexistent/policy", "LUKS policy '/nonexistent/policy' cannot be read: No such file or directory"),
    ],
)
def test_a_policy_that_says_nothing_clear_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_policy(text)
    assert reason in str(caught.value)


def test_a_file_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    for text, reason in (("[", "is no TOML"), ("versions = true", "takes numbers, not 'True'"), ("a = 1", "no rule")):
        file.write_text(text)
        with pytest.raises(CommandError, match=reason):
            parse_policy(str(file))
    file.write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(CommandError, match="has more than 1048576 bytes"):
        parse_policy(str(file))


@pytest.mark.parametrize(
    ("rules", "refusal"),
    [
        ("", None),
        ("versions=2,ciphers=aes-256-xts-plain64,sector-sizes=512:4096,hashes=sha256,kdfs=pbkdf2:argon2id", None),
        ("versions=1", "the version is 2, the rule is versions=1"),
        (
            "ciphers=aes-128-*:camellia-*",
            "the payload encryption is aes-256-xts-plain64, the rule is ciphers=aes-128-*:",
        ),
        ("sector-sizes=4096", "the sector size is 512, the rule is sector-sizes=4096"),
        ("hashes=sha512", "the volume key digest hash is sha256, the rule is hashes=sha512"),
        ("kdfs=argon2id", "the keyslot 0 kdf is pbkdf2, the rule is kdfs=argon2id"),
        ("pbkdf2-min-iterations=2001", "the keyslot 0 iterations is 2000, the rule is pbkdf2-min-iterations=2001"),
        ("pbkdf2-min-iterations=2000,argon2-min-passes=4,argon2-min-memory=65536", None),
        ("pbkdf2-max-iterations=1999", "the keyslot 0 iterations is 2000, the rule is pbkdf2-max-iterations=1999"),
        ("pbkdf2-max-iterations=999", "the volume key digest iterations is 1000"),
        ("argon2-min-passes=5", "the keyslot 5 passes is 4, the rule is argon2-min-passes=5"),
        ("argon2-max-passes=3", "the keyslot 5 passes is 4, the rule is argon2-max-passes=3"),
        ("argon2-min-memory=65537", "the keyslot 5 memory is 65536, the rule is argon2-min-memory=65537"),
        ("argon2-max-memory=65535", "the keyslot 5 memory is 65536, the rule is argon2-max-memory=65535"),
        ("argon2-max-parallel=3", "the keyslot 5 threads is 4, the rule is argon2-max-parallel=3"),
    ],
)
def test_each_rule_and_what_its_refusal_names(rules: str, refusal: str | None) -> None:
    policy = parse_policy(rules) if rules else Policy()
    if refusal is None:
        policy.check(2, SPEC, DIGEST, SLOTS)
        return
    with pytest.raises(CommandError) as caught:
        policy.check(2, SPEC, DIGEST, SLOTS)
    assert str(caught.value).startswith("LUKS policy: " + refusal)


def test_weak_slots_are_warned_of_only() -> None:
    slots = {1: Cost("pbkdf2", "sha1", 999), 2: Cost("argon2i", "", 3, 31, 1), 3: Cost("pbkdf2", "sha1", 1000)}
    Policy().check(2, SPEC, DIGEST, slots)
    assert list(Policy().warnings(slots)) == [
        ("keyslot 1 iterations", 999, "pbkdf2-min-iterations=1000"),
        ("keyslot 2 passes", 3, "argon2-min-passes=4"),
        ("keyslot 2 memory", 31, "argon2-min-memory=32"),
    ]


def test_new_slots_are_not_made_below_the_floor() -> None:
    policy = Policy(pbkdf2_min_iterations=5000, argon2_min_memory=1024, argon2_max_memory=2048, argon2_min_passes=6)
    assert policy.iterations(1200, exact=False) == 5000
    assert policy.iterations(6000, exact=False) == 6000
    assert policy.iterations(1200, exact=True, force=True) == 1200
    assert Policy().iterations(7, exact=True) == 1000
    with pytest.raises(CommandError, match="new keyslot iterations is 1200, the rule is pbkdf2-min-iterations=5000"):
        policy.iterations(1200, exact=True)
    assert policy.argon2(Kdf("argon2id", "", time=4, memory=32, cpus=1), exact=False).memory == 1024
    assert policy.argon2(Kdf("argon2id", "", time=4, memory=99999, cpus=1), exact=False).memory == 2048
    assert policy.argon2(Kdf("argon2id", "", time=4, memory=32, cpus=1), exact=True, force=True).memory == 32
    with pytest.raises(CommandError, match="new keyslot passes is 4, the rule is argon2-min-passes=6"):
        policy.argon2(Kdf("argon2id", "", time=4, memory=1024, cpus=1), exact=True)
    with pytest.raises(CommandError, match="the version is 1, the rule is versions=2"):
        Policy(versions=(2,)).check_new(1, SPEC, "sha256", "pbkdf2")
    with pytest.raises(CommandError, match="the kdf is pbkdf2, the rule is kdfs=argon2id"):
        Policy(kdfs=("argon2id",)).check_new(2, SPEC, "sha256", "pbkdf2")
