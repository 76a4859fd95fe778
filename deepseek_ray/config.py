"""Settings: one tree of checked sections, one function that builds it for CLI, YAML and Tune trials."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from deepseek_ray.errors import ConfigError


class Section(BaseModel):
    """A group of settings; unknown names are errors, values are checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class DataConfig(Section):
    """Where events come from and how days are split. All days are UTC."""

    source: str = Field("synthetic", description="'synthetic', or a folder of handbook-shaped parquet")
    num_customers: int = Field(1_000, ge=1)
    num_terminals: int = Field(2_000, ge=1)
    start_date: str = "2026-01-01"
    num_days: int = Field(120, ge=1)
    train_days: int = Field(60, ge=1)
    holdout_days: int = Field(7, ge=1)
    replay_days: int = Field(7, ge=0)
    label_delay_days: float = Field(7.0, ge=0)
    drift: str = Field("none", description="name of a drift preset of data/fraud_patterns.py")
    drift_start_day: int | None = Field(
        None, ge=0, description="day of the data on which the drift preset's day 0 falls; null: the first replay day"
    )


class FeatureConfig(Section):
    """Which vector the model reads."""

    vector: Literal["default", "wide", "handbook", "handbook_history"] = "default"
    sequence_len: int = Field(16, ge=0, le=128, description="card's recent events fed to attention")
    engine: Literal["local", "ray", "auto"] = Field(
        "auto", description="what computes the history: this process, Ray Data, or Ray Data when it outgrows this one"
    )


class ModelConfig(Section):
    """Shape of the Mixture-of-Experts risk model."""

    d_model: int = Field(64, ge=8)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    num_experts: int = Field(8, ge=1)
    num_shared_experts: int = Field(1, ge=0)
    top_k: int = Field(2, ge=1)
    d_expert: int = Field(64, ge=8)
    num_bins: int = Field(16, ge=2, description="piecewise-linear bins a numeric feature")
    dropout: float = Field(0.2, ge=0, lt=1)
    router_bias_rate: float = Field(2e-2, ge=0, description="step of aux-loss-free load balancing")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"model.top_k={self.top_k} must be <= model.num_experts={self.num_experts}")
        if self.d_model % self.num_heads:
            raise ValueError(f"model.d_model={self.d_model} must be a multiple of model.num_heads={self.num_heads}")
        return self


class TrainConfig(Section):
    """Optimisation and its spread over workers."""

    epochs: int = Field(4, ge=1)
    batch_size: int = Field(512, ge=1, description="samples a step over all workers")
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    negative_rate: float = Field(
        1.0, gt=0, le=1, description="share of genuine rows kept an epoch; logits are corrected"
    )
    num_workers: int = Field(2, ge=0, description="Ray Train workers; 0 runs in this process")
    threads_per_worker: int = Field(1, ge=1)
    checkpoint_every: int = Field(1, ge=1, description="epochs between checkpoints")
    max_failures: int = Field(3, ge=0, description="restarts of the workers before the training gives up")
    validation_fraction: float = Field(
        0.15, gt=0, lt=1, description="last share of the training days: judges and calibrates, then is trained on too"
    )
    ablation: bool = Field(True, description="also train a dense model of equal active size")


class GateConfig(Section):
    """Bounds of the promotion gate; relative bounds compare with the champion."""

    max_average_precision_drop: float = Field(0.0, ge=0, le=1, description="relative")
    max_cp100_drop: float = Field(0.0, ge=0, le=1, description="relative")
    max_calibration_error: float = Field(0.02, gt=0, description="expected calibration error, absolute")
    max_p99_ms: float = Field(20.0, gt=0, description="processor time of scoring one row")
    max_forgetting: float = Field(0.02, ge=0, le=1, description="relative loss of average precision on older patterns")
    max_label_shift: float = Field(
        3.0, ge=1, description="the share of fraud among new labels may be so many times that of older ones, or a part"
    )


class UpdateConfig(Section):
    """Incremental update of the champion."""

    strategy: Literal["replay", "ewc", "lwf", "derpp", "lora", "warm_start"] = Field(
        "replay", description="how an update keeps what the champion knows; see docs/updating.md"
    )
    replay_fraction: float = Field(0.9, ge=0, lt=1, description="share of old rows in each batch")
    epochs: int = Field(3, ge=1)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(0, ge=0, description="samples a step; 0: train.batch_size. An update has few rows")
    min_labels: int = Field(50, ge=1)
    holdout_fraction: float = Field(0.25, gt=0, lt=1, description="newest labelled days; they judge and do not train")
    memory_rows: int = Field(30_000, ge=1, description="rows of each class kept for replay")
    ewc_strength: float = Field(
        1.0, ge=0, description="of the pull to the champion's weights; 1: as strong as old rows"
    )
    ewc_rows: int = Field(512, ge=2, description="old rows that the weights' importance is measured on")
    lwf_weight: float = Field(1.0, ge=0, description="of the champion's answers on new rows, against their labels")
    lwf_temperature: float = Field(2.0, ge=1, description="log-odds are divided by it before they are compared")
    derpp_alpha: float = Field(0.1, ge=0, description="of the squared distance to the log-odds stored with old rows")
    lora_rank: int = Field(8, ge=1, description="of the adapters on the linear layers")
    lora_alpha: float = Field(16.0, gt=0, description="adapters count alpha / rank times")
    release: Literal["direct", "canary"] = Field(
        "direct", description="what the gate passed becomes champion at once, or by way of shadow and canary"
    )


class ReleaseConfig(Section):
    """How a version goes live where ``update.release`` is canary; times and decisions are both waited for."""

    shadow_s: float = Field(3_600.0, ge=0, allow_inf_nan=False, description="least time as shadow; 0: no shadow")
    shadow_decisions: int = Field(1_000, ge=1, le=100_000, description="least decisions that the shadow scored too")
    steps: list[float] = Field([1.0, 5.0, 25.0, 100.0], description="percentages of the canary, rising to 100 at most")
    dwell_s: float = Field(3_600.0, ge=0, allow_inf_nan=False, description="least time on each step")
    min_decisions: int = Field(1_000, ge=1, description="least decisions of the canary on each step")

    @model_validator(mode="after")
    def _check(self) -> ReleaseConfig:
        rising = self.steps == sorted(set(self.steps)) and 0 < len(self.steps) <= 20
        if not rising or not 0 < self.steps[0] <= self.steps[-1] <= 100:
            raise ValueError(f"release.steps={self.steps} must rise, above 0 and up to 100 at most, 20 steps at most")
        return self


class UpdaterConfig(Section):
    """When the long-running updater starts an update; each trigger is off at 0."""

    min_new_labels: int = Field(1_000, ge=0, description="usable labels that no champion has been trained on")
    drift_psi: float = Field(0.25, ge=0, description="largest population stability index of a feature")
    drift_labels: int = Field(50, ge=1, description="new labels without which drift starts nothing")
    every_s: float = Field(86_400.0, ge=0, description="time since the last attempt, where there is a new label")
    min_gap_s: float = Field(600.0, ge=0, description="shortest time from one attempt to the next")
    poll_s: float = Field(30.0, gt=0, description="how often it looks")
    drift_rows: int = Field(2_000, ge=100, description="newest decisions compared with the training rows")
    retry_s: float = Field(60.0, gt=0, description="wait after a failure; doubles with each one in a row")
    retry_max_s: float = Field(3_600.0, gt=0, description="longest wait after failures")

    @model_validator(mode="after")
    def _check(self) -> UpdaterConfig:
        if self.retry_max_s < self.retry_s:
            raise ValueError(f"updater.retry_max_s={self.retry_max_s:g} must be >= updater.retry_s={self.retry_s:g}")
        return self


class DriftConfig(Section):
    """What is watched of the live decisions, and from where on it is an alarm; see docs/updating.md."""

    window_days: float = Field(1.0, gt=0, description="newest decisions whose features and scores are compared")
    quality_days: int = Field(7, ge=1, description="newest whole days of matured decisions that quality is taken from")
    max_rows: int = Field(20_000, ge=100, description="decisions with features looked at; more are thinned out evenly")
    max_matured_rows: int = Field(500_000, ge=100, description="the same for matured decisions, which are small")
    min_rows: int = Field(500, ge=1, description="decisions without which nothing is judged")
    min_frauds: int = Field(20, ge=1, description="matured frauds without which no ranking is judged")
    max_feature_psi: float = Field(0.25, gt=0, description="population stability index of a feature")
    max_score_psi: float = Field(0.25, gt=0, description="the same of the scores, against the held-out days")
    max_calibration_error: float = Field(0.02, gt=0, le=1, description="expected, of matured decisions")
    max_precision_drop: float = Field(
        0.25, gt=0, lt=1, description="relative loss of average precision against the held-out days"
    )
    adwin_delta: float = Field(0.002, gt=0, lt=1, description="of ADWIN: chance of a false change")


class ServingConfig(Section):
    """HTTP service. The API key comes from the environment, never from here."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    rpc_port: int = Field(0, ge=-1, le=65_535, description="of gRPC; 0: a free one, -1: no gRPC")
    api_key_env: str = "DEEPSEEK_RAY_API_KEY"
    api_keys_file: str = Field("", description="digests of further keys; empty: api_keys.json of the run folder")
    rate_per_key: float = Field(0.0, ge=0, description="records a second that a key may send; 0: no limit")
    rate_burst_s: float = Field(2.0, gt=0, description="seconds of that rate that may come at once")
    tls_certfile: str = Field("", description="PEM certificate chain; with tls_keyfile the service speaks HTTPS only")
    tls_keyfile: str = Field("", description="PEM private key of tls_certfile, without a password")
    max_batch_size: int = Field(64, ge=1)
    batch_buckets: list[PositiveInt] = Field([], description="sizes that batches are padded to, for compiled models")
    slo_p99_ms: float = Field(0.0, ge=0, description="objective from arrival to answer: moves the batch cap, and what "
                              "would be later is refused; 0: none")  # fmt: skip
    request_timeout_s: float = Field(30.0, gt=0, description="deadline of a request that names none")
    header_timeout_s: float = Field(10.0, gt=0, description="time in which a request's headers must arrive")
    body_timeout_s: float = Field(10.0, gt=0, description="time in which a request's body must arrive")
    keep_alive_timeout_s: int = Field(60, ge=1, description="how long an idle connection stays open")
    max_connections: int = Field(1_000, ge=1, description="connections open at a time; more are refused")
    max_queued_requests: int = Field(2_000, ge=1)
    max_body_bytes: int = Field(4 << 20, ge=1_024)
    max_transactions: int = Field(1_000, ge=1, description="transactions a request")
    max_future_skew_s: float = Field(300.0, ge=0)
    poll_registry_s: float = Field(2.0, gt=0)
    compact_every_s: float = Field(3_600.0, ge=0, description="how often the log is moved into parquet; 0: never")
    drift_every_s: float = Field(300.0, ge=0, description="how often drift and quality are computed; 0: never")
    threshold_policy: Literal["alert_rate", "cost"] = Field(
        "alert_rate",
        description="review as many as people can, or wherever a review costs less than the fraud it stops",
    )
    alert_rate: float = Field(0.005, gt=0, lt=1, description="share of transactions a day that may be reviewed")
    review_cost: float = Field(0.0, ge=0, description="of one review; needed by the policy 'cost'")
    missed_fraud_cost: float = Field(0.0, ge=0, description="of one approved fraud, in the same unit")

    @model_validator(mode="after")
    def _check(self) -> ServingConfig:
        if bool(self.tls_certfile) != bool(self.tls_keyfile):
            raise ValueError("serving.tls_certfile and serving.tls_keyfile must be given together")
        if max(self.batch_buckets, default=0) > self.max_batch_size:
            raise ValueError(
                f"serving.batch_buckets={self.batch_buckets} must be <= serving.max_batch_size={self.max_batch_size}"
            )
        if self.threshold_policy == "cost" and not 0 < self.review_cost < self.missed_fraud_cost:
            raise ValueError(
                f"threshold_policy=cost needs 0 < review_cost={self.review_cost:g} "
                f"< missed_fraud_cost={self.missed_fraud_cost:g}"
            )
        return self


class StoreConfig(Section):
    """Stores; empty strings mean the embedded default inside the run folder."""

    tracking_uri: str = Field("", description="MLflow tracking and registry URI, absolute")
    online_store: str = Field("", description="redis://host:port, else SQLite in the run folder")
    gcs_store: str = Field("", description="redis://host:port for what Ray's head knows while it serves, else memory")
    artifact_root: str = Field("", description="s3://bucket/prefix or a folder; needed when tracking_uri is a database")


class Config(Section):
    """The whole tree."""

    seed: int = Field(0, ge=0)
    model_name: str = Field("risk", pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    data: DataConfig = Field(default_factory=DataConfig)
    features: FeatureConfig = Field(default_factory=FeatureConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    update: UpdateConfig = Field(default_factory=UpdateConfig)
    release: ReleaseConfig = Field(default_factory=ReleaseConfig)
    updater: UpdaterConfig = Field(default_factory=UpdaterConfig)
    drift: DriftConfig = Field(default_factory=DriftConfig)
    serving: ServingConfig = Field(default_factory=ServingConfig)
    stores: StoreConfig = Field(default_factory=StoreConfig)


Tree = TypeVar("Tree", bound=Section)


def build_config(
    base: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Config:
    """Build the card-fraud config; see :func:`build_tree`."""
    return build_tree(Config, base, file=file, overrides=overrides)


def build_tree(
    kind: type[Tree],
    base: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Tree:
    """Build a config from a base mapping, then a YAML file, then ``a.b=value`` overrides.

    Args:
        kind: the tree's class; every setting of it has a default.
        base: nested settings, for example a preset.
        file: YAML file of nested settings.
        overrides: ``["train.lr=1e-3", ...]`` or ``{"train.lr": 1e-3}``.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value out of range.
    """
    tree: dict[str, Any] = _flatten(base or {})
    if file is not None:
        tree.update(_flatten(_read_yaml(file)))
    tree.update(_parse_overrides(overrides))
    known = known_keys(kind)
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"Unknown setting {key!r} (value {tree[key]!r}).", fix=f"did you mean {near[0]!r}?")
    try:
        return kind.model_validate(_nest(tree))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"Setting {field!r} = {first.get('input')!r}: {first['msg']}.", fix="give a value in range"
        ) from error


def known_keys(kind: type[Section] = Config) -> list[str]:
    """All dotted setting names of a tree."""
    return list(_flatten(kind().model_dump()))


def given_keys(config: Config) -> list[str]:
    """Dotted names of the settings that were given to a config; the others have their defaults."""
    return list(_flatten(config.model_dump(exclude_unset=True)))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"Config file {str(file)!r} cannot be read: {error}.", fix="give a UTF-8 YAML file"
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"Config file {str(file)!r} holds a {type(loaded).__name__}.", fix="make its top level a mapping"
        )
    return loaded


def _parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return _flatten(overrides)
    parsed: dict[str, Any] = {}
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"Override {item!r} has no '='.", fix="write it as section.name=value")
        parsed[key.strip()] = _scalar(value)
    return parsed


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return str(value) if not isinstance(value, bool | int | float | list | type(None)) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
