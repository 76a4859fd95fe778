"""The tensor axis (tp) with sequence parallelism: heads, hidden widths and the vocabulary are split over processes.

Between sublayers each process holds its part of the sequence (Korthikanti et al. 2022, arXiv:2205.05198): a sublayer
gathers the sequence, computes with its shard of the weights, and the summands are scattered again. Weights that stay
whole (norms, routers) see a part of the tokens or of the sum, so their gradients are summands too (models/layers.py).

Legend: B samples, S positions, D model width, V vocabulary, N = B * S tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from deepseek_ray.kernels.linear_cross_entropy import linear_lse
from deepseek_ray.models.adapters import TokenAdapter
from deepseek_ray.models.backbone import Block
from deepseek_ray.models.heads.sequence import SequenceHead

PLAN: dict[str, Placement] = {
    "embed.weight": Shard(0),
    "attention.query.weight_OD": Shard(0),
    "attention.key.weight_OD": Shard(0),
    "attention.value.weight_OD": Shard(0),
    "attention.output.weight_OD": Shard(1),
    "up_2HD": Shard(1),
    "down_DH": Shard(1),
    "up_ED2I": Shard(3),
    "down_EID": Shard(1),
    "logits.project.weight_OD": Shard(0),
}
"""End of a weight's name -> the dimension that tp splits; all other weights stay whole on every process."""


def placement_of(name: str, *, pooled: bool = False) -> Placement:
    """Where tp puts a weight.

    Args:
        name: of the weight.
        pooled: the head gives one answer a sample; its few outputs are not split.
    """
    found = next((place for end, place in PLAN.items() if name.endswith(end)), Replicate())
    return Replicate() if pooled and name.endswith("logits.project.weight_OD") else found


def shard_weights(module: nn.Module, mesh: DeviceMesh, *, pooled: bool = False) -> None:
    """Replace the whole weights of a module, but not of its experts, by this process's shards."""
    for owner in module.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            if name in ("up_ED2I", "down_EID") or isinstance(weight, DTensor):
                continue
            place = placement_of(_full_name(module, owner, name), pooled=pooled)
            sharded = distribute_tensor(weight.detach(), mesh, [place], src_data_rank=None)
            owner.register_parameter(name, nn.Parameter(sharded))


def split_adapter(adapter: nn.Module, mesh: DeviceMesh) -> None:
    """The adapter's output becomes this process's part of the sequence."""
    if isinstance(adapter, TokenAdapter):
        adapter.embed.forward = _ShardedEmbedding(adapter.embed, mesh)  # type: ignore[assignment]
        return

    def keep_part(_: nn.Module, __: Any, y_BSD: Tensor) -> Tensor:
        return y_BSD.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].clone()  # FSDP wants no view

    adapter.register_forward_hook(keep_part)


def split_block(block: Block, mesh: DeviceMesh) -> None:
    """Gather the sequence before attention and experts, scatter the summands behind them."""
    block.shard = mesh.get_local_rank()
    for sublayer in (block.attention, block.feed):
        sublayer.register_forward_pre_hook(lambda _, inputs: (gather_sequence(inputs[0], mesh), *inputs[1:]))
        sublayer.register_forward_hook(lambda _, __, y_BSD: scatter_sequence(y_BSD, mesh))


def split_head(head: SequenceHead, mesh: DeviceMesh) -> None:
    """The head's last map sees the whole sequence; its loss joins what each process finds in its part of V."""
    head.logits.register_forward_pre_hook(lambda _, inputs: (gather_sequence(inputs[0], mesh),))
    head.loss = partial(_split_loss, mesh=mesh)


def _split_loss(h_BSD: Tensor, weight_VD: Tensor, target_BS: Tensor, mesh: DeviceMesh) -> Tensor:
    first = mesh.get_local_rank() * len(weight_VD)
    lse_BS, aim_BS = linear_lse(gather_sequence(h_BSD, mesh), weight_VD, target_BS - first)
    loss_BS: Tensor = _JoinedCrossEntropy.apply(lse_BS, aim_BS, mesh.get_group())  # type: ignore[no-untyped-call]
    return loss_BS


def gather_sequence(x_BSD: Tensor, mesh: DeviceMesh) -> Tensor:
    """Parts of the sequence -> the whole; backward sums what each process found and scatters it."""
    part = DTensor.from_local(x_BSD, mesh, [Shard(1)], run_check=False)
    return part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def scatter_sequence(y_BSD: Tensor, mesh: DeviceMesh) -> Tensor:
    """Summands of the whole sequence -> this process's part of the sum; backward gathers."""
    summand = DTensor.from_local(y_BSD, mesh, [Partial()], run_check=False)
    return summand.redistribute(placements=[Shard(1)]).to_local()


class _ShardedEmbedding:
    """Look up the tokens whose vectors are here; the sum over tp has all of them."""

    def __init__(self, embed: nn.Embedding, mesh: DeviceMesh) -> None:
        self.embed, self.mesh = embed, mesh

    def __call__(self, token_BS: Tensor) -> Tensor:
        weight_VD = self.embed.weight
        assert isinstance(weight_VD, DTensor)
        table_VD = weight_VD.to_local()
        slot_BS = token_BS - self.mesh.get_local_rank() * len(table_VD)
        here_BS = (slot_BS >= 0) & (slot_BS < len(table_VD))
        found_BSD = nn.functional.embedding(slot_BS.where(here_BS, 0), table_VD) * here_BS.unsqueeze(-1)
        return scatter_sequence(found_BSD, self.mesh).clone()  # FSDP wants no view


def cross_entropy(logit_NV: Tensor, target_N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Each token's cross-entropy (N,), of logits whose vocabulary is split over a group.

    Args:
        logit_NV: this process's columns; column 0 is number ``rank * V`` of the vocabulary.
        target_N: token numbers of the whole vocabulary.
        group: the tp processes; None where the columns are all here.
    """
    wide_NV = logit_NV.to(torch.promote_types(logit_NV.dtype, torch.float32))
    if group is None:
        return nn.functional.cross_entropy(wide_NV, target_N, reduction="none")
    column_N = target_N - dist.get_rank(group) * logit_NV.shape[-1]
    here_N = (column_N >= 0) & (column_N < logit_NV.shape[-1])
    aim_N = wide_NV.gather(-1, column_N.where(here_N, 0)[:, None]).squeeze(-1) * here_N
    loss_N: Tensor = _JoinedCrossEntropy.apply(wide_NV.logsumexp(-1), aim_N, group)  # type: ignore[no-untyped-call]
    return loss_N


class _JoinedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of parts of a vocabulary, without their logits (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

    Each process gives the log-sum-exp of its logits, and the target's logit where it is among them, else 0.
    """

    @staticmethod
    def forward(ctx: Any, lse: Tensor, aim: Tensor, group: dist.ProcessGroup) -> Tensor:
        top = lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        sums = torch.stack([(lse - top).exp(), aim])
        dist.all_reduce(sums, group=group)
        whole = top + sums[0].log()
        ctx.save_for_backward((lse - whole).exp())
        return whole - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (share,) = ctx.saved_tensors
        return grads[0] * share, -grads[0], None


def _full_name(root: nn.Module, owner: nn.Module, name: str) -> str:
    path = next(path for path, module in root.named_modules() if module is owner)
    return f"{path}.{name}" if path else name
