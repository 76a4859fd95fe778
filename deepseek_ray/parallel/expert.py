"""The expert axis (ep): each process holds some experts, tokens travel to theirs and back. Nothing is dropped.

Legend: S chosen (token, expert) pairs of this process, s pairs that reach its experts, D width, E experts, e experts
here, R processes of the axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class ExpertExchange:
    """All-to-all with uneven counts; its backward is the all-to-all the other way.

    Args:
        group: processes of the axis; process r holds experts ``r * E / R`` to ``(r + 1) * E / R - 1``.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def __call__(self, x_SD: Tensor, count_E: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Send rows, sorted by expert, to their experts.

        Returns:
            The rows for the experts here (s, D), sorted by expert and then by sender; their count (e,); and the way
            back, from outputs in that order to outputs in the order of ``x_SD``.
        """
        count_Re = count_E.view(self.size, -1)
        arrived_Re = torch.empty_like(count_Re)
        dist.all_to_all_single(arrived_Re, count_Re.contiguous(), group=self.group)
        sent, received = (counts.sum(1).tolist() for counts in (count_Re, arrived_Re))
        order_s = _by_expert(arrived_Re)
        rows_sD = _exchange(x_SD, sent, received, self.group)[order_s]

        def back(y_sD: Tensor) -> Tensor:
            as_arrived = torch.empty_like(y_sD).index_copy(0, order_s, y_sD)
            return _exchange(as_arrived, received, sent, self.group)

        return rows_sD, arrived_Re.sum(0), back


def _by_expert(arrived_Re: Tensor) -> Tensor:
    """(s,) positions of the arrived rows (by sender, then expert) in the order by expert, then sender."""
    runs_Re = arrived_Re.flatten().cumsum(0).view_as(arrived_Re) - arrived_Re
    length, first = arrived_Re.T.flatten(), runs_Re.T.flatten()
    place = torch.arange(int(length.sum()), device=length.device)
    run = torch.repeat_interleave(torch.arange(len(length), device=length.device), length)
    return first[run] + place - (length.cumsum(0) - length)[run]


def _exchange(x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    y_sD: Tensor = _AllToAll.apply(x_SD, sent, received, group)  # type: ignore[no-untyped-call]
    return y_sD


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits = sent, received, group
        y_sD = x_SD.new_empty(sum(received), *x_SD.shape[1:])
        dist.all_to_all_single(y_sD, x_SD.contiguous(), received, sent, group=group)
        return y_sD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.splits
        x_SD = grads[0].new_empty(sum(sent), *grads[0].shape[1:])
        dist.all_to_all_single(x_SD, grads[0].contiguous(), sent, received, group=group)
        return x_SD, None, None, None
