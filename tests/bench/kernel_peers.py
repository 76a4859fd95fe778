"""Kernels of other packages beside ours, where they are installed: none is a dependency, none is imported elsewhere.

An adapter takes the inputs of a case and calls the package as its users do. Weights that a package keeps another way
are laid out before anything is timed.

    liger-kernel, cut-cross-entropy           wheels without compiled code: pip install, or carry them
    sonic-moe, quack-kernels                  likewise, but they need nvidia-cutlass-dsl, a compiler of 74 MB

megablocks comes as source to be compiled, scattermoe is on no registry, and unsloth's kernels import its whole training
stack: their published figures are quoted in docs/kernels.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Provider = Callable[..., Any]


def as_it_is(inputs: Inputs) -> Inputs:
    """The inputs of the case."""
    return inputs


@dataclass(frozen=True)
class Peer:
    """An op of another package.

    Attributes:
        op: on what ``layout`` makes of the inputs of a case.
        layout: the same numbers as the package keeps them.
    """

    op: Provider
    layout: Callable[[Inputs], Inputs] = as_it_is


def installed(op: str) -> dict[str, Peer]:
    """Peers of an op that can be imported here, by name."""
    found = {}
    for name, (module, adapt) in PEERS.get(op, {}).items():
        try:
            found[name] = adapt(importlib.import_module(module))
        except Exception as error:  # a package that is broken here must not end the run
            MISSING[name] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return found


MISSING: dict[str, str] = {}
"""Peers that could not be imported, and why; filled by ``installed``."""


def _liger_moe(module: ModuleType) -> Peer:
    def op(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ECD: Tensor, down_EDI: Tensor) -> Tensor:
        return module.LigerFusedMoEFunction.apply(x_TD, up_ECD, down_EDI, expert_TK, gate_TK)

    return Peer(op, _rows_of_outputs)


def _sonic_moe(module: ModuleType) -> Peer:
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def op(
        x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ECD: Tensor, down_EDI: Tensor, token_S: Tensor
    ) -> Tensor:
        return module.moe_general_routing_inputs(
            x_TD, gate_TK.flatten(), token_S, expert_TK.flatten(), up_ECD.permute(1, 2, 0), None,
            down_EDI.permute(1, 2, 0), None, len(up_ECD), torch.cuda.current_stream().cuda_stream, swiglu,
            concat_layout=True,
        )[0]  # fmt: skip

    def layout(inputs: Inputs) -> Inputs:
        tokens, top_k = inputs["expert_TK"].shape
        token_S = torch.arange(tokens, dtype=torch.int32, device=inputs["x_TD"].device).repeat_interleave(top_k)
        return {**_rows_of_outputs(inputs), "token_S": token_S}

    return Peer(op, layout)


def _rows_of_outputs(inputs: Inputs) -> Inputs:
    """Weights with a row an output, as ``nn.Linear`` has them: gates before values in up_ECD, C = 2 I."""
    turned = {"up_ECD": inputs["up_ED2I"].flatten(2), "down_EDI": inputs["down_EID"]}
    weights = {name: one.detach().transpose(1, 2).contiguous().requires_grad_() for name, one in turned.items()}
    kept = {name: inputs[name] for name in ("x_TD", "gate_TK")}
    return {**kept, "expert_TK": inputs["expert_TK"].int(), **weights}


def _liger_norm(module: ModuleType) -> Peer:
    return Peer(lambda x, weight_N: module.LigerRMSNormFunction.apply(x, weight_N, 1e-6, 0.0, "llama", False))


def _liger_added(module: ModuleType) -> Peer:
    apply = module.LigerFusedAddRMSNormFunction.apply
    return Peer(lambda x, weight_N, residual: apply(x, residual, weight_N, 1e-6, 0.0, "llama", False))


def _liger_swiglu(module: ModuleType) -> Peer:
    return Peer(lambda x: module.LigerFusedGateUpSiLUMulFunction.apply(x))


def _liger_loss(module: ModuleType) -> Peer:
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    return Peer(lambda x_TD, weight_VD, target_T: apply(x_TD, weight_VD, target_T)[0])


def _cut_loss(module: ModuleType) -> Peer:
    def op(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        return module.linear_cross_entropy(x_TD, weight_VD, target_T, filter_eps=None)  # no gradient is left out

    return Peer(op)


def _quack_norm(module: ModuleType) -> Peer:
    return Peer(lambda x, weight_N: module.rmsnorm(x, weight_N, eps=1e-6))


PEERS: Mapping[str, Mapping[str, tuple[str, Callable[[ModuleType], Peer]]]] = {
    "fused_moe": {
        "liger": ("liger_kernel.ops.fused_moe", _liger_moe),
        "sonicmoe": ("sonicmoe.functional", _sonic_moe),
    },
    "rms_norm": {"liger": ("liger_kernel.ops.rms_norm", _liger_norm), "quack": ("quack.rmsnorm", _quack_norm)},
    "rms_norm + residual": {"liger": ("liger_kernel.ops.fused_add_rms_norm", _liger_added)},
    "swiglu": {"liger": ("liger_kernel.ops.swiglu", _liger_swiglu)},
    "linear_cross_entropy": {
        "liger": ("liger_kernel.ops.fused_linear_cross_entropy", _liger_loss),
        "cut-cross-entropy": ("cut_cross_entropy", _cut_loss),
    },
}
