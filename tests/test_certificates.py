"""Certificates: read, chosen by name, refused with a reason, and taken anew when their files change."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from apphost.errors import SettingsError
from apphost.logs import Log
from apphost.settings import Settings
from apphost.sources import resolve
from apphost.worker import certificates
from apphost.worker.certificates import Certificates, Tls, files_of, load, names_of, unreadable
from tests import pki as pki_module
from tests.pki import Pki


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return pki_module.make(tmp_path_factory.mktemp("pki"))


def settings(pki: Pki, *names: str, **more: Any) -> Settings:
    files = {"tls_certfile": tuple(str(pki.folder / f"{name}.pem") for name in names)}
    files["tls_keyfile"] = tuple(str(pki.folder / f"{name}.key") for name in names)
    return Settings(**{**files, **more})


def loaded(pki: Pki, *names: str, **more: Any) -> Certificates:
    found = load(settings(pki, *names, **more))
    assert found is not None
    return found


def test_none() -> None:
    assert load(Settings()) is None


def test_chosen_by_name(pki: Pki) -> None:
    found = loaded(pki, "local", "other")
    local, other = found.choose("localhost"), found.choose("other.example")
    assert (local.certificate, other.certificate) == (pki.leaf("local"), pki.leaf("other"))
    assert local is found.context
    assert {found.choose(name) for name in ("OTHER.example", "other.example.", "x.wild.example")} == {other}
    assert {found.choose(name) for name in ("", ".", "wild.example", "a.b.wild.example", "x", "127.0.0.1")} == {local}
    assert not found.warnings
    assert local.suites["TLS_AES_128_GCM_SHA256"] == 0x1301


@settings_of_hypothesis(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_any_name_has_a_certificate(pki: Pki, name: str) -> None:
    assert _pair(pki).choose(name).certificate


_pairs: list[Certificates] = []


def _pair(pki: Pki) -> Certificates:
    if not _pairs:
        _pairs.append(loaded(pki, "local", "other"))
    return _pairs[0]


def test_context(pki: Pki) -> None:
    """TLS 1.2 at least, no compression, no renegotiation, the server's order."""
    context = loaded(pki, "local").context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_COMPRESSION
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert context.verify_mode is ssl.CERT_NONE
    assert loaded(pki, "local", tls_minimum="1.3").context.minimum_version is ssl.TLSVersion.TLSv1_3
    ciphers = loaded(pki, "local", tls_ciphers="ECDHE+AESGCM").context.get_ciphers()
    assert all("GCM" in each["name"] for each in ciphers if each["protocol"] == "TLSv1.2")


def test_key_in_the_file_of_the_certificate(pki: Pki, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((pki.folder / "local.key").read_bytes() + (pki.folder / "local.pem").read_bytes())
    found = load(Settings(tls_certfile=(str(both),)))
    assert found is not None
    assert found.context.certificate == pki.leaf("local")


def test_names() -> None:
    """The common name counts only without alternative names."""
    subject = ((("organizationName", "o"),), (("commonName", "cn.example"),))
    assert names_of({"subject": subject}) == ("cn.example",)
    both = {"subject": subject, "subjectAltName": (("DNS", "a"), ("IP Address", "::1"), ("DNS", "*.b"))}
    assert names_of(both) == ("a", "*.b")
    assert names_of({}) == ()


def test_expired(pki: Pki) -> None:
    """Served, as a renewal may be on its way; but told."""
    import datetime

    past = datetime.datetime(2001, 1, 1, tzinfo=datetime.timezone.utc)
    issued = pki.ca.issue_cert("old.example", not_before=past - datetime.timedelta(1), not_after=past)
    issued.private_key_and_cert_chain_pem.write_to_path(str(pki.folder / "old.pem"))
    found = load(Settings(tls_certfile=(str(pki.folder / "old.pem"),)))
    assert found is not None
    (warning,) = found.warnings
    assert warning.startswith(f"the certificate in {pki.folder}/old.pem has expired: Jan  1 00:00:00 2001")
    assert found.choose("old.example") is found.context


def _wrong(pki: Pki, tmp_path: Path) -> dict[str, tuple[Settings, str]]:
    folder = pki.folder
    cert, key = str(folder / "local.pem"), str(folder / "local.key")
    empty, broken, encrypted, big = (str(tmp_path / name) for name in ("empty", "broken", "encrypted", "big"))
    Path(empty).write_text("nothing\n")
    Path(broken).write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    Path(big).write_bytes(bytes(2**20 + 1))
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)

    def pair(cert: str, key: str, **more: Any) -> Settings:
        return Settings(tls_certfile=(cert,), tls_keyfile=(key,) if key else (), **more)

    asked = {"tls_client_certs": "optional"}
    return {
        "missing": (pair("/nowhere.pem", key), "tls_certfile: cannot read /nowhere.pem: No such file or directory"),
        "missing key": (pair(cert, "/nowhere.key"), "tls_keyfile: cannot read /nowhere.key: No such file"),
        "folder": (pair(str(folder), key), f"tls_certfile: cannot read {folder}: Is a directory"),
        "no certificate": (pair(empty, key), f"tls_certfile: there is no certificate in {empty}; expected PEM"),
        "no key": (pair(cert, empty), f"tls_keyfile: there is no private key in {empty}; expected PEM"),
        "no key at all": (pair(cert, ""), f"there is no private key in {cert}, and tls_keyfile is not set"),
        "swapped": (pair(key, cert), f"there is no certificate in {key}"),
        "mismatch": (pair(cert, str(folder / "other.key")), f"other.key does not belong to the certificate in {cert}"),
        "broken": (pair(broken, key), f"cannot use {broken} with {key}: "),
        "encrypted": (pair(cert, encrypted), f"the private key in {encrypted} is encrypted"),
        "big": (pair(big, key), "is larger than"),
        "ciphers": (pair(cert, key, tls_ciphers="FOO"), "tls_ciphers: OpenSSL knows none of 'FOO'"),
        "missing CA": (pair(cert, key, tls_ca_certs="/ca", **asked), "tls_ca_certs: cannot read /ca: No such file"),
        "no CA": (pair(cert, key, tls_ca_certs=empty, **asked), f"tls_ca_certs: there is no certificate in {empty}"),
    }


_CASES = ["missing", "missing key", "folder", "no certificate", "no key", "no key at all", "swapped", "mismatch",
          "broken", "encrypted", "big", "ciphers", "missing CA", "no CA"]  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_wrong_files(pki: Pki, tmp_path: Path, case: str) -> None:
    """What is wrong, and where, in one paragraph."""
    wrong = _wrong(pki, tmp_path)
    assert set(wrong) == set(_CASES)
    given, message = wrong[case]
    with pytest.raises(SettingsError) as caught:
        load(given)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_certificate_that_is_not_for_servers(pki: Pki, tmp_path: Path) -> None:
    """A CA's own, say: no client would take it."""
    key, cert = tmp_path / "ca.key", tmp_path / "ca.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-addext",
               "extendedKeyUsage=clientAuth", "-keyout", str(key), "-out", str(cert)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(SettingsError, match="is not fit for a server: unsuitable certificate purpose"):
        load(Settings(tls_certfile=(str(cert),), tls_keyfile=(str(key),)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bind": ["https://a:1"]}, "bind = .* asks for TLS, which needs a certificate"),
        ({"tls_keyfile": ["k"]}, "tls_keyfile = .* must be one file for each of tls_certfile"),
        ({"tls_keyfile": ["k"], "tls_certfile": ["c", "d"]}, "must be one file for each of"),
        ({"tls_client_certs": "required", "tls_ca_certs": "c"}, "needs TLS, with a certificate of the server's own"),
        ({"tls_client_certs": "required", "tls_certfile": ["c"]}, "needs the certificates of the CA"),
        ({"tls_ca_certs": "c", "tls_certfile": ["c"]}, "would check nobody"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(given, {})


def test_settings_that_go_together() -> None:
    both = {"tls_certfile": ["a", "b"], "tls_keyfile": ["c", "d"], "tls_ca_certs": "e", "tls_client_certs": "optional"}
    found = resolve({**both, "bind": ["https://a:1", "http://a:2", "unix:s"]}, {}).settings
    assert files_of(found) == ["a", "b", "c", "d", "e"]
    assert unreadable(found) == ["a", "b", "c", "d", "e"]


# ------------------------------------------------------------------------------------------------- files that change


class Lines(Log):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def write(self, level: str, message: str, detail: str = "", **fields: Any) -> None:
        self.lines.append(f"{level} {message}")


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pki, Tls, Lines]:
    monkeypatch.setattr(certificates, "SETTLE", 0.0)
    pki = pki_module.make(tmp_path / "pki")
    log = Lines()
    given = settings(pki, "local")
    found = load(given)
    assert found is not None
    return pki, Tls(given, found, log, "worker 1"), log


def look(tls: Tls, change: Callable[[], object] = lambda: None) -> None:
    change()
    asyncio.run(tls._look())


def served(tls: Tls) -> Any:
    return tls.context.certificate  # type: ignore[attr-defined]


def test_change_is_taken(watched: tuple[Pki, Tls, Lines]) -> None:
    pki, tls, log = watched
    look(tls)
    assert log.lines == []
    look(tls, lambda: pki.issue("local", "127.0.0.1"))
    assert served(tls) == pki.leaf("local")
    look(tls)
    (line,) = log.lines
    assert line.startswith("info worker 1 has taken the changed certificates (")


def test_half_a_change_waits(watched: tuple[Pki, Tls, Lines]) -> None:
    """A certificate whose key has not come yet, a file that is half written, one that is gone: one line for each."""
    pki, tls, log = watched
    old = served(tls)
    key = pki.folder / "local.key"
    before = key.read_bytes()
    pki.issue("local", "127.0.0.1")
    after = key.read_bytes()
    for content in (before, after[:100], None):
        if content is None:
            key.unlink()
        else:
            key.write_bytes(content)
        look(tls)
        look(tls)
        assert served(tls) == old
    assert [line.split(":")[0] for line in log.lines] == ["warning worker 1 keeps the certificates that it has"] * 3
    look(tls, lambda: key.write_bytes(after))
    assert served(tls) == pki.leaf("local")


def test_change_in_the_middle_of_a_look(watched: tuple[Pki, Tls, Lines], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read once it stays as it is."""
    _, tls, log = watched
    stamps = iter([(1,), (2,), (3,), (3,)])
    monkeypatch.setattr(certificates, "stamp_of", lambda _: next(stamps))
    monkeypatch.setattr(tls, "_take", lambda: log.info("taken"))
    look(tls)
    assert log.lines == ["info taken"]
    assert next(stamps, None) is None


def test_file_that_may_not_be_read_any_more(watched: tuple[Pki, Tls, Lines], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once, however often it changes."""
    pki, tls, log = watched

    def denied(*_: object) -> None:
        raise SettingsError("tls_keyfile: cannot read it") from PermissionError()

    monkeypatch.setattr(certificates, "load", denied)
    for _ in range(2):
        look(tls, lambda: pki.issue("local", "127.0.0.1"))
    (line,) = log.lines
    assert line.endswith("send USR1 to have them taken")


def test_a_look_that_fails_is_not_the_last_one(
    watched: tuple[Pki, Tls, Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong with the files is said, and what comes after is taken."""
    pki, tls, log = watched
    pki.issue("local", "127.0.0.1")
    good, attempts = certificates.load, iter([OSError(5, "Input/output error")])

    def flaky(*given: Any) -> Any:
        for exc in attempts:
            pki.issue("local", "127.0.0.1")
            raise exc
        return good(*given)

    async def main() -> None:
        monkeypatch.setattr(tls, "_settings", dataclasses.replace(tls._settings, tls_watch_interval=0.01))
        tls.start(asyncio.get_running_loop())
        deadline = asyncio.get_running_loop().time() + 10
        while len(log.lines) < 2 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        tls.stop()

    monkeypatch.setattr(certificates, "load", flaky)
    monkeypatch.setattr(certificates, "_hush_odd_names", lambda: None)  # it is for the whole process
    asyncio.run(main())
    assert log.lines[0].startswith("error worker 1 keeps the certificates that it has: OSError")
    assert log.lines[1].startswith("info worker 1 has taken the changed certificates")
    assert served(tls) == pki.leaf("local")
