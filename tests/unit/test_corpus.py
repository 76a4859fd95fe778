"""The corpus: bytes become windows, each once an epoch, in an order that seed and epoch alone decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek_ray.config_moe import CorpusConfig
from deepseek_ray.data.corpus import START, VOCAB_SIZE, Corpus
from deepseek_ray.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 bytes in two files, one in a folder below; and one that the pattern leaves out."""
    (tmp_path / "below").mkdir()
    (tmp_path / "b.txt").write_bytes(bytes(range(200, 240)))
    (tmp_path / "below" / "a.txt").write_bytes(bytes(range(60)))
    (tmp_path / "c.bin").write_bytes(b"never seen")
    return tmp_path


def make(folder: Path, seed: int = 0, **settings: Any) -> Corpus:
    return Corpus(CorpusConfig(folder=str(folder), pattern="**/*.txt", **({"seq_len": 10} | settings)), seed)


def order(corpus: Corpus, epoch: int) -> list[int]:
    """First tokens of an epoch's windows, as their place in the text."""
    first = epoch * corpus.num_windows
    x_BS, _ = corpus.take(torch.arange(first, first + corpus.num_windows))
    starts = {tuple(corpus.tokens[i * 10 : i * 10 + 10].tolist()): i for i in range(corpus.num_windows)}
    return [starts[tuple(row)] for row in x_BS.tolist()]


def test_files_follow_each_other_by_path_each_after_a_start(folder: Path) -> None:
    assert make(folder).tokens.tolist() == [START, *range(200, 240), START, *range(60)]
    assert VOCAB_SIZE == START + 1


def test_the_targets_are_the_next_tokens(folder: Path) -> None:
    corpus = make(folder)
    x_BS, target_BS = corpus.take(torch.arange(corpus.num_windows))
    assert x_BS.shape == target_BS.shape == (10, 10)
    assert x_BS.dtype == target_BS.dtype == torch.int64
    assert torch.equal(x_BS[:, 1:], target_BS[:, :-1])
    text = corpus.tokens.tolist()
    for row, last in zip(x_BS.tolist(), target_BS[:, -1].tolist(), strict=True):
        place = next(i for i in range(0, 100, 10) if text[i : i + 10] == row)
        assert text[place + 10] == last


def test_every_epoch_visits_every_window_once_in_an_order_of_its_own(folder: Path) -> None:
    corpus = make(folder)
    epochs = [order(corpus, epoch) for epoch in range(3)]
    assert [sorted(one) for one in epochs] == [list(range(10))] * 3
    assert len({tuple(one) for one in epochs}) == 3


def test_the_order_depends_on_seed_and_epoch_only(folder: Path) -> None:
    corpus = make(folder)
    wanted = order(corpus, 2)
    assert wanted == order(make(folder), 2)  # whatever was read before
    assert wanted != order(make(folder, seed=1), 2)
    number_B = torch.tensor([29, 3, 20, 11])  # of three epochs, in any order
    one_by_one = [make(folder).take(number[None])[0] for number in number_B]
    assert torch.equal(corpus.take(number_B)[0], torch.cat(one_by_one))
    text: Tensor = corpus.take(torch.tensor([20]))[0]
    assert text[0].tolist() == corpus.tokens[wanted[0] * 10 : wanted[0] * 10 + 10].tolist()


@pytest.mark.parametrize(("seq_len", "windows"), [(50, 2), (51, 1), (101, 1)])
def test_a_window_needs_one_token_more_than_its_length(folder: Path, seq_len: int, windows: int) -> None:
    corpus = make(folder, seq_len=seq_len)  # 102 tokens
    assert corpus.num_windows == windows
    assert corpus.take(torch.arange(windows))[1].shape == (windows, seq_len)


def test_too_little_text_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"102 tokens; corpus.seq_len = 102 needs one more.*Fix: name a folder"):
        make(folder, seq_len=102)


@pytest.mark.parametrize("content", [None, b""])
def test_a_folder_without_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"No text in .* matches '\*\*/\*\.txt'.*Fix: set corpus.folder"):
        make(tmp_path)
    with pytest.raises(DataError, match="No text"):
        make(tmp_path / "nowhere")


def test_the_limit_is_in_bytes_and_cuts_the_last_file(tmp_path: Path) -> None:
    for name, size in (("a", 1000), ("b", 1000), ("c", 1000)):
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * size)
    tokens = make(tmp_path, max_bytes=1500).tokens
    assert np.bincount(tokens, minlength=VOCAB_SIZE)[[ord("a"), ord("b"), ord("c"), START]].tolist() == [
        1000,
        500,
        0,
        2,
    ]
    assert START not in make(tmp_path, max_bytes=2000).tokens[-1:]  # no empty document at the end


def test_the_digest_is_that_of_the_tokens_not_of_seed_or_length(folder: Path) -> None:
    digest = make(folder).digest
    assert digest == make(folder, seed=3, seq_len=20).digest
    (folder / "c.bin").write_bytes(b"still never seen")
    assert digest == make(folder).digest
    (folder / "b.txt").write_bytes(bytes(range(200, 239)) + b"!")
    assert digest != make(folder).digest


def test_without_a_folder_the_standard_library_serves() -> None:
    corpus = Corpus(CorpusConfig(max_bytes=50_000), seed=0)
    assert (corpus.tokens != START).sum() == 50_000
    x_BS, _ = corpus.take(torch.arange(4))
    assert x_BS.shape == (4, 128)
