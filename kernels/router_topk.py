"""Top-k routing of a mixture of experts: scores, choice and gates of every token in one pass over its logits.

score = sigmoid or softmax of the logits. The choice adds a bias that no gradient reaches and may be limited to the
experts of the best groups, a group being worth its two best experts (DeepSeek-V3, arXiv:2412.19437, sections 2.1.2
and 2.1.1). Gates are the chosen scores, optionally divided by their sum, times a scale. Equal scores: lowest number.

Legend: T tokens, E experts, K experts a token, G groups of experts.

Floats are compared as integers of the same order, because NVIDIA GPUs reduce 32-bit integers over a warp in one
instruction. A lane keeps the rank at which its expert was chosen and stores its own gate: nothing is gathered.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from deepseek_ray.kernels.aot import Variant
from deepseek_ray.kernels.dispatch import operator, use_triton
from deepseek_ray.kernels.rows import MAX_WIDTH, check_floats
from deepseek_ray.kernels.tuning import Settings, bucket, settings_for, tune_op

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the reference then serves
    triton = None

SCORES = ("sigmoid", "softmax")
_TILE = 512  # of one warp, so that a row needs no other warp


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        weight_TK: gates, float32 (float64 for float64 logits).
        index_TK: the experts, best first, int64.
        score_TE: all scores, for balancing losses, in the gates' type; None where they were not asked for.
    """

    weight_TK: Tensor
    index_TK: Tensor
    score_TE: Tensor | None


def router_topk_ref(
    logit_TE: Tensor, bias_E: Tensor | None, top_k: int, *, score: Literal["sigmoid", "softmax"] = "sigmoid",
    normalise: bool = True, scale: float = 1.0, num_groups: int = 1, top_groups: int = 1, scores: bool = False,
) -> Routing:  # fmt: skip
    """Plain torch reference; differentiable in any float type."""
    wide_TE = logit_TE.to(torch.promote_types(logit_TE.dtype, torch.float32))
    score_TE = torch.sigmoid(wide_TE) if score == "sigmoid" else wide_TE.softmax(-1)
    biased_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E.detach()
    if top_groups < num_groups:
        grouped_TGe = biased_TE.view(len(biased_TE), num_groups, biased_TE.shape[-1] // num_groups)
        worth_TG = grouped_TGe.topk(min(2, grouped_TGe.shape[-1]), dim=-1).values.sum(-1)
        best_TG = worth_TG.argsort(dim=-1, descending=True, stable=True)[:, :top_groups]
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(-1, best_TG, True)
        biased_TE = grouped_TGe.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    index_TK = biased_TE.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weight_TK = score_TE.gather(-1, index_TK)
    if normalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return Routing(weight_TK * scale, index_TK, score_TE if scores else None)


def router_topk(
    logit_TE: Tensor, bias_E: Tensor | None, top_k: int, *, score: Literal["sigmoid", "softmax"] = "sigmoid",
    normalise: bool = True, scale: float = 1.0, num_groups: int = 1, top_groups: int = 1, scores: bool = False,
) -> Routing:  # fmt: skip
    """Choose experts and their gates; Triton on a GPU, plain torch elsewhere. Gradients reach the logits.

    A logit that is not a number counts as the highest, so that experts are always valid and its gate shows it.

    Args:
        logit_TE: float16, bfloat16, float32 or float64.
        bias_E: added to the scores for the choice alone; None for none.
        top_k: K.
        score: what makes a score of a logit.
        normalise: gates of a token sum to ``scale``.
        scale: factor on the gates.
        num_groups: G, must divide E; a token chooses among the experts of its ``top_groups`` best groups.
        top_groups: see ``num_groups``.
        scores: return all scores too.

    Raises:
        ValueError: a shape, a type, a device or one of the numbers does not fit.
    """
    check_floats(logit=logit_TE, bias=bias_E)
    if logit_TE.ndim != 2:
        raise ValueError(f"logit has shape {tuple(logit_TE.shape)}: it must be (tokens, experts)")
    num_experts = logit_TE.shape[1]
    if bias_E is not None and bias_E.shape != (num_experts,):
        raise ValueError(f"bias has shape {tuple(bias_E.shape)}: it must be ({num_experts},), like logit's last")
    _check_numbers(num_experts, top_k, score, num_groups, top_groups)
    if not use_triton(logit_TE) or num_experts > MAX_WIDTH or (bias_E is not None and bias_E.dtype == torch.float64):
        return router_topk_ref(
            logit_TE, bias_E, top_k, score=score, normalise=normalise, scale=scale,
            num_groups=num_groups, top_groups=top_groups, scores=scores,
        )  # fmt: skip
    groups = num_groups if top_groups < num_groups else 1
    bias_E = None if bias_E is None else bias_E.contiguous()
    sigmoid = score == "sigmoid"
    found = _forward_op(logit_TE.contiguous(), bias_E, top_k, sigmoid, normalise, scale, groups, top_groups, scores)
    return Routing(found[0], found[1], found[2] if scores else None)


def _check_numbers(num_experts: int, top_k: int, score: str, num_groups: int, top_groups: int) -> None:
    if score not in SCORES:
        raise ValueError(f"score = {score!r} must be one of {', '.join(SCORES)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups = {num_groups} must divide the {num_experts} experts")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups = {top_groups} must be in 1..num_groups = {num_groups}")
    allowed = num_experts // num_groups * top_groups
    if not 1 <= top_k <= allowed:
        raise ValueError(f"top_k = {top_k} must be in 1..{allowed}, the experts that a token may choose from")


@operator("router_topk")
def _forward_op(
    logit_TE: Tensor, bias_E: Tensor | None, top_k: int, sigmoid: bool, normalise: bool, scale: float,
    num_groups: int, top_groups: int, scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gates, experts and, if asked for, scores."""
    num_tokens, num_experts = logit_TE.shape
    device = logit_TE.device
    weight_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    index_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    score_TE = torch.empty((num_tokens, num_experts) if scores else 0, dtype=torch.float32, device=device)
    settings = _settings(num_experts, num_groups)
    _forward[(triton.cdiv(num_tokens, settings["BLOCK_T"]),)](
        logit_TE, bias_E, weight_TK, index_TK, score_TE, num_tokens, scale,
        E=num_experts, K=top_k, G=num_groups, TOP_GROUPS=top_groups, SIGMOID=sigmoid, NORMALISE=normalise,
        HAS_BIAS=bias_E is not None, SCORES=scores, **settings,
    )  # fmt: skip
    return weight_TK, index_TK, score_TE


@_forward_op.register_fake
def _(
    logit_TE: Tensor, bias_E: Tensor | None, top_k: int, sigmoid: bool, normalise: bool, scale: float,
    num_groups: int, top_groups: int, scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens = logit_TE.shape[0]
    return (
        logit_TE.new_empty(num_tokens, top_k, dtype=torch.float32),
        logit_TE.new_empty(num_tokens, top_k, dtype=torch.int64),
        logit_TE.new_empty(logit_TE.shape if scores else 0, dtype=torch.float32),
    )


@operator("router_topk_backward")
def _backward_op(
    logit_TE: Tensor, index_TK: Tensor, dweight_TK: Tensor, dscore_TE: Tensor | None, sigmoid: bool, normalise: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of the logits; the choice has none."""
    num_tokens, num_experts = logit_TE.shape
    dlogit_TE = torch.empty_like(logit_TE)
    settings = {name: value for name, value in _settings(num_experts, 1).items() if name != "BLOCK_G"}
    _backward[(triton.cdiv(num_tokens, settings["BLOCK_T"]),)](
        logit_TE, index_TK, dweight_TK, dscore_TE, dlogit_TE, num_tokens, scale,
        E=num_experts, K=index_TK.shape[1], SIGMOID=sigmoid, NORMALISE=normalise, HAS_DSCORE=dscore_TE is not None,
        **settings,
    )  # fmt: skip
    return dlogit_TE


@_backward_op.register_fake
def _(
    logit_TE: Tensor, index_TK: Tensor, dweight_TK: Tensor, dscore_TE: Tensor | None, sigmoid: bool, normalise: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logit_TE)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    logit_TE, _, _, ctx.sigmoid, ctx.normalise, ctx.scale, _, _, ctx.scores = inputs
    ctx.save_for_backward(logit_TE, output[1])


def _gradients(ctx: Any, dweight_TK: Tensor | None, _: None, dscore_TE: Tensor | None) -> tuple[Tensor | None, ...]:
    logit_TE, index_TK = ctx.saved_tensors
    if dweight_TK is None:
        dweight_TK = torch.zeros(index_TK.shape, dtype=torch.float32, device=index_TK.device)
    # Without scores the third output is empty, and nobody's.
    dscore_TE = dscore_TE.contiguous() if dscore_TE is not None and ctx.scores else None
    dlogit_TE = _backward_op(
        logit_TE, index_TK, dweight_TK.contiguous(), dscore_TE, ctx.sigmoid, ctx.normalise, ctx.scale
    )
    return dlogit_TE, *[None] * 8


_forward_op.register_autograd(_gradients, setup_context=_keep)


def _settings(num_experts: int, num_groups: int) -> Settings:
    block_g, block_e = bucket(num_groups), bucket(num_experts // num_groups)
    block_t, num_warps = max(1, _TILE // (block_g * block_e)), max(1, block_g * block_e // _TILE)
    default = {"BLOCK_T": block_t, "BLOCK_G": block_g, "BLOCK_E": block_e, "num_warps": num_warps}
    return settings_for("router_topk", (num_experts, num_groups), default)


def tune_router_topk(logit_TE: Tensor, bias_E: Tensor | None, top_k: int) -> Settings:
    """Measure tiles of both passes together on logits that require a gradient; keep the fastest for so many experts."""
    num_experts = logit_TE.shape[1]
    block_e = bucket(num_experts)
    tiles = [
        {"BLOCK_T": max(1, size // block_e), "BLOCK_G": 1, "BLOCK_E": block_e, "num_warps": warps}
        for size in (_TILE // 2, _TILE, 2 * _TILE, 4 * _TILE)
        for warps in (1, 2, 4)
    ]

    def launch() -> None:
        torch.autograd.grad(router_topk(logit_TE, bias_E, top_k).weight_TK.sum(), logit_TE)

    return tune_op("router_topk", (num_experts, 1), tiles, launch)


if triton is not None:
    NEVER: tl.constexpr = tl.constexpr(-(2**31))  # type: ignore[name-defined, unused-ignore]
    LOWEST: tl.constexpr = tl.constexpr(-2139095041)  # type: ignore[name-defined, unused-ignore] # of minus infinity
    NAN: tl.constexpr = tl.constexpr(2**31 - 1)  # type: ignore[name-defined, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _score(logit, SIGMOID: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        if SIGMOID:
            return tl.sigmoid(logit)
        raised = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        return raised / tl.sum(raised, axis=1)[:, None]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _order(x):  # type: ignore[no-untyped-def, unused-ignore]
        # Integers in the order of the floats, NaN above all; never NEVER. A score plus a bias is never -0.
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(x == x, tl.where(bits < 0, bits ^ NAN, bits), NAN)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _first_best(key, number, COUNT: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        # In each row of (T, n), the place of the highest key, the lowest such.
        best = tl.max(key, axis=1)
        return tl.min(tl.where(key == best[:, None], number, COUNT), axis=1)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _ranks(key, number, COUNT: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        # The rank of each key of a row (T, n) among the K highest; K for the others.
        rank = tl.zeros_like(key) + K
        for k in range(K):
            chosen = number == _first_best(key, number, COUNT)[:, None]
            rank = tl.where(chosen, k, rank)
            key = tl.where(chosen, NEVER, key)
        return rank

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _value(key):  # type: ignore[no-untyped-def, unused-ignore]
        return tl.where(key < 0, key ^ NAN, key).to(tl.float32, bitcast=True)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _worth(key_TGe, BLOCK_E: tl.constexpr):  # type: ignore[no-untyped-def, name-defined, unused-ignore]
        # The sum of the two best of each group.
        place = tl.arange(0, BLOCK_E)[None, None, :]
        best = tl.max(key_TGe, axis=2)
        first = tl.min(tl.where(key_TGe == best[:, :, None], place, BLOCK_E), axis=2)
        second = tl.max(tl.where(place == first[:, :, None], NEVER, key_TGe), axis=2)
        return _value(best) + tl.where(second == NEVER, 0.0, _value(second))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward(  # type: ignore[no-untyped-def, unused-ignore]
        logit_ptr, bias_ptr, weight_ptr, index_ptr, score_ptr, num_tokens, scale,
        E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr,
        NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr, SCORES: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = tl.minimum(tokens, num_tokens - 1)[:, None]  # beyond the end the last token again, not stored
        # A row is (group, expert of the group), each padded to a power of two; the order of numbers is that of experts.
        number = tl.arange(0, BLOCK_G * BLOCK_E)[None, :]
        expert = number // BLOCK_E * (E // G) + number % BLOCK_E
        real = (number // BLOCK_E < G) & (number % BLOCK_E < E // G)
        logit = tl.load(logit_ptr + rows * E + expert, mask=real, other=float("-inf")).to(tl.float32)
        score = _score(logit, SIGMOID)
        biased = score
        if HAS_BIAS:
            biased += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
        key = tl.where(real, _order(biased), NEVER)
        if G > 1:
            key_TGe = tl.reshape(key, (BLOCK_T, BLOCK_G, BLOCK_E))
            group = tl.arange(0, BLOCK_G)[None, :]
            worth = tl.where(group < G, _order(_worth(key_TGe, BLOCK_E)), NEVER)
            kept = (_ranks(worth, group, BLOCK_G, TOP_GROUPS) < TOP_GROUPS)[:, :, None]
            key_TGe = tl.where(kept | (key_TGe == NEVER), key_TGe, LOWEST)
            key = tl.reshape(key_TGe, (BLOCK_T, BLOCK_G * BLOCK_E))
        rank = _ranks(key, number, BLOCK_G * BLOCK_E, K)
        chosen = rank < K
        weight = score
        if NORMALISE:
            weight = score / tl.sum(tl.where(chosen, score, 0.0), axis=1)[:, None]
        stored = chosen & (tokens < num_tokens)[:, None]
        tl.store(weight_ptr + rows * K + rank, weight * scale, mask=stored)
        tl.store(index_ptr + rows * K + rank, expert.to(tl.int64), mask=stored)
        if SCORES:
            tl.store(score_ptr + rows * E + expert, score, mask=real & (tokens < num_tokens)[:, None])

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _backward(  # type: ignore[no-untyped-def, unused-ignore]
        logit_ptr, index_ptr, dweight_ptr, dscore_ptr, dlogit_ptr, num_tokens, scale,
        E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, HAS_DSCORE: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = tl.minimum(tokens, num_tokens - 1)
        expert = tl.arange(0, BLOCK_E)[None, :]
        at = rows[:, None] * E + expert
        logit = tl.load(logit_ptr + at, mask=expert < E, other=float("-inf")).to(tl.float32)
        score = _score(logit, SIGMOID)
        dscore = tl.zeros_like(score)
        chosen = tl.zeros_like(score)
        for k in range(K):
            here = expert == tl.load(index_ptr + rows * K + k).to(tl.int32)[:, None]
            dscore = tl.where(here, tl.load(dweight_ptr + rows * K + k)[:, None], dscore)
            chosen = tl.where(here, 1.0, chosen)
        if NORMALISE:
            total = tl.sum(chosen * score, axis=1)[:, None]
            dscore = chosen * (dscore - tl.sum(dscore * score, axis=1)[:, None] / total) / total
        dscore *= scale
        if HAS_DSCORE:
            dscore += tl.load(dscore_ptr + at, mask=expert < E, other=0.0)
        if SIGMOID:
            dlogit = dscore * score * (1.0 - score)
        else:
            dlogit = score * (dscore - tl.sum(dscore * score, axis=1)[:, None])
        inside = (tokens < num_tokens)[:, None] & (expert < E)
        tl.store(dlogit_ptr + at, dlogit.to(dlogit_ptr.dtype.element_ty), mask=inside)


def aot_variants() -> list[Variant]:
    """Routers of Qwen3-30B-A3B, of Mixtral and of DeepSeek-V3."""
    if triton is None:
        return []
    models = (128, 8, False, 1, 1), (8, 2, False, 1, 1), (256, 8, True, 8, 4)
    return [variant for model in models for variant in (_forward_variant(*model), _backward_variant(*model[:3]))]


def _forward_variant(num_experts: int, top_k: int, sigmoid: bool, groups: int, top_groups: int) -> Variant:
    settings = _settings(num_experts, groups)
    constants: dict[str, Any] = {"E": num_experts, "K": top_k, "G": groups, "TOP_GROUPS": top_groups}
    constants |= {"SIGMOID": sigmoid, "NORMALISE": True, "HAS_BIAS": sigmoid, "SCORES": sigmoid}
    constants |= {name: settings[name] for name in ("BLOCK_T", "BLOCK_G", "BLOCK_E")}
    signature = {
        **dict.fromkeys(("logit_ptr", "weight_ptr", "score_ptr", *(("bias_ptr",) if sigmoid else ())), "*fp32"),
        "index_ptr": "*i64", "num_tokens": "i32", "scale": "fp32",
    }  # fmt: skip
    return Variant(
        "router_topk", _forward, signature, constants if sigmoid else {"bias_ptr": None, **constants},
        aligned=("num_tokens",), options={"num_warps": settings["num_warps"]},
        label=f"E{num_experts} K{top_k} G{groups}",
    )  # fmt: skip


def _backward_variant(num_experts: int, top_k: int, sigmoid: bool) -> Variant:
    settings = _settings(num_experts, 1)
    constants = {"E": num_experts, "K": top_k, "SIGMOID": sigmoid, "NORMALISE": True, "HAS_DSCORE": sigmoid}
    constants |= {name: settings[name] for name in ("BLOCK_T", "BLOCK_E")}
    single = ("logit_ptr", "dweight_ptr", "dlogit_ptr", *(("dscore_ptr",) if sigmoid else ()))
    return Variant(
        "router_topk", _backward,
        {**dict.fromkeys(single, "*fp32"), "index_ptr": "*i64", "num_tokens": "i32", "scale": "fp32"},
        constants if sigmoid else {"dscore_ptr": None, **constants},
        aligned=("num_tokens",), options={"num_warps": settings["num_warps"]},
        label=f"E{num_experts} K{top_k} backward",
    )  # fmt: skip
