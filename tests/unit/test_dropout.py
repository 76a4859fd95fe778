"""Dropout: the share and the scale, the same mask however the batch and the sequence are cut, splitmix64 itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_ray.models.dropout import dropout, mix, sample_keys

WORD = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The published algorithm in Python's integers: the first number from a state."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def keys(seed: int = 1, step: int = 2, count: int = 4) -> Tensor:
    return sample_keys(seed, step, torch.arange(count))


def mask(key_B: Tensor, layer: int = 0, rate: float = 0.5, length: int = 6, width: int = 8) -> Tensor:
    return dropout(torch.ones(len(key_B), length, width), rate, key_B, layer) != 0


def test_mix_gives_the_published_numbers() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    got = mix(torch.tensor([0, 1234567, -1])).tolist()
    assert got == [signed(splitmix64(state & WORD)) for state in (0, 1234567, -1)]


@given(st.integers(-(1 << 63), (1 << 63) - 1))
@settings(deadline=None)
def test_mix_is_splitmix64_for_every_number(number: int) -> None:
    assert mix(torch.tensor([number])).item() == signed(splitmix64(number & WORD))


def test_an_element_is_kept_where_its_number_of_the_stream_is_at_least_the_rate() -> None:
    seed, step, sample, layer, rate, width = 3, 9, 5, 7, 0.3, 4
    key = splitmix64((sample + splitmix64((step + splitmix64(seed)) & WORD)) & WORD)
    key = splitmix64((key + layer) & WORD)
    places = range(3 * width)
    kept = [(splitmix64((key + i * 0x9E3779B97F4A7C15) & WORD) >> 11) * 2.0**-53 >= rate for i in places]
    key_B = sample_keys(seed, step, torch.tensor([sample]))
    assert mask(key_B, layer, rate, length=3, width=width).flatten().tolist() == kept


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_is_the_rate_and_what_is_left_keeps_the_mean(rate: float) -> None:
    y_BSD = dropout(torch.ones(4, 50, 500, dtype=torch.float64), rate, keys(), layer=0)
    kept = y_BSD != 0
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - rate)) < 5 * deviation
    assert torch.equal(y_BSD[kept], torch.full_like(y_BSD[kept], 1.0) / (1.0 - rate))


def test_rate_zero_changes_nothing() -> None:
    x_BSD = torch.randn(4, 3, 5)
    assert torch.equal(dropout(x_BSD, 0.0, keys(), layer=0), x_BSD)


def test_the_mask_does_not_depend_on_how_the_batch_is_cut() -> None:
    whole, key_B = mask(keys()), keys()
    assert torch.equal(whole, torch.cat([mask(key_B[:1]), mask(key_B[1:])]))
    assert torch.equal(whole[[2, 0]], mask(key_B[[2, 0]]))


def test_the_mask_does_not_depend_on_how_the_sequence_is_cut() -> None:
    x_BSD, key_B = torch.randn(4, 6, 8), keys()
    parts = [dropout(part, 0.5, key_B, 3, first) for part, first in ((x_BSD[:, :2], 0), (x_BSD[:, 2:], 2))]
    assert torch.equal(torch.cat(parts, dim=1), dropout(x_BSD, 0.5, key_B, 3))
    assert not torch.equal(parts[1], dropout(x_BSD[:, 2:], 0.5, key_B, 3))


def test_samples_layers_steps_and_seeds_have_masks_of_their_own() -> None:
    masks = [*mask(keys()), *mask(keys(), layer=1), *mask(keys(step=3)), *mask(keys(seed=2))]
    share = torch.stack([(one == two).double().mean() for i, one in enumerate(masks) for two in masks[:i]])
    assert len(share) == 16 * 15 // 2
    assert share.max() < 0.85  # 1 for equal masks, about a half for independent ones
    assert abs(share.mean() - 0.5) < 0.03


def test_the_gradient_passes_where_the_value_did() -> None:
    x_BSD = torch.randn(4, 6, 8, requires_grad=True)
    dropout(x_BSD, 0.5, keys(), layer=0).sum().backward()
    assert x_BSD.grad is not None
    assert torch.equal(x_BSD.grad != 0, mask(keys()))


def test_the_type_stays() -> None:
    assert dropout(torch.ones(4, 2, 2, dtype=torch.bfloat16), 0.5, keys(), layer=0).dtype == torch.bfloat16
