"""Routed experts: the reference against a definition and gradcheck, torch's products and the kernels against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.kernels import dispatch, fused_moe, grouped_gemm, moe_swiglu, tuning
from tests.kernels.checks import DEVICE, assert_near, guarded, needs_kernels

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Layer:
    x_TD: Tensor
    expert_TK: Tensor
    gate_TK: Tensor
    up_ED2I: Tensor
    down_EID: Tensor

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.x_TD, self.expert_TK, self.gate_TK, self.up_ED2I, self.down_EID

    @property
    def floats(self) -> tuple[Tensor, ...]:
        return self.x_TD, self.gate_TK, self.up_ED2I, self.down_EID

    def to(self, dtype: torch.dtype) -> Layer:
        x, gate, up, down = (one.detach().to(dtype).requires_grad_() for one in self.floats)
        return Layer(x, self.expert_TK, gate, up, down)


def layer(
    tokens: int,
    top_k: int,
    experts: int,
    width: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    kind: str = "even",
) -> Layer:
    torch.manual_seed(0)
    weight_E = torch.ones(experts)
    if kind == "zipf":
        weight_E = 1.0 / torch.arange(1, experts + 1) ** 1.5
    if kind == "empty":  # every second expert gets nothing
        weight_E[1::2] = 0
    expert_TK = torch.multinomial(weight_E, tokens * top_k, replacement=True).view(tokens, top_k)
    if kind == "one":
        expert_TK.fill_(experts - 1)
    if kind == "elsewhere":  # some pairs belong to experts of another process, some tokens wholly
        expert_TK = torch.randint(-1, experts + 2, (tokens, top_k))
        expert_TK[::5] = -1
    gate_TK = torch.where((expert_TK >= 0) & (expert_TK < experts), torch.rand(tokens, top_k), float("inf"))
    made = Layer(
        torch.randn(tokens, width).to(dtype), expert_TK, gate_TK.to(dtype),
        (torch.randn(experts, width, 2, hidden) / width**0.5).to(dtype),
        (torch.randn(experts, hidden, width) / hidden**0.5).to(dtype),
    )  # fmt: skip
    return Layer(*(one.to(DEVICE) for one in made.all)).to(dtype)


def run(op: Callable[..., Tensor], made: Layer) -> list[Tensor]:
    """y and the gradients of x, gates, up and down."""
    generator = torch.Generator().manual_seed(1)
    y_TD = op(*made.all)
    dy_TD = torch.randn(y_TD.shape, generator=generator).to(y_TD)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, made.floats, dy_TD)]


def compare(found: list[Tensor], made: Layer) -> None:
    wanted = run(fused_moe.fused_moe_ref, made.to(torch.float64))
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other.to(one.dtype), TOLERANCE[one.dtype])


@pytest.fixture(name="kernels")
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.choice.cache_clear()
    yield
    dispatch.choice.cache_clear()


@pytest.fixture(name="small_tiles")
def tiles_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles along every side of small matrices."""

    def small(op: str, shape: tuple[object, ...], default: tuning.Settings) -> tuning.Settings:
        return {name: SMALL.get(name, default[name]) for name in default}

    monkeypatch.setattr(grouped_gemm, "settings_for", small)
    monkeypatch.setattr(moe_swiglu, "settings_for", small)


# The reference and torch's own products.


def test_the_reference_is_the_formula_token_by_token() -> None:
    made = layer(6, 2, 3, 8, 4, torch.float64)
    y_TD = torch.zeros_like(made.x_TD)
    for t in range(6):
        for k in range(2):
            gate_DI, up_DI = made.up_ED2I[made.expert_TK[t, k]].unbind(1)
            a_I = F.silu(made.x_TD[t] @ gate_DI) * (made.x_TD[t] @ up_DI)
            y_TD[t] += made.gate_TK[t, k] * (a_I @ made.down_EID[made.expert_TK[t, k]])
    torch.testing.assert_close(fused_moe.fused_moe_ref(*made.all), y_TD)


@pytest.mark.parametrize("kind", ["even", "elsewhere"])
def test_the_reference_passes_gradcheck(kind: str) -> None:
    made = layer(4, 2, 3, 3, 2, torch.float64, kind)
    x, expert_TK, gate, up, down = made.all
    assert torch.autograd.gradcheck(
        lambda x, g, u, d: fused_moe.fused_moe_ref(x, expert_TK, g, u, d), (x, gate, up, down)
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="the path without a GPU")
@pytest.mark.parametrize("kind", ["even", "empty", "elsewhere"])
@pytest.mark.parametrize(("width", "hidden"), [(32, 16), (18, 7)])
def test_torch_equals_the_reference(kind: str, width: int, hidden: int) -> None:
    made = layer(9, 2, 4, width, hidden, kind=kind)
    compare(run(fused_moe.fused_moe, made), made)
    compare(run(fused_moe._dense, made), made)


@pytest.mark.skipif(DEVICE == "cuda", reason="the path without a GPU")
def test_what_torch_leaves_behind_the_last_group_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = F.grouped_mm

    def spoiled(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        behind = torch.arange(len(a)).unsqueeze(1) >= offs[-1]
        return torch.where(behind, float("nan"), honest(a, b, offs=offs))

    monkeypatch.setattr(F, "grouped_mm", spoiled)
    made = layer(9, 2, 4, 32, 16, kind="elsewhere")
    compare(run(fused_moe.fused_moe, made), made)


def test_no_tokens_no_choices_and_no_experts() -> None:
    for tokens, top_k, experts in ((0, 2, 3), (4, 0, 3), (4, 2, 0)):
        made = Layer(
            torch.randn(tokens, 8), torch.zeros(tokens, top_k, dtype=torch.long), torch.zeros(tokens, top_k),
            torch.randn(experts, 8, 2, 4), torch.randn(experts, 4, 8),
        ).to(torch.float32)  # fmt: skip
        y_TD = fused_moe.fused_moe(*made.all)
        assert torch.equal(y_TD, torch.zeros(tokens, 8))
        if experts:
            assert all(not one.any() for one in torch.autograd.grad(y_TD.sum(), made.floats))


# The kernels.


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in ("even", "zipf", "one", "empty", "elsewhere")),
        *((kind, torch.float16) for kind in ("zipf", "elsewhere")),
    ],
)
def test_the_kernels_equal_the_reference(
    kind: str, dtype: torch.dtype, kernels: None, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(11, 2, 3, 24, 20, dtype, kind)
    with guarded(monkeypatch):
        found = run(fused_moe.fused_moe, made)
    compare(found, made)
    for expert in range(3):
        if not (made.expert_TK == expert).any():
            assert not found[3][expert].any()
            assert not found[4][expert].any()


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "width", "hidden"),
    [(1, 1, 1, 1, 1), (1, 3, 4, 16, 8), (5, 1, 3, 24, 33), (6, 4, 4, 8, 8), (3, 11, 2, 17, 16)],
    ids=["all 1", "one token", "one choice", "all experts", "more choices than experts"],
)
def test_edges(
    tokens: int, top_k: int, experts: int, width: int, hidden: int, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(tokens, top_k, experts, width, hidden)
    with guarded(monkeypatch):
        found = run(fused_moe.fused_moe, made)
    compare(found, made)


@needs_kernels
@pytest.mark.parametrize(("tokens", "dtype", "height"), [(70, torch.float32, 64), (129, torch.float16, 128)])
def test_high_tiles(
    tokens: int, dtype: torch.dtype, height: int, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grouped_gemm.block_rows(tokens, 1, dtype) == height
    made = layer(tokens, 1, 1, 24, 16, dtype)
    with guarded(monkeypatch):
        found = run(fused_moe.fused_moe, made)
    compare(found, made)


@pytest.mark.parametrize("default", [grouped_gemm.WIDE, grouped_gemm.PAIRED, grouped_gemm.OUTER, moe_swiglu.UP])
def test_the_largest_tiles_are_for_what_has_room_for_them(default: tuning.Settings) -> None:
    def tile(dtype: torch.dtype = torch.bfloat16, *, roomy: bool = True, even: bool = True) -> tuning.Settings:
        return grouped_gemm.tile_of(default, grouped_gemm.Kind("", (), dtype, roomy, even))

    assert tile() == default
    for other in (tile(roomy=False), tile(even=False), tile(torch.float32)):
        assert other["BLOCK_N"] <= default["BLOCK_N"] // 2
        assert not other.get("TMA")
        assert other.keys() == default.keys()  # outer products know no TMA


@pytest.mark.parametrize(("engine", "room", "roomy"), [(True, 232448, True), (True, 101376, False), (False, 0, False)])
def test_a_consumer_chip_with_a_copy_engine_has_no_room(
    engine: bool, room: int, roomy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_gemm, "copy_engine", lambda device: engine)
    monkeypatch.setattr(grouped_gemm, "shared_bytes", lambda device: room)
    assert grouped_gemm.roomy(torch.device("cuda", 0)) == roomy
    found = [grouped_gemm.for_launch(grouped_gemm.WIDE, torch.zeros(1).half(), size, 64) for size in (64, 72)]
    assert (found[0] == grouped_gemm.WIDE) == roomy
    assert found[1]["BLOCK_N"] == 64  # 72 is no multiple of 16


@needs_kernels
def test_one_expert_is_described_by_its_shape() -> None:
    weight_ERC = torch.empty_strided((1, 8, 16), (7, 16, 1))  # contiguous: nobody walks the first stride
    assert grouped_gemm.describe(weight_ERC, 1, 8, 16).strides == [128, 16, 1]


@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # rows of others, not stored
@pytest.mark.parametrize(("width", "hidden"), [(40, 24), (48, 32)])
def test_tiles_from_the_copy_engine(
    width: int, hidden: int, kernels: None, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_gemm, "copy_engine", lambda device: True)
    monkeypatch.setattr(grouped_gemm, "roomy", lambda device: True)
    monkeypatch.setattr(grouped_gemm, "tile_of", lambda default, kind: default)
    made = layer(9, 2, 3, width, hidden, torch.float16, "elsewhere")
    with guarded(monkeypatch):
        found = run(fused_moe.fused_moe, made)
    compare(found, made)


@needs_kernels
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 16),
    top_k=st.integers(1, 3),
    experts=st.integers(1, 5),
    width=st.integers(1, 40),
    hidden=st.integers(1, 40),
    kind=st.sampled_from(["even", "zipf", "elsewhere"]),
)
def test_any_shape(
    tokens: int, top_k: int, experts: int, width: int, hidden: int, kind: str, kernels: None,
) -> None:  # fmt: skip
    made = layer(tokens, top_k, experts, width, hidden, kind=kind)
    compare(run(fused_moe.fused_moe, made), made)


@needs_kernels
def test_gates_may_be_wider_than_tokens(kernels: None) -> None:
    made = layer(6, 2, 3, 16, 16, torch.float16)
    made = replace(made, gate_TK=made.gate_TK.detach().float().requires_grad_())
    found = run(fused_moe.fused_moe, made)
    assert found[2].dtype == torch.float32
    assert_near(found[2], run(fused_moe.fused_moe_ref, made.to(torch.float64))[2].float(), 2e-3)


@needs_kernels
def test_two_calls_give_the_same_bits(kernels: None, small_tiles: None) -> None:
    made = layer(9, 2, 3, 24, 24, torch.float16, "zipf")
    for one, other in zip(run(fused_moe.fused_moe, made), run(fused_moe.fused_moe, made), strict=True):
        assert torch.equal(one, other)


@needs_kernels
def test_only_the_preactivation_is_kept_a_pair(kernels: None) -> None:
    made = layer(64, 2, 2, 24, 16)
    kept: list[Tensor] = []

    def keep(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        fused_moe.fused_moe(*made.all)
    activations = [one for one in kept if one.is_floating_point() and all(one is not given for given in made.floats)]
    assert [tuple(one.shape) for one in activations] == [(64 * 2, 2 * 16)]
    assert sum(one.numel() for one in kept if not one.is_floating_point()) < 64 * 2 * 3


@needs_kernels
def test_nothing_is_kept_without_gradients(kernels: None) -> None:
    made = layer(6, 2, 3, 16, 16)
    with torch.no_grad():
        y_TD = fused_moe.fused_moe(*made.all)
        h_S2I = fused_moe._forward(*made.all, False)[1]
    assert h_S2I.numel() == 0
    assert_near(y_TD, fused_moe.fused_moe_ref(*made.all).detach(), 1e-5)


@needs_kernels
def test_frozen_weights_get_no_gradient(kernels: None) -> None:
    made = layer(6, 2, 3, 16, 16)
    up, down = made.up_ED2I.detach(), made.down_EID.detach()
    y_TD = fused_moe.fused_moe(made.x_TD, made.expert_TK, made.gate_TK, up, down)
    found = torch.autograd.grad(y_TD.square().sum(), (made.x_TD, made.gate_TK))
    wanted = torch.autograd.grad(fused_moe.fused_moe_ref(*made.all).square().sum(), (made.x_TD, made.gate_TK))
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other, 1e-5)


@needs_kernels
def test_the_host_never_waits(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a copy to the host, or a sort")

    made = layer(6, 2, 3, 16, 16)
    for name in ("item", "tolist", "nonzero", "argsort", "sort"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    run(fused_moe.fused_moe, made)


@needs_kernels
def test_it_is_an_operator_of_torch(kernels: None) -> None:
    made = layer(6, 2, 3, 16, 8)
    torch.library.opcheck(fused_moe._forward, (*made.all, True))


@needs_kernels
def test_it_compiles_as_a_whole(kernels: None) -> None:
    made = layer(6, 2, 3, 16, 8)
    compiled = torch.compile(fused_moe.fused_moe, fullgraph=True, backend="aot_eager")
    compare(run(compiled, made), made)


@pytest.mark.skipif(DEVICE == "cuda", reason="the path without a GPU")
@pytest.mark.parametrize("hidden", [8, 7])
def test_torchs_products_compile_as_a_whole(hidden: int) -> None:
    made = layer(6, 2, 3, 16, hidden)
    compiled = torch.compile(fused_moe.fused_moe, fullgraph=True, backend="aot_eager")
    compare(run(compiled, made), made)
    meta = [one.detach().to("meta") for one in made.all]
    assert fused_moe.fused_moe(*meta).shape == made.x_TD.shape


@needs_kernels
def test_tuning_asks_for_what_launches_look_up(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[object, ...]] = set()
    tuned: set[tuple[object, ...]] = set()

    def look_up(op: str, shape: tuple[object, ...], default: tuning.Settings) -> tuning.Settings:
        asked.add((op, *shape))
        return default

    def tune(op: str, shape: tuple[object, ...], candidates: list[tuning.Settings], measure: Any) -> tuning.Settings:
        tuned.add((op, *shape))
        assert measure(candidates[0]) == 1.0
        return candidates[0]

    monkeypatch.setattr(grouped_gemm, "settings_for", look_up)
    monkeypatch.setattr(moe_swiglu, "settings_for", look_up)
    monkeypatch.setattr(fused_moe, "tune", tune)
    monkeypatch.setattr(fused_moe, "_seconds", lambda launch, settings: [launch(settings), 1.0][1])
    fused_moe.tune_fused_moe(8, 24, 16, 2, 2, torch.float16, DEVICE)
    asked.clear()  # tuning itself launches
    run(fused_moe.fused_moe, layer(8, 2, 2, 24, 16, torch.float16))
    assert asked == tuned


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_replays_what_ran() -> None:
    made = layer(300, 4, 8, 128, 64, torch.bfloat16)
    inputs = [one.detach() for one in made.all]
    wanted = fused_moe.fused_moe(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused_moe.fused_moe(*inputs)
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)


# Errors.


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"x_TD": torch.zeros(2, 3, 8)}, r"x is \(2, 3, 8\).*flatten"),
        ({"x_TD": torch.zeros(4, 8, dtype=torch.long)}, "x is .*int64: it must be"),
        ({"expert_TK": torch.zeros(3, 2, dtype=torch.long)}, r"expert is \(3, 2\).*\(4, K\)"),
        ({"expert_TK": torch.zeros(4, 2)}, "expert is .*float32.*int32 or int64"),
        ({"gate_TK": torch.zeros(4, 3)}, r"gate is \(4, 3\).*\(4, 2\)"),
        ({"up_ED2I": torch.zeros(3, 8, 12)}, r"up is \(3, 8, 12\).*\(E, 8, 2, I\)"),
        ({"down_EID": torch.zeros(3, 8, 6)}, r"down is \(3, 8, 6\).*\(3, 6, 8\)"),
        ({"down_EID": torch.zeros(3, 6, 8, dtype=torch.float16)}, "down is .*float16, x torch.float32: cast"),
        ({"gate_TK": torch.zeros(4, 2, device="meta")}, "gate is on meta, x on cpu: move"),
    ],
)
def test_errors_name_the_argument(changed: dict[str, Tensor], text: str) -> None:
    given = {
        "x_TD": torch.zeros(4, 8), "expert_TK": torch.zeros(4, 2, dtype=torch.long), "gate_TK": torch.zeros(4, 2),
        "up_ED2I": torch.zeros(3, 8, 2, 6), "down_EID": torch.zeros(3, 6, 8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        fused_moe.fused_moe(**{**given, **changed})
