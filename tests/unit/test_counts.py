"""Counts: closed forms against made models, published sizes, operations against torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.models.backbone import Backbone
from deepseek_ray.models.counts import count, flops_per_token, mean_visible
from deepseek_ray.presets_moe import MOE_PRESETS, load_moe_preset


def numel(module: nn.Module | None) -> int:
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())


def made(config: BackboneConfig) -> Backbone:
    with torch.device("meta"):
        return Backbone(config)


def check(config: BackboneConfig) -> None:
    model, counts = made(config), count(config)
    assert counts.total == numel(model)
    assert counts.embedding == numel(model.adapter)
    assert counts.head == numel(model.head)
    idle = 0
    for number, layer in model.layers.items():
        dense = int(number) < config.num_dense_layers
        assert numel(layer) == (counts.dense_block if dense else counts.block)
        if not dense:
            assert numel(layer.feed.experts) == counts.experts
            idle += numel(layer.feed.experts) * (config.num_experts - config.top_k) // config.num_experts
    assert counts.active == numel(model) - idle


@pytest.mark.parametrize("name", MOE_PRESETS)
def test_the_counts_of_each_preset_are_those_of_the_made_model(name: str) -> None:
    check(load_moe_preset(name).backbone)  # on the meta device even the largest fits


@st.composite
def shapes(draw: st.DrawFn) -> BackboneConfig:
    kv, groups, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    top_groups, per_group = draw(st.integers(1, groups)), draw(st.integers(1, 3))
    values: dict[str, Any] = {
        name: draw(st.integers(2, 17))
        for name in ("vocab_size", "num_classes", "num_channels", "patch_size", "d_model", "d_dense", "d_expert")
    }
    values |= {"adapter": draw(st.sampled_from(["tokens", "events", "patches"]))}
    values |= {"head": draw(st.sampled_from(["language", "classification"])), "qk_norm": draw(st.booleans())}
    values |= {"num_kv_heads": kv, "num_heads": kv * draw(st.integers(1, 3)), "d_head": 2 * draw(st.integers(1, 5))}
    values |= {"num_layers": layers, "num_dense_layers": draw(st.integers(0, layers))}
    values |= {"num_groups": groups, "top_groups": top_groups, "num_experts": groups * per_group}
    values |= {"top_k": draw(st.integers(1, top_groups * per_group)), "num_shared_experts": draw(st.integers(0, 2))}
    return BackboneConfig.model_validate(values)


@given(shapes())
@settings(deadline=None, max_examples=40)
def test_the_counts_of_any_shape_are_those_of_the_made_model(config: BackboneConfig) -> None:
    check(config)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("qwen3_30b_a3b", 30.5e9, 3.3e9), ("mixtral_8x7b", 46.7e9, 12.9e9)]
)
def test_published_models_have_their_published_size(name: str, total: float, active: float) -> None:
    counts = count(load_moe_preset(name).backbone)
    assert counts.total == pytest.approx(total, rel=0.002)
    assert counts.active == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["full", "sliding"])
@pytest.mark.parametrize("window", [1, 3, 9, 50])
def test_a_query_sees_on_average_what_a_loop_counts(causal: bool, attention: str, window: int) -> None:
    config = BackboneConfig.model_validate({"causal": causal, "attention": attention, "window": window})
    for length in (1, 2, 9, 16):
        pairs = [(s, t) for s in range(length) for t in range(length) if t <= s or not causal]
        pairs = [(s, t) for s, t in pairs if attention == "full" or abs(s - t) < window]
        assert mean_visible(config, length) == pytest.approx(len(pairs) / length)


def measured(config: BackboneConfig, length: int, *, training: bool, recompute: bool = False) -> float:
    """Operations a token by torch's counter. It counts all S * S products of attention, visible or not."""
    model = Backbone(config)
    model.set_recompute("full" if recompute else "none")
    token_BS = torch.randint(config.vocab_size, (2, length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fast one it does not count
        with torch.set_grad_enabled(training):
            logits = model(token_BS)
        if training:
            logits.sum().backward()
    return counter.get_total_flops() / token_BS.numel()


DEBUG = {"d_model": 32, "num_layers": 2, "vocab_size": 3, "num_shared_experts": 1, "num_dense_layers": 1}


@pytest.mark.parametrize("training", [False, True])
def test_operations_are_those_that_torch_counts(training: bool) -> None:
    config = BackboneConfig.model_validate(DEBUG | {"causal": False})  # every product is visible
    formula = flops_per_token(config, 64, training=training)
    assert formula == pytest.approx(measured(config, 64, training=training), rel=0.02)


def test_recomputation_costs_at_most_one_forward_pass_more() -> None:
    config = BackboneConfig.model_validate(DEBUG | {"causal": False})
    formula = flops_per_token(config, 64, recompute=True)
    assert 0.95 * formula < measured(config, 64, training=True, recompute=True) <= formula  # a block's end is left out


@pytest.mark.parametrize("shape", [{}, {"attention": "sliding", "window": 5}])
def test_attention_counts_only_the_products_that_the_mask_leaves(shape: dict[str, Any]) -> None:
    config = BackboneConfig.model_validate(DEBUG | shape)
    products = 4 * config.num_layers * config.num_heads * config.d_head  # a query and a key, a share and a value
    masked = 3 * products * (64 - mean_visible(config, 64))
    formula = flops_per_token(config, 64)
    assert masked > 0.1 * formula  # so that the convention shows
    assert formula + masked == pytest.approx(measured(config, 64, training=True), rel=0.02)
