"""Before a model serves it answers its own example, in every size of batch that it will be given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.errors import ModelFormatError
from deepseek_ray.serving.model_folder import look_into
from deepseek_ray.serving.model_kinds import load
from deepseek_ray.serving.model_records import Batch
from deepseek_ray.serving.model_rehearsal import Example, rehearse
from tests.unit.model_parts import backbone, risk_model


class Recorded:
    """A model of one column that remembers the sizes of its batches."""

    def __init__(self, answer: Callable[[Batch], Sequence[Any]], *, made_up: bool = False) -> None:
        self._answer, self._made_up = answer, made_up
        self.sizes: list[int] = []

    def check(self, batch: Batch) -> None: ...

    def predict(self, batch: Batch) -> Sequence[Any]:
        self.sizes.append(batch.num_rows)
        return self._answer(batch)

    def example(self) -> Example:
        return Example(Batch({"x": [1.0, 2.0]}, 2), made_up=self._made_up)


def test_every_bucket_is_met_before_a_request_is() -> None:
    model = Recorded(lambda batch: batch.columns["x"])
    rehearse(model, [1, 8, 32])
    assert model.sizes == [2, 1, 8, 32]
    assert Batch({"x": [1.0, 2.0]}, 2).resized(4).columns == {"x": [1.0, 2.0, 2.0, 2.0]}
    assert Batch({"x": [1.0, 2.0]}, 2).resized(1).columns == {"x": [1.0]}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda batch: [0.5], "gives 1 answers for 2 rows"),
        (lambda batch: [{"p": math.nan}] * batch.num_rows, "no finite number"),
        (lambda batch: [[0.1, math.inf]] * batch.num_rows, "no finite number"),
        (lambda batch: [1 / 0], "fails with ZeroDivisionError"),
    ],
)
def test_a_model_that_fails_on_its_own_example_does_not_serve(
    answer: Callable[[Batch], Sequence[Any]], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelFormatError, match=why):
        rehearse(Recorded(answer))
    rehearse(Recorded(answer, made_up=True))
    assert why in caplog.text
    assert "input_example" in caplog.text


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"head": "classification", "num_classes": 3, "causal": False, "vocab_size": 50},
        {"adapter": "events", "head": "classification", "num_classes": 3, "causal": False, "num_channels": 2},
        {"adapter": "patches", "head": "classification", "num_classes": 3, "causal": False, "patch_size": 2},
    ],
)
def test_every_kind_of_backbone_has_an_example_that_it_answers(tmp_path: Path, shape: dict[str, Any]) -> None:
    backbone(tmp_path / "model", **shape)
    model = load(look_into(tmp_path / "model"), "cpu")
    assert not model.example().made_up
    assert set(model.example().rows.columns) == {column.name for column in model.columns}
    rehearse(model, [1, 2])


def test_a_saved_risk_model_has_an_example_too(tmp_path: Path) -> None:
    model = load(look_into(risk_model().save_pretrained(tmp_path / "fraud")), "cpu")
    assert list(model.example().rows.columns) == [column.name for column in model.columns]
    rehearse(model)
