"""Write-ahead logs are moved into their databases beside the writer."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from deepseek_ray.sqlite import WAL_PAGES, Checkpointer


def test_what_a_writer_commits_reaches_the_database_without_its_help(tmp_path: Path) -> None:
    file = tmp_path / "some.db"
    mover = Checkpointer([tmp_path / "never made.db", file], every_s=0.02)
    mover.start()
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
        with writer:
            writer.execute("CREATE TABLE rows (content BLOB)")
            writer.execute("INSERT INTO rows VALUES (?)", (bytes(100_000),))
        end = time.monotonic() + 20
        while file.stat().st_size < 100_000 and time.monotonic() < end:
            time.sleep(0.02)
        assert file.stat().st_size > 100_000
        mover.close()
        with writer:
            writer.execute("INSERT INTO rows VALUES (?)", (bytes(100_000),))
        assert file.stat().st_size < 200_000, "the writer alone leaves it in its log"
    assert not (tmp_path / "never made.db").exists()
