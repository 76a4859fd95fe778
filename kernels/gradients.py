"""Which gradients the backward pass that is running asks a fused op for.

``ctx.needs_input_grad`` says what was known in the forward pass. Schedules of a pipeline that split the backward pass
(ZBV, DualPipeV; Qi et al. 2023, arXiv:2401.10241) run it twice, for the inputs and later for the weights. Torch's own
nodes ask the engine what is wanted and compute that; an op of ours that does not ask does everything twice.
"""

from __future__ import annotations

from typing import Any

import torch


def asked_for(ctx: Any) -> list[bool]:
    """For each tensor that the op got, in order, whether this pass wants its gradient."""
    return [node is not None and _wanted(node) for node, _ in ctx.next_functions]


def _wanted(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it does not answer for a leaf whose gradient autograd.grad returns: that one is wanted
        return True
