"""What neurograft keeps to save time, such as dequantised models, hidden states, interrupted scans and organs."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from neurograft.files import explained_os_errors
from neurograft.models import cache_directory

CacheKind = Literal["gguf", "prefix", "scan", "studies", "organs", "demo", "arithmetic"]


class CacheEntry(BaseModel):
    """One thing that is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    kind: CacheKind
    """`gguf`: a dequantised model; `prefix`: hidden states that enter an organ; `scan`: where an interrupted scan
    stands; `studies`: what building models without weights has shown; `organs`: organ files out of banks; `demo`:
    the demo's recipient; `arithmetic`: how fast this machine multiplies matrices in each way.
    """
    name: str
    bytes: int
    used: str
    """When it was last written or, where the file system notes it, read; ISO 8601, UTC."""


class CacheReport(BaseModel):
    """What the cache holds, or held before it was cleared."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    folder: str
    entries: list[CacheEntry]
    cleared: bool


def cache(*, clear: CacheKind | Literal["all"] | None = None) -> CacheReport:
    """List what is kept in the cache, and clear it if asked to. All of it can be made again.

    Args:
        clear: Which kind to delete, or `all`; left out, nothing is.

    Raises:
        NeurograftError: Something can't be deleted.
    """
    folder, entries = cache_directory(), []
    for kind in get_args(CacheKind):
        if clear not in (None, "all", kind):
            continue
        for path in sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else []:
            entries.append(_describe(kind, path))
            if clear is not None:
                with explained_os_errors(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return CacheReport(folder=str(folder), entries=entries, cleared=clear is not None)


def _describe(kind: CacheKind, path: Path) -> CacheEntry:
    status = [file.stat() for file in (path, *path.rglob("*")) if file.is_file()]
    used = max((max(s.st_mtime, s.st_atime) for s in status), default=path.stat().st_mtime)
    when = datetime.datetime.fromtimestamp(used, datetime.UTC).isoformat(timespec="seconds")
    return CacheEntry(kind=kind, name=path.name, bytes=sum(s.st_size for s in status), used=when)
