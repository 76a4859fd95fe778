"""Which rows of a grouped matrix product belong to which expert: found on the device, without sorting or atomics.

Counting sort in four small kernels: count experts per block of pairs, add the counts up over blocks, lay experts and
their tiles out one after another, place every pair. All of it is integer work in a fixed order, so the same choices
give the same bits, and nothing is copied to the host: the number of tiles is bounded above by what the host knows.

Legend: T tokens, K choices a token, S = T * K pairs (pair = token * K + choice), E experts, N tiles at most,
B blocks of pairs. Rows are pairs sorted by expert, in order of the pair within one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

from deepseek_ray.kernels.aot import Variant

SMALLEST_TILE = 16
_PAIRS = 128
_EXPERTS = 64
_TILE_AREA = 8192


class Routing(NamedTuple):
    """Rows sorted by expert, all int32.

    Attributes:
        offset_E: E + 1 numbers; rows of expert e are offset[e] up to offset[e + 1]. The last one is how many are kept.
        pair_S: the pair of a row; undefined behind the last row that is kept.
        row_S: the row of a pair, -1 for a pair that no expert here takes.
        tile_N2: expert and first row of each tile, -1 behind the last one.
    """

    offset_E: Tensor
    pair_S: Tensor
    row_S: Tensor
    tile_N2: Tensor


def num_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """At most so many tiles of block_rows rows cover the pairs, each tile of one expert."""
    return -(-num_pairs // block_rows) + num_experts


def route_ref(expert_TK: Tensor, num_experts: int, block_rows: int) -> Routing:
    """Plain torch: what ``route`` finds, with -1 for what it leaves undefined."""
    choice_S = expert_TK.flatten().long()
    kept_S = (choice_S >= 0) & (choice_S < num_experts)
    order_S = torch.where(kept_S, choice_S, num_experts).argsort(stable=True)
    order_S = order_S[: int(kept_S.sum())]
    count_E = torch.bincount(choice_S[kept_S], minlength=num_experts)
    offset_E = torch.cat([count_E.new_zeros(1), count_E.cumsum(0)])
    pair_S = torch.full_like(choice_S, -1)
    pair_S[: len(order_S)] = order_S
    row_S = torch.full_like(choice_S, -1)
    row_S[order_S] = torch.arange(len(order_S), device=choice_S.device)
    tile_N2 = torch.full((num_tiles(len(choice_S), num_experts, SMALLEST_TILE), 2), -1, device=choice_S.device)
    tiles = [(e, row) for e in range(num_experts) for row in range(int(offset_E[e]), int(offset_E[e + 1]), block_rows)]
    if tiles:
        tile_N2[: len(tiles)] = torch.tensor(tiles, device=choice_S.device)
    return Routing(*(found.int() for found in (offset_E, pair_S, row_S, tile_N2)))


def empty_routing(expert_TK: Tensor, num_experts: int) -> Routing:
    """Room for a routing; tiles are enough for any height, so that shapes do not depend on the one that is chosen."""
    num_pairs = expert_TK.numel()
    room = num_tiles(num_pairs, num_experts, SMALLEST_TILE)
    sizes = ((num_experts + 1,), (num_pairs,), (num_pairs,), (room, 2))
    return Routing(*(torch.empty(size, dtype=torch.int32, device=expert_TK.device) for size in sizes))


def route(expert_TK: Tensor, num_experts: int, block_rows: int) -> Routing:
    """Sort pairs by expert with Triton kernels.

    Args:
        expert_TK: chosen experts, any integer type; a pair with another number than 0 .. E - 1 is dropped.
        num_experts: E.
        block_rows: height of a tile, at least SMALLEST_TILE.
    """
    choice_S = expert_TK.reshape(-1).contiguous()
    found = empty_routing(choice_S, num_experts)
    num_pairs, device = choice_S.numel(), choice_S.device
    num_blocks = triton.cdiv(num_pairs, _PAIRS)
    before_EB = torch.empty((num_experts, num_blocks), dtype=torch.int32, device=device)
    count_E = torch.empty((num_experts,), dtype=torch.int32, device=device)
    _count[(num_blocks,)](choice_S, before_EB, num_pairs, num_experts, num_blocks, BLOCK_S=_PAIRS, BLOCK_E=_EXPERTS)
    _add_up[(num_experts,)](before_EB, count_E, num_blocks, BLOCK=_scan_block(num_blocks))
    block_e, block_n = _tile_block(num_experts)
    room = len(found.tile_N2)
    _lay_out[(triton.cdiv(room, block_n),)](
        count_E, found.offset_E, found.tile_N2, num_experts, room, BLOCK_M=block_rows, BLOCK_N=block_n, BLOCK_E=block_e
    )
    _place[(num_blocks,)](
        choice_S, found.offset_E, before_EB, found.pair_S, found.row_S, num_pairs, num_experts, num_blocks,
        BLOCK_S=_PAIRS,
    )  # fmt: skip
    return found


def _scan_block(num_blocks: int) -> int:
    return max(16, min(2048, triton.next_power_of_2(num_blocks)))


def _tile_block(num_experts: int) -> tuple[int, int]:
    block_e = max(16, triton.next_power_of_2(num_experts))
    return block_e, max(1, min(64, _TILE_AREA // block_e))


def aot_variants() -> list[Variant]:
    """The four kernels for 128 experts."""
    block_e, block_n = _tile_block(128)
    counts = {"num_pairs": "i32", "num_experts": "i32", "num_blocks": "i32"}
    pairs = {"BLOCK_S": _PAIRS}
    count = {"choice_ptr": "*i64", "before_ptr": "*i32", **counts}
    place = {"choice_ptr": "*i64", "offset_ptr": "*i32", "before_ptr": "*i32", "pair_ptr": "*i32", "row_ptr": "*i32"}
    lay_out = {"count_ptr": "*i32", "offset_ptr": "*i32", "tile_ptr": "*i32", "num_experts": "i32", "num_tiles": "i32"}
    tile = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_E": block_e}
    add_up = {"before_ptr": "*i32", "count_ptr": "*i32", "num_blocks": "i32"}
    return [
        Variant("moe_routing", _count, count, {**pairs, "BLOCK_E": _EXPERTS}, label="count"),
        Variant("moe_routing", _add_up, add_up, {"BLOCK": 2048}, label="add up"),
        Variant("moe_routing", _lay_out, lay_out, tile, label="lay out"),
        Variant("moe_routing", _place, {**place, **counts}, pairs, label="place"),
    ]


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _known(choice, num_experts):  # type: ignore[no-untyped-def, unused-ignore]
        # Compared before it is narrowed: 2**32 is not expert 0.
        return tl.where((choice >= 0) & (choice < num_experts), choice, -1).to(tl.int32)

    @triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_blocks"])  # type: ignore[untyped-decorator, unused-ignore]
    def _count(  # type: ignore[no-untyped-def, unused-ignore]
        choice_ptr, before_ptr, num_pairs, num_experts, num_blocks, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr
    ):
        # Comparing all with all is less work than it seems (128 x 64 a step) and needs no atomics.
        block = tl.program_id(0)
        pairs = block * BLOCK_S + tl.arange(0, BLOCK_S)
        choice = _known(tl.load(choice_ptr + pairs, mask=pairs < num_pairs, other=-1), num_experts)
        for first in range(0, num_experts, BLOCK_E):
            experts = first + tl.arange(0, BLOCK_E)
            count = tl.sum((experts[:, None] == choice[None, :]).to(tl.int32), axis=1)
            at = experts.to(tl.int64) * num_blocks + block
            tl.store(before_ptr + at, count, mask=experts < num_experts)

    @triton.jit(do_not_specialize=["num_blocks"])  # type: ignore[untyped-decorator, unused-ignore]
    def _add_up(before_ptr, count_ptr, num_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
        # Counts of one expert become the sums of the blocks before.
        expert = tl.program_id(0)
        row_ptr = before_ptr + expert.to(tl.int64) * num_blocks
        total = 0
        for first in range(0, num_blocks, BLOCK):
            blocks = first + tl.arange(0, BLOCK)
            count = tl.load(row_ptr + blocks, mask=blocks < num_blocks, other=0)
            tl.store(row_ptr + blocks, total + tl.cumsum(count, 0) - count, mask=blocks < num_blocks)
            total += tl.sum(count, axis=0)
        tl.store(count_ptr + expert, total)

    @triton.jit(do_not_specialize=["num_experts", "num_tiles"])  # type: ignore[untyped-decorator, unused-ignore]
    def _lay_out(  # type: ignore[no-untyped-def, unused-ignore]
        count_ptr, offset_ptr, tile_ptr, num_experts, num_tiles,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        # Every program adds up all experts again: cheaper than another launch.
        experts = tl.arange(0, BLOCK_E)
        count = tl.load(count_ptr + experts, mask=experts < num_experts, other=0)
        row_end = tl.cumsum(count, 0)
        tile_count = (count + BLOCK_M - 1) // BLOCK_M
        tile_end = tl.cumsum(tile_count, 0)
        if tl.program_id(0) == 0:
            tl.store(offset_ptr, 0)
            tl.store(offset_ptr + 1 + experts, row_end, mask=experts < num_experts)
        tiles = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        expert = tl.sum((tile_end[None, :] <= tiles[:, None]).to(tl.int32), axis=1)
        row = (row_end - count)[None, :] + (tiles[:, None] - (tile_end - tile_count)[None, :]) * BLOCK_M
        row = tl.sum(tl.where(experts[None, :] == expert[:, None], row, 0), axis=1)
        there = expert < num_experts
        tl.store(tile_ptr + 2 * tiles, tl.where(there, expert, -1), mask=tiles < num_tiles)
        tl.store(tile_ptr + 2 * tiles + 1, tl.where(there, row, -1), mask=tiles < num_tiles)

    @triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_blocks"])  # type: ignore[untyped-decorator, unused-ignore]
    def _place(  # type: ignore[no-untyped-def, unused-ignore]
        choice_ptr, offset_ptr, before_ptr, pair_ptr, row_ptr, num_pairs, num_experts, num_blocks,
        BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        place = tl.arange(0, BLOCK_S)
        pairs = block * BLOCK_S + place
        inside = pairs < num_pairs
        choice = _known(tl.load(choice_ptr + pairs, mask=inside, other=-1), num_experts)
        earlier = (choice[None, :] == choice[:, None]) & (place[None, :] < place[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        kept = choice >= 0
        before = tl.load(before_ptr + choice.to(tl.int64) * num_blocks + block, mask=kept, other=0)
        row = tl.load(offset_ptr + choice, mask=kept, other=0) + before + rank
        tl.store(pair_ptr + row, pairs, mask=kept)
        tl.store(row_ptr + pairs, tl.where(kept, row, -1), mask=inside)
