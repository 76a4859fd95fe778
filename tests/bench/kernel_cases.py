"""Cases of the kernel benchmark and of the checks on a GPU: inputs, providers, and what each costs at least.

Operations count products only (a multiplication and an addition are two); bytes count each input and output once, in
the type of the case. Shapes are those that the published figures were measured on; routing is uniform, by Zipf's law,
to few experts, or to one.

Legend: T tokens, D model width, I hidden width of an expert, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_ray.kernels.fused_moe import fused_moe, fused_moe_ref, tune_fused_moe
from deepseek_ray.kernels.gelu_layer_norm import gelu_layer_norm, gelu_layer_norm_ref, tune_gelu_layer_norm
from deepseek_ray.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    tune_linear_cross_entropy,
)
from deepseek_ray.kernels.quantised_grouped_gemm import (
    dequantise,
    quantise_int4,
    quantise_int8,
    quantised_grouped_gemm,
    quantised_grouped_gemm_ref,
    tune_quantised_grouped_gemm,
)
from deepseek_ray.kernels.rms_norm import rms_norm, rms_norm_ref, tune_rms_norm
from deepseek_ray.kernels.rope import rope, rope_ref, tune_rope
from deepseek_ray.kernels.router_topk import router_topk, router_topk_ref, tune_router_topk
from deepseek_ray.kernels.rows import MAX_WIDTH
from deepseek_ray.kernels.sliding_window_attention import sliding_window_attention, sliding_window_attention_ref
from deepseek_ray.kernels.swiglu import swiglu, swiglu_ref, tune_swiglu
from tests.bench.kernel_peers import Inputs, Peer, Provider, as_it_is, installed


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op: name of the kernel.
        shape: for people.
        inputs: makes them from a seed, 0 without one; floating ones that train require a gradient.
        reference: the op in any precision, on the same inputs.
        providers: name -> the op; ``ours`` is the kernel, ``ours: torch`` what stands in where the kernel does not go.
        flops: of the forward pass.
        backward_flops: of the backward pass.
        bytes: that the forward pass reads and writes at least.
        backward_bytes: likewise.
        tune: measures launch settings on the inputs.
        layouts: name of a provider -> the inputs as it keeps them.
    """

    op: str
    shape: str
    inputs: Callable[..., Inputs]
    reference: Provider
    providers: Mapping[str, Provider]
    flops: float = 0.0
    backward_flops: float = 0.0
    bytes: float = 0.0
    backward_bytes: float = 0.0
    tune: Callable[[Inputs], object] | None = None
    layouts: Mapping[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)

    def beside(self, peers: Mapping[str, Peer]) -> Case:
        """The same with the packages that are installed here."""
        providers = {**self.providers, **{name: peer.op for name, peer in peers.items()}}
        return replace(self, providers=providers, layouts={name: peer.layout for name, peer in peers.items()})

    def laid_out(self, provider: str, inputs: Inputs) -> Inputs:
        """The inputs as a provider keeps them."""
        return self.layouts.get(provider, as_it_is)(inputs)


def all_cases(device: torch.device, *, small: bool, words: Sequence[str] = ()) -> Iterator[Case]:
    """The cases whose op holds one of the words, all without words; inputs are made when asked for."""
    for make in (moe_cases, row_cases, loss_cases, attention_cases, serving_cases):
        for case in make(device, small):
            if not words or any(word in case.op for word in words):
                yield case.beside(installed(case.op))


def medium_cases(device: torch.device) -> list[Case]:
    """Every op at a size of several tiles, with sizes that no tile divides: for checks."""
    return [
        moe_case(device, 4096, 2048, 768, 16, 4, "zipf"),
        moe_case(device, 1000, 2880, 1440, 8, 2, "empty"),
        *_norm_cases(device, 1000, 2880),
        _swiglu_case(device, 1000, 2880),
        _rope_case(device, 1000, 32, 4),
        _router_case(device, 1000, 128, 8),
        loss_case(device, 512, 512, 20_000),  # several chunks of the vocabulary
        _attention_case(device, 1024, 256, (8, 2, 64)),
        _serving_case(device, 512, 1024, 768, 16, "int8", quantise_int8),
        _serving_case(device, 512, 1024, 768, 16, "int4", partial(quantise_int4, group=128)),
    ]


# -- the Mixture-of-Experts layer ------------------------------------------------------------------------------------

QWEN, MIXTRAL, DEEPSEEK = (2048, 768, 128, 8), (4096, 14336, 8, 2), (7168, 2048, 8, 8)
MOE_SHAPES = [
    *((tokens, *QWEN) for tokens in (2048, 8192, 16384, 32768)),
    (8192, *MIXTRAL), (8192, *DEEPSEEK), (8192, 7168, 2048, 32, 8),
    *((40960, 768, *rest) for rest in ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    *((24576, 1536, *rest) for rest in ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    *((32768, 4096, *rest) for rest in ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
    *((32768, 4096, *rest) for rest in ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
    *((8192, 2048, 768, experts, 8) for experts in (8, 16, 32, 64)),
]  # fmt: skip
ROUTINGS = ("uniform", "zipf", "empty", "one expert")


def moe_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """fused_moe on the published shapes; skewed routing on one of them."""
    shapes = [(64, 32, 16, 8, 2)] if small else MOE_SHAPES
    for tokens, width, hidden, experts, top_k in shapes:
        skewed = small or (tokens, experts) == (8192, 128)
        for routing in ROUTINGS if skewed else ROUTINGS[:1]:
            yield moe_case(device, tokens, width, hidden, experts, top_k, routing)


def moe_case(
    device: torch.device, tokens: int, width: int, hidden: int, experts: int, top_k: int, routing: str
) -> Case:
    """fused_moe on one shape."""

    def inputs(seed: int = 0) -> Inputs:
        made = _maker(device, seed)
        expert_TK = routed(tokens, experts, top_k, routing, made.generator)
        gate_TK = torch.rand(tokens, top_k, generator=made.generator, device=device)
        return {
            "x_TD": made(tokens, width), "expert_TK": expert_TK,
            "gate_TK": (gate_TK / gate_TK.sum(-1, keepdim=True)).to(made.dtype).requires_grad_(),
            "up_ED2I": made(experts, width, 2, hidden, std=width**-0.5),
            "down_EID": made(experts, hidden, width, std=hidden**-0.5),
        }  # fmt: skip

    flops = 6.0 * tokens * top_k * width * hidden
    size = 2 if device.type == "cuda" else 4
    weights, rows = 3 * experts * width * hidden * size, 2 * tokens * width * size
    providers: dict[str, Provider] = {
        "ours": fused_moe,
        "torch grouped_mm": grouped_moe,
        "torch compiled": _compiled(grouped_moe),
        "loop": fused_moe_ref,
    }
    return Case(
        "fused_moe", f"T{tokens} D{width} I{hidden} E{experts} K{top_k} {routing}", inputs, fused_moe_ref, providers,
        flops, 2 * flops, weights + rows, 3 * weights + 3 * rows,
        tune=lambda _: tune_fused_moe(tokens, width, hidden, experts, top_k),
    )  # fmt: skip


def routed(tokens: int, experts: int, top_k: int, routing: str, generator: torch.Generator) -> Tensor:
    """Different experts for each token (T, K): uniform, by Zipf's law, most experts without a token, or the same K."""
    device = generator.device
    if routing == "one expert":
        first = torch.arange(top_k, device=device)
        return first.expand(tokens, top_k).contiguous()
    weight_E = torch.ones(experts, device=device)
    if routing == "zipf":
        weight_E = 1.0 / torch.arange(1, experts + 1, device=device)
    if routing == "empty":
        weight_E[max(top_k, experts // 8) :] = 1e-9
    noise_TE = torch.rand(tokens, experts, generator=generator, device=device)
    # the K largest of log(u) / w are a draw without replacement (Efraimidis and Spirakis 2006)
    return (noise_TE.log() / weight_E).topk(top_k, dim=-1).indices


def grouped_moe(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, up_ED2I: Tensor, down_EID: Tensor) -> Tensor:
    """What torch offers: sort, gather, grouped_mm, SwiGLU, grouped_mm, weigh, add up."""
    slot_S = expert_TK.flatten()
    order_S = slot_S.argsort(stable=True)
    token_S = order_S // expert_TK.shape[1]
    number_E = torch.arange(len(up_ED2I), device=slot_S.device)
    end_E = (slot_S[:, None] == number_E).sum(0).cumsum(0).to(torch.int32)  # bincount would wait for the GPU
    gate_SI, value_SI = F.grouped_mm(x_TD[token_S], up_ED2I.flatten(2), offs=end_E).chunk(2, dim=-1)
    y_SD = F.grouped_mm(F.silu(gate_SI) * value_SI, down_EID, offs=end_E)
    y_SD = y_SD * gate_TK.flatten()[order_S].unsqueeze(-1)
    return torch.zeros_like(x_TD).index_add(0, token_S, y_SD)


# -- ops on rows: as fast as memory at best ---------------------------------------------------------------------------

ROWS = [(8192, 2048), (8192, 4096), (32768, 4096), (8192, 8192), (131072, 2048), (2048, 65536)]


def row_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Norms, gates, rotary positions and the router."""
    for rows, width in [(33, 48)] if small else ROWS:
        yield from _norm_cases(device, rows, width)
        yield _swiglu_case(device, rows, width)
    for length, heads, groups in [(20, 4, 2)] if small else [(8192, 32, 4), (32768, 32, 8)]:
        yield _rope_case(device, length, heads, groups)
    for tokens, experts, top_k in [(33, 16, 4)] if small else [(32768, 128, 8), (32768, 256, 8), (131072, 64, 6)]:
        yield _router_case(device, tokens, experts, top_k)


def _norm_cases(device: torch.device, rows: int, width: int) -> Iterator[Case]:
    size = rows * width * _size(device)
    ours = "ours" if width <= MAX_WIDTH else "ours: torch"
    norm = {
        ours: rms_norm,
        "torch": lambda x, weight_N: F.rms_norm(x, (width,), weight_N, 1e-6),
        "torch compiled": _compiled(rms_norm_ref),
    }
    yield Case(
        "rms_norm", f"M{rows} N{width}", _inputs(device, x=(rows, width), weight_N=(width,)), rms_norm_ref, norm,
        bytes=2 * size, backward_bytes=3 * size,
        tune=_where(width <= MAX_WIDTH, lambda made: tune_rms_norm(made["x"], made["weight_N"])),
    )  # fmt: skip

    def added(x: Tensor, weight_N: Tensor, residual: Tensor) -> Any:
        return rms_norm(x, weight_N, 1e-6, residual)

    def added_ref(x: Tensor, weight_N: Tensor, residual: Tensor) -> Any:
        return rms_norm_ref(x, weight_N, 1e-6, residual)

    yield Case(
        "rms_norm + residual", f"M{rows} N{width}",
        _inputs(device, x=(rows, width), weight_N=(width,), residual=(rows, width)), added_ref,
        {ours: added, "torch compiled": _compiled(added_ref)},
        bytes=4 * size, backward_bytes=4 * size,
    )  # fmt: skip

    def two_ops(x: Tensor, weight_N: Tensor, bias_N: Tensor) -> Tensor:
        return F.layer_norm(F.gelu(x), (width,), weight_N, bias_N)

    yield Case(
        "gelu_layer_norm", f"M{rows} N{width}",
        _inputs(device, x=(rows, width), weight_N=(width,), bias_N=(width,)), gelu_layer_norm_ref,
        {ours: gelu_layer_norm, "torch": two_ops, "torch compiled": _compiled(two_ops)},
        bytes=2 * size, backward_bytes=3 * size,
        tune=_where(width <= MAX_WIDTH, lambda made: tune_gelu_layer_norm(**made)),
    )  # fmt: skip


def _swiglu_case(device: torch.device, rows: int, width: int) -> Case:
    size = rows * width * _size(device)

    def two_ops(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    providers = {"ours": swiglu, "torch": two_ops, "torch compiled": _compiled(two_ops)}
    return Case(
        "swiglu", f"M{rows} I{width}", _inputs(device, x=(rows, 2 * width)), swiglu_ref, providers,
        bytes=3 * size, backward_bytes=5 * size, tune=lambda made: tune_swiglu(**made),
    )  # fmt: skip


def _rope_case(device: torch.device, length: int, heads: int, groups: int) -> Case:
    width = 128

    def inputs(seed: int = 0) -> Inputs:
        made = _maker(device, seed)
        angle_SW = torch.rand(length, width // 2, generator=made.generator, device=device) * 6.28
        wave_SW2 = torch.stack([angle_SW.cos(), angle_SW.sin()], dim=-1)
        sizes = {"query_BHSP": (1, heads, length, width), "key_BGSP": (1, groups, length, width)}
        return {**{name: made(*shape) for name, shape in sizes.items()}, "wave_LW2": wave_SW2}

    size = 2.0 * (heads + groups) * length * width * _size(device)
    providers = {"ours": rope, "torch": rope_ref, "torch compiled": _compiled(rope_ref)}
    return Case(
        "rope", f"S{length} H{heads} G{groups} P{width}", inputs, rope_ref, providers,
        bytes=size, backward_bytes=size, tune=lambda made: tune_rope(**made),
    )  # fmt: skip


def _router_case(device: torch.device, tokens: int, experts: int, top_k: int) -> Case:
    def inputs(seed: int = 0) -> Inputs:
        made = _maker(device, seed)
        made.dtype = torch.float32  # logits are float32 whatever the model computes in
        # multiples of 1/64: ties occur, and float32 and float64 rank the rest alike
        logit_TE = (made(tokens, experts).detach() * 64).round().div(64).requires_grad_()
        return {"logit_TE": logit_TE, "bias_E": torch.zeros(experts, device=device)}

    def chosen(op: Provider) -> Provider:
        return lambda logit_TE, bias_E: op(logit_TE, bias_E, top_k, score="sigmoid")

    providers = {
        "ours": chosen(router_topk),
        "torch": chosen(router_topk_ref),
        "torch compiled": _compiled(chosen(router_topk_ref)),
    }
    size = 4.0 * tokens * experts
    return Case(
        "router_topk", f"T{tokens} E{experts} K{top_k}", inputs, chosen(router_topk_ref), providers,
        bytes=size + 12.0 * tokens * top_k, backward_bytes=2 * size,
        tune=lambda made: tune_router_topk(**made, top_k=top_k),
    )  # fmt: skip


# -- the loss ---------------------------------------------------------------------------------------------------------


def loss_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Cross-entropy with the output projection."""
    for tokens, width, vocabulary in [(40, 32, 100)] if small else [(8192, 4096, 131072), (8192, 2048, 151936)]:
        yield loss_case(device, tokens, width, vocabulary)


def loss_case(device: torch.device, tokens: int, width: int, vocabulary: int) -> Case:
    """linear_cross_entropy on one shape."""

    def inputs(seed: int = 0) -> Inputs:
        made = _maker(device, seed)
        target_T = torch.randint(vocabulary, (tokens,), generator=made.generator, device=device)
        return {
            "x_TD": made(tokens, width),
            "weight_VD": made(vocabulary, width, std=width**-0.5),
            "target_T": target_T,
        }

    def two_ops(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x_TD, weight_VD).float(), target_T)

    flops = 2.0 * tokens * width * vocabulary
    size = (tokens + vocabulary) * width * _size(device)
    providers = {
        "ours": linear_cross_entropy,
        "torch": two_ops,
        "torch compiled": _compiled(two_ops),
    }
    return Case(
        "linear_cross_entropy", f"T{tokens} D{width} V{vocabulary}", inputs, linear_cross_entropy_ref, providers,
        flops, 2 * flops, size, 2 * size, tune=lambda made: tune_linear_cross_entropy(**made),
    )  # fmt: skip


# -- attention --------------------------------------------------------------------------------------------------------


def attention_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Sliding windows over long sequences."""
    for length, window in [(64, 16)] if small else [(8192, 1024), (32768, 4096)]:
        yield _attention_case(device, length, window, (4, 2, 16) if small else (32, 4, 128))


def _attention_case(device: torch.device, length: int, window: int, heads: tuple[int, int, int]) -> Case:
    num_heads, groups, width = heads

    def masked(query_BHSP: Tensor, key_BGSP: Tensor, value_BGSP: Tensor) -> Tensor:
        position_S = torch.arange(length, device=query_BHSP.device)
        behind_SS = position_S[:, None] - position_S[None, :]
        seen_SS = (behind_SS >= 0) & (behind_SS < window)
        return F.scaled_dot_product_attention(query_BHSP, key_BGSP, value_BGSP, attn_mask=seen_SS, enable_gqa=True)

    shapes = {"query_BHSP": (1, num_heads, length, width)}
    shapes |= dict.fromkeys(("key_BGSP", "value_BGSP"), (1, groups, length, width))
    flops = 4.0 * num_heads * width * length * (window - window * (window - 1) / (2 * length))
    size = 2.0 * (num_heads + groups) * length * width * _size(device)
    return Case(
        "sliding_window_attention", f"S{length} W{window} H{num_heads} G{groups} P{width}", _inputs(device, **shapes),
        partial(sliding_window_attention_ref, window=window),
        {"ours": partial(sliding_window_attention, window=window), "torch masked": masked},
        flops, 2.5 * flops, size, 2 * size,
    )  # fmt: skip


# -- serving ----------------------------------------------------------------------------------------------------------


def serving_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Grouped products with int8 and 4-bit weights, from single requests to batches."""
    width, outputs, experts = (64, 48, 4) if small else (2048, 1536, 128)
    for rows in (16,) if small else (8, 128, 512, 8192):
        for label, quantise in (("int8", quantise_int8), ("int4", partial(quantise_int4, group=32 if small else 128))):
            yield _serving_case(device, rows, width, outputs, experts, label, quantise)


def _serving_case(
    device: torch.device, rows: int, width: int, outputs: int, experts: int, label: str, quantise: Provider
) -> Case:
    def inputs(seed: int = 0) -> Inputs:
        made = _maker(device, seed)
        weight_EDN = made(experts, width, outputs, std=width**-0.5).detach()
        expert_R = torch.randint(experts, (rows,), generator=made.generator, device=device)
        end_E = torch.bincount(expert_R, minlength=experts).cumsum(0)
        offsets_E1 = F.pad(end_E, (1, 0)).to(torch.int32)
        return {"x_RD": made(rows, width).detach(), "weight": quantise(weight_EDN), "offsets_E1": offsets_E1}

    def dequantised(x_RD: Tensor, weight: Any, offsets_E1: Tensor) -> Tensor:
        return F.grouped_mm(x_RD, dequantise(weight, x_RD.dtype), offs=offsets_E1[1:])

    used = experts * (1 - (1 - 1 / experts) ** rows)  # different ones among so many drawn
    size = used * width * outputs * (1.0 if label == "int8" else 0.5) + rows * (width + outputs) * _size(device)
    return Case(
        "quantised_grouped_gemm", f"R{rows} D{width} N{outputs} E{experts} {label}", inputs,
        quantised_grouped_gemm_ref, {"ours": quantised_grouped_gemm, "torch dequantised": dequantised},
        flops=2.0 * rows * width * outputs, bytes=size, tune=lambda made: tune_quantised_grouped_gemm(**made),
    )  # fmt: skip


# -- inputs -----------------------------------------------------------------------------------------------------------


def _inputs(device: torch.device, **shapes: tuple[int, ...]) -> Callable[..., Inputs]:
    def inputs(seed: int = 0) -> Inputs:
        made = _maker(device, seed)
        return {name: made(*shape) for name, shape in shapes.items()}

    return inputs


def _where(possible: bool, tune: Callable[[Inputs], object]) -> Callable[[Inputs], object] | None:
    return tune if possible else None


def _compiled(op: Provider) -> Provider:
    """The op by torch.compile, when it is first called: compiling takes its time, and not every case runs."""
    made: list[Provider] = []

    def run(*arguments: Any, **inputs: Any) -> Any:
        if not made:
            made.append(torch.compile(op, dynamic=False))
        return made[0](*arguments, **inputs)

    return run


def _size(device: torch.device) -> int:
    return 2 if device.type == "cuda" else 4


class _maker:
    """Normal numbers from one seed, in the type that the device is measured in; they require a gradient."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device) * std
        return drawn.to(self.dtype).requires_grad_()
