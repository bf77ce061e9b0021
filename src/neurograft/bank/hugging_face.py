"""A bank on the Hugging Face Hub: one repository for each organ, one git tag for each version.

A revision holds the organ file, `neurograft-entry.json`, which says what it is, and a generated model card. What was
yanked stands in `neurograft-yanked.json` on the branch `main`. Signatures are there as well, in
`neurograft-VERSION.sig`, since these may be added to and a revision may not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neurograft.bank.card import model_card
from neurograft.bank.entries import Entry, parse_entry
from neurograft.bank.signatures import decode
from neurograft.bank.stores import explaining, gather
from neurograft.bank.versions import is_version
from neurograft.errors import (
    BankAccessError,
    BankDigestError,
    BankError,
    BankUnreachableError,
    NotInBankError,
)
from neurograft.trust.signature_files import LARGEST_FILE

log = logging.getLogger("neurograft")

_ORGAN, _ENTRY, _YANKED = "organ.safetensors", "neurograft-entry.json", "neurograft-yanked.json"
_CONFLICTS = (409, 412)
_TRANSPORT = ("ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError", "WriteError")
_ADDRESS = ("UnsupportedProtocol", "InvalidURL", "LocalProtocolError")


class HubStore:
    """A bank on the Hub; see `stores.Store`. The organ's name in it is that of its repository."""

    def __init__(self, root: str) -> None:
        from huggingface_hub import HfApi

        self.root = root
        self.owner = root.removeprefix("hf://")
        self.api = HfApi(library_name="neurograft")

    def names(self) -> list[str]:
        """See `Store`."""
        with explaining(self._explain):
            models = self.api.list_models(author=self.owner, filter="neurograft")
            return sorted(model.id.rpartition("/")[2] for model in models)

    def versions(self, name: str) -> dict[str, str | None]:
        """See `Store`."""
        commits = self._commits(name)
        yanked = self._yanked(name) if commits else {}
        return {tag: yanked.get(tag) for tag in commits if is_version(tag)}

    def tags(self, name: str) -> dict[str, str]:
        """See `Store`. A tag stands for the version at whose commit it is."""
        commits = self._commits(name)
        versions = {commit: tag for tag, commit in commits.items() if is_version(tag)}
        return {tag: versions[c] for tag, c in commits.items() if not is_version(tag) and c in versions}

    def entry(self, name: str, version: str) -> Entry:
        """See `Store`."""
        where = f"{_ENTRY} of {self._id(name)}@{version}"
        text = gather(self._stream(name, version, _ENTRY), where)
        return parse_entry(text, where, name=name, version=version)

    def read(self, entry: Entry, start: int) -> Iterator[bytes]:
        """See `Store`."""
        return self._stream(entry.name, entry.version, _ORGAN, start)

    def add(self, entry: Entry, file: Path) -> None:
        """See `Store`. A repository that is not there yet is made, private; git makes each tag once."""
        from huggingface_hub import CommitOperationAdd

        repository = self._id(entry.name)
        card = model_card(entry.manifest, f"hf://{repository}@{entry.version}")
        small = {_ENTRY: entry.model_dump_json(), "README.md": card}
        operations = [CommitOperationAdd(path, content.encode()) for path, content in small.items()]
        operations.append(CommitOperationAdd(_ORGAN, str(file)))
        with explaining(self._explain):
            self.api.create_repo(repository, private=True, exist_ok=True)
            log.info("sending %s to %s", file.name, repository)
            message = f"{entry.manifest.name} {entry.version}"
            commit = self.api.create_commit(repository, operations, commit_message=message)
            self._create_tag(entry.name, entry.version, commit.oid)

    def restore(self, entry: Entry, file: Path) -> bool:
        """See `Store`. What git and the Hub keep under its digest is not lost file by file."""
        return False

    def _create_tag(self, name: str, tag: str, revision: str) -> None:
        """Make a tag; if another process made it first, the caller finds what that one pushed."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.create_tag(self._id(name), tag=tag, revision=revision)
        except HfHubHTTPError as error:
            if error.response.status_code not in _CONFLICTS:
                raise

    def signatures(self, entry: Entry) -> str | None:
        """See `Store`."""
        place = f"neurograft-{entry.version}.sig"
        where = f"{place} of {self._id(entry.name)}"
        try:
            return decode(gather(self._stream(entry.name, "main", place), where, LARGEST_FILE), where)
        except NotInBankError:
            return None

    def set_signatures(self, entry: Entry, text: str) -> None:
        """See `Store`."""
        from huggingface_hub import CommitOperationAdd

        with explaining(self._explain):
            operation = CommitOperationAdd(f"neurograft-{entry.version}.sig", text.encode())
            self.api.create_commit(self._id(entry.name), [operation], commit_message=f"Sign {entry.version}")

    def set_tag(self, name: str, tag: str, version: str) -> None:
        """See `Store`."""
        commits = self._commits(name)
        if commits.get(tag) == commits[version]:
            return
        with explaining(self._explain):
            if tag in commits:
                self.api.delete_tag(self._id(name), tag=tag)
            self.api.create_tag(self._id(name), tag=tag, revision=commits[version])

    def yank(self, name: str, version: str, reason: str | None) -> None:
        """See `Store`."""
        from huggingface_hub import CommitOperationAdd

        yanked = self._yanked(name)
        yanked.pop(version, None)
        content = json.dumps(yanked | ({} if reason is None else {version: reason}), indent=1).encode()
        message = f"{'Take again' if reason is None else 'Yank'} {version}"
        with explaining(self._explain):
            operation = CommitOperationAdd(_YANKED, content)
            self.api.create_commit(self._id(name), [operation], commit_message=message)

    def _id(self, name: str) -> str:
        return f"{self.owner}/{name}"

    def _commits(self, name: str) -> dict[str, str]:
        """Return tag -> commit; nothing if there is no such repository, or none that may be seen."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with explaining(self._explain):
            try:
                return {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self._id(name)).tags}
            except RepositoryNotFoundError:
                return {}

    def _yanked(self, name: str) -> dict[str, str]:
        try:
            text = gather(self._stream(name, "main", _YANKED), f"{_YANKED} of {self._id(name)}")
        except NotInBankError:
            return {}
        try:
            return {str(version): str(reason) for version, reason in json.loads(text).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise BankDigestError(f"{_YANKED} of {self._id(name)} is no JSON object; it was altered.") from error

    def _stream(self, name: str, revision: str, file: str, start: int = 0) -> Iterator[bytes]:
        """Return the bytes of a file from `start`, in pieces."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self._id(name), file, revision=revision, endpoint=self.api.endpoint)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # Its own retries can't go on in the middle of a body, and hide there what went wrong; `downloads` does both.
        request = http_stream_backoff("GET", url, headers=headers, follow_redirects=True, retry_on_exceptions=())
        with explaining(self._explain), request as response:
            hf_raise_for_status(response)
            skip = start if response.status_code != 206 else 0
            for piece in response.iter_bytes():
                if skip < len(piece):
                    yield piece[skip:]
                skip = max(0, skip - len(piece))

    def _explain(self, error: Exception) -> Exception:
        """Turn what huggingface_hub raises into one sentence; what it does not raise comes back as it is."""
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
        )

        kind, text = type(error).__name__, next(iter(str(error).strip().splitlines()), "no message").rstrip(".")
        status: Any = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, OfflineModeIsEnabled):
            return BankUnreachableError(f"{self.root} is on the Hub, and HF_HUB_OFFLINE forbids to ask it.")
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            return BankAccessError(
                f"the Hub refuses access to {self.root} ({text}); run `hf auth login` with a token that may do this, "
                f"or set HF_TOKEN."
            )
        if status == 404:
            return NotInBankError(f"{self.root} lacks what was asked for ({text}).")
        if kind in _ADDRESS:
            return BankUnreachableError(f"the Hub's address is none ({text}); mend or unset HF_ENDPOINT.")
        if isinstance(error, ConnectionError | TimeoutError) or kind in _TRANSPORT:
            return BankUnreachableError(f"the Hub can't be reached ({kind}: {text}); is there a network?")
        if isinstance(error, HfHubHTTPError | HFValidationError | OSError):
            return BankError(f"the Hub does not do this for {self.root}: {text}.")
        return error
