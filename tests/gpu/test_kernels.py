"""Kernels on a GPU: errors against float64, the same bits in every run, CUDA graphs. tests/kernels runs there too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bench.kernel_cases import ROUTINGS, Case, Inputs, Provider, all_cases, medium_cases, moe_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = list(all_cases(DEVICE, small=True))
CASES = [*SMALL, *medium_cases(DEVICE)]
NAMES = [f"{'small' if place < len(SMALL) else 'medium'} {case.op} {case.shape}" for place, case in enumerate(CASES)]
RUNS = 20

pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


def outputs_of(provider: Provider, inputs: Inputs) -> list[Tensor]:
    """What an op returns, as a list."""
    outputs = provider(**inputs)
    return [one for one in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(one, Tensor)]


def incoming(outputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the outputs that have one, the same for everyone."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    trained = [one for one in outputs if one.requires_grad]
    return [torch.randn(one.shape, generator=generator, device=DEVICE).bfloat16().to(one.dtype) for one in trained]


def results(provider: Provider, inputs: Inputs, grads: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = outputs_of(provider, inputs)
    trained = [one for one in outputs if one.requires_grad]
    leaves = [one for one in inputs.values() if isinstance(one, Tensor) and one.requires_grad]
    if not trained:
        return outputs
    return [*outputs, *torch.autograd.grad(trained, leaves, incoming(outputs) if grads is None else grads)]


def exactly(inputs: Inputs) -> Inputs:
    """The same inputs in float64."""

    def wide(one: Any) -> Any:
        if isinstance(one, Tensor) and one.is_floating_point():
            return one.detach().double().requires_grad_(one.requires_grad)
        return one

    return {name: wide(one) for name, one in inputs.items()}


@each_case
def test_the_error_is_at_most_twice_that_of_torch(case: Case) -> None:
    inputs = case.inputs()
    exact = results(case.reference, exactly(inputs))
    plain_torch = case.providers.get("torch", case.reference)
    ours, torchs = results(case.providers["ours"], inputs), results(plain_torch, inputs)
    for mine, plain, true in zip(ours, torchs, exact, strict=True):
        if not mine.is_floating_point():
            assert torch.equal(mine, true)
            continue
        error, allowed = ((one.double() - true).abs().max() for one in (mine, plain))
        rounding = torch.finfo(mine.dtype).eps * true.abs().max()
        assert error <= 2 * allowed + rounding, f"{case.op}: {error:.2e} against {allowed:.2e}"


@each_case
def test_every_run_gives_the_same_bits(case: Case) -> None:
    inputs = case.inputs()
    first = results(case.providers["ours"], inputs)
    for _ in range(RUNS - 1):
        assert_same(results(case.providers["ours"], inputs), first)


CAPTURED = [(case, name) for case, name in zip(CASES, NAMES, strict=True) if case.op != "sliding_window_attention"]
captured_cases = pytest.mark.parametrize(
    "case", [case for case, _ in CAPTURED], ids=[name for _, name in CAPTURED]
)  # the block lists of a window are made on the host


@captured_cases
def test_a_graph_of_the_forward_pass_replays_what_runs_eagerly(case: Case) -> None:
    ours = case.providers["ours"]
    inputs = {name: one.detach() if isinstance(one, Tensor) else one for name, one in case.inputs().items()}
    graph, found = capture(ours, inputs, [])
    for new in fed(case, inputs):
        graph.replay()
        assert_same(found, outputs_of(ours, new))


@captured_cases
def test_a_graph_of_both_passes_replays_what_runs_eagerly(case: Case) -> None:
    ours, inputs = case.providers["ours"], case.inputs()
    grads = incoming(outputs_of(ours, inputs))
    graph, found = capture(ours, inputs, grads)
    for new in fed(case, inputs):
        graph.replay()
        assert_same(found, results(ours, new, grads))


def test_a_graph_takes_any_routing() -> None:
    shape = 512, 256, 128, 32, 4
    case = moe_case(DEVICE, *shape, ROUTINGS[0])
    ours, inputs = case.providers["ours"], case.inputs()
    grads = incoming(outputs_of(ours, inputs))
    graph, found = capture(ours, inputs, grads)
    for routing in (*ROUTINGS, ROUTINGS[0]):
        new = moe_case(DEVICE, *shape, routing).inputs(1)
        fill(inputs, new)
        graph.replay()
        assert_same(found, results(ours, new, grads))


def capture(provider: Provider, inputs: Inputs, grads: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one run, and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(provider, inputs, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(provider, inputs, grads)
    return graph, found


def fed(case: Case, inputs: Inputs) -> Iterator[Inputs]:
    """Other numbers of the same shapes, which the captured inputs hold then; weights that are no tensor stay."""
    for seed in (0, 1, 2):
        new = case.inputs(seed)
        new = {name: one if isinstance(one, Tensor) else inputs[name] for name, one in new.items()}
        fill(inputs, new)
        yield new


def fill(inputs: Inputs, new: Inputs) -> None:
    """Put new numbers where a graph reads its inputs."""
    with torch.no_grad():
        for name, one in inputs.items():
            if isinstance(one, Tensor):
                one.copy_(new[name])


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """The same bits, and no number missing."""
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
