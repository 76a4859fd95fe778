"""Temporal attention: padding is never seen, a new card gets an answer, events have no order of their own.

Self-attention: equal to a plain loop over heads and queries; rotary positions.
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_ray.kernels.rms_norm import EPS
from deepseek_ray.kernels.rope import rope
from deepseek_ray.models.attention import Attention, TemporalAttention, rotary_waves
from deepseek_ray.models.events import SequenceAdapter
from deepseek_ray.models.layers import Linear, RMSNorm


def make(d_model: int = 8) -> TemporalAttention:
    torch.manual_seed(0)
    return TemporalAttention(d_model, num_heads=2).double()


def inputs(batch: int = 4, length: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    present = torch.ones(batch, length, dtype=torch.bool)
    return torch.randn(batch, 8).double(), torch.randn(batch, length, 8).double(), present


def test_padding_changes_nothing() -> None:
    attention, (h, events, present) = make(), inputs()
    present[:, 3:] = False
    changed = events.clone()
    changed[:, 3:] = 1e6
    torch.testing.assert_close(attention(h, changed, present), attention(h, events[:, :3], present[:, :3]))


def test_a_card_without_history_gets_the_answer_of_the_null_event() -> None:
    attention, (h, events, present) = make(), inputs()
    torch.nn.init.normal_(attention.null_event_D)
    answer = attention(h, events, torch.zeros_like(present))
    assert torch.isfinite(answer).all()
    torch.testing.assert_close(answer[0], answer[1])  # one event, so the query cannot matter


def test_events_are_a_set_their_age_is_in_the_embedding() -> None:
    attention, (h, events, present) = make(), inputs()
    torch.testing.assert_close(attention(h, events.flip(1), present), attention(h, events, present))


def test_it_equals_torchs_own_attention() -> None:
    attention, (h, events, present) = make(), inputs()
    memory = torch.cat([attention.null_event_D.expand(4, 1, 8), events], 1)
    key, value = attention.key_value(memory).chunk(2, -1)
    heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (attention.query(h).unsqueeze(1), key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1)
    torch.testing.assert_close(attention(h, events, present), attention.output(wanted))


def test_gradients_are_right() -> None:
    attention, (h, events, present) = make(), inputs(2, 3)
    present[0, 1:] = False
    assert torch.autograd.gradcheck(
        lambda a, b: attention(a, b, present), (h.requires_grad_(), events.requires_grad_())
    )


def test_the_sequence_adapter_marks_padding_and_bounds_every_channel() -> None:
    s_BNC = torch.tensor([[[1e9, 1e7, 1.0, 0.0, 3.0, 1.0], [0.0, -1.0, 0.0, 0.0, 0.0, 0.0]]])
    events, present = SequenceAdapter(8)(s_BNC)
    assert present.tolist() == [[True, False]]
    assert torch.isfinite(events).all()
    assert events.abs().max() < 20


def make_self(**settings: Any) -> Attention:
    torch.manual_seed(0)
    attention = Attention(12, num_heads=4, num_kv_heads=2, d_head=6, **settings).double()
    for weight in attention.parameters():
        torch.nn.init.normal_(weight)
    return attention


def plain_rotated(x_P: Tensor, position: int, theta: float) -> Tensor:
    """Pair (k, k + P/2) as one complex number, turned."""
    half = len(x_P) // 2
    turned = [
        complex(x_P[k], x_P[k + half]) * cmath.exp(1j * position * theta ** (-2 * k / len(x_P))) for k in range(half)
    ]
    return torch.tensor([one.real for one in turned] + [one.imag for one in turned], dtype=torch.float64)


def plain_heads(x_SD: Tensor, linear: Linear, norm: RMSNorm | None) -> list[list[Tensor]]:
    """Heads of each position, one at a time."""
    rows = [list(y.split(6)) for y in x_SD @ linear.weight_OD.T]
    if norm is None:
        return rows
    return [[h / (h.square().mean() + EPS).sqrt() * norm.weight_D for h in row] for row in rows]


def plain(attention: Attention, x_SD: Tensor) -> Tensor:
    """One head and one query at a time."""
    query = plain_heads(x_SD, attention.query, attention.query_norm)
    key = plain_heads(x_SD, attention.key, attention.key_norm)
    value = plain_heads(x_SD, attention.value, None)
    answers = []
    for s in range(len(x_SD)):
        mixed = []
        for head in range(4):
            kv = head // 2  # two query heads share one key head
            near = [t for t in range(len(x_SD)) if not attention.causal or t <= s]
            near = [t for t in near if attention.window is None or abs(s - t) < attention.window]
            asked = plain_rotated(query[s][head], s, attention.rope_theta)
            score = torch.stack([asked @ plain_rotated(key[t][kv], t, attention.rope_theta) for t in near]) / 6**0.5
            share = score.softmax(0)
            mixed.append(sum(share[i] * value[t][kv] for i, t in enumerate(near)))
        answers.append(torch.cat(mixed) @ attention.output.weight_OD.T)
    return torch.stack(answers)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_self_attention_equals_a_plain_loop(causal: bool, window: int | None, qk_norm: bool) -> None:
    attention = make_self(causal=causal, window=window, qk_norm=qk_norm, rope_theta=100.0)
    x_BSD = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x_BSD), torch.stack([plain(attention, x_SD) for x_SD in x_BSD]))


@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_a_causal_position_never_sees_the_future(window: int | None) -> None:
    attention, x_BSD = make_self(window=window), torch.randn(1, 6, 12, dtype=torch.float64)
    changed_BSD = x_BSD.clone()
    changed_BSD[:, 4:] = 1e3
    torch.testing.assert_close(attention(changed_BSD)[:, :4], attention(x_BSD)[:, :4])


def test_self_attentions_gradients_are_right() -> None:
    attention = make_self(window=2, qk_norm=True)
    x_BSD = torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x_BSD,))


def test_rotation_keeps_norms_and_products_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    query_P, key_P = torch.randn(2, 8, dtype=torch.float64)
    wave_SK2 = rotary_waves(40, 8, 100.0, query_P)
    query_SP, key_SP = (one[0, 0] for one in rope(query_P.expand(1, 1, 40, 8), key_P.expand(1, 1, 40, 8), wave_SK2))
    torch.testing.assert_close(query_SP.norm(dim=-1), query_P.norm().expand(40))
    product_SS = query_SP @ key_SP.T
    for distance in (-7, 0, 3, 20):
        along = product_SS.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand(len(along)))
    assert product_SS[0].std() > 0.1  # and on the distance it does depend
    assert torch.equal(query_SP[0], query_P)  # the first position is not turned


def test_angles_are_exact_far_into_a_long_sequence() -> None:
    wave_K2 = rotary_waves(100_001, 4, 10_000.0, torch.empty(0))[-1]
    wanted = [(math.cos(angle), math.sin(angle)) for angle in (100_000.0, 1_000.0)]
    torch.testing.assert_close(wave_K2, torch.tensor(wanted), rtol=0, atol=1e-6)
