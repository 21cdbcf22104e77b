"""The same requests about objects to QEMU's storage daemon and to ours: the replies have to be equal."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from tests.gen.certificates import Spec, authority, dh_pem, directory, key_pem, pem, sign
from tests.support.daemon import running
from tests.support.peers import need
from tests.support.reference import STORAGE_DAEMON, reference

KEY = base64.b64encode(bytes(range(32))).decode()
IV = base64.b64encode(b"defghijklmnopqrs").decode()

Request = tuple[str, dict[str, Any]]


def add(kind: str, name: str, **members: Any) -> Request:
    return "object-add", {"qom-type": kind, "id": name, **{key.replace("_", "-"): members[key] for key in members}}


def put(path: str, name: str, value: Any) -> Request:
    return "qom-set", {"path": path, "property": name, "value": value}


def get(path: str, name: str) -> Request:
    return "qom-get", {"path": path, "property": name}


def sorted_rows(reply: dict[str, Any]) -> dict[str, Any]:
    """QEMU's lists of names come in the order of a hash table."""
    rows = reply.get("return")
    if isinstance(rows, list) and rows and all("name" in row for row in rows):
        return {"return": sorted(rows, key=lambda row: str(row["name"]))}
    return reply


def compare(folder: Path, requests: list[Request]) -> None:
    need(STORAGE_DAEMON)
    wrong = []
    with reference(folder) as theirs, running(folder, name="qmpd-storage-daemon") as daemon:
        ours = daemon.client()
        for name, arguments in requests:
            expected, got = (
                sorted_rows(client.send({"execute": name, "arguments": arguments})) for client in (theirs, ours)
            )
            if expected != got:
                wrong.append(f"{name} {json.dumps(arguments)[:300]}\n  theirs {expected}\n  ours   {got}")
    assert not wrong, "\n".join(wrong)


def test_secrets(tmp_path: Path) -> None:
    files = {"nul": b"YWJj\0", "cr": b"YWJj\r\n", "empty": b"", "text": b"YWJj\n"}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
        (tmp_path / name).chmod(0o600)
    encrypted = {"format": "base64", "keyid": "k", "iv": IV}
    odd: list[Any] = ["base64", 5, None, {}, "hex"]
    requests = [
        add("secret", "k", data=KEY, format="base64"),
        *(add("secret", f"{name}-{form}", file=str(tmp_path / name), format=form)
          for name in (*files, "none", "text/x") for form in ("raw", "base64")),
        add("secret", "s", file="", data=""),
        add("secret", "s", file=""),
        add("secret", "s", file=str(tmp_path)),
        add("secret", "s", file="/proc/self/mem"),
        add("secret", "s", data="YW\0Jj", format="base64"),
        add("secret", "s", data="", **{**encrypted, "iv": ""}),
        add("secret", "s", data="*", **encrypted),
        add("secret", "s", data="*", **{**encrypted, "keyid": "none", "iv": "*"}),
        add("secret", "s", data="THNinON010VKU79GAkvtLQ==", **encrypted),
        add("secret", "s", keyid="none"),
        add("secret", "type", keyid="none", data="x"),
        add("secret", "s", keyid="type", data="x"),
        add("secret", "s", keyid="/objects/k", data="x"),
        add("secret", "1 2", data="x", keyid="none"),
        *(add("secret_keyring", "r", serial=serial) for serial in (1, 0, 1 << 31, 1 << 32, -(1 << 31) - 1, "x")),
        add("secret_keyring", "k", serial=0),
        add("secret_keyring", "k", serial=1),
        *(put("k", name, value) for name in ("data", "file", "format", "keyid", "iv", "type", "nosuch")
          for value in odd),
        *(get("/objects/k", name) for name in ("file", "format", "keyid", "iv", "type", "nosuch")),
        *(("object-del", {"id": name}) for name in ("k", "k", "", "type", "/objects/s")),
        ("qom-list", {"path": "/objects"}),
    ]  # fmt: skip
    compare(tmp_path, requests)


def test_threads_groups_and_access_lists(tmp_path: Path) -> None:
    numbers = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max")
    limits: list[Any] = [
        {"iops-total": 100, "iops-read": 10}, {"iops-total-max": 10, "iops-read-max": 1}, {"iops-size": 4096},
        {"bps-total": 10**15}, {"bps-total": 10**15 + 1}, {"iops-total": -1}, {"bps-total-max": 1},
        {"bps-total": 10, "bps-total-max": 100, "bps-total-max-length": 0},
        {"bps-total": 10, "bps-total-max": 100, "bps-total-max-length": -1},
        {"bps-total": 10, "bps-total-max": 100, "bps-total-max-length": 1 << 32},
        {"bps-total": 10, "bps-total-max": 10**9, "bps-total-max-length": 10**9},
        {"bps-total": 10, "bps-total-max": 9}, {"bps-total-max-length": 5}, {"bps-total-max": -1, "iops-total": -1},
        {"bps-total-max": 1, "iops-total": -1}, {"iops-total-max": 1, "bps-read-max-length": 0},
        {"iops-total-max-length": 1 << 33, "bps-write-max-length": 1 << 33}, {"zz": 1, "yy": 2, "aa": 3}, 5, "x",
        {"bps-write": 1, "iops-write": 10, "iops-size": -1}, {"bps-total": "x", "zz": 1}, {"iops-size": 1 << 64},
    ]  # fmt: skip
    rules: list[Any] = [
        [], 5, [5], [{"match": "a"}], [{"policy": "x"}], [{"match": 1, "policy": "x"}],
        [{"match": "a", "policy": "deny", "zz": 1}], [{"match": "a", "policy": "allow", "format": "glob"}, 5],
        [{"match": "a*", "policy": "allow", "format": "glob"}, {"match": "b", "policy": "deny"}],
    ]  # fmt: skip
    requests = [
        add("iothread", "io"),
        *(add("iothread", "io", **{name: value}) for name in numbers for value in (-1, 0, "x", 65)),
        *(put("io", name, value) for name in numbers[:4] for value in (-1, 7, 1 << 63, 1.5, 3.0, True, "x")),
        *(get("io", name) for name in numbers),
        *(add("throttle-group", f"t{at}", limits=one) for at, one in enumerate(limits)),
        *(add("throttle-group", f"x{at}", **{f"x-{name}": value for name, value in one.items()})
          for at, one in enumerate(limits) if isinstance(one, dict)),
        add("throttle-group", "t"),
        add("throttle-group", "t", limits={"iops-total": 1, "iops-read": 1}),
        add("throttle-group", "t", x_iops_total=1, x_iops_read=1),
        *(put("t", "limits", one) for one in limits),
        get("t", "limits"),
        put("t", "x-iops-total", 1),
        get("t", "x-iops-total"),
        add("authz-simple", "a", identity=""),
        put("a", "identity", 5),
        *(add("authz-list", f"l{at}", rules=one) for at, one in enumerate(rules)),
        add("authz-list", "l"),
        *(put("l", "rules", one) for one in rules),
        get("l", "rules"),
        get("l", "policy"),
        put("l", "policy", "maybe"),
        ("qom-list", {"path": "/objects"}),
    ]  # fmt: skip
    compare(tmp_path, requests)


def test_paths_and_types(tmp_path: Path) -> None:
    types = (
        "object", "container", "user-creatable", "secret_common", "secret", "secret_keyring", "iothread", "nosuch", "",
        "throttle-group", "tls-creds", "tls-creds-x509", "tls-creds-psk", "tls-creds-anon", "event-loop-base",
        "authz", "authz-simple", "authz-list", "authz-list-file",
    )  # fmt: skip
    paths = ("", "/", "//", "objects", "/objects/", "//objects//s", "s", "objects/s/", "s/type", "nosuch", "/nosuch")
    requests: list[Request] = [
        add("secret", "s", data="x"),
        *(("qom-list", {"path": path}) for path in paths),
        *(get(path, "type") for path in paths),
        *(put(path, "type", "x") for path in paths),
        get("/", "objects"),
        get("/objects", "s"),
        *(("qom-list-properties", {"typename": name}) for name in types),
        *(("qom-list-types", {"implements": name, "abstract": abstract})
          for name in ("secret_common", "authz", "tls-creds", "throttle-group", "nosuch", "container")
          for abstract in (False, True)),
    ]  # fmt: skip
    compare(tmp_path, requests)


def certificate_folders(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield folders with one thing wrong, and the options that go with them."""
    bad_pem = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    stranger, namesake = authority(name="stranger"), authority()
    leaves = [
        None, Spec("x", days=(-5, -1)), Spec("x", days=(1, 5)), Spec("x", ca=True), Spec("x", ca=None),
        Spec("x", usage=("key_encipherment",)), Spec("x", usage=("digital_signature",)),
        Spec("x", usage=("key_encipherment",), usage_critical=False), Spec("x", usage=("data_encipherment",)),
        Spec("x", purpose=(Purpose.CLIENT_AUTH,)), Spec("x", purpose=(Purpose.SERVER_AUTH,)),
        Spec("x", purpose=(Purpose.CODE_SIGNING,)), Spec("x", purpose=(Purpose.ANY_EXTENDED_KEY_USAGE,)),
        Spec("x", purpose=(Purpose.CODE_SIGNING,), purpose_critical=False),
        Spec("x", days=(-5, -1), ca=True, usage=("crl_sign",), purpose=(Purpose.CODE_SIGNING,)),
    ]  # fmt: skip
    authorities = [
        authority(days=(-5, -1)), authority(days=(1, 5)), authority(ca=None), authority(ca=False, usage=None),
        authority(usage=("digital_signature",)), authority(usage=("digital_signature",), usage_critical=False),
        authority(usage=None), authority(purpose=(Purpose.CLIENT_AUTH,)),
    ]  # fmt: skip
    damage: list[tuple[str, bytes | None]] = [
        ("ca-cert.pem", pem(sign(stranger, stranger))), ("ca-cert.pem", pem(sign(namesake, namesake))),
        ("server-key.pem", key_pem(ec.generate_private_key(ec.SECP256R1()))),
        ("server-key.pem", key_pem(rsa.generate_private_key(65537, 2048))),
        *((name, contents) for name in ("ca-cert.pem", "server-cert.pem") for contents in (b"", bad_pem, None)),
        *((name, contents) for name in ("server-key.pem",) for contents in (b"", b"garbage", None)),
        ("ca-crl.pem", b"garbage"), ("dh-params.pem", b"garbage"),
    ]  # fmt: skip
    for role in ("server", "client"):
        for at, leaf in enumerate(leaves):
            yield directory(root / f"{role}-{at}", leaf, role=role), {"endpoint": role}
    for at, ca in enumerate(authorities):
        yield directory(root / f"ca-{at}", ca=ca), {"endpoint": "server"}
    for at, (name, contents) in enumerate(damage):
        path = directory(root / f"damage-{at}")
        if contents is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(contents)
        for sanity in (True, False):
            yield path, {"endpoint": "server", "sanity_check": sanity}
    locked = directory(root / "locked", password=b"hunter2")
    for password in ("good", "bad", "binary", "none", None):
        yield locked, {"endpoint": "server", **({} if password is None else {"passwordid": password})}


@pytest.mark.timeout(240)
def test_certificates(tmp_path: Path) -> None:
    compare(
        tmp_path,
        [
            add("secret", "good", data="hunter2"),
            add("secret", "bad", data="nope"),
            add("secret", "binary", data="/+8=", format="base64"),
            *(
                add("tls-creds-x509", f"t{at}", dir=str(path), **options)
                for at, (path, options) in enumerate(certificate_folders(tmp_path))
            ),
            add("tls-creds-x509", "t"),
            add("tls-creds-x509", "t", dir=str(tmp_path / "none")),
        ],
    )


def test_shared_keys(tmp_path: Path) -> None:
    lines = ["", "alice:", "alice:5a5a5a", "alice:5a5a5a5a", "alice:5a5a5a5a5", "alice:zz\nalice:5a5a5a5a", "al:00"]
    requests = [add("tls-creds-anon", "anon", dir="/none", endpoint="server", priority="zz"), get("anon", "dir")]
    for at, text in enumerate(lines):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "dh-params.pem").write_bytes(dh_pem())
        (folder / "keys.psk").write_text(text + "\n")
        for options in ({"username": "alice"}, {"username": ""}, {}, {"endpoint": "server"}):
            requests.append(add("tls-creds-psk", f"p{at}-{len(requests)}", dir=str(folder), **options))
    requests.append(add("tls-creds-psk", "q", endpoint="server", username="alice"))
    requests.append(add("tls-creds-psk", "q"))
    compare(tmp_path, requests)
