"""A user's file: every row is accepted or quarantined with its reason; an unusable file changes nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_ray.cli import guarded
from deepseek_ray.data import table
from deepseek_ray.data.ingest import IngestResult, ingest
from deepseek_ray.data.mapping import FileMapping, load_mapping
from deepseek_ray.errors import ConfigError, EnvironmentProblemError, IngestError, SchemaError
from deepseek_ray.paths import RunPaths
from pipelines.risk.ingest import main

NOW = datetime(2026, 6, 1, tzinfo=UTC)
HEADER = "ref,when,pan,shop,eur,chan,bad"
MAPPING: dict[str, Any] = {
    "columns": {
        "ref": "transaction_id",
        "when": "event_time",
        "pan": "card_id",
        "shop": "terminal_id",
        "eur": "amount",
        "chan": "channel",
        "bad": "is_fraud",
    },
    "timezone": "Europe/Paris",
    "values": {"channel": {"POS": "chip", "WEB": "online"}},
}
GOOD = "a1,2026-01-31 12:30:00,c1,t1,12.50,POS,0"


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def write_csv(folder: Path, *lines: str, header: str = HEADER, encoding: str = "utf-8") -> Path:
    file = folder / "payments.csv"
    file.write_text("\n".join([header, *lines]) + "\n", encoding=encoding)
    return file


def take(file: Path, run: RunPaths, chunk_rows: int = 100_000, **changes: Any) -> IngestResult:
    mapping = FileMapping.model_validate({**MAPPING, **changes})
    return ingest(file, mapping, run, label_delay_days=7, chunk_rows=chunk_rows, now=NOW)


def rejected(run: RunPaths) -> list[tuple[int, str, str | None]]:
    return pl.read_parquet(run.quarantine).select("row_number", "reason", "value").rows()


def test_columns_become_fields(tmp_path: Path, run: RunPaths) -> None:
    result = take(
        write_csv(tmp_path, GOOD, "a2,2026-07-01T00:00:00Z,c2,t1,3,web,", "a3,2026-01-31 12:30,c1,t2,.5,,1"), run
    )
    made = table.read(run.transactions)
    assert (result.input_rows, result.accepted, result.quarantined) == (3, 1, 2)
    assert made.select("transaction_id", "card_id", "amount_cents", "channel", "is_fraud").row(0) == (
        "a1",
        "c1",
        1250,
        "chip",
        0,
    )
    assert made["event_time"][0] == datetime(2026, 1, 31, 11, 30, tzinfo=UTC)
    assert result.digest == table.digest(made)
    assert rejected(run) == [
        (3, "event_time: in the future", "2026-07-01T00:00:00Z"),
        (4, "amount: not a number", ".5"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (",2026-01-31 12:30:00,c1,t1,1,POS,0", "transaction_id: missing"),
        ("b b,2026-01-31 12:30:00,c1,t1,1,POS,0", "transaction_id: not an identifier"),
        ("b,,c1,t1,1,POS,0", "event_time: missing"),
        ("b,31.1.2026,c1,t1,1,POS,0", "event_time: not a time of format iso8601 in Europe/Paris"),
        ("b,2026-02-30 00:00:00,c1,t1,1,POS,0", "event_time: not a time of format iso8601 in Europe/Paris"),
        ("b,2026-03-29 02:30:00,c1,t1,1,POS,0", "event_time: not a time of format iso8601 in Europe/Paris"),
        ("b,1950-01-01 00:00:00,c1,t1,1,POS,0", "event_time: before 1970"),
        ("b,2026-06-03 00:00:00,c1,t1,1,POS,0", "event_time: in the future"),
        ("b,2026-01-31 12:30:00, ,t1,1,POS,0", "card_id: missing"),
        ("b,2026-01-31 12:30:00,c1,t/1,1,POS,0", "terminal_id: not an identifier"),
        ("b,2026-01-31 12:30:00,c1,t1,,POS,0", "amount: missing"),
        ("b,2026-01-31 12:30:00,c1,t1,-1,POS,0", "amount: negative"),
        ("b,2026-01-31 12:30:00,c1,t1,NaN,POS,0", "amount: not a number"),
        ("b,2026-01-31 12:30:00,c1,t1,inf,POS,0", "amount: not a number"),
        ("b,2026-01-31 12:30:00,c1,t1,1e3,POS,0", "amount: not a number"),
        ("b,2026-01-31 12:30:00,c1,t1,1.005,POS,0", "amount: finer than a cent"),
        ("b,2026-01-31 12:30:00,c1,t1,1000000001,POS,0", "amount: too large"),
        ("b,2026-01-31 12:30:00,c1,t1,99999999999999999999,POS,0", "amount: too large"),
        ("b,2026-01-31 12:30:00,c1,t1,1,FAX,0", "channel: not one of chip, contactless, online, atm, unknown"),
        ("b,2026-01-31 12:30:00,c1,t1,1,POS,maybe", "is_fraud: not 0, 1, true, false or empty"),
        ("a1,2026-02-01 12:30:00,c1,t1,1,POS,0", "transaction_id: given before"),
        ("b,2026-01-31 12:30:00,c1,t1", "row: 4 cells, expected 7"),
        ("b,2026-01-31 12:30:00,c1,t1,1,POS,0,more", "row: 8 cells, expected 7"),
        ('b,2026-01-31 12:30:00,"c1,t1,1,POS,0', "row: unexpected end of data"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason(tmp_path: Path, run: RunPaths, line: str, reason: str) -> None:
    result = take(write_csv(tmp_path, GOOD, line, "z,2026-01-31 12:30:00,c1,t1,1,POS,0"), run)
    assert (result.accepted, result.quarantined, result.by_reason) == (2, 1, {reason: 1})
    row = pl.read_parquet(run.quarantine).row(0, named=True)
    assert row["row_number"] == 3
    raw = json.loads(row["raw"])
    assert raw == {"line": line} or ",".join(raw.values()) == line


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 100])
def test_the_size_of_a_chunk_changes_nothing(tmp_path: Path, run: RunPaths, chunk_rows: int) -> None:
    lines = [
        GOOD,
        "broken",
        "b,2026-01-31 12:30:00,c1,t1,1,POS,0",
        GOOD,
        "",
        "c,2026-01-30 12:30:00,c1,t1,1,POS,1",
        GOOD,
    ]
    result = take(write_csv(tmp_path, *lines), run, chunk_rows=chunk_rows)
    assert table.read(run.transactions)["transaction_id"].to_list() == ["c", "a1", "b"]
    assert result.by_reason == {"transaction_id: given before": 2, "row: 1 cells, expected 7": 1}
    assert sorted(number for number, _, _ in rejected(run)) == [3, 5, 8]


line_text = st.text(st.sampled_from('ab1,.";-2026\té '), max_size=30).filter(lambda text: text.strip())


@given(st.lists(st.one_of(st.just(GOOD), line_text), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_is_ever_lost(tmp_path: Path, run: RunPaths, lines: list[str]) -> None:
    result = take(write_csv(tmp_path, "first,2026-01-31 12:30:00,c1,t1,1,POS,0", *lines), run, chunk_rows=7)
    assert result.accepted + result.quarantined == result.input_rows == len(lines) + 1
    assert table.read(run.transactions).height == result.accepted
    assert pl.read_parquet(run.quarantine).height == result.quarantined


@given(st.integers(0, 10**11), st.sampled_from(["amount text", "decimal", "float"]))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_amounts_become_exact_cents(tmp_path: Path, run: RunPaths, cents: int, kind: str) -> None:
    exact = Decimal(cents) / 100
    amount = {"amount text": str(exact), "decimal": exact, "float": float(exact)}[kind]
    dtype = pl.Decimal(20, 2) if kind == "decimal" else None
    assert ingested_amount(tmp_path, run, pl.Series([amount], dtype=dtype)) == cents


def ingested_amount(tmp_path: Path, run: RunPaths, amounts: pl.Series, field: str = "amount") -> int:
    columns = {"transaction_id": ["a"], "event_time": [NOW], "card_id": ["c"], "terminal_id": ["t"], field: amounts}
    pl.DataFrame(columns).write_parquet(tmp_path / "one.parquet")
    ingest(tmp_path / "one.parquet", None, run, label_delay_days=7, now=NOW)
    return int(table.read(run.transactions)["amount_cents"][0])


@pytest.mark.parametrize("amount", [1.005, float("nan"), float("inf"), -0.01, 1e12, None])
def test_a_wrong_float_is_no_amount(tmp_path: Path, run: RunPaths, amount: float | None) -> None:
    with pytest.raises(IngestError, match="'amount: "):
        ingested_amount(tmp_path, run, pl.Series([amount], dtype=pl.Float64))


def test_whole_cents_may_stand_in_any_numeric_column(tmp_path: Path, run: RunPaths) -> None:
    for amounts in (pl.Series([125]), pl.Series([125.0]), pl.Series(["125"])):
        assert ingested_amount(tmp_path, run, amounts, "amount_cents") == 125
    with pytest.raises(IngestError, match="not a whole number of cents"):
        ingested_amount(tmp_path, run, pl.Series(["1.5"]), "amount_cents")


@pytest.mark.parametrize(
    ("when", "changes", "expected"),
    [
        ("2026-01-31T12:30:00.25+05:30", {}, datetime(2026, 1, 31, 7, 0, 0, 250_000, tzinfo=UTC)),
        ("2026-01-31 12:30:00-0800", {}, datetime(2026, 1, 31, 20, 30, tzinfo=UTC)),
        ("2025-10-26 02:30:00", {}, datetime(2025, 10, 26, 0, 30, tzinfo=UTC)),  # happens twice: the first counts
        ("31/01/2026 12.30", {"time_format": "%d/%m/%Y %H.%M"}, datetime(2026, 1, 31, 11, 30, tzinfo=UTC)),
        ("1769862600", {"time_format": "epoch_s"}, datetime(2026, 1, 31, 12, 30, tzinfo=UTC)),
        ("1769862600250", {"time_format": "epoch_ms"}, datetime(2026, 1, 31, 12, 30, 0, 250_000, tzinfo=UTC)),
    ],
)
def test_times_are_read_in_their_format_and_zone(
    tmp_path: Path, run: RunPaths, when: str, changes: dict[str, str], expected: datetime
) -> None:
    take(write_csv(tmp_path, f"a1,{when},c1,t1,1,POS,0"), run, **changes)
    assert table.read(run.transactions)["event_time"].to_list() == [expected]


def test_a_label_that_became_known_late_waits(tmp_path: Path, run: RunPaths) -> None:
    columns = {**MAPPING["columns"], "known": "label_time"}
    lines = [f"{GOOD},2026-02-20T00:00:00Z", f"b{GOOD},2026-01-01T00:00:00Z", f"c{GOOD},"]
    result = take(write_csv(tmp_path, *lines, header=f"{HEADER},known"), run, columns=columns)
    made = table.read(run.transactions)
    known_us = int(datetime(2026, 2, 20, tzinfo=UTC).timestamp()) * 1_000_000
    assert made["label_us"].to_list() == [known_us, made["order_us"][1] + table.delay_us(7)]
    assert result.by_reason == {"label_time: before the event": 1}


def test_defaults_fill_what_the_source_lacks(tmp_path: Path, run: RunPaths) -> None:
    take(write_csv(tmp_path, "a1,2026-01-31 12:30:00,c1,t1,1,,0"), run, defaults={"channel": "online", "country": "FR"})
    assert table.read(run.transactions).select("channel", "country").row(0) == ("online", "FR")


def test_parquet_keeps_its_own_types(tmp_path: Path, run: RunPaths) -> None:
    frame = pl.DataFrame(
        {
            "transaction_id": [1, 2, 2],
            "event_time": [datetime(2026, 1, 31, 12), datetime(2026, 1, 31, 13), None],
            "card_id": [7, 7, 7],
            "terminal_id": [9, 9, 9],
            "amount": [1, 2, 3],
            "is_fraud": [True, None, False],
            "colour": ["red", "blue", "red"],
        }
    )
    frame.write_parquet(tmp_path / "payments.parquet")
    result = ingest(tmp_path / "payments.parquet", None, run, label_delay_days=7, now=NOW)
    made = table.read(run.transactions)
    assert made.select("transaction_id", "card_id", "amount_cents", "is_fraud").rows() == [
        ("1", "7", 100, 1),
        ("2", "7", 200, None),
    ]
    assert result.unused_columns == ("colour",)
    assert rejected(run) == [(3, "event_time: missing", "None")]


def test_quoted_cells_and_other_delimiters_and_encodings(tmp_path: Path, run: RunPaths) -> None:
    lines = ['"a1";2026-01-31 12:30:00;"c1";t1;12.50;POS;0;"café; bar"']
    file = write_csv(tmp_path, *lines, header=HEADER.replace(",", ";") + ";note", encoding="latin-1")
    with pytest.raises(IngestError, match=r"not utf-8.*set 'encoding'"):
        take(file, run, delimiter=";")
    assert take(file, run, delimiter=";", encoding="latin-1").accepted == 1


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, run: RunPaths) -> None:
    assert take(write_csv(tmp_path, GOOD, encoding="utf-8-sig"), run).accepted == 1
    file = write_csv(tmp_path, GOOD, encoding="utf-16")
    assert take(file, run, encoding="utf-16").accepted == 1
    with pytest.raises(IngestError, match="is not utf-8"):
        take(file, run)


def test_an_unusable_file_leaves_the_table_alone(tmp_path: Path, run: RunPaths) -> None:
    take(write_csv(tmp_path, GOOD, "broken"), run)
    before = (run.transactions.read_bytes(), run.quarantine.read_bytes())
    cases: list[tuple[list[str], str, type[Exception], str]] = [
        (["broken", "b,,c1,t1,1,POS,0"], HEADER, IngestError, "None of the 2 rows"),
        ([], HEADER, IngestError, "no rows"),
        ([GOOD], HEADER.replace("pan", "card"), SchemaError, r"lacks the columns \['pan'\]"),
        ([GOOD], HEADER.replace("pan", "ref"), SchemaError, "twice"),
        ([GOOD], "", IngestError, "no header"),
    ]
    for lines, header, kind, text in cases:
        with pytest.raises(kind, match=text):
            take(write_csv(tmp_path, *lines, header=header), run)
    assert (run.transactions.read_bytes(), run.quarantine.read_bytes()) == before
    assert pl.read_parquet(run.root / "quarantine-failed.parquet").height == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no file"),
        ("empty.csv", b"", "is empty"),
        ("empty.parquet", b"", "is empty"),
        ("torn.parquet", b"PAR1 torn", "not readable parquet"),
        ("table.xlsx", b"PK", "suffix '.xlsx'"),
    ],
)
def test_a_file_that_is_none_is_named(
    tmp_path: Path, run: RunPaths, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(IngestError, match=message):
        take(tmp_path / name, run)
    assert not run.transactions.exists()


def test_a_column_of_lists_is_refused(tmp_path: Path, run: RunPaths) -> None:
    with pytest.raises(SchemaError, match="'amount' has type List"):
        ingested_amount(tmp_path, run, pl.Series([[1]]))


def test_a_file_with_other_names_asks_for_a_mapping(tmp_path: Path, run: RunPaths) -> None:
    with pytest.raises(SchemaError, match="--map"):
        ingest(write_csv(tmp_path, GOOD), None, run, label_delay_days=7)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(EnvironmentProblemError, match="cannot be written"):
        take(write_csv(tmp_path, GOOD), RunPaths(tmp_path / "run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns: {a: card}", "'card' is no field; did you mean 'card_id'"),
        ("columns: {a: card_id, b: card_id}", "more than one column"),
        ("columns: {a: card_id}", "columns must feed"),
        ("columns: []", "columns"),
        ("zone: UTC", "columns|zone"),
        ("", "mapping"),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_mapping_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_mapping(tmp_path / "map.yaml")


@pytest.mark.parametrize(
    "change",
    [
        {"timezone": "Paris"},
        {"encoding": "utf-9"},
        {"delimiter": ",,"},
        {"defaults": {"card_id": "c1"}},
        {"values": {"x": {}}},
    ],
)
def test_a_wrong_setting_of_a_mapping_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FileMapping.model_validate({**MAPPING, **change})


def test_the_program_prints_what_became_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_csv(tmp_path, GOOD, "broken")
    mapping = tmp_path / "map.yaml"
    mapping.write_text(json.dumps(MAPPING))
    assert main([str(file), "--map", str(mapping), "--run", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 rows accepted" in printed
    assert "1  row: 1 cells, expected 7" in printed


def test_the_program_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--synthetic", "--preset", "debug", "--run", str(tmp_path / "run"), "--set", "seed=3"]) == 0
    assert table.read(RunPaths(tmp_path / "run").transactions).height > 1_000
    assert "frauds" in capsys.readouterr().out


def test_the_program_reports_errors_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPSEEK_RAY_HANDBOOK", raising=False)
    assert guarded(lambda: main(["--run", str(tmp_path / "run")])) == 2
    assert "Nothing to ingest" in capsys.readouterr().err
    assert guarded(lambda: main([str(tmp_path / "none.csv"), "--run", str(tmp_path / "run")])) == 2
    assert capsys.readouterr().err.count("\n") == 1
