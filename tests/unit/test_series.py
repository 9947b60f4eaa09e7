"""What is kept of samples, for how long, and what becomes of it where the disk is against it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fleet import series
from fleet.resources import GpuUse
from fleet.series import About, HostSample, JobSample, Series

_ABOUT = About("here", "w0", 4, 2**30)
_JOB = JobSample(1.5, 2**20, 2, 3.0, None, 0.25, 7)


@pytest.fixture
def make(tmp_path):
    """`make(most_bytes)`: a series below tmp_path/log, written when it is closed."""
    made = []

    def start(most_bytes: int = 2**20, most_seconds: float = 1000.0) -> Series:
        made.append(Series(tmp_path / "log", _ABOUT, most_bytes, most_seconds))
        return made[-1]

    yield start
    for one in made:
        one.close()


def rows(path: Path, table: str) -> list[Any]:
    with series.opened(path) as database:
        return database.execute(f"SELECT * FROM {table}").fetchall()


def found(folder: Path) -> list[Path]:
    return list(series.files(folder))


def test_what_is_noted_is_written_with_whose_it_is(make, tmp_path):
    one = make()
    one.close()
    assert found(tmp_path) == [], "a worker that saw nothing leaves nothing"
    one = make()
    one.note_host(10.0, HostSample(0.5, 2**29, None, 1.0, 2.0, 3.0), [GpuUse(1, None, 5)])
    one.note_job(11.0, "j", 7, _JOB)
    one.note_job(12.0, "j", 7, _JOB)
    one.close()
    (path,) = found(tmp_path)
    assert path.name.startswith("w0.series.")
    assert path.stat().st_mode & 0o777 == 0o600
    assert dict(rows(path, "about")) == _ABOUT._asdict()
    assert rows(path, "hosts") == [(10.0, 0.5, 2**29, None, 1.0, 2.0, 3.0)]
    assert rows(path, "gpus") == [(10.0, 1, None, 5)]
    assert rows(path, "attempts") == [(1, "j", 7)]
    assert rows(path, "jobs") == [(at, 1, *_JOB) for at in (11.0, 12.0)]


def _write(one: Series, count: int, eventually: Any) -> None:
    for _ in range(count):
        for at in range(100):
            one.note_job(float(at), f"j{at}", 7, _JOB)
        one.write()
        eventually(lambda: one._queue.empty())


def test_it_keeps_no_more_than_it_may_and_the_oldest_goes_first(make, tmp_path, eventually):
    one = make(2**17)
    _write(one, 60, eventually)
    one.close()
    kept = found(tmp_path)
    assert 4 <= len(kept) <= 9
    assert 2**16 < sum(path.stat().st_size for path in kept) <= 2**17 + 2**14
    last = make(2**17)
    last.note_job(1.0, "last", 7, _JOB)
    last.close()
    assert rows(max(found(tmp_path)), "attempts") == [(1, "last", 7)]
    assert set(found(tmp_path)) - set(kept), "another life begins another file"


def test_what_is_too_old_goes_and_others_files_stay(make, tmp_path):
    one = make()
    one.note_job(1.0, "old", 7, _JOB)
    one.close()
    (old,) = found(tmp_path)
    os.utime(old, (1, 1))
    others = [old.with_name(name) for name in ("w1.series.20200101T000000.0.sqlite", "w0.log")]
    for other in others:
        other.write_text("")
        os.utime(other, (1, 1))
    one = make()
    one.note_job(2.0, "new", 7, _JOB)
    one.close()
    assert not old.exists()
    assert all(other.exists() for other in others)


def test_a_file_that_somebody_removed_is_begun_anew(make, tmp_path, eventually):
    one = make()
    _write(one, 1, eventually)
    (path,) = eventually(lambda: found(tmp_path))
    eventually(lambda: rows(path, "jobs"))
    path.unlink()
    _write(one, 1, eventually)
    one.close()
    (path,) = found(tmp_path)
    assert len(rows(path, "jobs")) == 100


def test_a_disk_that_is_full_is_told_of_once_and_no_reason_to_stop(make, tmp_path, eventually, caplog):
    (tmp_path / "log").write_text("no folder: nothing can be written here, whoever we are")
    one = make()
    _write(one, 3, eventually)
    eventually(lambda: caplog.records)
    (tmp_path / "log").unlink()
    _write(one, 1, eventually)
    one.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be kept" in caplog.text
    (path,) = found(tmp_path)
    assert len(rows(path, "jobs")) % 100 == 0


def test_a_file_that_cannot_be_begun_leaves_nothing_and_a_damaged_one_has_a_successor(
    make, tmp_path, eventually, monkeypatch
):
    monkeypatch.setattr(series, "_SCHEMA", "no SQL {page_bytes}")
    one = make()
    _write(one, 3, eventually)
    one.close()
    assert list((tmp_path / "log").iterdir()) == []
    monkeypatch.undo()
    one = make()
    _write(one, 1, eventually)
    (first,) = eventually(lambda: found(tmp_path))
    eventually(lambda: rows(first, "jobs"))
    first.write_text("somebody wrote over it, and that is no database any more")
    _write(one, 2, eventually)
    one.close()
    (second,) = set(found(tmp_path)) - {first}
    assert len(rows(second, "jobs")) == 100


def test_what_is_no_database_is_said_so(tmp_path):
    (tmp_path / "x.series.1.sqlite").write_text("not at all")
    with pytest.raises(OSError, match=r"x\.series\.1\.sqlite: file is not a database"):
        rows(tmp_path / "x.series.1.sqlite", "jobs")
