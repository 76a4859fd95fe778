"""Sliding-window attention: against a loop and torch's own, every back end, and memory that grows with the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_ray.kernels import sliding_window_attention as op
from deepseek_ray.kernels.sliding_window_attention import (
    sliding_window_attention,
    sliding_window_attention_ref,
    window_blocks,
)
from tests.kernels.checks import DEVICE, assert_near

CPU = torch.device("cpu")


def make(
    length: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, count, length, width) for count in (heads, kv_heads, kv_heads)]
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
        for shape in shapes
    )
    return query, key, value


def all_of(fn: Any, inputs: tuple[Tensor, ...], window: int, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    y = fn(*inputs, window, **options)
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, slope)]


def test_the_reference_equals_a_loop() -> None:
    query, key, value = (one.detach() for one in make(7, batch=1))
    for window in (1, 3, 20):
        found = sliding_window_attention_ref(query, key, value, window, scale=0.3)
        for head in range(4):
            for s in range(7):
                seen = slice(max(0, s - window + 1), s + 1)
                share = torch.softmax(0.3 * key[0, head // 2, seen] @ query[0, head, s], 0)
                torch.testing.assert_close(found[0, head, s], share @ value[0, head // 2, seen])


@pytest.mark.parametrize("fn", [sliding_window_attention_ref, sliding_window_attention])
def test_gradcheck(fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LEAST_BLOCK", 2)
    inputs = make(7, batch=1, heads=2, kv_heads=1, width=2)
    assert torch.autograd.gradcheck(lambda *qkv: fn(*qkv, 3), inputs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 40), window=st.integers(1, 45), batch=st.integers(1, 2), kv_heads=st.integers(1, 2),
    shared=st.integers(1, 3), least=st.sampled_from([1, 8, 64]),
)  # fmt: skip
def test_it_equals_the_reference(length: int, window: int, batch: int, kv_heads: int, shared: int, least: int) -> None:
    inputs = make(length, batch, kv_heads * shared, kv_heads, width=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "LEAST_BLOCK", least)
        found = all_of(sliding_window_attention, inputs, window)
    for one, other in zip(found, all_of(sliding_window_attention_ref, inputs, window), strict=True):
        assert_near(one, other, 1e-9)  # some gradients are 0, and the smallest scale is 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make(200, batch=1, width=16, dtype=dtype)
    wanted = all_of(sliding_window_attention_ref, tuple(one.detach().double().requires_grad_() for one in inputs), 70)
    found = all_of(sliding_window_attention, inputs, 70, scale=0.25)
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other.to(dtype), tolerance)


@pytest.mark.parametrize("window", [30, 31, 10**9])
def test_a_window_over_the_whole_sequence_is_causal_attention(window: int) -> None:
    inputs = make(30)
    wanted = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.7, enable_gqa=True).detach()
    assert_near(sliding_window_attention(*inputs, window, scale=0.7).detach(), wanted, 1e-12)
    assert_near(op._blocked(*inputs, min(window, 100), 0.7).detach(), wanted, 1e-12)


def test_one_position_and_none() -> None:
    query, key, value = make(1)
    torch.testing.assert_close(sliding_window_attention(query, key, value, 1), value.repeat_interleave(2, 1))
    assert sliding_window_attention(*make(0), 4).shape == (2, 4, 0, 8)
    assert sliding_window_attention(*make(9, batch=0), 4).shape == (0, 4, 9, 8)


def test_huge_scores_stay_finite() -> None:
    inputs = tuple((one * 1e4).detach().requires_grad_() for one in make(150, width=16, dtype=torch.float32))
    assert all(bool(one.isfinite().all()) for one in all_of(sliding_window_attention, inputs, 20))


class Made(TorchDispatchMode):
    """Bytes of the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return found


def largest(fn: Any, length: int) -> tuple[int, int]:
    """Bytes of the largest tensor made, and of all that the backward pass keeps."""
    kept: dict[int, int] = {}

    def keep(one: Tensor) -> Tensor:
        kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return one

    inputs = make(length, batch=1, heads=2, kv_heads=1, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        y = fn(*inputs, 64)
    with Made() as made:
        all_of(fn, inputs, 64)
    del y
    return made.largest, sum(kept.values())


@pytest.mark.skipif(DEVICE == "cuda", reason="of the path without a GPU")
def test_memory_grows_with_the_length_not_with_its_square() -> None:
    short, long = (largest(sliding_window_attention, length) for length in (512, 2048))
    assert all(more <= 4.5 * less for less, more in zip(short, long, strict=True))
    squared = [largest(sliding_window_attention_ref, length)[0] for length in (512, 2048)]
    assert squared[1] == 16 * squared[0]  # the reference shows that the watch sees scores


@pytest.mark.parametrize("length", [128, 300, 640, 1000])
@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 255, 256, 257, 400, 5000])
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(length: int, window: int) -> None:
    found = window_blocks(length, window, CPU)
    wanted = create_block_mask(found.mask_mod, None, None, length, length, device="cpu")
    assert found.shape == wanted.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(found.to_dense(), wanted.to_dense())
    for count, index in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for row, number in enumerate(getattr(wanted, count)[0, 0].tolist()):
            ours, theirs = (getattr(mask, index)[0, 0, row, :number].tolist() for mask in (found, wanted))
            assert sorted(ours) == sorted(theirs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.skipif(DEVICE == "cuda", reason="stands in for the compiled kernel of a GPU")
def test_flex_attention_gets_the_right_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_flex_serves", lambda _: True)
    monkeypatch.setattr(op, "_compiled_flex", lambda: flex_attention)
    inputs = tuple(one.detach() for one in make(300, batch=1, width=16, dtype=torch.float32))
    for window in (5, 200):
        found = sliding_window_attention(*inputs, window, scale=0.2)
        assert_near(found, sliding_window_attention_ref(*inputs, window, scale=0.2), 1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="stands in for the compiled kernel of a GPU")
def test_twelve_masks_stay_below_the_limit_of_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window or a length becomes a variable of the kernel when it changes: no kernel a mask."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter)
    monkeypatch.setattr(op, "_flex_serves", lambda _: True)
    monkeypatch.setattr(op, "_compiled_flex", lambda: compiled)
    for number in range(12):
        inputs = tuple(one.detach() for one in make(300 + 50 * (number % 4), batch=1, width=16, dtype=torch.float32))
        sliding_window_attention(*inputs, 5 + 23 * number)
    assert 1 <= counter.frame_count <= 3
    assert torch._dynamo.config.recompile_limit >= 8


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.skipif(DEVICE == "cuda", reason="stands in for the compiled kernel of a GPU")
def test_masks_that_are_kept_serve_training_and_outlive_no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_flex_serves", lambda _: True)
    monkeypatch.setattr(op, "_compiled_flex", lambda: flex_attention)
    op._kept_blocks.cache_clear()
    inputs = tuple(one.detach() for one in make(300, batch=1, width=16, dtype=torch.float32))
    with monkeypatch.context() as recording:
        recording.setattr(op, "_recording", lambda _: True)
        sliding_window_attention(*inputs, 5)
    assert op._kept_blocks.cache_info().currsize == 0
    with torch.inference_mode():
        sliding_window_attention(*inputs, 5)
    assert op._kept_blocks.cache_info().currsize == 1
    assert not op._kept_blocks(300, 5, CPU).kv_indices.is_inference()


def test_it_can_be_compiled_and_runs_on_meta() -> None:
    inputs = make(150)
    compiled = torch.compile(sliding_window_attention, fullgraph=True, backend="aot_eager")
    for one, other in zip(all_of(compiled, inputs, 20), all_of(sliding_window_attention, inputs, 20), strict=True):
        assert_near(one, other, 1e-12)
    assert sliding_window_attention(*(one.to("meta") for one in inputs), 20).shape == inputs[0].shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_BHSP": torch.ones(2, 3, 4)}, r"give \(B, H, S, P\)"),
        ({"value_BGSP": torch.ones(1, 2, 5, 9)}, "query, key, value have shapes"),
        ({"query_BHSP": torch.ones(1, 3, 5, 8)}, "G divide H = 3"),
        ({"query_BHSP": torch.ones(1, 4, 6, 8)}, "B, S and P must agree"),
        ({"key_BGSP": torch.ones(1, 2, 5, 8, dtype=torch.float16)}, "cast all to one float type"),
        ({"key_BGSP": torch.ones(1, 2, 5, 8, device="meta")}, "one device"),
        ({"window": 0}, "window = 0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"query_BHSP": torch.ones(1, 4, 5, 8), "window": 2}
    given_ |= {"key_BGSP": torch.ones(1, 2, 5, 8), "value_BGSP": torch.ones(1, 2, 5, 8)}
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(**{**given_, **change})
