"""The planner's closed forms against measured models and published numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.errors import ConfigError
from deepseek_ray.parallel.mesh import check_mesh
from deepseek_ray.parallel.plan import GIB, Machine, activation_bytes, bubble_share, evaluate, propose
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretrain_step import Stepper
from deepseek_ray.train.pretraining import make_stepper
from tests.distributed.meshes import overrides

SHAPES = [
    {"d_model": 128, "num_heads": 4, "num_kv_heads": 2, "d_head": 32},
    {"d_model": 256, "num_kv_heads": 2, "d_head": 32, "d_expert": 128, "d_dense": 512, "vocab_size": 1024},
    {"d_model": 128, "d_head": 16, "num_layers": 2, "num_shared_experts": 0, "top_k": 4, "vocab_size": 4096},
]


def config_of(shape: dict[str, int], **settings: object) -> MoEConfig:
    values = {f"backbone__{name}": value for name, value in shape.items()}
    sizes = {"corpus__seq_len": 128, "step__batch_size": 2, "step__micro_batch_size": 2, "step__precision": "float32"}
    return load_moe_preset("debug_moe", overrides=overrides("", **{**values, **sizes, **settings}))


def stepper_of(config: MoEConfig) -> Stepper:
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    return make_stepper(config, samples, torch.device("cpu"))


def kept_bytes(stepper: Stepper, compute: Callable[[], Tensor]) -> int:
    """What autograd keeps of a computation for its backward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for _, weight in stepper.model.named_parameters()}
    kept: dict[int, Tensor] = {}  # the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = compute()
    del y
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_those_that_autograd_keeps(shape: dict[str, int], recompute: str) -> None:
    config = config_of(shape, step__recompute=recompute)
    stepper = stepper_of(config)
    (model,) = stepper.model.parts.values()
    x, target = stepper.samples.take(torch.arange(2))
    stepper.model._weigh_losses()
    measured = kept_bytes(stepper, lambda: stepper.model._loss(model(x), target))
    measured += target.numel() * config.backbone.vocab_size * 4  # the gradient of the logarithms
    if recompute == "full":
        model.set_recompute("none")
        hidden = torch.randn(2, 128, config.backbone.d_model, requires_grad=True)
        blocks = [layer for _, layer in sorted(model.layers.items())]
        measured += max(kept_bytes(stepper, lambda block=block: block(hidden)) for block in blocks)
    assert activation_bytes(config, 4) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_gradients_and_moments_of_one_process(shape: dict[str, int]) -> None:
    config = config_of(shape)
    stepper = stepper_of(config)
    stepper.step(0)
    weights = [weight for _, weight in stepper.model.named_parameters()]
    moments = [state[name] for state in stepper.optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    plan = evaluate(config, Machine(), bytes_each=4)
    for wanted, found in (
        (plan.weights_gib, weights),
        (plan.gradients_gib, [weight.grad for weight in weights]),
        (plan.optimiser_gib, moments),
    ):
        assert wanted * GIB == pytest.approx(sum(tensor.nbytes for tensor in found if tensor is not None), rel=1e-6)


def test_low_precision_takes_a_copy_of_the_weights() -> None:
    wide, low = (evaluate(config_of(SHAPES[0]), Machine(), bytes_each=size) for size in (4, 2))
    assert low.weights_gib == pytest.approx(1.5 * wide.weights_gib)
    assert low.optimiser_gib == wide.optimiser_gib


def bubble(schedule: str, pp: int, batches: int, stages: int = 0) -> float:
    """Of so many micro-batches; layers enough for all."""
    mesh = {"step__micro_batch_size": 1, "step__batch_size": batches, "parallel__stages_per_rank": stages}
    return bubble_share(load_moe_preset("debug_moe", overrides=overrides(f"pp={pp}", schedule, **mesh)))


@pytest.mark.parametrize(("pp", "batches"), [(2, 8), (4, 8), (8, 64)])
def test_gpipe_and_1f1b_wait_as_narayanan_says(pp: int, batches: int) -> None:
    ratio = (pp - 1) / batches  # time waited over time used, arXiv:2104.04473 section 2.2.1
    for schedule in ("GPipe", "1F1B"):
        share = bubble(schedule, pp, batches)
        assert share / (1 - share) == pytest.approx(ratio)


@pytest.mark.parametrize(("pp", "batches", "stages"), [(4, 8, 2), (4, 8, 4), (8, 64, 2)])
def test_interleaving_divides_the_wait_by_the_stages(pp: int, batches: int, stages: int) -> None:
    share = bubble("Interleaved1F1B", pp, batches, stages)
    assert share / (1 - share) == pytest.approx((pp - 1) / (stages * batches))  # same source, section 2.2.2


def test_zero_bubbles_are_zero_once_there_are_enough_micro_batches() -> None:
    assert bubble("ZBVZeroBubble", 4, 8) == 0.0  # arXiv:2405.15362: m >= 2p
    assert 0.0 < bubble("ZBVZeroBubble", 4, 4) < bubble("Interleaved1F1B", 4, 4)


@pytest.mark.parametrize(("pp", "batches"), [(4, 20), (8, 64)])
def test_dualpipe_waits_as_its_table_says(pp: int, batches: int) -> None:
    stages, forward, backward, weight, both = 2 * pp, 0.5, 1.0, 0.5, 1.5  # a stage is half a process's layers
    waited = (stages / 2 - 1) * (both + backward - 3 * weight)  # arXiv:2412.19437, table 2
    used = 2 * (forward + backward) * batches
    assert bubble("DualPipeV", pp, batches) == pytest.approx(waited / (used + waited))


def test_one_stage_waits_for_nobody() -> None:
    assert bubble("1F1B", 1, 4) == 0.0


@pytest.mark.parametrize(("preset", "gpus"), [("qwen3_30b_a3b", 64), ("mixtral_8x7b", 32), ("debug_moe", 8)])
def test_every_proposed_mesh_is_legal_fits_and_stands_in_order(preset: str, gpus: int) -> None:
    config = load_moe_preset(preset)
    plans = propose(config, gpus, Machine())
    assert plans
    for plan in plans:
        assert plan.degrees.world == gpus
        assert plan.memory_gib <= 80
        check_mesh(config.model_copy(update={"parallel": plan.degrees}))
    assert [plan.step_s for plan in plans] == sorted(plan.step_s for plan in plans)
    assert len({(plan.mesh(), plan.degrees.schedule) for plan in plans}) == len(plans)


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"No mesh of 8 GPUs fits 80 GiB; the smallest, .*, needs \d{3,}\.\d GiB"):
        propose(load_moe_preset("deepseek_v3"), 8, Machine())


def test_a_number_of_processes_that_suits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"No mesh of 7 processes suits .*batch_size = 8"):
        propose(load_moe_preset("debug_moe"), 7, Machine())


def test_more_of_every_axis_needs_less_memory() -> None:
    config = load_moe_preset("qwen3_30b_a3b")
    few, many = (min(plan.memory_gib for plan in propose(config, gpus, Machine(1000))) for gpus in (8, 64))
    assert many < few
