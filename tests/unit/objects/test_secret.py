"""secret: every form of giving it, the order of checks, and QEMU 10.0.2's texts."""

from __future__ import annotations

import base64
import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.errors import CommandError, QmpdError
from qmpd.objects._secret import decode_base64
from qmpd.objects.secret import MAX_FILE, Secret, SecretOptions
from qmpd.qom.tree import ObjectTree

MASTER = bytes(range(32))
IV = base64.b64encode(b"defghijklmnopqrs").decode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def add(tree: ObjectTree, name: str, **options: str) -> None:
    tree.add(name, Secret(SecretOptions(**options)))


@pytest.fixture
def tree() -> ObjectTree:
    tree = ObjectTree()
    add(tree, "master", data=b64(MASTER), format="base64")
    return tree


def encrypt(plain: bytes, key: bytes = MASTER, iv: bytes = b"defghijklmnopqrs") -> bytes:
    padder = padding.PKCS7(128).padder()
    worker = Cipher(algorithms.AES256(key), modes.CBC(iv)).encryptor()
    return worker.update(padder.update(plain) + padder.finalize()) + worker.finalize()


# --- plain secrets ----------------------------------------------------------------------------


def test_raw_data_is_taken_as_it_is(tree: ObjectTree) -> None:
    add(tree, "s", data="abc123\n")
    assert tree.secret("s") == b"abc123\n"


def test_a_raw_file_is_taken_whole_and_a_base64_file_may_end_in_newline(tree: ObjectTree, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"abc\n\xff\0")
    (tmp_path / "b64").write_text("YWJj\nMTIz\n")
    add(tree, "raw", file=str(tmp_path / "raw"))
    add(tree, "b64", file=str(tmp_path / "b64"), format="base64")
    assert tree.secret("raw") == b"abc\n\xff\0"
    assert tree.secret("b64") == b"abc123"


def test_exactly_one_of_data_and_file(tree: ObjectTree, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"^Either 'file' or 'data' must be provided$"):
        add(tree, "s")
    with pytest.raises(CommandError, match=r"^'file' and 'data' are mutually exclusive$"):
        add(tree, "s", data="", file=str(tmp_path))
    assert tree.get("s") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{tmp}/none", "Failed to open file “{tmp}/none”: No such file or directory"),
        ("{tmp}", "Error reading file “{tmp}”: Is a directory"),
        ("{tmp}/f/x", "Failed to open file “{tmp}/f/x”: Not a directory"),
        ("", "Failed to open file “”: No such file or directory"),
        ("/proc/self/mem", "Error reading file “/proc/self/mem”: Input/output error"),
    ],
)
def test_a_file_that_cannot_be_read(tree: ObjectTree, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "f").touch()
    name = text.format(tmp=tmp_path)
    with pytest.raises(CommandError) as caught:
        add(tree, "s", file=name)
    assert str(caught.value) == f"Unable to read {name}: {reason.format(tmp=tmp_path)}"


def test_a_file_without_end_is_refused(tree: ObjectTree) -> None:
    with pytest.raises(CommandError, match=f"^Unable to read /dev/zero: File is larger than {MAX_FILE} bytes$"):
        add(tree, "s", file="/dev/zero")


def test_a_file_others_can_read_is_reported_without_its_contents(
    tree: ObjectTree, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loose, tight = tmp_path / "loose", tmp_path / "tight"
    for path, mode in ((loose, 0o644), (tight, 0o600)):
        path.write_text("topsecret")
        path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        add(tree, "s", file=str(loose))
        add(tree, "t", file=str(tight))
    assert [record.getMessage() for record in caplog.records] == [
        f"secret file {loose} can be read by other users (mode 0644)"
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"", b""),
        (b"YWJj", b"abc"),
        (b"YWJj=", b"abc"),  # what is left over of a group is dropped
        (b"YW==", b"a"),
        (b"YWI=", b"ab"),
        (b"YW", b""),
        (b"YWJj\nYW==YWJj", b"abcaabc"),
        (b"YW=j", b"a\x23"),
        (b"=WJj", b"\x01bc"),
    ],
)
def test_base64_is_decoded_as_glib_does(text: bytes, value: bytes) -> None:
    assert decode_base64(text) == value


def test_base64_refuses_other_characters(tree: ObjectTree, tmp_path: Path) -> None:
    for text in ("*not base64*", "YWJj\r\n", "YW Jj", "YW\0Jj"):
        with pytest.raises(CommandError, match=r"^Base64 data contains invalid characters$"):
            add(tree, "s", data=text, format="base64")
    (tmp_path / "nul").write_bytes(b"YWJj\0")
    with pytest.raises(CommandError, match=r"^Base64 data contains embedded NUL characters$"):
        add(tree, "s", file=str(tmp_path / "nul"), format="base64")


@given(st.binary(max_size=200), st.integers(min_value=1, max_value=80))
def test_base64_of_any_bytes_with_newlines_anywhere(data: bytes, width: int) -> None:
    text = base64.b64encode(data)
    broken = b"\n".join(text[at : at + width] for at in range(0, len(text), width))
    assert decode_base64(broken) == data


# --- encrypted secrets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "iv", "plain"),
    [
        ("a80Lc+Gdr2S+jVbpPRoE9g==", "rnS6zz5gLxpcZFIS2EeaRQ==", b"lukspass"),
        ("XwLJnKidjwQY5axxwIUKeA==", "9sq2HeYLhblUY4M8zeF17A==", b"lukspass"),
        ("WZomn2Vc5dAbuQ7/Efoj6Q==", "JVqzdCFYtl1RYBioYFMiHA==", b"wrong"),
    ],
)
def test_what_libvirt_sent_in_a_real_session(data: str, iv: str, plain: bytes) -> None:
    """Captured from libvirt: object-add of masterKey0, then of the disks' secrets."""
    key = bytes.fromhex("fbb14af2b5e5f32c3042d3f88cf31013c8d768cee26c8e31c48523c7b0492ec6")
    tree = ObjectTree()
    add(tree, "masterKey0", data=b64(key), format="base64")
    add(tree, "s", data=data, keyid="masterKey0", iv=iv, format="base64")
    assert tree.secret("s") == plain


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=120), st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
def test_decrypts_what_cryptography_encrypts(plain: bytes, key: bytes, iv: bytes) -> None:
    tree = ObjectTree()
    add(tree, "k", data=b64(key), format="base64")
    add(tree, "s", data=b64(encrypt(plain, key, iv)), format="base64", keyid="k", iv=b64(iv))
    assert tree.secret("s") == plain


def test_raw_ciphertext_comes_from_a_file(tree: ObjectTree, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(encrypt(b"from a file"))
    add(tree, "s", file=str(tmp_path / "c"), keyid="master", iv=IV)
    assert tree.secret("s") == b"from a file"


def test_an_iv_without_keyid_is_ignored(tree: ObjectTree) -> None:
    add(tree, "s", data="plain", iv="!!")
    assert tree.secret("s") == b"plain"


GOOD = b64(encrypt(b"abc"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keyid": "none", "data": "*", "iv": "*"}, "No secret with id 'none'"),
        ({"keyid": "", "data": GOOD, "iv": IV}, "No secret with id ''"),
        ({"keyid": "type", "data": GOOD, "iv": IV}, "No secret with id 'type'"),
        ({"keyid": "/objects/master", "data": GOOD, "iv": IV}, "No secret with id '/objects/master'"),
        ({"keyid": "short", "data": "*"}, "Key should be 32 bytes in length"),
        ({"keyid": "master", "data": "*"}, "IV is required to decrypt secret"),
        ({"keyid": "master", "data": "*", "iv": "!!"}, "Base64 data contains invalid characters"),
        ({"keyid": "master", "data": "*", "iv": ""}, "IV should be 16 bytes in length not 0"),
        ({"keyid": "master", "data": "*", "iv": "ZGVmZ2hpams="}, "IV should be 16 bytes in length not 8"),
        ({"keyid": "master", "data": "*", "iv": IV}, "Base64 data contains invalid characters"),
        ({"keyid": "master", "data": "MTIzNDU=", "iv": IV}, "Length 5 must be a multiple of block size 16"),
        (
            {"keyid": "master", "data": "THNinON010VKU79GAkvtLQ==", "iv": IV},
            "Incorrect number of padding bytes (118) found on decrypted data",
        ),
        ({"keyid": "none"}, "Either 'file' or 'data' must be provided"),
    ],
)
def test_refusals_in_the_order_of_checks(tree: ObjectTree, options: dict[str, str], text: str) -> None:
    add(tree, "short", data="only sixteen byt")
    with pytest.raises(CommandError) as caught:
        add(tree, "s", format="base64", **options)
    assert str(caught.value) == text
    assert tree.get("s") is None


def test_without_format_base64_the_ciphertext_is_taken_literally(tree: ObjectTree) -> None:
    with pytest.raises(CommandError, match=r"^Length 24 must be a multiple of block size 16$"):
        add(tree, "s", data=GOOD, keyid="master", iv=IV)


def test_empty_ciphertext_is_an_empty_secret(tree: ObjectTree) -> None:
    add(tree, "s", data="", format="base64", keyid="master", iv=IV)
    assert tree.secret("s") == b""


def test_the_master_key_may_go_first(tree: ObjectTree) -> None:
    add(tree, "s", data=GOOD, format="base64", keyid="master", iv=IV)
    tree.remove("master")
    assert tree.secret("s") == b"abc"


# --- looking secrets up, and keeping them in ----------------------------------------------------


def test_a_passphrase_has_to_be_text(tree: ObjectTree) -> None:
    add(tree, "bad", data="/+8=", format="base64")
    add(tree, "nul", data="a\0b")
    add(tree, "good", data="pässword")
    for name in ("bad", "nul"):
        with pytest.raises(CommandError, match=f"^Data from secret {name} is not valid UTF-8$"):
            tree.passphrase(name)
    assert tree.passphrase("good") == "pässword".encode()


def test_deleting_wipes_the_object_but_not_what_was_handed_out(tree: ObjectTree) -> None:
    add(tree, "s", data="abc")
    secret = tree.get("s")
    assert isinstance(secret, Secret)
    handed_out = tree.secret("s")
    tree.remove("s")
    with pytest.raises(CommandError, match=r"^No secret with id 's'$"):
        tree.secret("s")
    with pytest.raises(CommandError, match="has no data"):
        secret.reveal()
    assert handed_out == b"abc"


def test_properties_show_everything_but_the_secret(tree: ObjectTree) -> None:
    add(tree, "s", data=GOOD, format="base64", keyid="master", iv=IV)
    secret = tree.resolve("/objects/s")
    assert {name: one.type for name, one in secret.properties().items()} == {
        "type": "string",
        "iv": "string",
        "keyid": "string",
        "format": "QCryptoSecretFormat",
        "data": "string",
        "file": "string",
    }
    shown = {name: secret.get_property(name) for name in ("type", "iv", "keyid", "format", "file")}
    assert shown == {"type": "secret", "iv": IV, "keyid": "master", "format": "base64", "file": ""}
    with pytest.raises(CommandError, match=r"^Property 'secret.data' is not readable$"):
        secret.get_property("data")


def test_setting_properties_checks_types_and_leaves_the_loaded_bytes(tree: ObjectTree) -> None:
    add(tree, "s", data="abc")
    secret = tree.resolve("s")
    for name, value in (("data", "new"), ("file", "/x"), ("format", "base64"), ("keyid", "k"), ("iv", "i")):
        secret.set_property(name, value)
        with pytest.raises(QmpdError, match=f"^Invalid parameter type for '{name}', expected: string$"):
            secret.set_property(name, 5)
    with pytest.raises(QmpdError, match=r"^Parameter 'format' does not accept value 'hex'$"):
        secret.set_property("format", "hex")
    assert secret.get_property("file") == "/x"
    assert tree.secret("s") == b"abc"


def test_options_and_objects_have_a_repr_without_the_secret(tree: ObjectTree) -> None:
    options = SecretOptions(data="abc123", keyid="k")
    assert "abc123" not in repr(options)
    assert "abc123" not in repr(Secret(options))
