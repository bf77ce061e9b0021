"""A bank in an OCI registry, through oras: one repository for each organ, one tag for each version.

A version is an artifact as the CNCF ModelPack has it (https://github.com/modelpack/model-spec): the organ file as raw
weights, a model configuration, and the organ's manifest as annotations. What is yanked has a small artifact beside it,
tagged `yanked-VERSION`, since who may push to a registry can often delete nothing. What is signed has one tagged
`signed-VERSION`, which holds the signatures.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from neurograft.bank.entries import Entry, parse_entry
from neurograft.bank.references import RESERVED_TAG
from neurograft.bank.signatures import decode
from neurograft.bank.stores import explaining, gather
from neurograft.bank.versions import is_version
from neurograft.errors import (
    BankAccessError,
    BankDigestError,
    BankError,
    BankUnreachableError,
    NeurograftError,
    NotInBankError,
    first_line,
)
from neurograft.files import CHUNK_BYTES, atomic_file, human_bytes
from neurograft.models import cache_directory
from neurograft.trust.signature_files import LARGEST_FILE

log = logging.getLogger("neurograft")

MODEL, CONFIG, WEIGHTS = (
    "application/vnd.cncf.model.manifest.v1+json",
    "application/vnd.cncf.model.config.v1+json",
    "application/vnd.cncf.model.weight.v1.raw",
)
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_YANK, _EMPTY = "application/vnd.neurograft.yank.v1+json", "application/vnd.oci.empty.v1+json"
_SIGNATURES, _LINES = "application/vnd.neurograft.signatures.v1+json", "application/jsonl"
_ORGAN_NOTE, _YANK_NOTE = "org.neurograft.manifest", "org.neurograft.yanked"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TIMEOUT_SECONDS = 60
_SENT_BYTES = 16 << 20  # in one request: this much is sent again after an interruption


class RegistryStore:
    """A bank in an OCI registry; see `stores.Store`. The organ's name in it is the repository's last part."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.host, _, self.path = root.removeprefix("oci://").partition("/")
        loopback = urlsplit(f"//{self.host}").hostname in _LOOPBACK
        self.base = f"{'http' if loopback else 'https'}://{self.host}/v2/"
        with explaining(self._explain):
            self.client = _connect(self.host, self.base, insecure=loopback)

    def names(self) -> list[str]:
        """See `Store`."""
        prefix = f"{self.path}/" if self.path else ""
        found = self._listed("_catalog", "repositories")
        names = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
        deeper = sorted({name.rpartition("/")[0] for name in names if "/" in name})
        if deeper:
            log.warning(
                "repositories deeper than that are not listed; see %s/%s",
                self.root,
                f" or {self.root}/".join(deeper[:3]),
            )
        return sorted(name for name in names if "/" not in name)

    def versions(self, name: str) -> dict[str, str | None]:
        """See `Store`."""
        tags = self._tags(name)
        yanked = {tag.removeprefix("yanked-"): tag for tag in tags if tag.startswith("yanked-")}
        return {_version(tag): self._reason(name, yanked.get(tag)) for tag in tags if is_version(_version(tag))}

    def tags(self, name: str) -> dict[str, str]:
        """See `Store`."""
        others = [tag for tag in self._tags(name) if not is_version(_version(tag)) and not RESERVED_TAG.fullmatch(tag)]
        found = {tag: self._manifest(name, tag)[0].get("annotations") or {} for tag in others}
        return {tag: str(notes.get("org.opencontainers.image.version")) for tag, notes in found.items()}

    def entry(self, name: str, version: str) -> Entry:
        """See `Store`."""
        manifest, where = self._manifest(name, _tag(version))[0], f"the artifact {self.root}/{name}:{_tag(version)}"
        try:
            notes, layer = manifest["annotations"], manifest["layers"][0]
            told = {
                "name": name,
                "version": notes["org.opencontainers.image.version"],
                "sha256": layer["digest"].removeprefix("sha256:"),
                "size": layer["size"],
                "pushed": notes["org.opencontainers.image.created"],
                "manifest": json.loads(notes[_ORGAN_NOTE]),
            }
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise BankDigestError(f"{where} is no organ, or was altered: it lacks {error}.") from error
        return parse_entry(json.dumps(told), where, name=name, version=version)

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See `Store`."""
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        url = f"{self._repository(entry.name)}/blobs/sha256:{entry.sha256}"
        try:
            response = self._ask("GET", url, headers=headers, stream=True)
        except NotInBankError as error:
            raise BankDigestError(
                f"{self.root} has no file any more of {entry.name} {entry.version}; push the organ again from where it "
                "is."
            ) from error
        with explaining(self._explain), response:
            skip = start if response.status_code != 206 else 0
            for piece in response.iter_content(CHUNK_BYTES):
                if skip < len(piece):
                    yield piece[skip:]
                skip = max(0, skip - len(piece))

    def add(self, entry: Entry, file: Path) -> None:
        """See `Store`. A registry that has immutable tags refuses a second writer; others let the last one win."""
        config = json.dumps(_config(entry), sort_keys=True).encode()
        self._send_blob(entry.name, config)
        self._send_file(entry, file)
        filename = f"{entry.name}-{entry.version}.safetensors"
        layer = {**_descriptor(WEIGHTS, entry.sha256, entry.size), "annotations": {"org.cncf.model.filepath": filename}}
        document = {
            "artifactType": MODEL,
            "config": _described(CONFIG, config),
            "layers": [layer],
            "annotations": _annotations(entry),
        }
        self._put(entry.name, _tag(entry.version), document)

    def restore(self, entry: Entry, file: Path) -> bool:
        """See `Store`. Only what a registry says that it lacks, or has in another size, can be told."""
        if self._has(entry.name, entry.sha256, entry.size):
            return False
        self._send_file(entry, file)
        if not self._has(entry.name, entry.sha256, entry.size):  # as by docker-registry, which looks at digests alone
            raise BankDigestError(
                f"{self.root} has a damaged file of {entry.name} {entry.version} and keeps it; ask who runs the "
                "registry to take the blob away, or push the organ as a new version."
            )
        return True

    def signatures(self, entry: Entry) -> str | None:
        """See `Store`."""
        tag = f"signed-{_tag(entry.version)}"
        where = f"{self.root}/{entry.name}:{tag}"
        try:
            manifest, _ = self._manifest(entry.name, tag)
        except NotInBankError:
            return None
        try:
            digest = str(manifest["layers"][0]["digest"]).removeprefix("sha256:")
        except (KeyError, IndexError, TypeError) as error:
            raise BankDigestError(
                f"the artifact {where} holds no signatures, or was altered: it lacks {error}."
            ) from error
        url = f"{self._repository(entry.name)}/blobs/sha256:{digest}"
        with explaining(self._explain), self._ask("GET", url, stream=True) as response:
            text = decode(gather(response.iter_content(CHUNK_BYTES), where, LARGEST_FILE), where)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise BankDigestError(
                f"the signatures in {where} do not have the digest that they should; push them again."
            )
        return text

    def set_signatures(self, entry: Entry, text: str) -> None:
        """See `Store`."""
        self._send_blob(entry.name, b"{}")
        self._send_blob(entry.name, text.encode())
        document = {
            "artifactType": _SIGNATURES,
            "config": _described(_EMPTY, b"{}"),
            "layers": [_described(_LINES, text.encode())],
            "subject": _described(MANIFEST, self._manifest(entry.name, _tag(entry.version))[1]),
        }
        self._put(entry.name, f"signed-{_tag(entry.version)}", document)

    def set_tag(self, name: str, tag: str, version: str) -> None:
        """See `Store`."""
        content = self._manifest(name, _tag(version))[1]
        self._ask("PUT", f"{self._repository(name)}/manifests/{tag}", headers={"Content-Type": MANIFEST}, data=content)

    def yank(self, name: str, version: str, reason: str | None) -> None:
        """See `Store`."""
        self._send_blob(name, b"{}")
        empty, content = _described(_EMPTY, b"{}"), self._manifest(name, _tag(version))[1]
        document = {
            "artifactType": _YANK,
            "config": empty,
            "layers": [empty],
            "subject": _described(MANIFEST, content),
            "annotations": {_YANK_NOTE: reason or ""},
        }
        self._put(name, f"yanked-{_tag(version)}", document)

    def _reason(self, name: str, tag: str | None) -> str | None:
        notes = {} if tag is None else self._manifest(name, tag)[0].get("annotations") or {}
        return notes.get(_YANK_NOTE) or None

    def _repository(self, name: str) -> str:
        return f"{self.base}{f'{self.path}/' if self.path else ''}{name}"

    def _tags(self, name: str) -> list[str]:
        try:
            return self._listed(self._repository(name).removeprefix(self.base) + "/tags/list", "tags")
        except NotInBankError:
            return []

    def _listed(self, path: str, key: str) -> list[str]:
        """Return a list that may come in pages."""
        url, found = f"{self.base}{path}?n=1000", list[str]()
        while url:
            response = self._ask("GET", url)
            found += response.json().get(key) or []
            following = response.links.get("next", {}).get("url")
            url = urljoin(url, following) if following else ""
        return found

    def _manifest(self, name: str, tag: str) -> tuple[dict[str, Any], bytes]:
        """Return an artifact's manifest, parsed and as it is."""
        url = f"{self._repository(name)}/manifests/{tag}"
        response = self._ask("GET", url, headers={"Accept": MANIFEST}, stream=True)
        with explaining(self._explain), response:
            content = gather(response.iter_content(CHUNK_BYTES), f"the artifact {self.root}/{name}:{tag}")
            return dict(json.loads(content)), content

    def _put(self, name: str, tag: str, document: dict[str, Any]) -> None:
        content = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, **document}).encode()
        self._ask("PUT", f"{self._repository(name)}/manifests/{tag}", headers={"Content-Type": MANIFEST}, data=content)

    def _has(self, name: str, sha256: str, size: int | None = None) -> bool:
        """Whether a registry has a blob, of this size if one is given and it tells its own."""
        try:
            response = self._ask("HEAD", f"{self._repository(name)}/blobs/sha256:{sha256}")
        except NotInBankError:
            return False
        return size is None or int(response.headers.get("Content-Length", size)) == size

    def _send_blob(self, name: str, content: bytes) -> None:
        """Send a small blob in one request, unless it is there."""
        digest = hashlib.sha256(content).hexdigest()
        if not self._has(name, digest):
            self._finish(self._begin(name), digest, content)

    def _send_file(self, entry: Entry, file: Path) -> None:
        """Send an organ file piece by piece; an upload that was interrupted goes on if the registry still has it."""
        if self._has(entry.name, entry.sha256, entry.size):
            return
        key = hashlib.sha256(f"{self._repository(entry.name)} {entry.sha256}".encode()).hexdigest()
        state = cache_directory() / "uploads" / f"{key}.json"
        state.parent.mkdir(parents=True, exist_ok=True)
        location, done = self._unfinished(state) or (self._begin(entry.name), 0)
        with file.open("rb") as stream:
            stream.seek(done)
            while chunk := stream.read(_SENT_BYTES):
                headers = {
                    "Content-Type": "application/octet-stream",
                    "Content-Range": f"{done}-{done + len(chunk) - 1}",
                }
                response = self._ask("PATCH", location, headers=headers, data=chunk)
                location, done = urljoin(location, response.headers["Location"]), done + len(chunk)
                with atomic_file(state, overwrite=True) as temporary:
                    temporary.write_text(json.dumps({"location": location}), encoding="utf-8")
                log.info("sending %s: %s of %s", entry.name, human_bytes(done), human_bytes(entry.size))
        state.unlink(missing_ok=True)
        self._finish(location, entry.sha256, b"")

    def _unfinished(self, state: Path) -> tuple[str, int] | None:
        """Return where an interrupted upload is and how many bytes the registry has; `None` if there is none."""
        try:
            location = str(json.loads(state.read_text(encoding="utf-8"))["location"])
            if not location.startswith(self.base):
                return None
            response = self._ask("GET", location)
            last = int(response.headers["Range"].rpartition("-")[2])
            return urljoin(location, response.headers["Location"]), last + 1
        except (OSError, ValueError, KeyError, TypeError, BankError):
            return None

    def _begin(self, name: str) -> str:
        url = f"{self._repository(name)}/blobs/uploads/"
        return urljoin(url, self._ask("POST", url, headers={"Content-Length": "0"}).headers["Location"])

    def _finish(self, location: str, sha256: str, content: bytes) -> None:
        url = f"{location}{'&' if '?' in location else '?'}digest=sha256:{sha256}"
        self._ask("PUT", url, headers={"Content-Type": "application/octet-stream"}, data=content)

    def _ask(self, method: str, url: str, *, headers: dict[str, str] | None = None, **options: Any) -> Any:
        """Make a request with oras's authentication, without its minutes of retries; refusals are raised.

        Its own requests would go on with a bearer token that is for reading, or that ended, and send every piece twice.
        """
        auth, session = self.client.auth, self.client.session
        is_own = url.startswith(self.base)  # uploads and blobs may be elsewhere, where a password has no business
        with explaining(self._explain):
            own = auth.get_auth_header() if is_own else {}
            response = session.request(method, url, headers={**own, **(headers or {})}, **options)
            if is_own and response.status_code in (401, 403) and _wants_token(response):
                fresh, _ = auth.authenticate_request(response, {}, refresh=True)
                response = session.request(method, url, headers={**fresh, **(headers or {})}, **options)
            response.raise_for_status()
            return response

    def _explain(self, error: Exception) -> Exception:
        """Turn what requests and oras raise into one sentence; anything else comes back as it is."""
        import requests

        kind, text = type(error).__name__, next(iter(str(error).strip().splitlines()), "no message").rstrip(".")
        response = getattr(error, "response", None)
        status = None if response is None else response.status_code
        if status == 401 and not getattr(self.client.auth, "_basic_auth", None):
            return BankAccessError(
                f"{self.root} asks for a login; run `docker login {self.host}` or `oras login {self.host}`."
            )
        if status == 416:
            return BankDigestError(
                f"{self.root} has less of a file than was asked for: it was cut off; push the organ again from where "
                "it is whole."
            )
        if status in (401, 403):
            return BankAccessError(
                f"{self.root} refuses access (the user or password is wrong, or has too few rights); run `docker login "
                f"{self.host}` or `oras login {self.host}`."
            )
        if status == 404:
            return NotInBankError(f"{self.root} lacks what was asked for ({text}).")
        if isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError):
            return BankUnreachableError(f"{self.root} can't be reached ({kind}); is there a network, and a registry?")
        if isinstance(error, requests.RequestException | KeyError | ValueError):
            return BankError(f"{self.root} does not do this ({kind}: {text}{_said(response)}).")
        return error


def _said(response: Any) -> str:
    """Return the beginning of what a registry said beside its status."""
    import requests

    try:
        return "" if response is None else f": {' '.join(response.text.split())[:200]}"
    except requests.RequestException:  # which breaks off as well
        return ""


def _wants_token(response: Any) -> bool:
    """Whether a refusal says where a bearer token is to be had."""
    return bool(response.headers.get("Www-Authenticate", "").lower().startswith("bearer"))


def _connect(host: str, base: str, *, insecure: bool) -> Any:
    """Return oras's client, which has what `docker login` left."""
    import os

    try:
        import oras.container
        import oras.logger
        import oras.provider
    except ImportError as error:
        raise NeurograftError("oci:// banks need oras; install the extra neurograft[oci].") from error
    import requests
    from requests.adapters import HTTPAdapter

    class Patient(HTTPAdapter):
        def send(self, request: Any, **options: Any) -> Any:  # type: ignore[override]
            return super().send(request, **{**options, "timeout": options.get("timeout") or _TIMEOUT_SECONDS})

    oras.logger.logger.set_level(logging.CRITICAL)  # what goes wrong is raised
    challenge = requests.get(base, timeout=_TIMEOUT_SECONDS).headers.get("Www-Authenticate", "")
    basic = challenge.lower().startswith("basic")
    client = oras.provider.Registry(host, insecure=insecure, auth_backend="basic" if basic else "token")
    for scheme in ("http://", "https://"):
        client.session.mount(scheme, Patient())
    folder = os.environ.get("DOCKER_CONFIG")
    configs = [f"{folder}/config.json"] if folder and Path(folder, "config.json").is_file() else []
    try:
        client.auth.load_configs(oras.container.Container(f"{host}/organs"), configs=configs)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BankAccessError(
            f"what `docker login` left can't be read ({first_line(error)}); mend or delete "
            f"{configs[0] if configs else '~/.docker/config.json'}, and run `docker login {host}`."
        ) from error
    if basic and not getattr(client.auth, "_basic_auth", None):
        helper = (getattr(client.auth, "_auth_config", None) or {}).get("credsStore")
        gave = f", and the helper docker-credential-{helper} gave none" if helper else ""
        raise BankAccessError(f"{host} asks for a password{gave}; run `docker login {host}` or `oras login {host}`.")
    return client


def _tag(version: str) -> str:
    """Return a version as a tag, in which + is not allowed; what stands for it is in no version."""
    return version.replace("+", "_")


def _version(tag: str) -> str:
    return tag.replace("_", "+")


def _descriptor(media_type: str, sha256: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size}


def _described(media_type: str, content: bytes) -> dict[str, Any]:
    return _descriptor(media_type, hashlib.sha256(content).hexdigest(), len(content))


def _annotations(entry: Entry) -> dict[str, str]:
    manifest = entry.manifest.model_copy(update={"probe": None})  # numbers for machines, which are in the file
    known = {
        "org.opencontainers.image.title": manifest.name,
        "org.opencontainers.image.version": entry.version,
        "org.opencontainers.image.created": entry.pushed,
        "org.opencontainers.image.licenses": manifest.license,
        "org.opencontainers.image.description": manifest.description,
        _ORGAN_NOTE: manifest.model_dump_json(),
    }
    return {key: value for key, value in known.items() if value}


def _config(entry: Entry) -> dict[str, Any]:
    """Return the ModelPack's configuration of an organ."""
    manifest = entry.manifest
    descriptor = {
        "createdAt": entry.pushed,
        "family": manifest.anatomy.model_type,
        "name": manifest.name,
        "version": entry.version,
        "licenses": [manifest.license] if manifest.license else [],
    }
    return {
        "descriptor": descriptor,
        "config": {"architecture": "transformer", "format": "safetensors", "precision": manifest.anatomy.dtype},
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{entry.sha256}"]},
    }
