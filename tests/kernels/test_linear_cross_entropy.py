"""Cross-entropy without logits: the reference against torch's, chunks and kernels against the reference, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_ray.kernels import dispatch
from deepseek_ray.kernels import linear_cross_entropy as op
from deepseek_ray.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref, linear_lse
from tests.kernels.checks import DEVICE, assert_near, guarded, needs_kernels

IGNORED = op.IGNORED


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(op, "LEAST_COLUMNS", 16)  # several chunks at the sizes of tests
    dispatch.choice.cache_clear()
    yield
    dispatch.choice.cache_clear()


def make(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    x_TD = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * 2 / max(1, width) ** 0.5
    target_T = torch.randint(vocabulary, (tokens,), generator=generator)
    target_T[::5] = IGNORED
    x_TD, weight_VD, target_T = (t.to(DEVICE) for t in (x_TD.to(dtype), weight_VD.to(dtype), target_T))
    return x_TD.requires_grad_(), weight_VD.requires_grad_(), target_T


def gradients(fn: Any, x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients; a loss a token gets a weight a token."""
    loss = fn(x, weight, target, **options)
    slope = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight), slope)


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
def test_the_reference_equals_torch(reduction: str) -> None:
    x, weight, target = make(12, 5, 9, torch.float64)
    wanted = F.cross_entropy(F.linear(x, weight), target, reduction=reduction)
    torch.testing.assert_close(linear_cross_entropy_ref(x, weight, target, reduction=reduction), wanted)


def test_the_references_z_loss_is_the_square_of_lse() -> None:
    x, weight, target = make(4, 5, 9, torch.float64)
    target = target.clamp(min=0)
    both = [linear_cross_entropy_ref(x, weight, target, z_loss=z, reduction="none") for z in (0.5, 0.0)]
    torch.testing.assert_close(both[0] - both[1], 0.5 * F.linear(x, weight).exp().sum(-1).log() ** 2)


@pytest.mark.parametrize("fn", [linear_cross_entropy_ref, linear_cross_entropy])
def test_gradcheck(fn: Any) -> None:
    x, weight, target = make(6, 3, 40, torch.float64)  # three chunks, the last of 8 columns
    for reduction in op.REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda a, b, how=reduction: fn(a, b, target, reduction=how, z_loss=0.1), (x, weight)
        )


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum", "z_loss": 0.01}])
def test_chunks_in_plain_torch_equal_the_reference(options: dict[str, Any]) -> None:
    x, weight, target = make(30, 8, 77, torch.float64)
    for found, wanted in zip(
        gradients(linear_cross_entropy, x, weight, target, **options),
        gradients(linear_cross_entropy_ref, x, weight, target, **options),
        strict=True,
    ):
        assert_near(found, wanted, 1e-12)


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(18, 24, 77), (1, 1, 1), (3, 7, 300), (5, 16, 64)])
def test_kernels_equal_the_reference(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    x, weight, target = make(tokens, width, vocabulary, dtype)
    with guarded(monkeypatch):
        found = gradients(linear_cross_entropy, x, weight, target, reduction="none", z_loss=0.01)
    wanted = gradients(linear_cross_entropy_ref, x, weight, target, reduction="none", z_loss=0.01)
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other, tolerance)


@needs_kernels
@settings(max_examples=8, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 6), width=st.integers(1, 20), vocabulary=st.integers(1, 70), int32=st.booleans())
def test_kernels_equal_the_reference_at_any_shape(tokens: int, width: int, vocabulary: int, int32: bool) -> None:
    x, weight, target = make(tokens, width, vocabulary)
    target = target.int() if int32 else target
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "triton")
        patch.setattr(op, "LEAST_COLUMNS", 16)
        found = gradients(linear_cross_entropy, x, weight, target)
    for one, other in zip(found, gradients(linear_cross_entropy_ref, x, weight, target), strict=True):
        assert_near(one, other, 1e-5)


@needs_kernels
def test_extreme_logits_neither_overflow_nor_lose_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk of two blocks: in the first row the largest logit is the last, in the second the first."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr(op, "FEWEST_CHUNKS", 1)
    x = torch.tensor([[1e3], [-1e3], [0.0]], device=DEVICE, requires_grad=True)
    weight = torch.linspace(-1, 1, 4112, device=DEVICE).unsqueeze(-1).requires_grad_()
    target = torch.tensor([4111, 4111, 7], device=DEVICE)
    found = gradients(linear_cross_entropy, x, weight, target, reduction="none")
    assert found[0].tolist() == pytest.approx([0.953927, 2000.953927, 8.321665], rel=1e-4)
    for one, other in zip(found, gradients(linear_cross_entropy_ref, x, weight, target, reduction="none"), strict=True):
        assert_near(one, other, 1e-5)


@needs_kernels
def test_the_kernels_give_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    x, weight, target = make(7, 12, 50)
    first, second = (gradients(linear_cross_entropy, x, weight, target) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_ignored_empty_and_impossible_targets(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    x, weight, target = make(4, 8, 40)
    loss, dx, dweight = gradients(linear_cross_entropy, x, weight, torch.full_like(target, IGNORED))
    assert float(loss) == 0
    assert not dx.any()
    assert not dweight.any()
    nothing = linear_cross_entropy(x[:0], weight, target[:0], reduction="sum")
    assert float(nothing.detach()) == 0
    assert not torch.autograd.grad(nothing, weight)[0].any()
    for wrong in (40, -1):
        target[1] = wrong
        loss = linear_cross_entropy(x, weight, target, reduction="none").detach()
        assert torch.isnan(loss).tolist() == [False, True, False, False]
    assert float(linear_cross_entropy(x, weight, torch.ones_like(target), ignore_index=1).detach()) == 0


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_shards_of_the_vocabulary_combine(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    x, weight, target = make(5, 8, 60)
    parts = [linear_lse(x, weight[at : at + 20], target - at) for at in (0, 20, 40)]
    lse = torch.stack([lse for lse, _ in parts]).logsumexp(0)
    aim = torch.stack([aim for _, aim in parts]).sum(0)
    wanted = linear_cross_entropy_ref(x, weight, target, reduction="none")
    assert_near((lse - aim).where(target >= 0, 0.0).detach(), wanted.detach(), 1e-5)


def test_only_the_gradients_asked_for_are_computed() -> None:
    x, weight, target = make(5, 8, 40)
    wanted = torch.autograd.grad(linear_cross_entropy_ref(x, weight, target), (x, weight))
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight.detach(), target), x)
    (dweight,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, target), weight)
    assert_near(dx, wanted[0], 1e-5)
    assert_near(dweight, wanted[1], 1e-5)


def test_parts_of_dx_are_not_rounded_before_they_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, target = make(32, 32, 512, torch.bfloat16)
    found = gradients(linear_cross_entropy, x, weight, target)[1]
    assert op._columns(x, weight) == 128
    monkeypatch.setattr(op, "FEWEST_CHUNKS", 1)
    wanted = gradients(linear_cross_entropy, x, weight, target)[1]
    assert float((found != wanted).float().mean()) < 0.02  # rounded four times: 0.26


class Largest(TorchDispatchMode):
    """Numbers in the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.element_size())
        return found


def test_the_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, target = make(64, 4, 2048)
    monkeypatch.setattr(op, "CHUNK_BYTES", {"cpu": 64 * 32 * 4, "cuda": 64 * 32 * 4})
    with Largest() as watch:
        gradients(linear_cross_entropy, x, weight, target)
    assert watch.numbers <= weight.numel()
    with Largest() as watch:
        gradients(linear_cross_entropy_ref, x, weight, target)
    assert watch.numbers == 64 * 2048  # the reference shows that the watch sees them


def test_budget_and_width_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LEAST_COLUMNS", 256)
    weight = torch.empty(131072, 1, device="meta", dtype=torch.bfloat16)
    widths = [op._columns(torch.empty(t, 1, device="meta", dtype=torch.bfloat16), weight) for t in (64, 8192, 32768)]
    assert widths == [32768, 32768, 16384]
    assert op._columns(torch.empty(0, 1), torch.empty(10, 1)) == 256


def test_it_is_a_torch_operation() -> None:
    x, weight, target = make(5, 8, 40)
    torch.library.opcheck(torch.ops.deepseek_ray.linear_lse, (x, weight, target, 16))
    torch.library.opcheck(torch.ops.deepseek_ray.linear_lse, (x.detach(), weight, target, op._AS_TUNED))
    wanted = linear_cross_entropy(x, weight, target)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, target), wanted)
    on_meta = linear_cross_entropy(x.to("meta"), weight.to("meta"), target.to("meta"), reduction="none")
    assert on_meta.shape == (5,)


def test_any_leading_shape_and_strides() -> None:
    x, weight, target = make(24, 8, 40)
    wanted = linear_cross_entropy_ref(x, weight, target, reduction="none").view(4, 6).T
    found = linear_cross_entropy(x.view(4, 6, 8).transpose(0, 1), weight, target.view(4, 6).T, reduction="none")
    assert_near(found.detach(), wanted.detach(), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.ones(4, 3)}, r"weight has shape \(4, 3\), x \(2, 5\)"),
        ({"weight_VD": torch.ones(0, 5)}, "V > 0"),
        ({"target_T": torch.zeros(3, dtype=torch.long)}, "one target for each row"),
        ({"target_T": torch.zeros(2)}, "int32 or int64"),
        ({"weight_VD": torch.ones(4, 5, dtype=torch.float16)}, "cast both"),
        ({"target_T": torch.zeros(2, dtype=torch.long, device="meta")}, "one device"),
        ({"reduction": "avg"}, "'avg' must be one of none, sum, mean"),
        ({"z_loss": -1.0}, "z_loss = -1.0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"x_TD": torch.ones(2, 5), "weight_VD": torch.ones(4, 5), "target_T": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**given_, **change})
