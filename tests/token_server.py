"""A server on the loopback that gives bearer tokens for an OCI registry, as GHCR's, Harbor's and Docker Hub's do.

https://distribution.github.io/distribution/spec/auth/token/ and, for what is in a token, .../spec/auth/jwt/.
"""

from __future__ import annotations

import base64
import datetime
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

_SERVICE, _ISSUER = "registry.example.org", "tokens"
_READING = {"pull"}


class Given(list[tuple[str | None, Sequence[str]]]):
    """(user, scopes) of each token that was given."""


@contextmanager
def serve_tokens(folder: Path, users: dict[str, str], *, lasting_seconds: int = 300) -> Iterator[tuple[str, Given]]:
    """Give tokens: to read to everybody, to write to users with their password.

    Args:
        folder: Where the certificate goes that the registry needs.
        users: User -> password.
        lasting_seconds: How long a token counts.

    Yields:
        The part of docker-registry's configuration that makes it ask for these tokens, and a log of them.
    """
    key, certificate = _certificate()
    (folder / "tokens.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    given = Given()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            user = self._user()
            if user == "":
                self._answer(401, {"errors": [{"code": "UNAUTHORIZED"}]})
                return
            scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
            given.append((user, scopes))
            token = _token(key, certificate, user, scopes, lasting_seconds)
            self._answer(200, {"token": token, "expires_in": lasting_seconds})

        def _user(self) -> str | None:
            """Return who asks: `None` for nobody in particular, "" for a wrong password."""
            scheme, _, text = self.headers.get("Authorization", "").partition(" ")
            if scheme != "Basic":
                return None
            name, _, password = base64.b64decode(text).decode().partition(":")
            return name if users.get(name) == password else ""

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        realm = f"http://127.0.0.1:{server.server_port}/token"
        try:
            yield (
                f"auth: {{token: {{realm: '{realm}', service: {_SERVICE}, issuer: {_ISSUER}, "
                f"rootcertbundle: '{folder / 'tokens.pem'}'}}}}\n",
                given,
            )
        finally:
            server.shutdown()


def _certificate() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _ISSUER)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    day = datetime.timedelta(days=1)
    builder = builder.not_valid_before(now - day).not_valid_after(now + day)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return key, builder.sign(key, hashes.SHA256())


def _token(
    key: ec.EllipticCurvePrivateKey,
    certificate: x509.Certificate,
    user: str | None,
    scopes: Sequence[str],
    seconds: int,
) -> str:
    der = certificate.public_bytes(serialization.Encoding.DER)
    header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    claims = {
        "iss": _ISSUER, "sub": user or "", "aud": _SERVICE, "exp": now + seconds, "nbf": now - 10, "iat": now,
        "jti": secrets.token_hex(8), "access": [_access(scope, user) for one in scopes for scope in one.split(" ")],
    }  # fmt: skip
    signed = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
    r, s = utils.decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_encoded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _access(scope: str, user: str | None) -> dict[str, Any]:
    kind, name, actions = scope.split(":")
    asked = set(actions.split(","))
    return {"type": kind, "name": name, "actions": sorted(asked if user else asked & _READING)}


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
