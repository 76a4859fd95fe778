"""The benchmark of the kernels: every case runs, failures are rows, goals are read off rows."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_ray.kernels import dispatch
from tests.bench import bench_kernels, kernel_cases, kernel_goals, kernel_peers
from tests.bench.bench_kernels import Machine, main, measure
from tests.bench.kernel_cases import ROUTINGS, Case, all_cases, routed, row_cases
from tests.bench.kernel_goals import GOALS, place, report
from tests.kernels.checks import needs_kernels

CPU = torch.device("cpu")
MACHINE = Machine(CPU, 1e12, 1e11)
CASES = list(all_cases(CPU, small=True))
DIRECTIONS = ["forward", "backward", "full"]


def names(case: Case) -> str:
    return f"{case.op} {case.shape}"


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.choice.cache_clear()
    yield
    dispatch.choice.cache_clear()


def rows_of(case: Case, *providers: str, repeats: int = 2) -> list[dict[str, Any]]:
    """Rows of some providers."""
    kept = {name: case.providers[name] for name in providers}
    return list(measure(dataclasses.replace(case, providers=kept), MACHINE, repeats=repeats))


def check(case: Case, rows: list[dict[str, Any]], num_providers: int) -> None:
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert all(row["ms_p50"] > 0 and row["timed"] == "wall" for row in rows)
    trains = case.op != "quantised_grouped_gemm"
    assert [row["direction"] for row in rows] == DIRECTIONS[: 1 + 2 * trains] * num_providers
    assert all(float(row["off_ours"] or 0) < 2e-2 for row in rows)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_a_case_is_measured_forward_backward_and_both(case: Case) -> None:
    plain = [name for name in case.providers if name not in ("torch compiled", *kernel_peers.PEERS.get(case.op, ()))]
    check(case, rows_of(case, *plain), len(plain))


OURS = [case for case in CASES if case.op != "sliding_window_attention"]  # which is torch's


@needs_kernels
@pytest.mark.parametrize("case", [case for case in OURS if case.op != "fused_moe" or "empty" in case.shape], ids=names)
def test_the_kernels_themselves_are_measured(case: Case, on_triton: None) -> None:
    check(case, rows_of(case, "ours", repeats=1), 1)


def test_both_passes_count_the_work_of_both() -> None:
    case = next(case for case in CASES if case.op == "fused_moe")
    forward, backward, full = (bench_kernels._needs(case, direction) for direction in DIRECTIONS)
    assert full == tuple(a + b for a, b in zip(forward, backward, strict=True))


def test_rows_wider_than_the_kernels_are_not_called_theirs() -> None:
    wide = [case for case in row_cases(CPU, small=False) if case.op in ("rms_norm", "gelu_layer_norm")]
    for case in wide:
        assert ("ours: torch" in case.providers) == ("N65536" in case.shape), case.shape
        assert (case.tune is None) == ("ours: torch" in case.providers)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_choose_different_experts(routing: str) -> None:
    expert_TK = routed(500, 64, 4, routing, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in expert_TK.tolist())
    used = len(expert_TK.unique())
    assert used == {"uniform": 64, "zipf": 64, "empty": 8, "one expert": 4}[routing]


def broken(**_: Any) -> Tensor:
    raise RuntimeError("no such instruction")


def broken_gradient(x: Tensor, **_: Any) -> Tensor:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            raise RuntimeError("no gradient")

    return Broken.apply(x)


def small(op: str, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> Case:
    """A case of the benchmark, alone and changed."""
    case = dataclasses.replace(next(case for case in CASES if case.op == op), **changed)
    monkeypatch.setattr(kernel_cases, "all_cases", lambda *_, **__: iter([case]))
    return case


def test_a_provider_that_fails_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = small("swiglu", monkeypatch)
    providers = {"first": broken, "second": broken_gradient, "torch": case.providers["torch"]}
    small("swiglu", monkeypatch, providers=providers)
    assert main(["--small", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "no such instruction" in printed
    assert "no gradient" in printed
    small("swiglu", monkeypatch, providers={"ours": broken, "torch": case.providers["torch"]})
    assert main(["--small", "--repeats", "1"]) == 1
    assert "failed: swiglu" in capsys.readouterr().out


def test_tuning_that_fails_is_a_row_and_the_case_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small("rope", monkeypatch, tune=lambda made: 1 / 0)
    out = tmp_path / "rows.csv"
    assert main(["--small", "--repeats", "1", "--tune", "--providers", "ours", "--out", str(out)]) == 1
    lines = out.read_text().splitlines()
    assert "ours: tuning" in lines[1]
    assert "ZeroDivisionError" in lines[1]
    assert len(lines) == 1 + 1 + 3


def test_goals_and_plots_are_read_off_kept_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small("rms_norm", monkeypatch)
    out = tmp_path / "rows.csv"
    assert main(["--small", "--repeats", "2", "--providers", "ours", "torch", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["--report", str(out), "--plots", str(tmp_path / "plots")]) == 0
    assert "not measured" in capsys.readouterr().out
    assert (tmp_path / "plots" / "rms_norm.png").stat().st_size > 1000


def row(provider: str, ms: float, **more: Any) -> dict[str, Any]:
    shape = "T32768 D2048 I768 E128 K8 uniform"
    made = {"op": "fused_moe", "shape": shape, "provider": provider, "direction": "full", "error": "", "ms_p50": ms}
    return {**made, "tflops": 0.0, **more}


def lines_of(rows: list[dict[str, Any]], word: str) -> list[str]:
    return [line for line in report(rows) if word in line]


def test_a_goal_is_met_by_the_worst_shape_alone() -> None:
    fast, slow = row("ours", 1.0), row("ours", 1.0, shape="T8192 D2048 I768 E128 K8 uniform")
    torchs = [row("torch grouped_mm", 2.0), row("torch grouped_mm", 1.2, shape=slow["shape"])]
    assert lines_of([fast, *torchs], "speedup")[0].split()[-1] == "yes"
    assert lines_of([fast, slow, *torchs], "speedup")[0].split()[-2:] == ["1.2", "no"]
    assert lines_of([fast], "speedup")[0].endswith("not measured")


def test_a_goal_reads_the_latest_row_of_ours() -> None:
    rows = [row("ours", 1.0, tflops=100.0), row("ours", 1.0, tflops="500.5"), row("liger", 1.0, tflops=900.0)]
    line = next(line for line in lines_of(rows, "T32768 D2048") if "full" in line)
    assert line.split()[-2:] == ["500.5", "yes"]


def test_every_goal_names_a_case() -> None:
    cases = [case for case in all_cases(CPU, small=False) if place(case.op, case.shape) is not None]
    for goal in GOALS:
        assert any(kernel_goals.re.search(goal.shape, case.shape) for case in cases if case.op == goal.op), goal
        assert all(goal.against in case.providers for case in cases if goal.against and case.op == goal.op)


def test_goals_are_measured_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_kernels._parser().parse_args(["--goals"])
    found = [f"{case.op} {case.shape}" for case in bench_kernels.cases(options, CPU)]
    assert found[0] == "fused_moe T32768 D2048 I768 E128 K8 uniform"
    assert found[-1].startswith("fused_moe")
    assert not any("rope" in name for name in found)


def fused(x_TD: Tensor, up_ECD: Tensor, down_EDI: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """As Liger's op takes its arguments; written as a loop."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(len(up_ECD)):
        token_s, choice_s = torch.where(expert_TK == expert)
        gate_sI, value_sI = (x_TD[token_s] @ up_ECD[expert].T).chunk(2, -1)
        y_sD = (torch.nn.functional.silu(gate_sI) * value_sI) @ down_EDI[expert].T
        y_TD = y_TD.index_add(0, token_s, y_sD * gate_TK[token_s, choice_s, None])
    return y_TD


def test_a_peer_gets_the_inputs_as_it_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(LigerFusedMoEFunction=types.SimpleNamespace(apply=fused))
    importer: Callable[[str], Any] = lambda name: module if "liger" in name else 1 / 0  # noqa: E731
    monkeypatch.setattr(kernel_peers.importlib, "import_module", importer)
    monkeypatch.setattr(kernel_peers, "MISSING", {})
    case = next(case for case in CASES if case.op == "fused_moe").beside(kernel_peers.installed("fused_moe"))
    check(case, rows_of(case, "ours", "liger"), 2)
    assert list(kernel_peers.MISSING) == ["sonicmoe"]
