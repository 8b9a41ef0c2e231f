"""Certificates for tests: a CA, servers, a client, and contexts of clients that trust that CA."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

CLIENT_NAME = 'Jo "J", the #1'


class Pki:
    """Files in `folder`: `ca.pem`, and `NAME.pem` (with the chain) and `NAME.key` of each `issue`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, name: str, *hosts: str, ca: trustme.CA | None = None, **about: str) -> tuple[Path, Path]:
        """Write a new certificate, over an older one of that name; the files of certificate and key."""
        issued = (ca or self.ca).issue_cert(*hosts, **about)  # type: ignore[arg-type]
        certfile, keyfile = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        write(certfile, b"".join(each.bytes() for each in issued.cert_chain_pems))
        write(keyfile, issued.private_key_pem.bytes())
        return certfile, keyfile

    def options(self, *names: str) -> list[str]:
        """The command line for certificates that were issued."""
        found = []
        for name in names:
            found += ["--tls-certfile", str(self.folder / f"{name}.pem")]
            found += ["--tls-keyfile", str(self.folder / f"{name}.key")]
        return found

    def client(self, name: str = "", version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """A context that trusts the CA; `name`: with that certificate; `version`: that one only."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if name:
            context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context

    def leaf(self, name: str) -> str:
        """The certificate itself, in PEM as `ssl` writes it."""
        first = (self.folder / f"{name}.pem").read_text().partition("-----END CERTIFICATE-----")[0]
        return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(first + "-----END CERTIFICATE-----\n"))


def write(path: Path, data: bytes) -> None:
    """In one step, as certbot does."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_bytes(data)
    new.replace(path)


def make(folder: Path) -> Pki:
    """With `local` for 127.0.0.1 and localhost, `other` for other.example and *.wild.example, and `client`."""
    pki = Pki(folder)
    pki.issue("local", "127.0.0.1", "localhost")
    pki.issue("other", "other.example", "*.wild.example")
    pki.issue("client", "jo@example.com", common_name=CLIENT_NAME, organization_name="Test, Inc.")
    return pki
