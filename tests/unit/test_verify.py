"""Served vectors come out of the log again; a changed number is found and named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from deepseek_ray import cli
from deepseek_ray.data import windows
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_log import LoggedFeedback, LoggedPrediction, PredictionLog
from deepseek_ray.data.stream_engine import Served, StreamEngine
from deepseek_ray.data.verify import Verification, verify_run
from deepseek_ray.errors import FeatureError
from deepseek_ray.paths import RunPaths
from tests.unit.feature_worlds import world
from tests.unit.test_stream_engine import transaction

SPEC = windows.load().vector("default")
LENGTH = 4


def serve(
    paths: RunPaths, history: pl.DataFrame, *, warmed: int, tamper: int | None = None, online_store: str = ""
) -> None:
    """Warm with the first rows, serve and log the rest; each label is reported after ten more events."""
    client = FeatureClient(paths, online_store)
    client.apply()
    engine = StreamEngine(client.declaration(), SPEC, client, label_delay_days=7, sequence_len=LENGTH)
    if warmed:
        client.warm(engine, history.head(warmed))
    log = PredictionLog(paths.prediction_log, synchronous="NORMAL")
    waiting: list[tuple[int, dict[str, object], Served]] = []
    for n, row in enumerate(history.slice(warmed).iter_rows(named=True)):
        while waiting and waiting[0][0] <= n:
            report(log, engine, *waiting.pop(0)[1:])
        served = engine.observe(transaction(row))
        if n == tamper:
            served.values[SPEC.names.index("card_count_7d")] += 1
        log.commit([logged(row, served)])
        waiting.append((n + 10, row, served))
    log.close()
    client.close()


def report(log: PredictionLog, engine: StreamEngine, row: dict[str, object], served: Served) -> None:
    if row["is_fraud"] is None:
        return
    ids = str(row["card_id"]), str(row["terminal_id"]), str(row["device_id"])
    fraud = row["is_fraud"] == 1
    known = engine.apply_label(*ids, served.order_us, fraud, int(str(row["label_us"])))
    log.commit(feedback=[feedback(f"p-{row['transaction_id']}", fraud, known)])


def feedback(prediction_id: str, is_fraud: bool, known_us: int) -> LoggedFeedback:
    times = {"observed_us": known_us, "known_us": known_us, "logged_us": known_us, "after_seq": 0}
    names = LoggedFeedback.__dataclass_fields__
    extra = {name: value for name, value in times.items() if name in names}
    return LoggedFeedback(prediction_id=prediction_id, is_fraud=is_fraud, **extra)


def logged(row: dict[str, object], served: Served) -> LoggedPrediction:
    return LoggedPrediction(
        prediction_id=f"p-{row['transaction_id']}",
        transaction=transaction(row),
        order_us=served.order_us,
        values=served.values,
        sequence=served.sequence,
        probability=0.5,
        threshold=0.5,
        decision="review",
        cold=tuple(served.cold),
        reasons=(),
        model_name="risk",
        model_version="1",
        run_id="r",
        feature_service=SPEC.service,
        feature_digest=SPEC.digest,
        latency_ms=1.0,
        logged_us=served.order_us,
    )


def verify(paths: RunPaths, *, sequence_len: int = LENGTH) -> Verification:
    return verify_run(paths, "default", label_delay_days=7, sequence_len=sequence_len, limit=3)


@pytest.mark.parametrize("warmed", [0, 150])
def test_a_replay_shows_no_difference(tmp_path: Path, warmed: int) -> None:
    paths, history = RunPaths(tmp_path), world(220, seed=1, days=40)
    serve(paths, history, warmed=warmed)
    result = verify(paths)
    assert (result.rows, result.other_vectors) == (220 - warmed, 0)
    assert result.features == len(SPEC.names) + LENGTH * 6
    assert result.differences == ()
    assert (result.num_differences, result.max_difference) == (0, 0.0)


def test_a_changed_number_is_named(tmp_path: Path) -> None:
    paths, history = RunPaths(tmp_path), world(60, seed=2, days=20)
    serve(paths, history, warmed=0, tamper=17)
    result = verify(paths)
    assert result.num_differences == 1
    assert result.max_difference == 1.0
    difference = result.differences[0]
    assert (difference.transaction_id, difference.feature) == ("x17", "card_count_7d")
    assert difference.served == difference.recomputed + 1
    assert "card_count_7d: served" in str(difference)


def test_a_wrong_history_shows_and_is_limited(tmp_path: Path) -> None:
    paths, history = RunPaths(tmp_path), world(120, seed=3, days=20)
    serve(paths, history, warmed=60)
    warm = paths.feature_store / "warmed" / f"{SPEC.service}.parquet"
    pl.read_parquet(warm).with_columns(amount_cents=pl.col("amount_cents") + 1).write_parquet(warm)
    result = verify(paths)
    assert result.num_differences > len(result.differences) == 3
    assert np.isfinite(result.max_difference)


def test_an_event_in_history_and_log_is_refused(tmp_path: Path) -> None:
    paths, history = RunPaths(tmp_path), world(40, seed=4, days=20)
    serve(paths, history, warmed=20)
    history.write_parquet(paths.feature_store / "warmed" / f"{SPEC.service}.parquet")
    with pytest.raises(FeatureError, match="20 transactions"):
        verify(paths)


def test_the_sequence_length_must_be_the_served_one(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    serve(paths, world(30, seed=5, days=20), warmed=0)
    with pytest.raises(FeatureError, match="sequence length"):
        verify(paths, sequence_len=LENGTH + 1)


def test_an_empty_log_has_nothing_to_verify(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    serve(paths, world(0, seed=6), warmed=0)
    assert verify(paths).rows == 0


def test_the_command_of_the_page_shows_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, history = RunPaths(tmp_path), world(80, seed=7, days=20)
    serve(paths, history, warmed=50)
    settings = ["--run", str(tmp_path), "--set", f"features.sequence_len={LENGTH}"]
    assert cli.main(["verify", "features", *settings]) == 0
    assert f"0 differences in 30 predictions of {len(SPEC.names) + LENGTH * 6} numbers" in capsys.readouterr().out


def test_the_snippet_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (windows.DECLARATION.resolve().parents[1] / "docs" / "features.md").read_text(encoding="utf-8")
    snippet = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    shown: list[object] = []
    exec(snippet, {"print": shown.append})  # noqa: S102 - our own page
    assert shown[0][1] == 128  # type: ignore[index]


def test_the_page_tells_the_sizes_and_every_aggregation() -> None:
    page = (windows.DECLARATION.resolve().parents[1] / "docs" / "features.md").read_text(encoding="utf-8")
    for spec in windows.load().vectors.values():
        assert f"| `{spec.name}` | {len(spec.names)} | `{spec.service}` |" in page
    for name in (*windows.EVENT_AGGREGATIONS, *windows.DELAYED_AGGREGATIONS):
        assert f"`{name}`" in page
