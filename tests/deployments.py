"""What the tests of deployments share: a gates file, a rollback that always has a way, everything in a folder."""

from __future__ import annotations

from pathlib import Path

from neurograft import history, rollback
from neurograft.files import file_sha256
from neurograft.organ import Organ

EASY = "<=100*baseline"
IMPOSSIBLE = "<=0.01*baseline"


def write_gates(folder: Path, limit: str = EASY) -> Path:
    """Write a gates file with one limit of perplexity, and its text."""
    text = "\n\n".join(f"report {number}: the lung is {number * 7919 % 31} and clear" for number in range(12))
    (folder / "reports.txt").write_text(text, encoding="utf-8")
    path = folder / "gates.yaml"
    path.write_text(
        f'gates:\n  reports:\n    metric: perplexity\n    data: reports.txt\n    limit: "{limit}"\n', encoding="utf-8"
    )
    return path


def one_more(organ: Organ, folder: Path) -> Organ:
    """Return an organ under a name that is not deployed in a folder: by how many entries its history has."""
    entries = (folder / "history.jsonl").read_bytes().count(b"\n") if (folder / "history.jsonl").exists() else 0
    return Organ(organ.manifest.model_copy(update={"name": f"{organ.name}-{entries}"}), organ.tensors)


def go_back(folder: Path) -> None:
    """Roll back to the first version, or forth to the second from there, or from a decided switch there."""
    found = history(folder)
    rollback(folder, to=2 if (found.unfinished or found.current).startswith("0001-") else 1)


def everything(folder: Path) -> dict[str, str]:
    """Return every file and link below a folder, with digest or target; locks, which hold nothing, aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.suffix != ".lock":
            found[name] = "a folder" if path.is_dir() else file_sha256(path)
    return found
