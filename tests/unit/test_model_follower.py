"""A model server follows its alias: what is whole and fits is swapped in under traffic, all else changes nothing."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_ray.errors import ModelFormatError, RegistryUnavailableError
from deepseek_ray.models import load
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema, Probes
from deepseek_ray.registry.package import write_package
from deepseek_ray.serving import model_slot
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.model_follower import Loader, ModelFollower, difference, start_version
from deepseek_ray.serving.model_kept import Following, KeptModel
from deepseek_ray.serving.model_records import Batch
from deepseek_ray.serving.model_service import ModelService
from deepseek_ray.serving.model_target import Target, alias_of
from serve_apps import model as program
from tests.unit.model_parts import KEY, backbone, client, promoted, risk_model, settings
from tests.unit.registry_parts import FakeRegistry
from tests.unit.waiting import await_until

RECORD = {"amount": 1.5, "count 1d": 2.0}
CONFIG = settings(poll_registry_s=0.01)


def package(folder: Path, seed: int) -> Path:
    """A version's files: a small risk model with probes."""
    saved = risk_model(seed).save_pretrained(folder / "saved")
    model = load(saved)
    schema = InputSchema.of(model.config)
    write_package(saved, folder / "version", schema, Probes.of(model, np.ones((2, 2)), schema.empty_sequence(2)))
    return folder / "version"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [package(tmp_path_factory.mktemp("package"), seed) for seed in (1, 2)]


def target(path: Path, version: str = "1", kind: Any = "package") -> Target:
    return Target(str(path), kind, "m", version, "r", "models:/m@champion")


class Followed:
    """A model server in process whose registry is a stand-in.

    Attributes:
        files: of each version.
    """

    def __init__(self, files: dict[str, Target], kept: Path, first: str = "1") -> None:
        self.files, self.registry = files, FakeRegistry(aliases={"champion": first})
        following = Following(str(kept), str(kept / "copy"))
        self.service = ModelService(files[first], CONFIG, "cpu", Keyring(KEY, None), following)
        assert self.service.follower
        self.follower: ModelFollower = self.service.follower
        self.follower._registry = lambda: self.registry  # type: ignore[assignment,return-value]
        self.follower._find = lambda version, cache: self.files[version]

    def move(self, version: str) -> None:
        self.registry.aliases["champion"] = version
        self.follower.check()

    @property
    def version(self) -> str:
        return self.service.slot.live.identity.version

    @property
    def metrics(self) -> str:
        return self.service.monitor.render().decode()

    def get(self, route: str) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            async with client(self.service.app) as talk:
                return dict((await talk.get(route)).json())

        return asyncio.run(ask())


@pytest.fixture
def followed(packages: list[Path], tmp_path: Path) -> Iterator[Followed]:
    made = Followed({"1": target(packages[0]), "2": target(packages[1], "2")}, tmp_path)
    made.follower.check()
    yield made
    made.service.close()


def test_another_version_answers_says_so_and_is_kept(followed: Followed, packages: list[Path]) -> None:
    old = weakref.ref(followed.service.slot.live.model)
    followed.move("2")
    gc.collect()
    assert old() is None
    about = followed.get("/v1/models/m")
    assert (about["version"], about["follows"], about["refused"]) == ("2", "champion", "")
    assert followed.get("/readyz")["model_version"] == "2"
    assert 'deepseek_ray_model_info{name="m",run_id="r",version="2"} 1.0' in followed.metrics
    assert 'deepseek_ray_model_swaps_total{outcome="swapped"} 1.0' in followed.metrics
    assert followed.follower._kept.target("m") == target(
        Path(followed.follower._kept.target("m").path),
        "2",  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("file", ["model.safetensors", "probes.safetensors"])
def test_a_torn_version_is_refused_once_and_the_last_good_one_serves(
    followed: Followed, packages: list[Path], tmp_path: Path, file: str
) -> None:
    torn = shutil.copytree(packages[1], tmp_path / "torn")
    (torn / file).write_bytes((torn / file).read_bytes()[:-1] + b"x")
    followed.files["3"] = target(torn, "3")
    followed.move("3")
    followed.follower.check()
    assert followed.version == "1"
    refused = followed.get("/v1/models/m")["refused"]
    assert "does not match its SHA-256" in refused
    assert str(tmp_path) not in refused
    assert 'deepseek_ray_model_swaps_total{outcome="refused"} 1.0' in followed.metrics
    assert "deepseek_ray_version_refused 1.0" in followed.metrics
    followed.move("1")
    assert "deepseek_ray_version_refused 0.0" in followed.metrics


def test_a_version_of_another_description_is_refused_by_name(
    followed: Followed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone(tmp_path / "lm")
    followed.files["3"] = target(tmp_path / "lm", "3", "backbone")
    followed.move("3")
    assert followed.version == "1"
    for why in ("only a restart", "column 'amount' is absent, not double, required", "kind is language, not risk"):
        assert why in followed.follower.refused
        assert why in caplog.text


def test_while_the_registry_is_away_what_serves_goes_on(followed: Followed) -> None:
    followed.registry.away = True
    with pytest.raises(RegistryUnavailableError):
        followed.move("2")
    assert followed.version == "1"
    followed.registry.away = False
    followed.follower.check()
    assert followed.version == "2"


def test_no_request_fails_in_twenty_swaps_and_each_answer_is_its_versions(
    followed: Followed, packages: list[Path]
) -> None:
    schema = InputSchema.of(load(packages[0]).config)
    wanted = {
        version: load(folder).predict_proba(np.array([[1.5, 2.0]]), schema.empty_sequence(1))[0]
        for version, folder in zip("12", packages, strict=True)
    }
    assert abs(wanted["1"] - wanted["2"]) > 1e-3
    answered: list[tuple[int, dict[str, Any]]] = []

    async def one_client(talk: Any, done: asyncio.Event) -> None:
        while not done.is_set():
            answer = await talk.post("/v1/models/m/predict", json={"records": [RECORD]})
            answered.append((answer.status_code, answer.json()))

    async def story() -> None:
        done = asyncio.Event()
        async with client(followed.service.app) as talk:
            clients = [asyncio.create_task(one_client(talk, done)) for _ in range(8)]
            for number in range(20):
                await asyncio.to_thread(followed.move, "21"[number % 2])
                await asyncio.sleep(0.01)
            done.set()
            await asyncio.gather(*clients)

    asyncio.run(story())
    assert {status for status, _ in answered} == {200}
    assert {body["version"] for _, body in answered} == {"1", "2"}
    for _, body in answered:
        assert body["predictions"][0]["probability"] == pytest.approx(wanted[body["version"]], abs=1e-9)
    assert 'outcome="swapped"} 20.0' in followed.metrics


def test_the_thread_follows_by_itself(followed: Followed) -> None:
    followed.registry.aliases["champion"] = "2"
    followed.service.start()
    await_until(lambda: followed.version == "2")


def test_a_replica_that_comes_back_starts_with_what_it_served_last(packages: list[Path], tmp_path: Path) -> None:
    first, second = target(packages[0]), target(packages[1], "2")
    kept = KeptModel(tmp_path)
    kept.keep(first)
    following = Following("", str(tmp_path), kept.seen)
    ready = Loader("cpu").ready
    assert start_version(second, following, ready)[0] == second
    kept.keep(second)
    found, _, why = start_version(first, following, ready)
    assert (found.version, why) == ("2", "")
    shutil.rmtree(found.path)
    assert start_version(first, following, ready)[0] == first


def test_a_torn_version_at_the_start_leaves_its_place_to_the_copy(packages: list[Path], tmp_path: Path) -> None:
    torn = target(shutil.copytree(packages[1], tmp_path / "torn"), "2")
    (Path(torn.path) / "config.json").write_text("{}")
    kept = KeptModel(tmp_path / "copy")
    ready = Loader("cpu").ready
    with pytest.raises(ModelFormatError, match="SHA-256"):
        start_version(torn, Following("", str(tmp_path / "copy")), ready)
    kept.keep(target(packages[0]))
    found, _, why = start_version(torn, Following("", str(tmp_path / "copy"), kept.seen), ready)
    assert found.version == "1"
    assert "SHA-256" in why


def test_without_a_registry_the_server_starts_with_the_copy(
    packages: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = program.parser().parse_args(["models:/m@champion"])
    paths = RunPaths(tmp_path)
    with pytest.raises(RegistryUnavailableError, match="does not exist"):
        program._find(options, CONFIG, paths, tmp_path)
    KeptModel(paths.kept_models / "m@champion").keep(target(packages[0]))
    found, following = program._find(options, CONFIG, paths, tmp_path)
    assert (found.version, found.name) == ("1", "m")
    assert following is not None
    assert "does not exist" in following.fallback
    assert "served last is served again" in capsys.readouterr().err
    with pytest.raises(RegistryUnavailableError):
        program._find(program.parser().parse_args(["models:/m/1"]), CONFIG, paths, tmp_path)


def test_a_store_elsewhere_keeps_its_copy_beside_the_server_alone(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    assert program._store(CONFIG, run, "", tmp_path) == (CONFIG, run)
    config, paths = program._store(CONFIG, run, "http://mlflow:5000", tmp_path)
    assert (config.stores.tracking_uri, paths.root) == ("http://mlflow:5000", tmp_path)


def test_what_the_program_tells_its_replica_follows_a_real_store(mlflow_template: Path, tmp_path: Path) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    registry = promoted(RunPaths(tmp_path))
    options = program.parser().parse_args(["models:/risk@champion", "--name", "m"])
    found, following = program._find(options, CONFIG, RunPaths(tmp_path), tmp_path / "cache")
    assert following is not None
    app: Any = program.build(asdict(found), CONFIG.model_dump(), "cpu", KEY, "", asdict(following), "")

    async def about() -> dict[str, Any]:
        async with client(app) as talk:
            return dict((await talk.get("/v1/models/m")).json())

    try:
        with registry.tracking.guard(write=True) as store:
            source = store.get_model_version("risk", "1").source
            store.create_model_version("risk", source, "")
            store.set_registered_model_alias("risk", "champion", "2")
        await_until(lambda: asyncio.run(about())["version"] == "2")
        assert asyncio.run(about())["source"] == "models:/risk@champion"
        kept = KeptModel(Path(following.kept))
        await_until(lambda: (copy := kept.target("m")) is not None and copy.version == "2")
    finally:
        app._shutdown()


def test_only_an_alias_is_followed() -> None:
    assert alias_of("models:/risk@champion") == ("risk", "champion")
    assert [alias_of(name) for name in ("models:/risk/3", "runs:/1/model", "a@b", "models:/m-1")] == [None] * 4


def test_models_that_differ_in_their_weights_alone_take_turns(packages: list[Path]) -> None:
    one, other = (Loader("cpu").ready(target(folder)) for folder in packages)
    assert difference(one, other) == ""


def test_batches_are_padded_to_their_buckets(packages: list[Path]) -> None:
    sizes: list[int] = []
    model: Any = Loader("cpu").ready(target(packages[0]))
    predict = model.predict
    model.predict = lambda batch: (sizes.append(batch.num_rows), predict(batch))[1]
    config = settings(batch_buckets=[1, 4])
    service = ModelService(target(packages[0]), config, "cpu", Keyring(KEY, None))
    service.slot.swap(model, target(packages[0]).identity)
    work = model_slot.ModelWork(service.slot, service.monitor, config.serving.batch_buckets)
    rows = Batch({"amount": [1.0, 2.0, 3.0], "count 1d": [0.0] * 3, "sequence": [None] * 3}, 3)
    (answers,) = work.run([rows])
    service.close()
    assert sizes == [4]
    assert isinstance(answers, model_slot.Answers)
    alone = [row["probability"] for row in predict(rows)]
    assert [row["probability"] for row in answers.rows] == pytest.approx(alone, abs=1e-9)
