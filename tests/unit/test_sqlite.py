"""Many rows by few statements are the rows that one statement each would write."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from deepseek_ray.sqlite import insert_rows


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 131, 200])
def test_rows_are_inserted_in_their_order_with_consecutive_numbers(count: int) -> None:
    rows = [(f"name{number}", number, b"\x00" * (number % 3)) for number in range(count)]
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t (seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, n INTEGER, blob BLOB)")
        assert insert_rows(db, "INSERT INTO t (name, n, blob)", [("before", -1, b"")]) == 1
        assert insert_rows(db, "INSERT INTO t (name, n, blob)", rows) == (count + 1 if count else 0)
        found = db.execute("SELECT seq, name, n, blob FROM t WHERE n >= 0 ORDER BY seq").fetchall()
    assert found == [(seq, *row) for seq, row in enumerate(rows, 2)]


def test_of_a_key_that_comes_twice_the_last_row_stays() -> None:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t (name TEXT PRIMARY KEY, n INTEGER)")
        replacing = "ON CONFLICT (name) DO UPDATE SET n = excluded.n"
        insert_rows(db, "INSERT INTO t (name, n)", [("a", 1), ("b", 2), ("a", 3)], replacing)
        insert_rows(db, "INSERT INTO t (name, n)", [("b", 4)], replacing)
        assert db.execute("SELECT name, n FROM t ORDER BY name").fetchall() == [("a", 3), ("b", 4)]


def test_a_refused_row_leaves_none_of_its_transaction() -> None:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t (name TEXT UNIQUE)")
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"), db:
            insert_rows(db, "INSERT INTO t (name)", [(f"n{number % 99}",) for number in range(100)])
        assert db.execute("SELECT COUNT(*) FROM t").fetchone() == (0,)
