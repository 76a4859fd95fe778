"""Play the held-out days against the live service in accelerated time, as its clients and its back office would.

python -m pipelines.risk.replay --run runs/mine --url http://127.0.0.1:8000 --update-after 11

Labels are sent when they are due, some late; after each day the threshold moves to its alert budget.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl
from tqdm import tqdm

from deepseek_ray.cli import add_settings, guarded, settings_arguments, settings_of
from deepseek_ray.client import RiskClient
from deepseek_ray.config import Config
from deepseek_ray.data import table
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.periods import Period, periods
from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.errors import DataError
from deepseek_ray.online.playback import Label, Outcome, late_labels, play_day, send_threshold
from deepseek_ray.online.watch import Watch
from deepseek_ray.paths import RunPaths, write_stage

LATE_SHARE, LATE_DAYS = 0.02, 2.0


@dataclass
class Play:
    """One replay under way."""

    config: Config
    paths: RunPaths
    client: RiskClient
    watch: Watch
    labels: Sequence[Label]
    options: argparse.Namespace
    outcome: Outcome = field(default_factory=Outcome)
    update: subprocess.Popen[bytes] | None = None
    failed_before_update: int | None = None
    steady: Outcome | None = None

    def rate(self) -> float:
        """Requests a second: slower while an update trains on the same machine, steady on the measured day."""
        if self.steady is not None:
            return float(self.options.steady_rate)
        updating = self.update is not None and self.update.poll() is None
        return float(self.options.update_rate if updating else self.options.rate)


def main(argv: Sequence[str] | None = None) -> int:
    """Replay; exit status 1 when a request failed."""
    parser = argparse.ArgumentParser(prog="deepseek-ray replay", description="Play held-out days against the service.")
    add_settings(parser)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, 0 for as fast as answers come")
    parser.add_argument("--update-rate", type=float, default=50.0, help="requests a second while an update trains")
    parser.add_argument("--lanes", type=int, default=16, help="clients at once")
    parser.add_argument("--days", type=int, help="replay only the first days")
    parser.add_argument("--update-after", type=int, help="start an update after this many days")
    parser.add_argument("--steady-rate", type=float, help="play the last day at this rate and report its latency")
    options = parser.parse_args(argv)
    config, paths = settings_of(options)
    return asyncio.run(replay(config, paths, options))


async def replay(config: Config, paths: RunPaths, options: argparse.Namespace) -> int:
    """Play all days and write results/replay.json."""
    start = time.perf_counter()
    transactions = table.read(paths.transactions)
    period = periods(transactions, config.data).replay
    rows = period.filter(transactions)
    if not rows.height:
        raise DataError("There are no days to replay: data.replay_days = 0.", fix="set data.replay_days")
    labels = late_labels(rows, share=LATE_SHARE, max_days=LATE_DAYS, seed=config.seed)
    reference = RiskDataset.load(paths.datasets / "train.safetensors")
    async with RiskClient(options.url, connections=options.lanes) as client:
        threshold = float((await client.model())["threshold"])
        watch = Watch(reference, config.serving, threshold=threshold)
        play = Play(config, paths, client, watch, labels, options)
        await _days(play, rows, period)
    _write(play, time.perf_counter() - start)
    _finish_update(play)
    return 1 if play.outcome.failures or (play.steady and play.steady.failures) else 0


async def _days(play: Play, rows: pl.DataFrame, period: Period) -> None:
    last = period.last if play.options.days is None else min(period.last, period.first + play.options.days - 1)
    with tqdm(total=rows.filter(pl.col("order_us") < (last + 1) * DAY_US).height, unit="tx", desc="replay") as bar:
        for number in range(period.first, last + 1):
            day = Period(number, number)
            chosen = day.filter(rows)
            bar.set_postfix_str(str(day.start))
            if number == last and play.options.steady_rate:
                play.steady = Outcome(predictions=play.outcome.predictions)
            await _day(play, chosen, day, bar)
            await _close_day(play, chosen, day)
            if play.options.update_after == number - period.first + 1:
                _start_update(play)


async def _day(play: Play, rows: pl.DataFrame, day: Period, bar: tqdm[None]) -> None:
    outcome = play.steady or play.outcome
    pace = {"lanes": play.options.lanes, "rate_per_s": play.rate, "open_loop": play.steady is not None}
    play.labels = await play_day(play.client, rows, day.start_us, play.labels, outcome, **pace, progress=bar.update)


async def _close_day(play: Play, rows: pl.DataFrame, day: Period) -> None:
    logged = read_predictions(play.paths)
    served = logged.filter(pl.col("event_us").is_between(day.start_us, day.start_us + DAY_US, closed="left"))
    if served.height:
        report = play.watch.close_day(str(day.start), served, logged, int(rows["is_fraud"].sum()))
        await send_threshold(play.client, report.threshold, report.model_version)


def _start_update(play: Play) -> None:
    command = [sys.executable, "-m", "pipelines.risk.update", f"--run={play.paths.root}", f"--url={play.options.url}"]
    play.failed_before_update = len(play.outcome.failures)
    play.update = subprocess.Popen([*command, *settings_arguments(play.options)])


def _finish_update(play: Play) -> None:
    if play.update is not None and play.update.wait() not in (0, 3):  # 3: the gate turned it down
        raise DataError(f"The update ended with status {play.update.returncode}.", fix="see its messages above")


def _write(play: Play, wall_s: float) -> None:
    outcome, steady = play.outcome, play.steady
    stage = {"base_url": play.options.url, **outcome.figures(), "wall_s": wall_s, **play.watch.plain()}
    if play.failed_before_update is not None:
        late = len(steady.failures) if steady else 0
        stage["update_failed_requests"] = len(outcome.failures) + late - play.failed_before_update
    write_stage(play.paths, "replay", stage)
    if steady is not None:
        latency = {"rate_per_s": play.options.steady_rate, **steady.figures(), "histogram": steady.histogram()}
        write_stage(play.paths, "latency", latency)
    print(f"{outcome.requests} requests, {len(outcome.failures)} failed, {outcome.feedback} labels sent")


if __name__ == "__main__":
    sys.exit(guarded(main))
