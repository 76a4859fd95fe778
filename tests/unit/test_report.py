"""The report of a run: what it says of a whole run, of half a run, and of files that are not what they should be."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_ray.errors import EnvironmentProblemError, SchemaError
from deepseek_ray.paths import RunPaths
from deepseek_ray.report import write_report
from deepseek_ray.report.page import number, summary
from deepseek_ray.report.verdict import judge
from pipelines.risk.report import main

RUN_ID, UPDATE_RUN_ID = "4f1c2ab09d3e47c8a1b2c3d4e5f60718", "9a8b7c6d5e4f30211203f4e5d6c7b8a9"
FIRST_DAY = np.datetime64("2026-01-01")


def _day(position: int) -> str:
    return str(FIRST_DAY + position)


def data_result() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    days = []
    for position in range(120):
        kinds = {"1": int(rng.poisson(1)), "2": int(rng.poisson(9)), "3": int(rng.poisson(5))}
        kinds |= {"4": int(rng.poisson(8))} if position > 105 else {}
        days.append(
            {
                "day": _day(position),
                "transactions": int(rng.poisson(1900)),
                "frauds": sum(kinds.values()),
                "by_scenario": kinds,
            }
        )
    frauds, rows = sum(day["frauds"] for day in days), sum(day["transactions"] for day in days)
    return {
        "source": "synthetic",
        "num_transactions": rows,
        "num_frauds": frauds,
        "fraud_rate": frauds / rows,
        "data_digest": "sha256:" + "5b" * 32,
        "quarantined": 3,
        "days": days,
    }


def model_result(quality: float, average_precision: float, cp100: float, auc: float, error: float) -> dict[str, Any]:
    recall = np.linspace(0, 1, 120)
    fpr = np.logspace(-4, 0, 120)
    predicted = np.logspace(-3.3, -0.05, 12)
    return {
        "average_precision": average_precision,
        "auc": auc,
        "cp100": cp100,
        "recall_at_1pct_fpr": 0.7 + quality / 10,
        "calibration_error": error,
        "by_scenario": {"1": 0.99, "2": 0.7 + quality / 9, "3": None},
        "curves": {
            "pr": np.stack([recall, np.clip(1 - recall ** (3 * quality + 1), 0.008, 1)], 1).tolist(),
            "roc": np.stack([fpr, fpr ** (0.18 - 0.08 * quality)], 1).tolist(),
            "calibration": [[p, min(1.0, p * (1 + (0.6 - quality) * 0.5)), 400] for p in predicted.tolist()],
        },
    }


def train_result() -> dict[str, Any]:
    return {
        "seed": 0,
        "mlflow_run_id": RUN_ID,
        "tracking_uri": "sqlite:////data/runs/x/mlflow.db",
        "num_features": 128,
        "feature_service": "risk_default_v1",
        "feature_digest": "sha256:" + "c4" * 32,
        "git_commit": "e59b4af" + "0" * 33,
        "rows_train": 113_412,
        "rows_holdout": 13_377,
        "label_delay_days": 7.0,
        "train_from": _day(30),
        "train_to": _day(90),
        "holdout_from": _day(97),
        "holdout_to": _day(104),
        "wall_s": 141.3,
        "rows_dropped_as_compromised": 911,
        "models": {
            "logistic": model_result(0.35, 0.6051, 0.2914, 0.8701, 0.0031),
            "lightgbm": model_result(0.6, 0.7261, 0.3004, 0.8782, 0.0016),
            "moe": model_result(0.7, 0.7384, 0.3029, 0.8861, 0.0012),
            "dense": model_result(0.62, 0.7302, 0.3000, 0.8810, 0.0014),
        },
        "expert_load": [
            [0.16, 0.11, 0.13, 0.12, 0.12, 0.14, 0.09, 0.13],
            [0.12, 0.2, 0.084, 0.11, 0.13, 0.12, 0.126, 0.11],
        ],
        "loss": [[epoch, 0.05 * 0.8**epoch + 0.012, 0.74 - 0.3 * 0.5**epoch] for epoch in range(6)],
        "importance": [[f"terminal_fraud_share_{days}d", 2.1 / days] for days in (1, 3, 7, 14, 30)]
        + [["amount_cents", 0.9], ["night", 0.05]],
    }


def replay_result() -> dict[str, Any]:
    days = []
    for position in range(14):
        drifted, updated = position >= 3, position >= 9
        days.append(
            {
                "day": _day(105 + position),
                "transactions": 1900 + position,
                "frauds": 22,
                "alerts": 100,
                "threshold": 0.21 + 0.01 * position,
                "average_precision": None
                if position > 11
                else 0.73 - 0.35 * (drifted and not updated) - 0.02 * updated,
                "psi_max": 0.04 + 0.31 * drifted,
                "ks_max": 0.03 + 0.12 * drifted,
                "model_version": 2 if updated else 1,
            }
        )
    return {
        "base_url": "http://127.0.0.1:8123",
        "requests": 7310,
        "transactions": 26_691,
        "feedback": 25_300,
        "failed": 0,
        "wall_s": 96.2,
        "http_p50_ms": 7.9,
        "http_p99_ms": 38.5,
        "days": days,
        "mlflow_run_id": UPDATE_RUN_ID,
        "drift_features": [
            {"feature": f"card_channel_count_{days}d", "psi": 0.4 / days, "ks": 0.1 / days}
            for days in (1, 3, 7, 14, 30)
        ],
        "swaps": [{"at_day": _day(114), "from_version": 1, "to_version": 2}],
    }


def latency_result() -> dict[str, Any]:
    times = np.random.default_rng(1).lognormal(1.6, 0.42, 3000)
    counts, edges = np.histogram(times, bins=np.arange(0, 41))
    return {
        "rate_per_s": 50.0,
        "http_achieved_rate": 49.5,
        "duration_s": 60.0,
        "requests": 3000,
        "failed": 0,
        "http_p50_ms": 4.93,
        "http_p90_ms": 8.4,
        "http_p99_ms": 13.2,
        "histogram": [[float(edge), int(count)] for edge, count in zip(edges[1:], counts, strict=True)],
    }


CHECKS = [
    {
        "name": "average_precision",
        "passed": True,
        "value": 0.6932,
        "bound": 0.3821,
        "detail": "not worse than version 1",
    },
    {
        "name": "card_precision_at_100",
        "passed": True,
        "value": 0.301,
        "bound": 0.244,
        "detail": "not worse than version 1",
    },
    {"name": "calibration_error", "passed": True, "value": 0.0019, "bound": 0.02, "detail": ""},
    {"name": "p99_scoring_ms", "passed": True, "value": 3.1, "bound": 20.0, "detail": "one row"},
    {"name": "schema", "passed": True, "value": 1.0, "bound": 1.0, "detail": "equal"},
    {"name": "feature_service", "passed": True, "value": 1.0, "bound": 1.0, "detail": "risk_default_v1"},
    {"name": "forgetting", "passed": True, "value": 0.009, "bound": 0.02, "detail": "older patterns"},
]


def update_result() -> dict[str, Any]:
    return {
        "champion_version": "1",
        "challenger_version": "2",
        "promoted": True,
        "checks": CHECKS,
        "update_failed_requests": 0,
        "seconds_label_to_live": 21.4,
        "mlflow_run_id": UPDATE_RUN_ID,
        "update_gain": 0.814,
        "update_forgetting": 0.009,
        "after_drift": {
            "frozen": {"average_precision": 0.3821, "cp100": 0.244},
            "updated": {"average_precision": 0.6932, "cp100": 0.301},
            "full_retrain": {"average_precision": 0.7013, "cp100": 0.303},
        },
        "old_pattern": {
            "frozen": {"average_precision": 0.7384, "cp100": 0.3029},
            "updated": {"average_precision": 0.7318, "cp100": 0.3014},
            "full_retrain": {"average_precision": 0.7361, "cp100": 0.302},
        },
    }


def history_result() -> list[dict[str, Any]]:
    base = {"name": "risk", "note": "", "id": 1}
    decision = json.dumps({"promote": True, "checks": CHECKS})
    refused = json.dumps({"promote": False, "checks": [{**CHECKS[0], "passed": False, "value": None}, *CHECKS[1:]]})
    return [
        {
            **base,
            "at": "2026-05-01T10:00:00.000+00:00",
            "action": "promote",
            "version": "1",
            "champion_before": None,
            "champion_after": "1",
            "decision": "{}",
            "note": "first version",
        },
        {
            **base,
            "at": "2026-05-01T10:04:00.000+00:00",
            "action": "refuse",
            "version": "3",
            "champion_before": "1",
            "champion_after": "1",
            "decision": refused,
        },
        {
            **base,
            "at": "2026-05-01T10:06:00.000+00:00",
            "action": "promote",
            "version": "2",
            "champion_before": "1",
            "champion_after": "2",
            "decision": decision,
        },
    ]


def whole_run() -> dict[str, Any]:
    return {
        "data": data_result(),
        "train": train_result(),
        "replay": replay_result(),
        "latency": latency_result(),
        "update": update_result(),
        "verify": {"feature_rows": 26_691, "feature_differences": 0, "served_offline_max_diff": 2.2e-16},
        "history": history_result(),
    }


def make_run(root: Path, stages: dict[str, Any]) -> RunPaths:
    paths = RunPaths(root)
    paths.results.mkdir(parents=True)
    for name, stage in stages.items():
        (paths.results / f"{name}.json").write_text(json.dumps(stage), encoding="utf-8")
    return paths


class Page(HTMLParser):
    """A page's text, its ids, whatever it refers to, and its tags, each checked to be closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.references, self.ids, self._open = "", [], Counter[str](), list[str]()
        self.tags = Counter[str]()
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action", "data")]
        self.ids.update(value or "" for name, value in attrs if name == "id")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self._open else ""


def written(paths: RunPaths, **extra: Any) -> tuple[Page, dict[str, Any]]:
    html = write_report(paths, extra=extra).read_text(encoding="utf-8")
    return Page(html), json.loads(paths.report_json.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A finished run with its report."""
    paths = make_run(tmp_path_factory.mktemp("whole") / "run-7", whole_run())
    (paths.artifacts / "1" / RUN_ID).mkdir(parents=True)
    write_report(paths, extra={"wall_s": 583.2, "git": {"branch": "main"}})
    return paths


@pytest.fixture
def html(whole: RunPaths) -> str:
    return whole.report_html.read_text(encoding="utf-8")


@pytest.fixture
def flat(whole: RunPaths) -> dict[str, Any]:
    return json.loads(whole.report_json.read_text(encoding="utf-8"))


def test_a_whole_run_meets_every_bound_and_shows_its_figures(html: str) -> None:
    page = Page(html)
    assert "11 of 11 bounds met. Model version 2 decides now." in " ".join(page.text.split())
    for figure in ("0.7384", "0.7261", "0.8861", "0.3029", "583.2 s", "4.93 ms", "13.2 ms", "81.4 %", "2.2e-16"):
        assert figure in page.text
    for name in ("26,691", "risk_default_v1", "6 of 7 passed", "swap: version 1 to 2"):
        assert name in page.text
    assert page.tags["svg"] == 11


def test_report_json_holds_the_figures_under_the_promised_keys(flat: dict[str, Any]) -> None:
    promised = {
        "seed": 0,
        "average_precision": 0.7384,
        "cp100": 0.3029,
        "auc": 0.8861,
        "calibration_error": 0.0012,
        "lightgbm_average_precision": 0.7261,
        "lightgbm_cp100": 0.3004,
        "logistic_average_precision": 0.6051,
        "dense_average_precision": 0.7302,
        "min_expert_load": 0.084,
        "served_offline_max_diff": 2.2e-16,
        "http_achieved_rate": 49.5,
        "feature_differences": 0,
        "update_failed_requests": 0,
        "http_p50_ms": 4.93,
        "http_p99_ms": 13.2,
        "update_gain": 0.814,
        "update_forgetting": 0.009,
        "full_retrain_average_precision": 0.7013,
        "champion_version": "2",
        "wall_s": 583.2,
    }
    assert {key: flat.get(key) for key in promised} == promised
    assert flat["replay.days.2026-04-20.psi_max"] == pytest.approx(0.35)


def test_report_json_is_flat(flat: dict[str, Any]) -> None:
    assert {type(value) for value in flat.values()} <= {int, float, str}
    assert flat["git.branch"] == "main"
    assert next(iter(flat)) == "seed"
    assert not any("curves" in key for key in flat)


def test_the_page_needs_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    local = ("#", "http://127.0.0.1:5000/#/runs/", "artifacts/")
    assert sorted(one for one in page.references if not one.startswith(local)) == ["report.json", "results/"]
    assert set(re.findall(r"https?://[^/\s\"'<]+", html)) == {"http://127.0.0.1:5000"}
    assert page.tags.keys().isdisjoint({"script", "link", "iframe", "img", "object"})
    assert "@import" not in html


def test_plots_share_no_id_and_take_their_colours_from_the_page(html: str) -> None:
    page = Page(html)
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert {one[1:] for one in page.references if one.startswith("#")} <= page.ids.keys()
    plots = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert re.findall(r"(?:fill|stroke): ?#\w+", plots) == []


def test_each_figure_names_its_run(html: str) -> None:
    page = Page(html)
    captions = re.findall(r"<figcaption>.*?</figcaption>", html, flags=re.DOTALL)
    assert len(captions) == page.tags["figure"] == 11
    assert all(RUN_ID in caption or UPDATE_RUN_ID in caption for caption in captions)
    assert f"artifacts/1/{RUN_ID}" in page.references
    assert "mlflow ui --backend-store-uri sqlite:////data/runs/x/mlflow.db" in page.text


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    page, flat = written(make_run(tmp_path / "run", {}))
    assert flat == {}
    assert page.text.count("Not in this run") == 8
    assert "0 of 11 bounds met, 11 not measured" in " ".join(page.text.split())
    assert page.tags["svg"] == 0


@pytest.mark.parametrize("stage", whole_run())
def test_any_one_stage_is_enough(tmp_path: Path, stage: str) -> None:
    page, flat = written(make_run(tmp_path / "run", {stage: whole_run()[stage]}))
    assert "Not in this run" in page.text
    assert flat


def test_the_training_may_be_missing_from_a_run_that_has_all_else(tmp_path: Path) -> None:
    page, flat = written(
        make_run(tmp_path / "run", {name: stage for name, stage in whole_run().items() if name != "train"})
    )
    assert page.text.count("Not in this run: features and training") == 2
    assert "no MLflow run recorded" in page.text
    assert "average_precision" not in flat


@pytest.mark.parametrize("stage", [name for name in whole_run() if name != "history"])
def test_a_stage_may_be_empty(tmp_path: Path, stage: str) -> None:
    page, flat = written(make_run(tmp_path / "run", {stage: {}}))
    assert flat == {}
    assert "Not in this run" in page.text


def test_gaps_in_the_figures_are_shown_as_gaps(tmp_path: Path) -> None:
    train = train_result()
    train["models"]["moe"]["average_precision"] = float("nan")
    train["models"]["moe"]["curves"] = {
        "pr": [[0.0, None], [0.5, 0.5], [1.0, 0.1]],
        "roc": [],
        "calibration": [[None, None, 0]],
    }
    train["expert_load"] = [[None, 0.5], []]
    train["loss"] = [[0, 0.1, None], [1, 0.05, None]]
    _, flat = written(make_run(tmp_path / "run", {"train": train, "update": {"promoted": False}}))
    assert "average_precision" not in flat
    verdicts = {verdict.bound.key: verdict.state for verdict in judge(flat)}
    assert verdicts["average_precision"] == "not measured"


def test_a_missed_bound_is_called_missed(tmp_path: Path) -> None:
    stages = {"update": {"update_failed_requests": 2, "update_gain": 0.3}, "verify": {"feature_differences": 1}}
    page, flat = written(make_run(tmp_path / "run", stages), wall_s=900)
    assert summary(judge(flat)) == {"met": 1, "missed": 3, "not measured": 7}
    assert page.text.count("✗ missed") == 3
    assert "3 missed" in page.text


def test_decision_times_at_a_low_rate_prove_nothing(tmp_path: Path) -> None:
    page, flat = written(make_run(tmp_path / "run", {"latency": latency_result() | {"rate_per_s": 5.0}}))
    assert "http_p99_ms" not in flat
    assert flat["latency.http_p99_ms"] == 13.2
    assert flat["latency.http_achieved_rate"] == 49.5
    assert "not counted in the verdict" in page.text


def test_gain_and_forgetting_follow_from_the_scores(tmp_path: Path) -> None:
    update = update_result()
    del update["update_gain"], update["update_forgetting"]
    _, flat = written(make_run(tmp_path / "run", {"update": update}))
    assert flat["update_gain"] == pytest.approx(0.6932 / 0.3821 - 1)
    assert flat["update_forgetting"] == pytest.approx(1 - 0.7318 / 0.7384)


def test_unknown_fields_and_stages_are_shown(tmp_path: Path) -> None:
    stages = {"train": {"rows_dropped_as_compromised": 911}, "handbook": {"average_precision": 0.7301}}
    page, flat = written(make_run(tmp_path / "run", stages))
    assert "rows_dropped_as_compromised" in page.text
    assert flat["handbook.average_precision"] == 0.7301
    assert "More from handbook" in page.text


def test_texts_from_data_are_not_markup(tmp_path: Path) -> None:
    stages = {"data": data_result(), "replay": replay_result(), "train": {}}
    stages["data"]["source"] = "<script>alert(1)</script>"
    stages["replay"]["drift_features"][0]["feature"] = "<script>alert(2)</script>$x^2$"
    stages["train"]["mlflow_run_id"] = "../../<script>"
    page, _ = written(make_run(tmp_path / "run", stages))
    assert page.tags["script"] == 0
    assert "<script>alert(1)</script>" in page.text


def test_a_password_in_the_tracking_address_is_not_shown(tmp_path: Path) -> None:
    train = train_result() | {"tracking_uri": "postgresql://mlflow:secret@db/mlflow"}
    paths = make_run(tmp_path / "run", {"train": train})
    write_report(paths)
    assert "secret" not in paths.report_html.read_text(encoding="utf-8")
    assert "secret" not in paths.report_json.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "content", "field"),
    [
        ("train", '{"models": {"moe": {"auc": "high"}}}', "models.moe.auc"),
        ("replay", '{"days": [{"transactions": 3}]}', r"days\.0\.day"),
        ("update", '{"checks": [{"name": "schema"}]}', r"checks\.0\.passed"),
        ("history", '[{"action": "promote", "version": "1", "decision": "{"}]', r"0\.decision"),
        ("data", "[]", r"\(top level\)"),
        ("latency", '{"histogram": ', "not readable JSON"),
    ],
)
def test_a_malformed_result_names_the_file_and_the_field(tmp_path: Path, stage: str, content: str, field: str) -> None:
    paths = make_run(tmp_path / "run", {})
    (paths.results / f"{stage}.json").write_text(content, encoding="utf-8")
    with pytest.raises(SchemaError, match=rf"{stage}\.json.*{field}"):
        write_report(paths)
    assert not paths.report_html.exists()


def test_a_run_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblemError, match="does not exist"):
        write_report(RunPaths(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_writing_again_keeps_what_the_caller_once_said(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run", {"verify": {"feature_differences": 0}})
    _, first = written(paths, wall_s=583.2)
    _, again = written(paths)
    assert first == again == {"feature_differences": 0, "wall_s": 583.2, "verify.feature_differences": 0}
    assert written(paths, wall_s=601.0)[1]["wall_s"] == 601.0
    assert sorted(file.name for file in paths.root.iterdir()) == ["report.html", "report.json", "results"]


def test_numbers_for_people() -> None:
    shown = [number(value) for value in (None, 0, 0.0, 1234567, 0.73841, 2.2e-16, 12345.6, True, "x", 5.0)]
    assert shown == ["–", "0", "0", "1,234,567", "0.7384", "2.2e-16", "12,346", "yes", "x", "5"]


def test_the_program_writes_the_report_of_the_run_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_run(tmp_path / "run", {"verify": {"feature_differences": 0}})
    assert main(["--run", str(paths.root)]) == 0
    assert capsys.readouterr().out.strip() == str(paths.report_html)
