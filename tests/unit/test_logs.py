"""What is said goes where it can be found, and what is private goes nowhere."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.logs import get_logger, hide_folders, keep_in


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Leave the loggers as they were."""
    loggers = [get_logger("x").parent, logging.getLogger("uvicorn.error")]
    before = [list(logger.handlers) for logger in loggers if logger]
    yield
    for logger, kept in zip(loggers, before, strict=True):
        assert logger is not None
        for handler in set(logger.handlers) - set(kept):
            logger.removeHandler(handler)
            handler.close()


def test_the_replicas_log_has_times_and_no_message_of_an_unforeseen_error(tmp_path: Path) -> None:
    file = tmp_path / "serving" / "replica.log"
    keep_in(file)
    logger = get_logger("deepseek_ray.serving.x")
    logger.info("version %s serves", "7")
    try:
        raise KeyError("card c17")
    except KeyError:
        logger.exception("a batch failed")
    try:
        try:
            raise sqlite3.OperationalError("disk is full")
        except sqlite3.Error as error:
            raise EnvironmentProblemError("The log of card c17.") from error
    except EnvironmentProblemError:
        logging.getLogger("uvicorn.error").exception("no start")
    text = file.read_text()
    assert "Z INFO deepseek_ray.serving.x: version 7 serves\n" in text
    assert "a batch failed\nKeyError at test_logs.py" in text
    assert "  from OperationalError (disk is full) at test_logs.py" in text
    assert "c17" not in text


def test_a_full_log_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_ray.logs.MAX_LOG_BYTES", 1_000)
    keep_in(tmp_path / "replica.log")
    for number in range(200):
        get_logger("deepseek_ray.x").warning("line %d", number)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(sizes) == {"replica.log", "replica.log.1", "replica.log.2", "replica.log.3"}
    assert max(sizes.values()) <= 1_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("The log '/srv/run 7/a/b.db' is gone", "The log 'a/b.db' is gone"),
        ("The log '/var/lib/x y/b.db' is gone", "The log 'b.db' is gone"),
        ("chmod 600 /srv/keys/api_keys.json", "chmod 600 api_keys.json"),
        (
            "sqlite:////srv/run 7/mlflow.db and sqlite:////opt/other/mlflow.db",
            "sqlite:///mlflow.db and sqlite:///mlflow.db",
        ),
        (
            "read GET /v1/risk/model, see /docs, redis://host:1/a/b",
            "read GET /v1/risk/model, see /docs, redis://host:1/a/b",
        ),
    ],
)
def test_folders_of_the_server_are_hidden(text: str, shown: str) -> None:
    assert hide_folders(text, "/srv/run 7") == shown
