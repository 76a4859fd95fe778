"""Models named by URI, and models of other libraries: served when their files are data, refused when they are code."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.models import infer_signature
from sklearn.linear_model import LogisticRegression

from deepseek_ray.config import StoreConfig
from deepseek_ray.errors import ModelFormatError, RegistryError
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry
from deepseek_ray.registry.foreign import ForeignModel, check_safe
from deepseek_ray.registry.located import locate
from deepseek_ray.serving.model_kinds import OtherModel
from deepseek_ray.serving.model_rehearsal import rehearse
from tests.unit.model_parts import NAMES, client, predict, promoted, served

ROWS = pd.DataFrame({"amount": np.linspace(-2, 2, 60), "count 1d": np.arange(60) % 7})
LABEL = (ROWS["amount"] > 0).astype(int)


@pytest.fixture(scope="module")
def booster() -> lightgbm.Booster:
    settings = {"objective": "binary", "num_leaves": 4, "min_data_in_leaf": 3, "verbose": -1, "num_threads": 1}
    return lightgbm.train(settings, lightgbm.Dataset(ROWS.rename(columns=str), LABEL), num_boost_round=3)


@pytest.fixture(scope="module")
def good(booster: lightgbm.Booster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LightGBM model as MLflow saves it, with a signature."""
    folder = tmp_path_factory.mktemp("lightgbm") / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow: an integer column cannot hold a missing value
        signature = infer_signature(ROWS, booster.predict(ROWS))
        mlflow.lightgbm.save_model(booster, folder, signature=signature, pip_requirements=["lightgbm"])
    return folder


@pytest.fixture(scope="module")
def registry(good: Path, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A store with version 1 of ``risk``, the champion, and a LightGBM model ``boosted``."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    made = promoted(RunPaths(folder))
    with made.tracking.start_run("boost") as run, made.tracking.guard(write=True) as store:
        store.log_artifacts(run.run_id, str(good), "boosted")
        store.create_registered_model("boosted")
        store.create_model_version("boosted", f"{run.artifact_uri}/boosted", run.run_id)
    return made


def test_the_input_example_that_was_logged_is_what_a_model_is_checked_on(
    booster: lightgbm.Booster, good: Path, tmp_path: Path
) -> None:
    assert ForeignModel(good).example() is None
    assert OtherModel(ForeignModel(good)).example().made_up
    folder = tmp_path / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signature = infer_signature(ROWS, booster.predict(ROWS))
        rows = ROWS.iloc[10:20]
        mlflow.lightgbm.save_model(
            booster, folder, signature=signature, input_example=rows, pip_requirements=["lightgbm"]
        )
    model = OtherModel(ForeignModel(folder))
    example = model.example()
    assert not example.made_up
    assert example.rows.columns == {name: rows[name].tolist()[:8] for name in NAMES}
    assert model.predict(example.rows) == pytest.approx(booster.predict(rows)[:8].tolist())
    rehearse(model, [1, 16])
    (folder / "input_example.json").write_text('{"columns": ["amount"], "data": [[1.0]]}')
    with pytest.raises(ModelFormatError, match="input example of the model"):
        model.example()


def where(registry: Registry, cache: Path) -> dict[str, Any]:
    return {"paths": registry.tracking.paths, "stores": StoreConfig(), "cache": cache}


@pytest.mark.parametrize("uri", ["models:/risk@champion", "models:/risk/1"])
def test_a_version_is_served_by_alias_and_by_number(registry: Registry, tmp_path: Path, uri: str) -> None:
    async def about(app: Any) -> Any:
        async with client(app) as talk:
            return (await talk.get("/v1/models/risk")).json()

    with served(uri, name="", **where(registry, tmp_path)) as app:
        answer = asyncio.run(predict(app, {"records": [{"amount": 1, "count 1d": 2}]}, "risk"))
        found = asyncio.run(about(app))
    assert answer.status_code == 200, answer.text
    assert (answer.json()["model"], answer.json()["version"]) == ("risk", "1")
    assert (found["source"], found["run_id"], found["kind"]) == (uri, registry.get("1").run_id, "risk")


def test_another_librarys_model_is_served_by_uri(registry: Registry, booster: lightgbm.Booster, tmp_path: Path) -> None:
    with registry.tracking.guard() as store:
        run_id = store.get_model_version("boosted", "1").run_id
    for uri, name in (("models:/boosted/1", "boosted"), (f"runs:/{run_id}/boosted", "boosted")):
        with served(uri, name="", **where(registry, tmp_path)) as app:
            columns = {name: ROWS[name].tolist() for name in NAMES}
            answer = asyncio.run(predict(app, {"columns": columns}, name))
            wrong = asyncio.run(predict(app, {"records": [{"amount": 1.0, "count 1d": 1.5}]}, name))
        assert answer.json()["predictions"] == pytest.approx(booster.predict(ROWS).tolist())
        assert (wrong.status_code, wrong.json()["field"]) == (422, "records.0.count 1d")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/risk@nobody", "nobody"),
        ("models:/risk/99", "99"),
        ("models:/nothing/1", "nothing"),
        ("models:/risk", "names no model"),
        ("runs:/abc", "names no model"),
    ],
)
def test_what_the_store_does_not_have_is_named(registry: Registry, tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        locate(uri, registry.tracking, tmp_path)


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hide_pickle(folder: Path, bomb: Bomb) -> None:
    (folder / "model.lgb").write_bytes(pickle.dumps(bomb))


def hide_pickle_in_zip(folder: Path, bomb: Bomb) -> None:
    with zipfile.ZipFile(folder / "weights.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bomb))


def bring_code(folder: Path, bomb: Bomb) -> None:
    change(folder, code="code")


def load_by_own_module(folder: Path, bomb: Bomb) -> None:
    change(folder, loader_module="os")


def load_by_a_class_of_its_author(folder: Path, bomb: Bomb) -> None:
    change(folder, loader_module="mlflow.pyfunc.model")


def name_a_wrapper(folder: Path, bomb: Bomb) -> None:
    change(folder, "lightgbm", model_class="lightgbm.sklearn.LGBMClassifier")
    (folder / "model.lgb").write_bytes(pickle.dumps(bomb, protocol=0))  # looks like text


def change(folder: Path, flavour: str = "python_function", **settings: str) -> None:
    file = folder / "MLmodel"
    tree = yaml.safe_load(file.read_text())
    tree["flavors"][flavour] |= settings
    file.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (hide_pickle, "'model.lgb' is a pickle"),
        (hide_pickle_in_zip, "'weights.bin' is a pickle"),
        (bring_code, "brings Python code"),
        (name_a_wrapper, "unpickles a 'lightgbm.sklearn.LGBMClassifier'"),
        (load_by_a_class_of_its_author, "its loader is 'mlflow.pyfunc.model'"),
        (load_by_own_module, "its loader is 'os'"),
    ],
)
def test_code_in_a_models_folder_is_refused_and_not_run(
    good: Path, tmp_path: Path, spoil: Callable[[Path, Bomb], None], message: str
) -> None:
    folder, trace = tmp_path / "spoiled", tmp_path / "it-ran"
    mlflow.artifacts.download_artifacts(str(good), dst_path=str(tmp_path))
    (tmp_path / "model").rename(folder)
    spoil(folder, Bomb(trace))
    with pytest.raises(ModelFormatError, match=message):
        ForeignModel(folder)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore")  # MLflow's own advice on saving
def test_flavours_that_pickle_are_refused(tmp_path: Path) -> None:
    sklearn = LogisticRegression().fit(ROWS, LABEL)
    mlflow.sklearn.save_model(sklearn, tmp_path / "a", pip_requirements=[], serialization_format="cloudpickle")
    booster = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1, n_jobs=1).fit(ROWS, LABEL)
    mlflow.lightgbm.save_model(booster, tmp_path / "b", pip_requirements=[], serialization_format="cloudpickle")

    for name in "ab":
        with pytest.raises(ModelFormatError, match="is not loaded"):
            check_safe(tmp_path / name)


def test_a_model_without_named_columns_is_refused(good: Path, tmp_path: Path) -> None:
    mlflow.artifacts.download_artifacts(str(good), dst_path=str(tmp_path))
    file = tmp_path / "model" / "MLmodel"
    tree = yaml.safe_load(file.read_text())
    del tree["signature"]
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ModelFormatError, match="infer_signature"):
        ForeignModel(tmp_path / "model")


def test_a_folder_that_is_no_mlflow_model_is_refused(tmp_path: Path) -> None:
    for text in ("", "flavors: {}", "flavors: [", "[]"):
        (tmp_path / "MLmodel").write_text(text)
        with pytest.raises(ModelFormatError, match="no MLflow model"):
            check_safe(tmp_path)
