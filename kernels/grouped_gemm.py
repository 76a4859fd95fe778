"""Grouped matrix products for experts: every row times the matrix of its expert, and the gradient of those matrices.

Rows lie sorted by expert (see moe_routing.py); a tile of rows belongs to one expert. Programs of one expert run next
to each other, in groups of GROUP tiles of rows, so that its weights and rows are read from memory once and then from
the L2 cache. Each program owns its tile of the output and adds up in one fixed order: no atomics.

Legend: S rows, E experts, K depth of a product, N its width, M height of a weight's gradient, R and C rows and columns
of an expert's matrix as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # not on every platform; the reference then serves
    triton = None

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.moe_routing import SMALLEST_TILE, Routing, num_tiles
from deepseek_ray.kernels.tuning import Settings, bucket, settings_for

WIDE = {"BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 16, "TMA": 1, "num_warps": 8, "num_stages": 4}
"""One program a multiprocessor with the largest tile: most work for a byte that is loaded."""
PAIRED = {"BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 16, "TMA": 1, "num_warps": 4, "num_stages": 3}
"""Two programs a multiprocessor: while one stores its tile the other one multiplies."""
OUTER = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 5}
"""Three buffers: the pipeline spends the other stages on fetching indices before rows."""
LARGEST_BYTES = 196640
"""Shared memory of the largest of these and of moe_swiglu.py: consumer chips have a copy engine, but half of it."""
SHORT_DEPTH = 1024
ROW_CANDIDATES: list[Settings] = [
    {"BLOCK_N": n, "BLOCK_K": 64, "GROUP": group, "TMA": tma, "num_warps": warps, "num_stages": stages}
    for n, warps in ((256, 8), (128, 8), (128, 4), (64, 4))
    for stages in (3, 4)
    for tma in (1, 0)
    for group in (8, 16)
]
OUTER_CANDIDATES: list[Settings] = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}
    for m, n, warps in ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4))
    for k in (32, 64)
    for stages in (3, 5, 7)
]


def block_rows(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Height of a tile of rows: what the experts get on average decides, so that padding stays small."""
    average = num_rows // max(num_experts, 1)
    if average < 32:
        return SMALLEST_TILE
    return 128 if average >= 128 and dtype != torch.float32 else 64


def row_class(dtype: torch.dtype, width: int, depth: int, height: int) -> tuple[object, ...]:
    """What the best settings of a kernel on tiles of rows depend on."""
    return (dtype, width, depth, height)


def outer_class(dtype: torch.dtype, height: int, width: int, average_rows: int) -> tuple[object, ...]:
    """What the best settings of ``outer_products`` depend on."""
    return (dtype, height, width, bucket(average_rows))


class Kind(NamedTuple):
    """What decides the tile, besides the shape.

    Attributes:
        label: for tables.
        targets: of aot.py that launch it.
        dtype: of rows and weights.
        roomy: the device has Hopper's copy engine and shared memory for the largest tiles.
        even: rows are multiples of 16 numbers, at addresses that are multiples of 16: wide loads.
        amd: not NVIDIA's.
    """

    label: str
    targets: tuple[str, ...]
    dtype: torch.dtype
    roomy: bool = False
    even: bool = True
    amd: bool = False


KINDS = (
    Kind("", ("sm_90",), torch.bfloat16, roomy=True),
    Kind(" small", ("sm_80", "sm_120"), torch.bfloat16),
    Kind(" small", ("gfx942",), torch.bfloat16, amd=True),
    Kind(" fp32", ("sm_80", "sm_90", "sm_120"), torch.float32),
    Kind(" odd", ("sm_80", "sm_90", "sm_120"), torch.bfloat16, even=False),
    Kind(" fp32 odd", ("sm_90", "sm_120"), torch.float32, even=False),
)


def for_launch(default: Settings, rows: Tensor, *sizes: int) -> Settings:
    """``tile_of`` for these rows, on their device, in products of matrices with these sizes."""
    even = rows.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in sizes)
    amd = torch.version.hip is not None
    return tile_of(default, Kind("", (), rows.dtype, roomy(rows.device), even, amd))


def tile_of(default: Settings, kind: Kind) -> Settings:
    """Defaults are for Hopper in half precision; here is what runs elsewhere.

    Less shared memory: half the tile and three buffers, since products go through registers there. No matrix units for
    float32, and tiles from the copy engine cost it 320 bytes of stack and more. Rows that are not aligned come number
    by number, with an address in a register each: a quarter of the tile.
    """
    if kind.dtype == torch.float32:
        tile = _changed(default, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, TMA=0, num_warps=4, num_stages=2)
    elif kind.amd:
        tile = _changed(default, BLOCK_N=default["BLOCK_N"] // 2, BLOCK_K=32, TMA=0, num_stages=2)
    elif kind.roomy and kind.even:
        return default
    else:
        buffers = min(default["num_stages"], 3) if "TMA" in default else default["num_stages"]
        tile = _changed(default, BLOCK_N=default["BLOCK_N"] // 2, TMA=0, num_stages=buffers)
    if kind.even:
        return tile
    return _changed(tile, BLOCK_N=tile["BLOCK_N"] // 2, BLOCK_K=32, num_warps=8, num_stages=2)


def _changed(tile: Settings, **change: int) -> Settings:
    return {name: change.get(name, value) for name, value in tile.items()}


def fit(settings: Settings, width: int, depth: int) -> Settings:
    """Settings with tiles no larger than the matrices."""
    return {**settings, "BLOCK_N": _cut(settings["BLOCK_N"], width), "BLOCK_K": _cut(settings["BLOCK_K"], depth)}


def multiply_rows(
    left_SK: Tensor, w_ERC: Tensor, routing: Routing, height: int, *, transposed: bool, settings: Settings | None = None
) -> Tensor:
    """Rows times the matrix of their expert, (S, K) -> (S, N); rows that no expert takes are undefined.

    Args:
        left_SK: contiguous rows.
        w_ERC: contiguous matrices, R = K and C = N, or the other way round when ``transposed``.
        routing: of tiles with ``height`` rows.
        height: of a tile.
        transposed: multiply by the transposed matrices, as a backward does.
        settings: instead of the measured ones.
    """
    num_experts, num_rows, num_columns = w_ERC.shape
    depth, width = (num_columns, num_rows) if transposed else (num_rows, num_columns)
    default = for_launch(PAIRED if depth <= SHORT_DEPTH or height < 128 else WIDE, left_SK, width, depth)
    op = "moe_rows_transposed" if transposed else "moe_rows"
    settings = settings or settings_for(op, row_class(left_SK.dtype, width, depth, height), default)
    settings = fit(settings, width, depth)
    y_SN = torch.empty((len(left_SK), width), dtype=left_SK.dtype, device=left_SK.device)
    block_n, block_k = settings["BLOCK_N"], settings["BLOCK_K"]
    tma = bool(settings["TMA"]) and describable(left_SK) and describable(w_ERC)
    tiles, columns = num_tiles(len(left_SK), num_experts, height), triton.cdiv(width, block_n)
    _multiply_rows[(tiles * columns,)](
        describe(left_SK, height, block_k) if tma else left_SK,
        describe(w_ERC, 1, *((block_n, block_k) if transposed else (block_k, block_n))) if tma else w_ERC,
        y_SN, routing.offset_E, routing.tile_N2, tiles, width, depth,
        TRANSPOSED=transposed, EVEN=width % block_n == 0 and depth % block_k == 0, BLOCK_M=height,
        **{**settings, "TMA": tma},
    )  # fmt: skip
    return y_SN


def outer_products(
    left_XM: Tensor,
    right_XN: Tensor,
    routing: Routing,
    top_k: int,
    *,
    gather_left: bool,
    settings: Settings | None = None,
) -> Tensor:
    """Sum over each expert's rows of left^T right: (E, M, N), zero for an expert without rows.

    Args:
        left_XM, right_XN: contiguous; one of them holds tokens, picked by the pair of a row, the other one rows.
        routing: of any height.
        top_k: pairs a token.
        gather_left: whether the left one holds tokens, else the right one.
        settings: instead of the measured ones.
    """
    num_experts = len(routing.offset_E) - 1
    height, width = left_XM.shape[1], right_XN.shape[1]
    shape = outer_class(left_XM.dtype, height, width, len(routing.pair_S) // num_experts)
    settings = settings or settings_for("moe_outer", shape, for_launch(OUTER, left_XM, height, width))
    settings = {**settings, "BLOCK_M": _cut(settings["BLOCK_M"], height), "BLOCK_N": _cut(settings["BLOCK_N"], width)}
    dw_EMN = torch.empty((num_experts, height, width), dtype=left_XM.dtype, device=left_XM.device)
    block_m, block_n = settings["BLOCK_M"], settings["BLOCK_N"]
    tiles = triton.cdiv(height, block_m) * triton.cdiv(width, block_n)
    _outer_products[(num_experts * tiles,)](
        left_XM, right_XN, dw_EMN, routing.offset_E, routing.pair_S, top_k, height, width,
        GATHER_LEFT=gather_left, EVEN=height % block_m == 0 and width % block_n == 0, **settings,
    )  # fmt: skip
    return dw_EMN


def describable(x: Tensor) -> bool:
    """Whether Hopper's copy engine (TMA) can load tiles of a contiguous tensor."""
    aligned = x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0
    return aligned and x.numel() > 0 and copy_engine(x.device)


def roomy(device: torch.device) -> bool:
    """Whether a device runs the largest tiles."""
    return copy_engine(device) and shared_bytes(device) >= LARGEST_BYTES


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may have, as Triton checks it at launch."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.compiler.max_shared_mem(index))


@cache
def copy_engine(device: torch.device) -> bool:
    """Whether a device has one."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def describe(x: Tensor, *block: int) -> Any:
    """A contiguous tensor as the copy engine sees it: loads of blocks, zero outside."""
    strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.ndim)]  # x's own may be anything where a size is 1
    return TensorDescriptor(x, list(x.shape), strides, list(block))


def descriptor_type(dtype: str, *block: int) -> str:
    """How a signature names a described tensor."""
    return f"tensordesc<{dtype}{list(block)}>"


def aot_variants() -> list[Variant]:
    """The products of the Qwen3-30B-A3B and the Mixtral layer; sizes are not compiled in, but choose the tile."""
    found: list[Variant] = []
    for kind in KINDS:
        found += [_rows_variant("qwen3 down", 768, False, kind), _rows_variant("qwen3 dx", 1536, True, kind)]
        found += [_outer_variant("dup", True, kind), _outer_variant("ddown", False, kind)]
        if kind.even and kind.dtype != torch.float32:
            found.append(_rows_variant("mixtral down", 14336, False, kind))
    return found


def _rows_variant(label: str, depth: int, transposed: bool, kind: Kind) -> Variant:
    settings = tile_of(PAIRED if depth <= SHORT_DEPTH else WIDE, kind)
    block_n, block_k = settings["BLOCK_N"], settings["BLOCK_K"]
    constants = {"TRANSPOSED": transposed, "BLOCK_M": block_rows(1 << 20, 1, kind.dtype)}
    blocks = {
        "left": (constants["BLOCK_M"], block_k),
        "w": (1, block_n, block_k) if transposed else (1, block_k, block_n),
    }
    return variant("moe_rows", _multiply_rows, blocks, constants, settings, label, kind)


def _outer_variant(label: str, gather_left: bool, kind: Kind) -> Variant:
    return variant("moe_outer", _outer_products, {}, {"GATHER_LEFT": gather_left}, tile_of(OUTER, kind), label, kind)


def variant(
    op: str, kernel: Any, described: Mapping[str, tuple[int, ...]], constants: dict[str, Any], settings: Settings,
    label: str, kind: Kind,
) -> Variant:  # fmt: skip
    """A product of a kind as it is launched.

    Args:
        op: name for the table.
        kernel: its function; names of arguments tell their types.
        described: argument -> block that the copy engine would load.
        constants: besides EVEN and those among the settings.
        settings: of the launch.
        label: of the product.
        kind: appended to the label.
    """
    dtype = "fp32" if kind.dtype == torch.float32 else "bf16"
    options = {name: settings[name] for name in ("num_warps", "num_stages")}
    blocks: dict[str, Any] = {name: value for name, value in settings.items() if name not in options}
    tma = bool(settings.get("TMA"))
    blocks |= {"TMA": tma} if "TMA" in blocks else {}
    constants = {"EVEN": kind.even, **constants, **blocks}
    signature = {name: _TYPES.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constants}
    signature |= {name: descriptor_type(dtype, *block) for name, block in described.items() if tma}
    sizes = tuple(name for name in ("height", "width", "depth") if name in signature and kind.even)
    return Variant(op, kernel, signature, constants, sizes, options, label + kind.label, kind.targets)


_TYPES = {
    **dict.fromkeys(("num_tiles", "top_k", "height", "width", "depth"), "i32"),
    **dict.fromkeys(("offset_ptr", "pair_ptr", "tile_ptr"), "*i32"),
    **dict.fromkeys(("router_ptr", "part_ptr"), "*fp32"),
}


def _cut(block: int, size: int) -> int:
    return min(block, max(16, triton.next_power_of_2(size)))


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def find_tile(tile_ptr, num_tiles, num_columns, GROUP: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
        """The expert of this program (-1: none), its first row, and which column of tiles it owns."""
        program = tl.program_id(0)
        first = program // (GROUP * num_columns) * GROUP
        height = tl.minimum(num_tiles - first, GROUP)
        inside = program % (GROUP * num_columns)
        tile = first + inside % height
        return tl.load(tile_ptr + 2 * tile), tl.load(tile_ptr + 2 * tile + 1), inside // height

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def expert_tile(  # type: ignore[no-untyped-def, unused-ignore]
        w, expert, row, column, num_rows, num_columns,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    ):  # fmt: skip
        """A tile of an expert's matrix; zero outside."""
        if TMA:
            tile = w.load([expert, row, column]).reshape(BLOCK_R, BLOCK_C)
        else:
            rows = tl.arange(0, BLOCK_R)[:, None]
            columns = column + tl.arange(0, BLOCK_C)[None, :]
            behind = (expert.to(tl.int64) * num_rows + row) * num_columns
            w_ptrs = w + behind + (rows * num_columns + columns)  # 64 bits for the scalar, 32 within the tile
            if EVEN:
                tile = tl.load(w_ptrs)
            else:
                tile = tl.load(w_ptrs, mask=(rows < num_rows - row) & (columns < num_columns), other=0.0)
        return tile

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def row_tile(x_ptr, rows, column, num_columns, BLOCK_C: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
        """Columns of the rows that are listed, all of which exist; zero behind the last column."""
        columns = column + tl.arange(0, BLOCK_C)
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        if EVEN:
            tile = tl.load(x_ptrs)
        else:
            tile = tl.load(x_ptrs, mask=(columns < num_columns)[None, :], other=0.0)
        return tile

    @triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator, unused-ignore]
    def _multiply_rows(  # type: ignore[no-untyped-def, unused-ignore]
        left, w, y_ptr, offset_ptr, tile_ptr, num_tiles, width, depth,
        TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        expert, first, column = find_tile(tile_ptr, num_tiles, tl.cdiv(width, BLOCK_N), GROUP)
        if expert < 0:
            return
        end = tl.load(offset_ptr + expert + 1)
        there = tl.minimum(first + tl.arange(0, BLOCK_M), end - 1)  # behind the last: repeat it, no mask
        y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, depth, BLOCK_K):
            if TMA:
                part = left.load([first, k])
            else:
                part = row_tile(left, there, k, depth, BLOCK_K, EVEN)
            if TRANSPOSED:
                weight = expert_tile(w, expert, column * BLOCK_N, k, width, depth, BLOCK_N, BLOCK_K, EVEN, TMA).T
            else:
                weight = expert_tile(w, expert, k, column * BLOCK_N, depth, width, BLOCK_K, BLOCK_N, EVEN, TMA)
            y = tl.dot(part, weight, y, input_precision="ieee")
        rows = tl.arange(0, BLOCK_M)[:, None]
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        y_ptrs = y_ptr + first.to(tl.int64) * width + (rows * width + columns)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < end - first) & (columns < width))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _outer_products(  # type: ignore[no-untyped-def, unused-ignore]
        left_ptr, right_ptr, dw_ptr, offset_ptr, pair_ptr, top_k, height, width,
        GATHER_LEFT: tl.constexpr, EVEN: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        num_rows, num_columns = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
        expert = tl.program_id(0) // (num_rows * num_columns)
        program = tl.program_id(0) % (num_rows * num_columns)
        above = program // (GROUP * num_columns) * GROUP
        inside = program % (GROUP * num_columns)
        group = tl.minimum(num_rows - above, GROUP)
        top = (above + inside % group) * BLOCK_M
        m = top + tl.arange(0, BLOCK_M)
        n = inside // group * BLOCK_N + tl.arange(0, BLOCK_N)
        start = tl.load(offset_ptr + expert)
        end = tl.load(offset_ptr + expert + 1)
        dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(start, end, BLOCK_K):
            rows = first + tl.arange(0, BLOCK_K)
            mine = rows < end
            tokens = tl.load(pair_ptr + rows, mask=mine, other=0) // top_k
            left_rows = tokens if GATHER_LEFT else rows
            right_rows = rows if GATHER_LEFT else tokens
            # Both are masked: what lies behind the last row may be NaN, and 0 * NaN is not 0.
            left_mask = mine[:, None] if EVEN else mine[:, None] & (m < height)[None, :]
            right_mask = mine[:, None] if EVEN else mine[:, None] & (n < width)[None, :]
            left_ptrs = left_ptr + left_rows.to(tl.int64)[:, None] * height + m[None, :]
            right_ptrs = right_ptr + right_rows.to(tl.int64)[:, None] * width + n[None, :]
            left = tl.load(left_ptrs, mask=left_mask, other=0.0)
            right = tl.load(right_ptrs, mask=right_mask, other=0.0)
            dw = tl.dot(left.T, right, dw, input_precision="ieee")
        dw_ptrs = dw_ptr + (expert.to(tl.int64) * height + top) * width + ((m - top)[:, None] * width + n[None, :])
        tl.store(dw_ptrs, dw.to(dw_ptr.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])
