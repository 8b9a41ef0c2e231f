"""Certificates: from the files that the settings name to what a handshake needs, and the look at files that change.

`load` runs in the fork server before it gives root up, as keys are often readable by root alone; the workers inherit
the result, and with it the keys of session tickets, so that a session that began in one worker of a generation is
resumed in another. Without a reload each worker looks at the files every now and then and takes what is new.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import ssl
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from apphost.errors import ApphostError, SettingsError, user_traceback
from apphost.logs import Log
from apphost.protocols.tls import ServerContext, explain
from apphost.settings import Settings

SETTLE = 1.0  # s that changed files must stay as they are before they are read: certbot and cp take milliseconds
_SIZE_MAX = 1 << 20  # bytes of one file: a bundle of all public CAs has a quarter of it
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which `ssl` has no name for
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}

Stamp = tuple[tuple[int, ...] | None, ...]
Entry = tuple[ServerContext, tuple[str, ...]]  # and the host names that it is for


class Certificates:
    """All certificates of a server, each in a context of its own. The first is for clients that name no known host.

    stamp: how the files were when they were read. warnings: what an operator should know, in sentences. watched: the
    workers may read the files, so they look whether these have changed.
    """

    def __init__(self, entries: Sequence[Entry], stamp: Stamp, warnings: list[str]) -> None:
        self.context = entries[0][0]
        self.stamp = stamp
        self.warnings = warnings
        self.watched = True
        self._by_name: dict[str, ServerContext] = {}
        for context, names in entries:
            for name in names:
                self._by_name.setdefault(name.lower(), context)
        if len(entries) > 1:
            # The others differ from it in their certificate only, and OpenSSL takes only that over.
            self.context.sni_callback = self._choose

    def choose(self, host: str) -> ServerContext:
        """The certificate for `host`: of that very name, else with `*` for its first label (RFC 9525, 6.3)."""
        host = host.lower().removesuffix(".")
        wild = "*." + host.partition(".")[2]
        return self._by_name.get(host) or self._by_name.get(wild) or self.context

    def _choose(self, tls: ssl.SSLObject, host: str | None, _context: ssl.SSLContext) -> None:
        if host is not None and (chosen := self.choose(host)) is not self.context:
            tls.context = chosen


def files_of(settings: Settings) -> list[str]:
    """Every file that matters, each once."""
    ca = [settings.tls_ca_certs] if settings.tls_ca_certs else []
    return list(dict.fromkeys([*settings.tls_certfile, *settings.tls_keyfile, *ca]))


def unreadable(settings: Settings) -> list[str]:
    """Files that this process may not read, or not even see."""
    return [path for path in files_of(settings) if not os.access(path, os.R_OK)]


def stamp_of(settings: Settings) -> Stamp:
    """How the files are now, symlinks followed; None for one that cannot be seen."""
    return tuple(map(_stamp, files_of(settings)))


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def load(settings: Settings, directory: str = "") -> Certificates | None:
    """Read and try all certificates; None without any. Raises `SettingsError` that names the file and what is wrong.

    directory: where relative names begin; empty is the current one.
    """
    if not settings.tls_certfile:
        return None
    if directory:
        settings = _located(settings, directory)
    stamp = stamp_of(settings)
    warnings: list[str] = []
    entries: list[Entry] = []
    for number, certfile in enumerate(settings.tls_certfile):
        keyfile = settings.tls_keyfile[number] if settings.tls_keyfile else certfile
        entries.append(_load_one(settings, certfile, keyfile, warnings))
    return Certificates(entries, stamp, warnings)


def _located(settings: Settings, directory: str) -> Settings:
    def at(path: str) -> str:
        return os.path.join(directory, path) if path else path

    return dataclasses.replace(
        settings,
        tls_certfile=tuple(map(at, settings.tls_certfile)),
        tls_keyfile=tuple(map(at, settings.tls_keyfile)),
        tls_ca_certs=at(settings.tls_ca_certs),
    )


def _load_one(settings: Settings, certfile: str, keyfile: str, warnings: list[str]) -> Entry:
    found = _CERTIFICATE.search(_read(certfile, "tls_certfile"))
    if found is None:
        raise SettingsError(f"tls_certfile: there is no certificate in {certfile}; expected PEM (BEGIN CERTIFICATE)")
    key = _read(keyfile, "tls_keyfile")
    if "PRIVATE KEY-----" not in key:
        where = f"tls_keyfile: there is no private key in {keyfile}"
        if keyfile == certfile:
            where = f"tls_certfile: there is no private key in {certfile}, and tls_keyfile is not set"
        raise SettingsError(f"{where}; expected PEM (BEGIN PRIVATE KEY)")
    context = _context(settings)
    _load_pair(context, certfile, keyfile)
    leaf = context.certificate = ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(found[0]))
    facts = _look_at(certfile, keyfile, leaf)
    expires = str(facts.get("notAfter", ""))
    if expires and ssl.cert_time_to_seconds(expires) < time.time():
        warnings.append(f"the certificate in {certfile} has expired: {expires}")
    return context, names_of(facts)


def _read(path: str, setting: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_SIZE_MAX + 1)
    except OSError as exc:
        raise SettingsError(f"{setting}: cannot read {path}: {exc.strerror}") from exc
    if len(data) > _SIZE_MAX:
        raise SettingsError(f"{setting}: {path} is larger than {_SIZE_MAX} bytes, so it is something else")
    return data.decode("latin-1")


def _load_pair(context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except _Encrypted:
        raise SettingsError(
            f"the private key in {keyfile} is encrypted, and a server that starts by itself has nobody to ask for the "
            f"password: write it without one (openssl pkey -in {keyfile} -out NEW) and protect the file"
        ) from None
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(
                f"the private key in {keyfile} does not belong to the certificate in {certfile} (the first one in it)"
            ) from None
        raise SettingsError(f"cannot use {_both(certfile, keyfile)}: {explain(exc)}") from None
    except OSError as exc:
        raise SettingsError(f"cannot read {_both(certfile, keyfile)}: {exc.strerror}") from exc


def _both(certfile: str, keyfile: str) -> str:
    return certfile if certfile == keyfile else f"{certfile} with {keyfile}"


class _Encrypted(Exception):
    pass


def _no_password() -> NoReturn:
    raise _Encrypted


def _context(settings: Settings) -> ServerContext:
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _MINIMUM[settings.tls_minimum]
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    if settings.tls_ciphers:
        try:
            context.set_ciphers(settings.tls_ciphers)
        except ssl.SSLError:
            raise SettingsError(
                f"tls_ciphers: OpenSSL knows none of {settings.tls_ciphers!r}; expected a list such as "
                "ECDHE+AESGCM:ECDHE+CHACHA20"
            ) from None
    context.suites = {each["name"]: each["id"] & 0xFFFF for each in context.get_ciphers()}
    if settings.tls_ca_certs:
        _read(settings.tls_ca_certs, "tls_ca_certs")
        try:
            context.load_verify_locations(settings.tls_ca_certs)
        except ssl.SSLError:
            raise SettingsError(
                f"tls_ca_certs: there is no certificate in {settings.tls_ca_certs}; expected PEM (BEGIN CERTIFICATE)"
            ) from None
    context.verify_mode = _VERIFY[settings.tls_client_certs]
    return context


def _look_at(certfile: str, keyfile: str, leaf: str) -> dict[str, Any]:
    """What stands in the certificate, in the form of `getpeercert`. That wants a handshake, so there is one, in memory,
    with a client that trusts this very certificate: it shows as well that a handshake is possible."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_pair(server, certfile, keyfile)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.verify_flags |= _NO_CHECK_TIME  # one that has expired is a warning
    client.load_verify_locations(cadata=leaf)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(back, there)
    sides = [ours, server.wrap_bio(there, back, server_side=True)]
    try:
        for turn in range(8):  # TLS 1.3 takes three
            try:
                sides[turn % 2].do_handshake()
            except ssl.SSLWantReadError:
                pass
        return dict(ours.getpeercert() or {})
    except (ssl.SSLError, ValueError) as exc:
        why = exc.verify_message if isinstance(exc, ssl.SSLCertVerificationError) else explain(exc)
        raise SettingsError(f"the certificate in {certfile} is not fit for a server: {why}") from None


def names_of(facts: dict[str, Any]) -> tuple[str, ...]:
    """The host names of a certificate; its common name only where it has no alternative names (RFC 6125, 6.4.4)."""
    names = tuple(value for kind, value in facts.get("subjectAltName", ()) if kind == "DNS")
    common = (value for part in facts.get("subject", ()) for name, value in part if name == "commonName")
    return names or tuple(common)


def _hush_odd_names() -> None:
    """A client may ask for a host whose name is no text. `ssl` ends the handshake then, and we tell it in one line; the
    traceback that it prints as well, through this hook, tells nobody anything."""
    before = sys.unraisablehook

    def hook(args: sys.UnraisableHookArgs, /) -> None:
        if args.exc_type is not UnicodeDecodeError or not isinstance(args.object, bytes):
            before(args)

    sys.unraisablehook = hook


class Tls:
    """What a worker does with certificates: `context` for the next handshake, the current one. Event loop only."""

    def __init__(self, settings: Settings, certificates: Certificates, log: Log, name: str) -> None:
        self._settings = settings
        self._log = log
        self._name = name
        self._watched = certificates.watched and bool(settings.tls_watch_interval)
        self._seen = certificates.stamp  # of the last attempt, good or bad
        self._hint = False  # that USR1 is needed has been said
        self._watch: asyncio.Task[None] | None = None
        self.patience = settings.tls_handshake_timeout
        self.context: ssl.SSLContext = certificates.context

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the files from now on, at once as well: they may have changed before this worker was forked."""
        _hush_odd_names()
        if self._watched:
            self._watch = loop.create_task(self._look_again_and_again())

    def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def _look_again_and_again(self) -> None:
        while True:
            try:
                await self._look()
            except Exception as exc:  # whatever the files are like, the next look may find them mended
                self._log.error(f"{self._name} keeps the certificates that it has: {exc!r}", user_traceback(exc))
            await asyncio.sleep(self._settings.tls_watch_interval)

    async def _look(self) -> None:
        """Take the files if they have changed and are whole."""
        stamp = stamp_of(self._settings)
        while stamp != self._seen:
            await asyncio.sleep(SETTLE)
            before, stamp = stamp, stamp_of(self._settings)
            if before == stamp:
                self._seen = stamp
                # In a thread: a file system may be slow, and each certificate takes some milliseconds.
                await asyncio.get_running_loop().run_in_executor(None, self._take)

    def _take(self) -> None:
        try:
            certificates = load(self._settings)
        except ApphostError as exc:
            self._keep(exc)
            return
        assert certificates is not None
        self.context = certificates.context
        self._hint = False
        self._log.info(f"{self._name} has taken the changed certificates ({', '.join(files_of(self._settings))})")
        for warning in certificates.warnings:
            self._log.warning(f"{self._name}: {warning}")

    def _keep(self, exc: ApphostError) -> None:
        if not isinstance(exc.__cause__, PermissionError):
            self._log.warning(f"{self._name} keeps the certificates that it has: {exc.message}")
        elif not self._hint:
            self._hint = True
            self._log.warning(
                f"{self._name} keeps the certificates that it has, since it may not read the changed ones "
                f"({exc.message}): send USR1 to have them taken"
            )
