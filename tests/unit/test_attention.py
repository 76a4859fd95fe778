"""Temporal attention: padding is never seen, a new card gets an answer, events have no order of their own."""

from __future__ import annotations

import torch

from deepseek_ray.models.attention import TemporalAttention
from deepseek_ray.models.events import SequenceAdapter


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
