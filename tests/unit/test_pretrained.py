"""A backbone on disk: back bit for bit, in its type; anything torn, changed, missing or foreign is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.errors import ModelFormatError
from deepseek_ray.models.backbone import Backbone, init_weights
from deepseek_ray.models.pretrained import from_pretrained, piece_of, pieces_of, save_pretrained

CONFIG = BackboneConfig(vocab_size=7, d_model=8, num_layers=2, d_head=4, num_experts=4, d_expert=4, rope_theta=1e6 / 3)


def make(dtype: torch.dtype = torch.float32) -> Backbone:
    model = Backbone(CONFIG)
    init_weights(model, CONFIG, seed=3)
    model.routers()[1].bias_E.copy_(torch.tensor([0.1, -0.2, 0.3, -0.2]))
    return model.to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pretrained(make(), tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_comes_back_bit_for_bit_in_its_type(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(dtype)
    back = from_pretrained(save_pretrained(model, tmp_path / "new" / "model"))
    wanted, got = model.state_dict(), back.state_dict()
    assert back.config == CONFIG
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == dtype
        assert torch.equal(got[name], wanted[name])
    token_BS = torch.randint(7, (2, 5))
    assert torch.equal(back(token_BS), model.eval()(token_BS))


def test_it_comes_back_for_evaluation_and_can_train_on(folder: Path) -> None:
    model = from_pretrained(folder)
    assert not model.training
    model.train()(torch.randint(7, (2, 5))).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert int(model.routers()[1].count_E.sum()) == 2 * 5 * CONFIG.top_k


def test_another_type_may_be_asked_for(folder: Path) -> None:
    state = from_pretrained(folder, torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert torch.equal(state["head.norm.weight_D"], torch.ones(8, dtype=torch.bfloat16))


def test_the_files_are_one_a_layer_and_nothing_else_and_hold_every_tensor_once(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json"} | {f"{piece}.safetensors" for piece in pieces_of(CONFIG)}
    held = {file.stem: list(load_file(file)) for file in folder.glob("*.safetensors")}
    assert sorted(name for part in held.values() for name in part) == sorted(make().state_dict())
    assert all(piece_of(name) == piece for piece, part in held.items() for name in part)


def test_no_pickle_is_written_or_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert from_pretrained(folder).config == CONFIG
    for file in folder.iterdir():  # a pickle of torch is a zip, a bare one starts with its protocol
        assert not file.read_bytes().startswith((b"PK", b"\x80"))


def describe(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def swap_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors and the checksum with them, as a foreign writer could."""
    file = folder / "head.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    files = json.loads((folder / "config.json").read_text())["files"]
    describe(folder, files=files | {file.name: hashlib.sha256(file.read_bytes()).hexdigest()})


def broken_but_signed(folder: Path) -> None:
    file = folder / "head.safetensors"
    file.write_bytes(b"PK\x03\x04 not a tensor file")
    files = json.loads((folder / "config.json").read_text())["files"]
    describe(folder, files=files | {file.name: hashlib.sha256(file.read_bytes()).hexdigest()})


def torn(folder: Path) -> None:
    file = folder / "layer-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flipped(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (torn, r"layer-0001\.safetensors is missing or its checksum"),
    "one bit": (flipped, r"adapter\.safetensors is missing or its checksum"),
    "piece missing": (lambda f: (f / "head.safetensors").unlink(), r"head\.safetensors is missing"),
    "config missing": (lambda f: (f / "config.json").unlink(), r"config\.json is missing or broken"),
    "config torn": (lambda f: (f / "config.json").write_text('{"format": '), r"config\.json is missing or broken"),
    "config no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is missing or broken"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json is missing or broken"),
    "other format": (lambda f: describe(f, format="llama"), r"format 'llama' is not 'deepseek_ray.backbone/1'"),
    "config refused": (lambda f: describe(f, config={"num_heads": 3}), r"num_heads % num_kv_heads = 1"),
    "unknown setting": (lambda f: describe(f, config={"d_modle": 3}), r"config\.json is missing or broken"),
    "no list of files": (lambda f: describe(f, files=3), r"config\.json is missing or broken"),
    "other files": (lambda f: describe(f, files={"../x.safetensors": "0"}), r"names other files .*\.\./x"),
    "more layers": (lambda f: describe(f, config=CONFIG.model_dump() | {"num_layers": 3}), r"layer-0002"),
    "other width": (lambda f: describe(f, config=CONFIG.model_dump() | {"d_expert": 6}), r"do not fit its config"),
    "tensor missing": (lambda f: swap_tensors(f, lambda s: s.pop("head.norm.weight_D")), r"do not fit its config"),
    "tensor added": (lambda f: swap_tensors(f, lambda s: s.update(x=torch.ones(1))), r"do not fit its config"),
    "not safetensors": (broken_but_signed, r"head\.safetensors is broken"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused(folder: Path, damage: str) -> None:
    change, problem = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelFormatError, match=rf"(?s){problem}.*Fix: fetch or train it again"):
        from_pretrained(folder)


def test_an_interrupted_overwrite_is_refused_not_mixed(folder: Path, tmp_path: Path) -> None:
    newer = make()
    init_weights(newer, CONFIG, seed=4)
    other = save_pretrained(newer, tmp_path / "other")
    (folder / "adapter.safetensors").write_bytes((other / "adapter.safetensors").read_bytes())
    with pytest.raises(ModelFormatError, match=r"adapter\.safetensors"):
        from_pretrained(folder)
