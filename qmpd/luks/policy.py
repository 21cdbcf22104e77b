"""What LUKS volumes must be like before a passphrase is tried on them, and what new ones are made like.

The policy is one for the program and set by its option `luks-policy`: a file in TOML, or RULE=VALUE,...
with the values of a list separated by colons. Without it, what costs secrecy or memory safety is refused
all the same (no cipher, segments that are not ours, a reencryption in flight, costs beyond the ceilings
of `crypto.kdf`), and costs below the floors are warned of. Rules that are set are held, floors included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpd.crypto.cipher import CipherSpec
from qmpd.crypto.kdf import MIN_ITERATIONS
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.formats.luks2_json import Kdf

WARN_ITERATIONS = MIN_ITERATIONS
WARN_PASSES, WARN_MEMORY_KIB = 4, 32
"""Floors of the default policy: what QEMU never goes below for pbkdf2, and cryptsetup for argon2."""

MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules, named as in the option with `_` for `-`; None: no such rule. Memory in KiB, the others plain numbers.

    ciphers   patterns for what is written CIPHER-BITS-MODE-IV, such as aes-256-xts-plain64
    """

    versions: tuple[int, ...] | None = None
    ciphers: tuple[str, ...] | None = None
    sector_sizes: tuple[int, ...] | None = None
    hashes: tuple[str, ...] | None = None
    kdfs: tuple[str, ...] | None = None
    pbkdf2_min_iterations: int | None = None
    pbkdf2_max_iterations: int | None = None
    argon2_min_passes: int | None = None
    argon2_max_passes: int | None = None
    argon2_min_memory: int | None = None
    argon2_max_memory: int | None = None
    argon2_max_parallel: int | None = None

    # --- volumes that are there -------------------------------------------------------------------

    def check(self, version: int, spec: CipherSpec, digest: Cost, slots: Mapping[int, Cost]) -> None:
        """Refuse a volume that breaks a rule, before any secret is used. Raises CommandError.

        digest   what proves the volume key        slots   those in use, by number
        """
        self.check_kind(version, spec)
        self._one_of("hashes", "volume key digest hash", digest.hash)
        self._at_most("pbkdf2_max_iterations", "volume key digest iterations", digest.iterations)
        for number, cost in slots.items():
            self.check_cost(f"keyslot {number}", cost)

    def check_kind(self, version: int, spec: CipherSpec) -> None:
        """Refuse a version, cipher or sector size. Raises CommandError."""
        self._one_of("versions", "version", version)
        name = f"{spec.cipher}-{spec.key_bits}-{spec.mode}-{spec.iv or 'none'}"
        if self.ciphers is not None and not any(fnmatchcase(name, pattern) for pattern in self.ciphers):
            raise _refusal("payload encryption", name, "ciphers", self.ciphers)
        self._one_of("sector_sizes", "sector size", spec.sector_size)

    def check_cost(self, what: str, cost: Cost) -> None:
        """Refuse how a key slot is derived. Raises CommandError."""
        self._one_of("kdfs", f"{what} kdf", cost.kind)
        if cost.kind == "pbkdf2":
            self._one_of("hashes", f"{what} hash", cost.hash)
            self._at_least("pbkdf2_min_iterations", f"{what} iterations", cost.iterations)
            self._at_most("pbkdf2_max_iterations", f"{what} iterations", cost.iterations)
            return
        self._at_least("argon2_min_passes", f"{what} passes", cost.iterations)
        self._at_most("argon2_max_passes", f"{what} passes", cost.iterations)
        self._at_least("argon2_min_memory", f"{what} memory", cost.memory)
        self._at_most("argon2_max_memory", f"{what} memory", cost.memory)
        self._at_most("argon2_max_parallel", f"{what} threads", cost.cpus)

    def warnings(self, slots: Mapping[int, Cost]) -> Iterator[tuple[str, int, str]]:
        """Yield (field, value, rule) for every cost below a floor that is not refused."""
        for number, cost in slots.items():
            if cost.kind == "pbkdf2":
                floors = [("iterations", cost.iterations, "pbkdf2-min-iterations", WARN_ITERATIONS)]
            else:
                floors = [
                    ("passes", cost.iterations, "argon2-min-passes", WARN_PASSES),
                    ("memory", cost.memory, "argon2-min-memory", WARN_MEMORY_KIB),
                ]
            for name, value, rule, floor in floors:
                if value < floor:
                    yield f"keyslot {number} {name}", value, f"{rule}={floor}"

    # --- new ones ---------------------------------------------------------------------------------

    def check_new(self, version: int, spec: CipherSpec, hash_name: str, kdf: str) -> None:
        """Refuse to make a volume that could not be opened. Raises CommandError."""
        self.check_kind(version, spec)
        self._one_of("hashes", "hash", hash_name)
        self._one_of("kdfs", "kdf", kdf)

    def iterations(self, rounds: int, *, exact: bool, force: bool = False) -> int:
        """Return the pbkdf2 rounds of a new key slot: what was asked for, or measured, but not below the floor.

        exact   asked for as a number: a rule that is set then refuses, unless forced
        Raises CommandError.
        """
        if exact and not force:
            self._at_least("pbkdf2_min_iterations", "new keyslot iterations", rounds)
        floor = 0 if force else self.pbkdf2_min_iterations or 0
        rounds = max(rounds, MIN_ITERATIONS, floor)
        if exact or self.pbkdf2_max_iterations is None:
            self._at_most("pbkdf2_max_iterations", "new keyslot iterations", rounds)
            return rounds
        return min(rounds, self.pbkdf2_max_iterations)

    def argon2(self, costs: Kdf, *, exact: bool, force: bool = False) -> Kdf:
        """Return the argon2 costs of a new key slot; see `iterations`. Raises CommandError."""
        if not exact and not force:
            memory = max(costs.memory, self.argon2_min_memory or 0)
            passes = max(costs.time, self.argon2_min_passes or 0)
            costs = replace(
                costs,
                memory=min(memory, self.argon2_max_memory or memory),
                time=min(passes, self.argon2_max_passes or passes),
                cpus=min(costs.cpus, self.argon2_max_parallel or costs.cpus),
            )
        if not force:
            self.check_cost("new keyslot", Cost.of(costs))
        return costs

    # --- rules ------------------------------------------------------------------------------------

    def _one_of(self, rule: str, what: str, value: int | str) -> None:
        allowed = getattr(self, rule)
        if allowed is not None and value not in allowed:
            raise _refusal(what, value, rule, allowed)

    def _at_least(self, rule: str, what: str, value: int) -> None:
        limit = getattr(self, rule)
        if limit is not None and value < limit:
            raise _refusal(what, value, rule, limit)

    def _at_most(self, rule: str, what: str, value: int) -> None:
        limit = getattr(self, rule)
        if limit is not None and value > limit:
            raise _refusal(what, value, rule, limit)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a key derivation takes: `iterations` are the passes of argon2, `memory` is in KiB."""

    kind: str
    hash: str
    iterations: int
    memory: int = 0
    cpus: int = 0

    @classmethod
    def of(cls, kdf: Kdf) -> Cost:
        """Return what the JSON of a LUKS2 key slot says."""
        return cls(kdf.type, kdf.hash, kdf.iterations or kdf.time, kdf.memory, kdf.cpus)


def _refusal(what: str, value: int | str, rule: str, limit: Any) -> CommandError:
    shown = ":".join(map(str, limit)) if isinstance(limit, tuple) else limit
    return CommandError(f"LUKS policy: the {what} is {value}, the rule is {rule.replace('_', '-')}={shown}")


def parse_policy(text: str) -> Policy:
    """Return what an option says: RULE=VALUE,... or the name of a file in TOML. Raises CommandError."""
    import tomllib  # not for those who have no such file: it costs every start of a tool

    if "=" in text.partition("/")[0]:
        return _build(_pairs(text), lambda value: str(value).split(":"))
    try:
        with Path(text).open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise CommandError(f"LUKS policy '{text}' has more than {MAX_FILE} bytes")
        tree = tomllib.loads(data.decode())
    except OSError as error:
        raise CommandError(f"LUKS policy '{text}' cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CommandError(f"LUKS policy '{text}' is no TOML: {error}") from error
    return _build(tree.items(), lambda value: value if isinstance(value, list) else [value])


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        name, mark, value = part.partition("=")
        if not mark:
            raise CommandError(f"LUKS policy: '{part}' is no RULE=VALUE")
        yield name, value


def _build(pairs: Any, listed: Callable[[Any], list[Any]]) -> Policy:
    kinds = {one.name.replace("_", "-"): str(one.type) for one in fields(Policy)}
    rules: dict[str, Any] = {}
    for name, value in pairs:
        if name not in kinds:
            raise CommandError(f"LUKS policy: there is no rule '{name}', only {', '.join(kinds)}")
        if name in rules:
            raise CommandError(f"LUKS policy: the rule '{name}' is given twice")
        values = listed(value)
        if "int" in kinds[name]:
            values = [_number(name, one) for one in values]
        elif not all(isinstance(one, str) and one for one in values):
            raise CommandError(f"LUKS policy: the rule '{name}' takes words, not '{value}'")
        if kinds[name].startswith("tuple"):
            rules[name] = tuple(values)
        elif len(values) == 1:
            rules[name] = values[0]
        else:
            raise CommandError(f"LUKS policy: the rule '{name}' takes one number, not '{value}'")
    return Policy(**{name.replace("-", "_"): value for name, value in rules.items()})


def _number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
        raise CommandError(f"LUKS policy: the rule '{name}' takes numbers, not '{value}'")
    number = int(value)
    if not 0 <= number < 1 << 32:
        raise CommandError(f"LUKS policy: the rule '{name}' takes numbers from 0 to {(1 << 32) - 1}, not {number}")
    return number


_current = Policy()


def current() -> Policy:
    """Return the policy of this program."""
    return _current


def set_policy(policy: Policy) -> None:
    """Hold every volume from now on to `policy`."""
    global _current
    _current = policy
