"""The backbone: every adapter with every head, stages equal the whole, weights by name, recomputation."""

from __future__ import annotations

from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.models.backbone import Backbone, init_weights
from deepseek_ray.models.dropout import dropout, sample_keys
from deepseek_ray.models.recompute import Recompute

SMALL: dict[str, Any] = {
    "vocab_size": 11, "d_model": 12, "num_layers": 3, "d_head": 6, "d_dense": 16, "num_experts": 4, "d_expert": 8,
    "patch_size": 2, "num_channels": 2, "num_classes": 3,
}  # fmt: skip


def make(layers: list[int] | None = None, **changes: Any) -> Backbone:
    config = BackboneConfig.model_validate(SMALL | changes)
    model = Backbone(config, layers).double()
    init_weights(model, config, seed=7)
    return model


def rows(model: Backbone, count: int = 4) -> tuple[Tensor, Tensor]:
    return RandomSamples(model.config, 8, seed=1, dtype=torch.float64).take(torch.arange(count))


def loss_of(model: Backbone, count: int = 4) -> Tensor:
    x, target = rows(model, count)
    logits = model(x, sample_keys(0, 0, torch.arange(count)))
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())


@pytest.mark.parametrize("head", ["language", "classification"])
@pytest.mark.parametrize("adapter", ["tokens", "events", "patches"])
@pytest.mark.parametrize("attention", ["full", "sliding"])
def test_every_adapter_works_with_every_head(adapter: str, head: str, attention: str) -> None:
    model = make(adapter=adapter, head=head, attention=attention, window=3, qk_norm=True, causal=head == "language")
    assert model(rows(model)[0]).shape == ((4, 8, 11) if head == "language" else (4, 3))
    loss_of(model).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
    assert sum(float(weight.grad.abs().sum()) > 0 for weight in model.parameters() if weight.grad is not None) > 20


@pytest.mark.parametrize("cut", [[[0], [1], [2]], [[0, 1], [2]], [[0], [1, 2]]])
def test_stages_in_a_chain_equal_the_whole(cut: list[list[int]]) -> None:
    whole, stages = make(dropout=0.3), [make(layers, dropout=0.3) for layers in cut]
    (x, _), key_B = rows(whole), sample_keys(0, 5, torch.arange(4))
    wanted, got = whole(x, key_B), x
    for stage in stages:
        got = stage(got, key_B)
    assert torch.equal(got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    gradients = {name: weight.grad for stage in stages for name, weight in stage.named_parameters()}
    assert gradients.keys() == dict(whole.named_parameters()).keys()
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad)


def test_a_stage_has_only_its_own_parts() -> None:
    first, middle, last = make([0]), make([1]), make([2])
    assert [stage.adapter is not None for stage in (first, middle, last)] == [True, False, False]
    assert [stage.head is not None for stage in (first, middle, last)] == [False, False, True]
    assert (list(first.routers()), list(middle.routers())) == ([], [1])  # layer 0 is dense


def test_weights_do_not_depend_on_the_cut_or_on_what_was_drawn_before() -> None:
    whole = make().state_dict()
    torch.manual_seed(99)
    parts = make([0]).state_dict() | make([1, 2]).state_dict()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    block = make().layers["1"]
    with torch.no_grad():
        block.attention.query.weight_OD.zero_()
    init_weights(block, make().config, seed=7, prefix="layers.1.")
    assert torch.equal(block.attention.query.weight_OD, whole["layers.1.attention.query.weight_OD"])


def test_weights_differ_by_seed_and_name_and_have_the_deviation_told() -> None:
    model = make(d_model=96, d_head=48)
    other = make(d_model=96, d_head=48)
    init_weights(other, other.config, seed=8)
    state, query = model.state_dict(), "attention.query.weight_OD"
    assert not torch.equal(state[f"layers.1.{query}"], state[f"layers.2.{query}"])
    assert not torch.equal(state[f"layers.1.{query}"], other.state_dict()[f"layers.1.{query}"])
    for name, weight in state.items():
        residual = name.endswith(("output.weight_OD", "down_DH", "down_EID"))
        if weight.numel() > 9_000:
            assert float(weight.std()) == pytest.approx(0.02 / 6**0.5 if residual else 0.02, rel=0.03), name
    assert all(torch.equal(one, torch.ones_like(one)) for one in model.parameters() if one.ndim == 1)


def test_dropout_acts_in_training_only_and_asks_for_keys() -> None:
    model, still = make(dropout=0.5), make()
    x, _ = rows(model)
    with pytest.raises(AssertionError, match="needs the samples' keys"):
        model(x)
    key_B = sample_keys(0, 0, torch.arange(4))
    assert not torch.equal(model(x, key_B), still(x))
    assert torch.equal(model.eval()(x), still(x))


def test_both_places_of_a_block_have_masks_of_their_own_and_a_shard_of_the_sequence_has_its_part() -> None:
    block, key_B = make(dropout=0.5).layers["1"], sample_keys(0, 0, torch.arange(2))
    for name, _ in list(block.named_children()):
        setattr(block, name, torch.nn.Identity())
    x_BSD = torch.randn(2, 6, 12, dtype=torch.float64)
    h_BSD = x_BSD + dropout(x_BSD, 0.5, key_B, 2)
    wanted_BSD = h_BSD + dropout(h_BSD, 0.5, key_B, 3)
    assert torch.equal(block(x_BSD, key_B), wanted_BSD)
    block.shard = 1
    assert torch.equal(block(x_BSD[:, 3:], key_B), wanted_BSD[:, 3:])


def trained(mode: Recompute) -> Backbone:
    model = make(dropout=0.3, qk_norm=True, balance_loss=0.1, z_loss=0.1)
    model.set_recompute(mode)
    for router in model.routers().values():
        router.loss_weight = 0.5
    loss_of(model).backward()
    return model


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_gradient_and_no_count(mode: Recompute) -> None:
    wanted, got = trained("none"), trained(mode)
    for (name, one), other in zip(wanted.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
    for number, router in wanted.routers().items():
        assert torch.equal(router.count_E, got.routers()[number].count_E)
        assert int(router.count_E.sum()) == 4 * 8 * 2


def test_a_later_mode_replaces_an_earlier_one() -> None:
    modes = cast(tuple[Recompute, ...], get_args(Recompute))
    again = make()
    for mode in (*reversed(modes), "none", *modes):
        again.set_recompute(mode)
        fresh = make()
        fresh.set_recompute(mode)
        assert saved_bytes(again) == saved_bytes(fresh)


def saved_bytes(model: Backbone) -> int:
    """Bytes that a forward pass keeps for its backward pass, besides the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no storage is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(one.untyped_storage().nbytes() for pointer, one in kept.items() if pointer not in weights)


def test_recomputation_keeps_fewer_bytes() -> None:
    sizes = {}
    for mode in cast(tuple[Recompute, ...], get_args(Recompute)):
        model = make(d_model=48, d_head=12, d_dense=96, d_expert=48)
        model.set_recompute(mode)
        sizes[mode] = saved_bytes(model)
    assert sizes["selective"] < 0.8 * sizes["none"]
    assert sizes["full"] < 0.3 * sizes["none"]


def test_selective_computes_no_matrix_product_again_and_full_the_blocks() -> None:
    flops = {}  # of dense layers: without a fused product the experts' loop runs again but for its last expert
    for mode in cast(tuple[Recompute, ...], get_args(Recompute)):
        model = make(vocab_size=2, num_dense_layers=3, d_dense=24)
        model.set_recompute(mode)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the fast one
            loss_of(model).backward()
        flops[mode] = counter.get_total_flops()
    assert flops["selective"] == flops["none"]
    assert 1.2 < flops["full"] / flops["none"] < 4 / 3  # the last product of a block need not be computed again
