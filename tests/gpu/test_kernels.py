"""Kernels on a GPU: errors against float64, the same bits in every run, CUDA graphs. tests/kernels runs there too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bench.kernel_cases import Case, all_cases, loss_case, moe_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEDIUM = ((4096, 2048, 768, 16, 4), (1000, 2880, 1440, 8, 2))  # tiles of 128 rows; widths that no tile divides
CASES = [case for case in all_cases(DEVICE, small=True) if case.op != "quantised_grouped_gemm"]
CASES += [moe_case(DEVICE, *shape, "zipf") for shape in MEDIUM]
CASES += [loss_case(DEVICE, 512, 512, 20_000)]  # several chunks of the vocabulary
RUNS = 20

pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")


def results(case: Case, provider: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients; the gradients that come in are the same for everyone."""
    outputs = provider(**inputs)
    each = [one for one in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(one, Tensor)]
    trained = [one for one in each if one.requires_grad]
    leaves = [one for one in inputs.values() if isinstance(one, Tensor) and one.requires_grad]
    if not trained:
        return each
    torch.manual_seed(1)
    incoming = [torch.randn(one.shape, device=DEVICE).bfloat16().to(one.dtype) for one in trained]
    return [*each, *torch.autograd.grad(trained, leaves, incoming)]


def exactly(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64."""

    def wide(one: Any) -> Any:
        if isinstance(one, Tensor) and one.is_floating_point():
            return one.detach().double().requires_grad_(one.requires_grad)
        return one

    return {name: wide(one) for name, one in inputs.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.shape}")
def test_the_error_is_at_most_twice_that_of_torch(case: Case) -> None:
    inputs = case.inputs()
    exact = results(case, case.reference, exactly(inputs))
    plain_torch = case.providers.get("torch", case.reference)
    ours, torchs = results(case, case.providers["ours"], inputs), results(case, plain_torch, inputs)
    for mine, plain, true in zip(ours, torchs, exact, strict=True):
        if not mine.is_floating_point():
            assert torch.equal(mine, true)
            continue
        error, allowed = ((one.double() - true).abs().max() for one in (mine, plain))
        rounding = torch.finfo(mine.dtype).eps * true.abs().max()
        assert error <= 2 * allowed + rounding, f"{case.op}: {error:.2e} against {allowed:.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.shape}")
def test_every_run_gives_the_same_bits(case: Case) -> None:
    inputs = case.inputs()
    first = results(case, case.providers["ours"], inputs)
    for _ in range(RUNS - 1):
        again = results(case, case.providers["ours"], inputs)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "case", [one for one in CASES if one.op != "sliding_window_attention"], ids=lambda case: f"{case.op} {case.shape}"
)
def test_a_graph_replays_what_ran_eagerly(case: Case) -> None:
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in case.inputs().items()}
    ours = case.providers["ours"]
    eager = results(case, ours, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(**inputs)
    graph.replay()
    torch.cuda.synchronize()
    each = [one for one in (captured if isinstance(captured, tuple) else (captured,)) if isinstance(one, Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(each, eager, strict=True))
