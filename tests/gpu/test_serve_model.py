"""A served model gives the same answers on a GPU as on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ray.serving.model_folder import look_into
from deepseek_ray.serving.model_kinds import load
from deepseek_ray.serving.model_records import Records
from tests.unit.model_parts import backbone, risk_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def answers(folder: Path, body: bytes, device: Any) -> list[Any]:
    model = load(look_into(folder), device)
    assert model.facts["device"] == device
    return list(model.predict(Records(model.columns, 10).parse(body)))


def test_probabilities_of_the_risk_model(tmp_path: Path) -> None:
    folder = risk_model().save_pretrained(tmp_path / "fraud")
    body = b'{"records": [{"amount": 1.5, "count 1d": 2}, {"amount": -1, "count 1d": 0}]}'
    here, there = answers(folder, body, "cpu"), answers(folder, body, "cuda")
    assert [row["probability"] for row in there] == pytest.approx([row["probability"] for row in here], abs=1e-9)


def test_classes_and_completions_of_backbones(tmp_path: Path) -> None:
    backbone(tmp_path / "classes", head="classification", causal=False, num_classes=3)
    backbone(tmp_path / "language")
    body = b'{"records": [{"text": "def f("}, {"text": "x"}]}'
    here, there = (answers(tmp_path / "classes", body, device) for device in ("cpu", "cuda"))
    for one, other in zip(here, there, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-3)
    for one in answers(tmp_path / "language", body, "cuda"):
        assert len(one["next"]) == 5
