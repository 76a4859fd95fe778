"""Settings of Mixture-of-Experts pretraining: the backbone's shape, the mesh, the training step, the corpus."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from deepseek_ray.config import Section, StoreConfig

Schedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]


class BackboneConfig(Section):
    """Shape of the transformer: pre-norm blocks of grouped-query attention and experts."""

    adapter: Literal["tokens", "events", "patches"] = "tokens"
    head: Literal["language", "classification"] = "language"
    vocab_size: int = Field(320, ge=2, description="tokens; the byte-level corpus uses 257 of them")
    num_classes: int = Field(2, ge=2, description="of the classification head")
    num_channels: int = Field(1, ge=1, description="numbers an event, or channels a voxel")
    patch_size: int = Field(4, ge=1, description="edge of a cubic patch, voxels")
    max_seq_len: int = Field(256, ge=1)
    d_model: int = Field(64, ge=2)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    d_head: int = Field(16, ge=2)
    qk_norm: bool = Field(False, description="normalise each query and key head")
    attention: Literal["full", "sliding"] = "full"
    window: int = Field(128, ge=1, description="positions a query sees with sliding attention, itself included")
    causal: bool = True
    rope_theta: float = Field(10_000.0, gt=0)
    num_dense_layers: int = Field(1, ge=0, description="first layers that have one dense feed-forward layer instead")
    d_dense: int = Field(128, ge=1)
    num_experts: int = Field(8, ge=1)
    num_shared_experts: int = Field(1, ge=0)
    top_k: int = Field(2, ge=1)
    d_expert: int = Field(32, ge=1)
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    normalise_gates: bool = True
    gate_scale: float = Field(1.0, gt=0)
    num_groups: int = Field(1, ge=1, description="expert groups; a token chooses among its best groups")
    top_groups: int = Field(1, ge=1)
    bias_rate: float = Field(1e-3, ge=0, description="step of the auxiliary-loss-free balance")
    balance_loss: float = Field(1e-4, ge=0, description="weight of the sequence-wise auxiliary loss")
    z_loss: float = Field(1e-4, ge=0, description="weight of the squared log-sum-exp of the router's logits")
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> BackboneConfig:
        whole = {
            "num_heads % num_kv_heads": self.num_heads % self.num_kv_heads,
            "d_head % 2": self.d_head % 2,
            "num_experts % num_groups": self.num_experts % self.num_groups,
        }
        for equation, rest in whole.items():
            if rest:
                raise ValueError(f"backbone: {equation} = {rest}, must be 0")
        if self.top_groups > self.num_groups:
            raise ValueError(f"backbone.top_groups = {self.top_groups} must be <= num_groups = {self.num_groups}")
        choice = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > choice:
            raise ValueError(f"backbone.top_k = {self.top_k} must be <= {choice}, the experts of a token's groups")
        if self.num_dense_layers > self.num_layers:
            raise ValueError(f"backbone.num_dense_layers = {self.num_dense_layers} > num_layers = {self.num_layers}")
        return self


class ParallelConfig(Section):
    """Degrees of the mesh: ``pp * dp_replicate * dp_shard * tp`` processes; ep divides dp_shard."""

    dp_replicate: int = Field(1, ge=1)
    dp_shard: int = Field(1, ge=1)
    tp: int = Field(1, ge=1, description="tensor and sequence parallel")
    pp: int = Field(1, ge=1)
    ep: int = Field(1, ge=1, description="expert parallel, folded into dp_shard")
    schedule: Schedule = "1F1B"
    stages_per_rank: int = Field(0, ge=0, description="pipeline stages a process; 0: what the schedule needs")

    def degrees(self) -> str:
        """As ``verify mesh`` takes them: ``pp=1,dp_replicate=1,dp_shard=2,tp=1,ep=2``."""
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in ("pp", "dp_replicate", "dp_shard", "tp", "ep"))

    @property
    def data(self) -> int:
        """Processes that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def model(self) -> int:
        """Processes that hold one replica of the unsharded model: pp * tp."""
        return self.pp * self.tp

    @property
    def world(self) -> int:
        """All processes."""
        return self.data * self.model


class StepConfig(Section):
    """Optimisation. A sample is one sequence."""

    steps: int = Field(200, ge=1)
    batch_size: int = Field(16, ge=1, description="samples a step over all processes")
    micro_batch_size: int = Field(4, ge=1, description="samples of one forward pass on one process")
    lr: float = Field(3e-3, gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    decay_fraction: float = Field(0.2, ge=0, le=1, description="last share of the steps in which wsd decays")
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0, description="global norm; 0 switches it off")
    adaptive_clip: float = Field(0.0, ge=0, description="gradient norm of a unit over its weight's norm; 0: off")
    precision: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    recompute: Literal["none", "selective", "full"] = Field("none", description="activation checkpointing")
    compile: bool = Field(False, description="torch.compile for attention and gated layers")
    exchange: Literal["all_reduce", "top_k", "parameter_server"] = Field(
        "all_reduce", description="how gradients cross dp_replicate"
    )
    top_k_fraction: float = Field(0.05, gt=0, le=1, description="share of the gradient that top_k sends")
    checkpoint_every: int = Field(50, ge=1, description="steps")
    background_checkpoints: bool = Field(False, description="write while training goes on")
    keep_checkpoints: int = Field(2, ge=1)


class CorpusConfig(Section):
    """Text to train on: UTF-8 files, byte by byte."""

    folder: str = Field("", description="folder of text files; empty: the sources of Python's standard library")
    pattern: str = Field("**/*.py", pattern=r"^[^/]", description="of the files, below the folder")
    max_bytes: int = Field(16 << 20, ge=1024)
    seq_len: int = Field(128, ge=2)


class ClusterConfig(Section):
    """Ray Train workers."""

    num_workers: int = Field(0, ge=0, description="processes offered; 0: as many as the mesh has")
    min_workers: int = Field(0, ge=0, description="elastic: fewest processes to go on with; 0: not elastic")
    resize_interval_s: float = Field(60.0, gt=0, description="elastic: how often to look for more or fewer processes")
    threads_per_worker: int = Field(1, ge=1)
    max_failures: int = Field(3, ge=0)
    timeout_s: int = Field(120, ge=1, description="of a collective")


class MoEConfig(Section):
    """The whole tree."""

    seed: int = Field(0, ge=0)
    init_from: str = Field("", description="folder of a pretrained model to start from; empty: drawn from the seed")
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    step: StepConfig = Field(default_factory=StepConfig)
    corpus: CorpusConfig = Field(default_factory=CorpusConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    stores: StoreConfig = Field(default_factory=StoreConfig)

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.corpus.seq_len > self.backbone.max_seq_len:
            raise ValueError(f"corpus.seq_len = {self.corpus.seq_len} > max_seq_len = {self.backbone.max_seq_len}")
        edge = round(self.corpus.seq_len ** (1 / 3))
        if self.backbone.adapter == "patches" and edge**3 != self.corpus.seq_len:
            raise ValueError(f"corpus.seq_len = {self.corpus.seq_len} patches fill no cube: {edge**3} do")
        return self
