"""Text to train on, byte by byte: a folder of files becomes one array of tokens, cut into windows.

Tokens 0 to 255 are bytes; 256 starts a document. A window is ``seq_len`` tokens and the ones that follow each of them.
Every epoch visits all windows once, in an order that follows from the seed and the epoch alone.

Legend: B samples, S positions.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.config_moe import CorpusConfig
from deepseek_ray.errors import DataError

START = 256
VOCAB_SIZE = 257
_NOT_SOURCES = ("site-packages", "test", "tests", "idle_test", "__pycache__")


class Corpus:
    """Samples of a folder of text.

    Args:
        config: folder, pattern, limit of bytes, S.
        seed: of the order.

    Raises:
        DataError: the folder has no text, or too little for one window.
    """

    def __init__(self, config: CorpusConfig, seed: int) -> None:
        self.seq_len, self.seed = config.seq_len, seed
        self.tokens = _read(config)
        self.digest = hashlib.sha256(self.tokens.tobytes()).hexdigest()
        self.num_windows = (len(self.tokens) - 1) // self.seq_len
        if self.num_windows < 1:
            raise DataError(
                f"The corpus has {len(self.tokens)} tokens; corpus.seq_len = {self.seq_len} needs one more.",
                fix="name a folder with more text",
            )
        self._orders: dict[int, NDArray[np.int64]] = {}

    def take(self, number_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, S) and the next ones (B, S) of samples by their number in the order of training."""
        starts = [self._window(int(number)) * self.seq_len for number in number_B]
        rows = np.stack([self.tokens[start : start + self.seq_len + 1] for start in starts]).astype(np.int64)
        whole = torch.from_numpy(rows)
        return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()

    def _window(self, number: int) -> int:
        epoch, place = divmod(number, self.num_windows)
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)}
        return int(self._orders[epoch][place])


def _read(config: CorpusConfig) -> NDArray[np.uint16]:
    """All files in order of their path, each after a START, up to the limit."""
    own = not config.folder
    folder = Path(sysconfig.get_path("stdlib") if own else config.folder)
    parts: list[NDArray[np.uint16]] = []
    size = 0
    for file in sorted(folder.glob(config.pattern)):
        if size >= config.max_bytes:
            break
        if not file.is_file() or (own and not set(_NOT_SOURCES).isdisjoint(file.relative_to(folder).parts)):
            continue
        text = np.frombuffer(file.read_bytes()[: config.max_bytes - size], dtype=np.uint8)
        parts += [np.array([START], dtype=np.uint16), text.astype(np.uint16)]
        size += len(text)
    if not size:
        raise DataError(f"No text in {str(folder)!r} matches {config.pattern!r}.", fix="set corpus.folder")
    return np.concatenate(parts)
