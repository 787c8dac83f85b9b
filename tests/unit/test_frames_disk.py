"""A real disk that is full: a clear error, finished rows kept, nothing damaged, and on it goes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.frames import chat_model, engine_of

from nbinfer.frames import complete, last_run
from nbinfer.frames.journal import JournalError, close_all, journal_path, open_journal

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = [f"row {i} " + "w" * 3000 for i in range(400)]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 600 KiB, in memory; mounting one needs the right to."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {tried.stderr.strip()}")
    monkeypatch.setenv("NBINFER_CACHE", str(folder))
    yield folder
    close_all()
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_finished_rows_are_kept_and_with_room_it_goes_on(small_disk: Path) -> None:
    with pytest.raises(JournalError, match="full") as caught:
        complete(ROWS, model=chat_model(), progress=False)
    assert str(caught.value).count("\n") <= 4
    done = int(last_run().frame()["completion"].notna().sum())
    assert 20 < done < len(ROWS)
    # What was committed is there for another process; the last row, which was not, is not half there.
    close_all()
    kept = open_journal().info().entries
    assert 20 < kept <= done
    assert open_journal()._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    model = chat_model()
    out = complete(ROWS, model=model, progress=False)
    assert list(out["completion"]) == ROWS
    assert len(engine_of(model).requests) == len(ROWS) - kept


_CHILD = """
    import resource
    from nbinfer.frames import complete, last_run
    from nbinfer.frames.journal import JournalError
    from support.frames import chat_model
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
    rows = [f"row {i} " + "w" * 3000 for i in range(400)]
    try:
        complete(rows, model=chat_model(), progress=False)
    except JournalError as error:
        assert str(error).count("\\n") <= 4, error
        assert "nb.cache.clear()" in str(error)
        print(last_run().frame()["completion"].notna().sum())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits on files")
def test_at_a_limit_on_files_finished_rows_are_kept_and_without_it_it_goes_on(results_folder: Path) -> None:
    """The same by another way to no room, which needs no rights: a limit on the size of files."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(_CHILD)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    done = int(ran.stdout)
    kept = open_journal().info().entries
    assert 20 < kept <= done < len(ROWS)
    assert open_journal()._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert journal_path().stat().st_size < 600_000
    model = chat_model()
    assert list(complete(ROWS, model=model, progress=False)["completion"]) == ROWS
    assert len(engine_of(model).requests) == len(ROWS) - kept
