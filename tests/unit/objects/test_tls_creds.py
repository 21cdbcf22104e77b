"""TLS credentials: every text below was answered by qemu-storage-daemon 10.0.2 to the same files."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from qmpd.errors import CommandError, QmpdError
from qmpd.objects.secret import Secret, SecretOptions
from qmpd.objects.tls_creds_anon import TlsCredsAnon, TlsCredsAnonOptions
from qmpd.objects.tls_creds_psk import TlsCredsPsk, TlsCredsPskOptions, client_key
from qmpd.objects.tls_creds_x509 import TlsCredsX509, TlsCredsX509Options
from qmpd.qom.protocols import TlsCredentials
from qmpd.qom.tree import ObjectTree
from tests.gen.certificates import Spec, authority, directory, key_pem, pem, sign

BAD_PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
SAME_NAME = authority()


def x509(path: Path, **options: Any) -> TlsCredsX509:
    tree = ObjectTree()
    for name, values in (
        ("pw", {"data": "hunter2"}),
        ("badpw", {"data": "nope"}),
        ("binpw", {"data": "/+8=", "format": "base64"}),
    ):
        tree.add(name, Secret(SecretOptions(**values)))
    creds = TlsCredsX509(TlsCredsX509Options(dir=str(path), **options))
    tree.add("tls", creds)
    assert tree.tls_credentials("tls") is creds
    return creds


def usable(creds: TlsCredsX509) -> None:
    assert isinstance(creds.context(), ssl.SSLContext)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(QmpdError) as caught:
        x509(path, **options)
    return str(caught.value).replace(str(path), "D")


@pytest.mark.parametrize("role", ["server", "client"])
def test_sound_certificates_make_a_context(tmp_path: Path, role: str) -> None:
    context = x509(directory(tmp_path, role=role), endpoint=role).context()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname is (role == "client")
    assert len(context.get_ca_certs()) == 1


def test_a_peer_need_not_be_verified(tmp_path: Path) -> None:
    context = x509(directory(tmp_path), endpoint="server", verify_peer=False).context()
    assert context.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize(
    "leaf",
    [
        Spec("x", ca=None),
        Spec("x", usage=("key_encipherment",), usage_critical=False),
        Spec("x", usage=("digital_signature",), usage_critical=False),
        Spec("x", usage=("digital_signature", "key_encipherment")),
        Spec("x", purpose=(Purpose.CLIENT_AUTH,), purpose_critical=False),
        Spec("x", purpose=(Purpose.SERVER_AUTH,)),
        Spec("x", purpose=(Purpose.SERVER_AUTH, Purpose.CLIENT_AUTH)),
        Spec("x", purpose=(Purpose.ANY_EXTENDED_KEY_USAGE,)),
    ],
)
def test_certificates_that_pass(tmp_path: Path, leaf: Spec) -> None:
    usable(x509(directory(tmp_path, leaf), endpoint="server"))


SERVER = "D/server-cert.pem"
UNTRUSTED = f"Our own certificate {SERVER} failed validation against D/ca-cert.pem"


@pytest.mark.parametrize(
    ("leaf", "ca", "text"),
    [
        (Spec("x", days=(-5, -1)), None, f"The server certificate {SERVER} has expired"),
        (Spec("x", days=(1, 5)), None, f"The server certificate {SERVER} is not yet active"),
        (None, authority(days=(-5, -1)), "The CA certificate D/ca-cert.pem has expired"),
        (None, authority(days=(1, 5)), "The CA certificate D/ca-cert.pem is not yet active"),
        (
            Spec("x", ca=True),
            None,
            f"The certificate {SERVER} basic constraints show a CA, but we need one for a server",
        ),
        (None, authority(ca=None), "The certificate D/ca-cert.pem is missing basic constraints for a CA"),
        (
            None,
            authority(ca=False, usage=None),
            "The certificate D/ca-cert.pem basic constraints do not show a CA",
        ),
        (
            None,
            authority(usage=("digital_signature",)),
            "Certificate D/ca-cert.pem usage does not permit certificate signing",
        ),
        (
            None,
            authority(usage=("digital_signature",), usage_critical=False),
            f"{UNTRUSTED}: The certificate is not trusted",
        ),
        (
            Spec("x", usage=("key_encipherment",)),
            None,
            f"Certificate {SERVER} usage does not permit digital signature",
        ),
        (
            Spec("x", usage=("digital_signature",)),
            None,
            f"Certificate {SERVER} usage does not permit key encipherment",
        ),
        (
            Spec("x", purpose=(Purpose.CLIENT_AUTH,)),
            None,
            f"Certificate {SERVER} purpose does not allow use with a TLS server",
        ),
        (
            Spec("x", purpose=(Purpose.CODE_SIGNING,)),
            None,
            f"Certificate {SERVER} purpose does not allow use with a TLS server",
        ),
        (
            Spec("x", days=(-5, -1), ca=True, usage=("crl_sign",), purpose=(Purpose.CODE_SIGNING,)),
            authority(days=(-5, -1)),
            f"The server certificate {SERVER} has expired",
        ),
        (
            Spec("x", usage=("crl_sign",), purpose=(Purpose.CODE_SIGNING,)),
            None,
            f"Certificate {SERVER} usage does not permit digital signature",
        ),
    ],
)
def test_certificates_that_do_not(tmp_path: Path, leaf: Spec | None, ca: Spec | None, text: str) -> None:
    assert refusal(directory(tmp_path, leaf, ca), endpoint="server") == text


def test_a_ca_may_have_any_purpose(tmp_path: Path) -> None:
    usable(x509(directory(tmp_path, ca=authority(purpose=(Purpose.CLIENT_AUTH,))), endpoint="server"))


def test_a_client_is_named_as_one(tmp_path: Path) -> None:
    for name, leaf, text in (
        ("a", Spec("x", days=(-5, -1)), "The client certificate D/client-cert.pem has expired"),
        ("b", Spec("x", days=(1, 5)), "The client certificate D/client-cert.pem is not yet active"),
        (
            "c",
            Spec("x", purpose=(Purpose.SERVER_AUTH,)),
            "Certificate D/client-cert.pem purpose does not allow use with a TLS client",
        ),
    ):
        assert refusal(directory(tmp_path / name, leaf, role="client")) == text


def write(name: str, contents: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(contents)


def remove(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def replace_by_directory(name: str) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


PAIR = "Cannot load certificate 'D/server-cert.pem' & key 'D/server-key.pem'"
OTHER = authority(name="other CA")


@pytest.mark.parametrize(
    ("damage", "options", "text"),
    [
        (
            write("ca-cert.pem", pem(sign(OTHER, OTHER))),
            {},
            f"{UNTRUSTED}: The certificate hasn't got a known issuer",
        ),
        (
            write("ca-cert.pem", pem(sign(SAME_NAME, SAME_NAME))),
            {},
            f"{UNTRUSTED}: The certificate is not trusted",
        ),
        (
            write("server-key.pem", key_pem(ec.generate_private_key(ec.SECP256R1()))),
            {},
            f"{PAIR}: The certificate and the given key do not match.",
        ),
        (
            write("server-key.pem", key_pem(rsa.generate_private_key(65537, 2048))),
            {},
            f"{PAIR}: The certificate and the given key do not match.",
        ),
        (write("server-key.pem", b"garbage"), {}, f"{PAIR}: The requested data were not available."),
        (write("server-key.pem", b""), {}, f"{PAIR}: The requested data were not available."),
        (
            write("server-cert.pem", b"garbage"),
            {},
            f"Unable to import server certificate {SERVER}: Base64 unexpected header error.",
        ),
        (
            write("server-cert.pem", BAD_PEM),
            {},
            f"Unable to import server certificate {SERVER}: ASN1 parser: Error in TAG.",
        ),
        (write("server-cert.pem", b"garbage"), {"sanity_check": False}, f"{PAIR}: Base64 decoding error."),
        (write("server-cert.pem", BAD_PEM), {"sanity_check": False}, f"{PAIR}: ASN1 parser: Error in TAG."),
        (write("ca-cert.pem", b""), {}, "Unable to import CA certificate list D/ca-cert.pem"),
        (write("ca-cert.pem", BAD_PEM), {}, "Unable to import CA certificate list D/ca-cert.pem"),
        (
            write("ca-cert.pem", BAD_PEM),
            {"sanity_check": False},
            "Cannot load CA certificate 'D/ca-cert.pem': ASN1 parser: Error in TAG.",
        ),
        (remove("ca-cert.pem"), {}, "Unable to access credentials D/ca-cert.pem: No such file or directory"),
        (remove("server-cert.pem"), {}, f"Unable to access credentials {SERVER}: No such file or directory"),
        (
            remove("server-key.pem"),
            {},
            "Unable to access credentials D/server-key.pem: No such file or directory",
        ),
        (write("ca-crl.pem", b"garbage"), {}, "Cannot load CRL 'D/ca-crl.pem': Base64 decoding error."),
        (
            write("dh-params.pem", b""),
            {},
            "Unable to load DH parameters from D/dh-params.pem: Base64 unexpected header error.",
        ),
        (
            replace_by_directory("ca-cert.pem"),
            {},
            "Cannot load CA cert list D/ca-cert.pem: Error reading file “D/ca-cert.pem”: Is a directory",
        ),
        (replace_by_directory("server-key.pem"), {}, f"{PAIR}: Error while reading file."),
    ],
)
def test_damaged_directories(
    tmp_path: Path, damage: Callable[[Path], object], options: dict[str, Any], text: str
) -> None:
    path = directory(tmp_path)
    damage(path)
    assert refusal(path, endpoint="server", **options) == text


def test_without_a_sanity_check_much_passes(tmp_path: Path) -> None:
    expired = directory(tmp_path / "a", Spec("x", days=(-5, -1)))
    stranger = directory(tmp_path / "b")
    write("ca-cert.pem", pem(sign(SAME_NAME, SAME_NAME)))(stranger)
    empty = directory(tmp_path / "c")
    write("ca-cert.pem", b"garbage")(empty)
    for path in (expired, stranger, empty):
        usable(x509(path, endpoint="server", sanity_check=False))


@pytest.mark.parametrize("missing", [("client-cert.pem",), ("client-key.pem",), ("client-cert.pem", "client-key.pem")])
def test_a_client_needs_no_certificate_of_its_own(tmp_path: Path, missing: tuple[str, ...]) -> None:
    path = directory(tmp_path, role="client")
    for name in missing:
        remove(name)(path)
    usable(x509(path))


def test_only_the_first_certificate_of_our_own_file_counts(tmp_path: Path) -> None:
    root, middle, leaf = authority(), authority(name="middle"), Spec("localhost")
    path = directory(tmp_path, leaf, root)
    chain = pem(sign(leaf, middle)) + pem(sign(middle, root))
    write("server-cert.pem", chain)(path)
    assert refusal(path, endpoint="server") == f"{UNTRUSTED}: The certificate hasn't got a known issuer"
    write("ca-cert.pem", pem(sign(root, root)) + pem(sign(middle, root)))(path)
    usable(x509(path, endpoint="server"))


def test_an_encrypted_key_needs_its_secret(tmp_path: Path) -> None:
    path = directory(tmp_path, password=b"hunter2")
    assert refusal(path, endpoint="server") == f"{PAIR}: Decryption has failed."
    assert refusal(path, endpoint="server", passwordid="badpw") == f"{PAIR}: Decryption has failed."
    assert refusal(path, endpoint="server", passwordid="none") == "No secret with id 'none'"
    assert refusal(path, endpoint="server", passwordid="binpw") == "Data from secret binpw is not valid UTF-8"
    usable(x509(path, endpoint="server", passwordid="pw"))
    usable(x509(directory(tmp_path / "plain"), endpoint="server", passwordid="pw"))


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, hostname: str | None) -> str | None:
    """Run a handshake in memory and return the protocol version."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=hostname),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    return ends[0].version()


def test_two_sides_shake_hands_and_strangers_do_not(tmp_path: Path) -> None:
    ca = authority()
    server = x509(directory(tmp_path / "s", Spec("localhost"), ca), endpoint="server").context()
    client = x509(directory(tmp_path / "c", Spec("me"), ca, role="client")).context()
    stranger = x509(directory(tmp_path / "x", Spec("me"), role="client")).context()
    assert handshake(server, client, "localhost") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client, "elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, stranger, "localhost")


def test_missing_directory_and_priority(tmp_path: Path) -> None:
    tree = ObjectTree()
    with pytest.raises(CommandError, match=r"^Missing 'dir' property value$"):
        tree.add("a", TlsCredsX509(TlsCredsX509Options()))
    creds = x509(directory(tmp_path), endpoint="server", priority="SECURE256")
    with pytest.raises(CommandError, match=r"^Unable to set TLS session priority SECURE256: "):
        creds.context()


def test_properties_read_back_and_count_from_the_next_connection_on(tmp_path: Path) -> None:
    creds = x509(directory(tmp_path), endpoint="server", passwordid="pw")
    names = ("type", "endpoint", "dir", "verify-peer", "priority", "sanity-check", "passwordid")
    assert {name: creds.get_property(name) for name in names} == {
        "type": "tls-creds-x509",
        "endpoint": "server",
        "dir": str(tmp_path),
        "verify-peer": True,
        "priority": "",
        "sanity-check": True,
        "passwordid": "pw",
    }
    before = creds.context()
    creds.set_property("verify-peer", False)
    assert before.verify_mode == ssl.CERT_REQUIRED
    assert creds.context().verify_mode == ssl.CERT_NONE
    with pytest.raises(QmpdError, match=r"^Invalid parameter type for 'verify-peer', expected: boolean$"):
        creds.set_property("verify-peer", 5)
    with pytest.raises(QmpdError, match=r"^Parameter 'endpoint' does not accept value 'both'$"):
        creds.set_property("endpoint", "both")


# --- psk and anon -----------------------------------------------------------------------------


def psk(path: Path | None, **options: Any) -> TlsCredsPsk:
    creds = TlsCredsPsk(TlsCredsPskOptions(dir=None if path is None else str(path), **options))
    ObjectTree().add("psk", creds)
    return creds


def psk_refusal(path: Path | None, **options: Any) -> str:
    with pytest.raises(CommandError) as caught:
        psk(path, **options)
    return str(caught.value).replace(str(path), "D")


def test_psk_texts(tmp_path: Path) -> None:
    missing = "Unable to access credentials D/keys.psk: No such file or directory"
    assert psk_refusal(None) == "Missing 'dir' property value"
    assert psk_refusal(tmp_path) == missing
    assert psk_refusal(tmp_path, endpoint="server") == missing
    assert psk_refusal(None, endpoint="server", username="x") == "username should not be set when endpoint=server"
    (tmp_path / "keys.psk").write_text("alice:5a5a5a5a\n")
    assert psk_refusal(tmp_path) == "Username qemu not found in PSK file D/keys.psk"
    assert psk_refusal(tmp_path, username="ali") == "Username ali not found in PSK file D/keys.psk"
    assert psk_refusal(tmp_path, username="") == "Username  not found in PSK file D/keys.psk"
    assert psk(tmp_path, username="alice").get_property("username") == "alice"
    directory = tmp_path / "d"
    (directory / "keys.psk").mkdir(parents=True)
    assert psk(directory, endpoint="server").endpoint == "server"
    text = "Cannot read PSK file D/keys.psk: Error reading file “D/keys.psk”: Is a directory"
    assert psk_refusal(directory) == text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("alice:", "The request is invalid."),
        ("alice:5a5a5a", "The request is invalid."),
        ("alice:5a5a5a5a5", "Error in parsing."),
        ("alice:5a5a5a5a5a\r", "Error in parsing."),
        ("alice:zz\nalice:5a5a5a5a", "Error in parsing."),
    ],
)
def test_keys_that_are_none(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "keys.psk").write_bytes(line.encode() + b"\n")
    assert psk_refusal(tmp_path, username="alice") == f"Cannot set PSK client credentials: {reason}"
    assert psk(tmp_path, endpoint="server").endpoint == "server"


def test_the_first_line_of_a_name_holds_its_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text("alicia:00000000\nalice:00ff00ff\nalice:11111111\nqemu:0102030405")
    assert client_key(str(path), "alice") == b"\x00\xff\x00\xff"
    assert client_key(str(path), "qemu") == b"\x01\x02\x03\x04\x05"


@pytest.mark.skipif(hasattr(ssl.SSLContext, "set_psk_server_callback"), reason="this Python has pre-shared keys")
def test_using_psk_on_an_old_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("qemu:01020304\n")
    with pytest.raises(CommandError, match=r"^TLS credentials 'psk' cannot be used: pre-shared keys need Python 3.13"):
        psk(tmp_path).context()


def test_anon_can_be_made_but_not_used(tmp_path: Path) -> None:
    tree = ObjectTree()
    tree.add("anon", TlsCredsAnon(TlsCredsAnonOptions(dir=str(tmp_path / "none"), endpoint="server", priority="zz")))
    creds = tree.tls_credentials("anon")
    assert isinstance(creds, TlsCredentials)
    assert creds.endpoint == "server"
    with pytest.raises(CommandError, match=r"^TLS credentials 'anon' cannot be used: anonymous TLS is not supported$"):
        creds.context()


def test_looking_up_what_is_no_tls_credentials() -> None:
    tree = ObjectTree()
    tree.add("s", Secret(SecretOptions(data="x")))
    with pytest.raises(CommandError, match=r"^Object with id 's' is not TLS credentials$"):
        tree.tls_credentials("s")
    with pytest.raises(CommandError, match=r"^No TLS credentials with id 'nosuch'$"):
        tree.tls_credentials("nosuch")
