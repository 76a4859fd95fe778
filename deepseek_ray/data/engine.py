"""Which batch engine computes the vectors of a run's history: this process, or Ray Data over partitions."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import psutil
import pyarrow.parquet as pq

from deepseek_ray import cluster
from deepseek_ray.config import Config
from deepseek_ray.data import batch_engine
from deepseek_ray.data.batch_engine import SEQUENCE_CHANNELS
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.windows import VectorSpec
from deepseek_ray.errors import DataError
from deepseek_ray.logs import get_logger

LOCAL, RAY = "local", "ray"
MEMORY_SHARE = 0.5
"""A history whose computation needs more of the available memory than this goes to Ray."""
PARTITION_BYTES = 256 << 20
"""Memory that one partition's computation is meant to need."""
_NEED_PER_VECTOR = 2.5  # measured peak over the bytes of the vectors: handbook 2.2, default 2.4, wide 1.9
_CGROUP = Path("/sys/fs/cgroup")
log = get_logger(__name__)


@dataclass(frozen=True)
class Choice:
    """An engine, and why it was chosen."""

    engine: str
    reason: str


def store(
    source: Path, spec: VectorSpec, client: FeatureClient, config: Config, *, before_us: int | None = None
) -> Choice:
    """Compute the vectors of a transactions table and append them to the offline store; returns what computed them.

    Args:
        source: parquet of the table; with Ray on a cluster, a path that every machine sees.
        spec: the vector.
        client: the run's feature store.
        config: sections ``features`` (engine, sequence_len) and ``data`` (label_delay_days).
        before_us: leave out rows of this order and later; None takes all.

    Raises:
        DataError: the file is missing or not parquet.
        FeatureError: ``order_us`` is not strictly increasing, or the service is not registered.
    """
    delay, length = config.data.label_delay_days, config.features.sequence_len
    need = num_rows(source) * row_bytes(spec, length)
    with ExitStack() as connected:
        nodes = 1
        if config.features.engine != LOCAL and cluster.inside_cluster():
            connected.enter_context(cluster.local_cluster(1))
            nodes = cluster.num_nodes()
        choice = choose(config.features.engine, need=need, available=available_bytes(), nodes=nodes)
        log.info("features by the %s engine: %s", choice.engine, choice.reason)
        if choice.engine == LOCAL:
            rows = pl.scan_parquet(source).filter(pl.lit(True) if before_us is None else pl.col("order_us") < before_us)
            vectors = batch_engine.compute(rows.collect(), spec, label_delay_days=delay, sequence_len=length)
            client.write_offline(vectors)
        else:
            from deepseek_ray.data import ray_engine  # slow to import, and not needed otherwise

            connected.enter_context(cluster.local_cluster(1))
            parts = max(cluster.num_cpus(), -(-need // PARTITION_BYTES))
            with client.offline_part(spec) as files:
                ray_engine.write(
                    source, spec, files, label_delay_days=delay, sequence_len=length,
                    num_partitions=parts, before_us=before_us,
                )  # fmt: skip
    return choice


def choose(setting: str, *, need: int, available: int, nodes: int) -> Choice:
    """The engine for ``features.engine``, and why.

    Args:
        setting: ``local``, ``ray`` or ``auto``.
        need: bytes that the local engine would need.
        available: bytes of memory that this machine has to give.
        nodes: machines of the Ray cluster that this process runs in; 1 when there is none.
    """
    if setting != "auto":
        return Choice(setting, f"features.engine={setting}")
    if nodes > 1:
        return Choice(RAY, f"the run is inside a Ray cluster of {nodes} machines")
    engine = RAY if need > MEMORY_SHARE * available else LOCAL
    room = f"{MEMORY_SHARE:.0%} of the {available / 1e9:.1f} GB available"
    return Choice(engine, f"it needs about {need / 1e9:.1f} GB and may take {room}")


def row_bytes(spec: VectorSpec, sequence_len: int) -> int:
    """Memory that a row costs the local engine at its peak, the vector included, in bytes."""
    return round(_NEED_PER_VECTOR * 8 * (len(spec.names) + sequence_len * len(SEQUENCE_CHANNELS)))


def num_rows(source: Path) -> int:
    """Rows of a parquet file, or of all parquet files of a folder.

    Raises:
        DataError: nothing there is parquet.
    """
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    try:
        return sum(pq.read_metadata(file).num_rows for file in files)
    except (OSError, ValueError) as error:
        problem = f"{str(source)!r} is not readable parquet: {error}."
        raise DataError(problem, fix="run `deepseek-ray ingest` first") from error


def available_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group where that is limited."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return free
