"""Random samples: a function of their number alone, of the shape and type that the backbone takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.data.samples import RandomSamples


def make(seed: int = 0, seq_len: int = 8, dtype: torch.dtype = torch.float64, **shape: Any) -> RandomSamples:
    small = {"vocab_size": 50, "num_channels": 2, "patch_size": 3, "num_classes": 4}
    return RandomSamples(BackboneConfig.model_validate(small | shape), seq_len, seed, dtype)


@pytest.mark.parametrize("head", ["language", "classification"])
@pytest.mark.parametrize(("adapter", "shape"), [("tokens", (8,)), ("events", (8, 2)), ("patches", (2, 6, 6, 6))])
def test_samples_have_the_shape_that_adapter_and_head_take(adapter: str, shape: tuple[int, ...], head: str) -> None:
    x, target = make(adapter=adapter, head=head).take(torch.arange(40))
    assert x.shape == (40, *shape)
    assert x.dtype == (torch.int64 if adapter == "tokens" else torch.float64)
    assert target.shape == ((40, 8) if head == "language" else (40,))
    assert target.dtype == torch.int64
    assert target.min() >= 0
    assert target.max() < (50 if head == "language" else 4)
    assert len(target.unique()) > (20 if head == "language" else 3)


@pytest.mark.parametrize("adapter", ["tokens", "events", "patches"])
def test_a_sample_depends_on_its_number_and_the_seed_only(adapter: str) -> None:
    x, target = make(adapter=adapter).take(torch.tensor([5, 6, 7]))
    again, same = make(adapter=adapter).take(torch.tensor([7, 5]))
    assert torch.equal(again, x[[2, 0]])
    assert torch.equal(same, target[[2, 0]])
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(make(seed=1, adapter=adapter).take(torch.tensor([5]))[0][0], x[0])


def test_nothing_outside_changes_the_draw_and_the_draw_changes_nothing_outside() -> None:
    torch.manual_seed(1)
    first, state = make().take(torch.arange(3))[0], torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(make().take(torch.arange(3))[0], first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_type_holds_the_same_numbers() -> None:
    wide, _ = make(adapter="events").take(torch.arange(3))
    narrow, _ = make(adapter="events", dtype=torch.bfloat16).take(torch.arange(3))
    assert torch.equal(narrow, wide.bfloat16())


def test_targets_of_text_are_the_next_tokens() -> None:
    x_BS, target_BS = make().take(torch.arange(5))
    assert torch.equal(x_BS[:, 1:], target_BS[:, :-1])


def test_tokens_follow_zipfs_law() -> None:
    x_BS, _ = make(seq_len=200).take(torch.arange(100))
    share_V = torch.bincount(x_BS.flatten(), minlength=50) / x_BS.numel()
    wanted_V = 1 / torch.arange(1.0, 51.0)
    torch.testing.assert_close(share_V, wanted_V / wanted_V.sum(), rtol=0, atol=0.01)
