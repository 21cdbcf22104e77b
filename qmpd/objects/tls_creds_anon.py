"""tls-creds-anon: TLS without identities.

Options: TlsCredsAnonProperties (qapi/qom.json and what it includes). Such objects can be made, as
in the reference; using one is refused, because Python's ssl cannot do anonymous key exchange under
TLS 1.3 and OpenSSL does not offer it by default below.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import NoReturn

from qmpd.errors import CommandError
from qmpd.objects._tls import TlsCreds, base_context, load_dh_params
from qmpd.qapi.registry import qom_type
from qmpd.qom.tree import ObjectTree


@dataclass(frozen=True, slots=True)
class TlsCredsAnonOptions:
    """Members of TlsCredsAnonProperties."""

    verify_peer: bool = True
    dir: str | None = None
    endpoint: str = "client"
    priority: str | None = None


@qom_type("tls-creds-anon", schema="TlsCredsAnonProperties", options=TlsCredsAnonOptions)
class TlsCredsAnon(TlsCreds):
    """Credentials that name nobody."""

    qom_type = "tls-creds-anon"
    abstract = False

    def __init__(self, options: TlsCredsAnonOptions) -> None:
        super().__init__(options.verify_peer, options.dir, options.endpoint, options.priority)

    def complete(self, objects: ObjectTree) -> None:
        """Check the Diffie-Hellman parameters of a server, if there are any."""
        if self.endpoint == "server":
            path = self.file("dh-params.pem", required=False)
            if path is not None:
                load_dh_params(base_context(self.endpoint), path)

    def make_context(self) -> NoReturn:
        """Refuse."""
        raise CommandError(f"TLS credentials '{self.id}' cannot be used: anonymous TLS is not supported")

    def context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Refuse (TlsCredentials)."""
        self.make_context()
