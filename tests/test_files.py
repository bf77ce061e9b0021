"""What a process that was killed leaves is cleared by the next one, and what a live one is writing is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neurograft.errors import UsageError
from neurograft.files import atomic_directory, atomic_file, check_output_file

KILLED = """
import os, signal, sys
from pathlib import Path
from neurograft import files
with getattr(files, sys.argv[1])(Path(sys.argv[2]), overwrite=True) as temporary:
    (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(write: Any, tmp_path: Path) -> None:
    output = tmp_path / "new"
    subprocess.run([sys.executable, "-c", KILLED, write.__name__, output], check=False)
    [left] = tmp_path.iterdir()
    (tmp_path / ".other.0123abcd.tmp").mkdir()
    with write(output, overwrite=True) as first:
        first.write_text("first") if write is atomic_file else (first / "first").touch()
        assert left.exists()  # too new to tell
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        with write(output, overwrite=True) as second:
            assert not left.exists() and first.exists()
            second.write_text("second") if write is atomic_file else (second / "config.json").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123abcd.tmp", "new"]


def test_a_file_is_no_folder_to_write_into(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file, so nothing can be written into it"):
        check_output_file(tmp_path / "file" / "new", overwrite=False)
