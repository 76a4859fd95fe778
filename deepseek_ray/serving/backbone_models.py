"""Backbones behind a server: the next token and a completion, or the probability of each class.

Legend: S positions, C numbers an event or channels a voxel, Z Y X edges of a volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from deepseek_ray.config_moe import BackboneConfig
from deepseek_ray.data.corpus import START, VOCAB_SIZE
from deepseek_ray.errors import ModelFormatError
from deepseek_ray.models.backbone import Backbone
from deepseek_ray.models.generation import complete, next_log_probs
from deepseek_ray.registry.columns import Column
from deepseek_ray.serving.model_records import Batch
from deepseek_ray.serving.model_rehearsal import Example
from deepseek_ray.serving.problem import FieldErrors, field_error

MAX_CANDIDATES = 100
_NUMBER = {"type": "number"}


def serve_backbone(model: Backbone) -> Language | Classes:
    """The model behind its head.

    Raises:
        ModelFormatError: a language head over something that is no token.
    """
    if model.config.head == "classification":
        return Classes(model)
    if model.config.adapter != "tokens":
        raise ModelFormatError(
            f"A language head over {model.config.adapter!r} has no completion to serve.",
            fix="serve a backbone of tokens, or one with a classification head",
        )
    return Language(model)


class Language:
    """A language backbone over bytes or token numbers: the next token's candidates, and a greedy completion."""

    def __init__(self, model: Backbone) -> None:
        self._model, self._inputs = model, Tokens(model.config)
        longest = model.config.max_seq_len
        self.columns: tuple[Column, ...] = (
            *self._inputs.columns,
            Column("max_new_tokens", "long", required=False, minimum=0, maximum=longest, text="completion; default 0"),
            Column("candidates", "long", required=False, minimum=1, maximum=MAX_CANDIDATES, text="default 5"),
        )
        candidate = {"token": {"type": "integer"}, "text": {"type": "string"}, "log_probability": _NUMBER}
        self.answer: Mapping[str, Any] = {
            "type": "object",
            "properties": {
                "next": {"type": "array", "items": {"type": "object", "properties": candidate}},
                "tokens": {"type": "array", "items": {"type": "integer"}, "description": "the completion"},
                "completion": {"type": "string", "description": "the same as text, for a model of bytes"},
            },
        }
        self.facts: Mapping[str, Any] = {
            "kind": "language",
            "device": next(model.parameters()).device.type,
            "max_seq_len": longest,
        }

    def check(self, batch: Batch) -> None:
        self._inputs.check(batch)

    def predict(self, batch: Batch) -> Sequence[Any]:
        prompts = self._inputs.read(batch)
        room = [self._model.config.max_seq_len - len(prompt) for prompt in prompts]
        wanted = [min(n or 0, left) for n, left in zip(batch.columns["max_new_tokens"], room, strict=True)]
        scores = next_log_probs(self._model, prompts)[:, : self._inputs.num_tokens]
        stop = START if self._inputs.bytewise else None
        new = complete(self._model, prompts, wanted, stop=stop, num_tokens=self._inputs.num_tokens)
        best = [scores[row].topk(min(n or 5, scores.shape[1])) for row, n in enumerate(batch.columns["candidates"])]
        return [self._answer(top, tokens) for top, tokens in zip(best, new, strict=True)]

    def example(self) -> Example:
        rows = self._inputs.example() | {"max_new_tokens": [1], "candidates": [None]}
        return Example(Batch(rows, 1))

    def _answer(self, top: Any, tokens: list[int]) -> dict[str, Any]:
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        found: dict[str, Any] = {"next": [{"token": token, "log_probability": value} for token, value in pairs]}
        found["tokens"] = tokens
        if self._inputs.bytewise:
            found["completion"] = _text(tokens)
            for candidate in found["next"]:
                candidate["text"] = _text([candidate["token"]])
        return found


class Classes:
    """A backbone with a classification head: the probability of each class."""

    def __init__(self, model: Backbone) -> None:
        self._model = model
        self._inputs: Inputs = Tokens(model.config) if model.config.adapter == "tokens" else Numbers(model.config)
        self.columns: tuple[Column, ...] = self._inputs.columns
        self.answer: Mapping[str, Any] = {
            "type": "object",
            "properties": {"probabilities": {"type": "array", "items": _NUMBER}, "class": {"type": "integer"}},
        }
        self.facts: Mapping[str, Any] = {
            "kind": "classification",
            "device": next(model.parameters()).device.type,
            "num_classes": model.config.num_classes,
        }

    def check(self, batch: Batch) -> None:
        self._inputs.check(batch)

    @torch.inference_mode()
    def predict(self, batch: Batch) -> Sequence[Any]:
        answers: list[Any] = [None] * batch.num_rows
        for rows, x in self._by_shape(self._inputs.read(batch)):
            for row, share in zip(rows, torch.softmax(self._model(x).float(), -1).tolist(), strict=True):
                answers[row] = {"probabilities": share, "class": int(np.argmax(share))}
        return answers

    def example(self) -> Example:
        return Example(Batch(self._inputs.example(), 1))

    def _by_shape(self, inputs: Sequence[Any]) -> list[tuple[list[int], torch.Tensor]]:
        """Rows of one shape together: the head takes the mean over all positions, so none may be padding."""
        weight = next(self._model.parameters())
        kind = torch.int64 if isinstance(self._inputs, Tokens) else weight.dtype
        groups: dict[tuple[int, ...], tuple[list[int], list[torch.Tensor]]] = {}
        for row, values in enumerate(inputs):
            x = torch.tensor(values, dtype=kind)
            rows, tensors = groups.setdefault(tuple(x.shape), ([], []))
            rows.append(row)
            tensors.append(x)
        return [(rows, torch.stack(tensors).to(weight.device)) for rows, tensors in groups.values()]


class Inputs(Protocol):
    """The columns of a backbone's adapter."""

    columns: tuple[Column, ...]

    def check(self, batch: Batch) -> None: ...
    def read(self, batch: Batch) -> list[list[Any]]: ...
    def example(self) -> dict[str, list[Any]]: ...


class Tokens:
    """Either ``text``, read as UTF-8 bytes after the token that starts a document, or ``tokens`` as they are.

    Attributes:
        bytewise: whether the vocabulary is that of the byte-level corpus.
        num_tokens: tokens that mean something.
    """

    def __init__(self, config: BackboneConfig) -> None:
        self._longest = config.max_seq_len
        self.bytewise = VOCAB_SIZE <= config.vocab_size <= VOCAB_SIZE + 255  # padded to a round number at most
        self.num_tokens = VOCAB_SIZE if self.bytewise else config.vocab_size
        top = config.vocab_size - 1
        tokens = Column(
            "tokens", "long", required=not self.bytewise, sizes=((1, self._longest),), minimum=0, maximum=top
        )
        text = Column("text", "string", required=False, text=f"at most {self._longest - 1} bytes; else send tokens")
        self.columns: tuple[Column, ...] = (text, tokens) if self.bytewise else (tokens,)

    def check(self, batch: Batch) -> None:
        if not self.bytewise:
            return
        errors = []
        for row, (text, tokens) in enumerate(zip(batch.columns["text"], batch.columns["tokens"], strict=True)):
            field = f"records.{row}.text"
            if (text is None) == (tokens is None):
                errors.append(field_error(field, text, "not exactly one of text and tokens", "send one of the two"))
            elif text is not None and (size := len(text.encode("utf-8", "replace"))) >= self._longest:
                detail = f"{size} bytes, at most {self._longest - 1} fit"
                errors.append(field_error(field, text, detail, "send the end of the text alone"))
        if errors:
            raise FieldErrors(errors)

    def read(self, batch: Batch) -> list[list[Any]]:
        """Each row's tokens."""
        if not self.bytewise:
            return batch.columns["tokens"]
        pairs = zip(batch.columns["text"], batch.columns["tokens"], strict=True)
        return [tokens if text is None else [START, *text.encode("utf-8", "replace")] for text, tokens in pairs]

    def example(self) -> dict[str, list[Any]]:
        """A row of one token."""
        return {"text": [None], "tokens": [[0]]} if self.bytewise else {"tokens": [[0]]}


class Numbers:
    """``events``: S vectors of C numbers; or ``volume``: C channels of Z x Y x X voxels, edges of whole patches."""

    def __init__(self, config: BackboneConfig) -> None:
        channels = (config.num_channels, config.num_channels)
        self._patch, self._longest = config.patch_size, config.max_seq_len
        self._name = "events" if config.adapter == "events" else "volume"
        edge = (self._patch, None)
        sizes = ((1, self._longest), channels) if self._name == "events" else (channels, edge, edge, edge)
        self.columns: tuple[Column, ...] = (Column(self._name, "double", sizes=sizes),)
        shape = (1, channels[0]) if self._name == "events" else (channels[0], *(self._patch,) * 3)
        self._smallest = np.zeros(shape).tolist()

    def check(self, batch: Batch) -> None:
        if self._name == "events":
            return
        errors = [
            field_error(f"records.{row}.volume", None, problem, "pad or crop it, every line as long as the others")
            for row, volume in enumerate(batch.columns["volume"])
            if (problem := self._problem(volume))
        ]
        if errors:
            raise FieldErrors(errors)

    def read(self, batch: Batch) -> list[list[Any]]:
        """Each row's numbers."""
        return batch.columns[self._name]

    def example(self) -> dict[str, list[Any]]:
        """The smallest row that fits, of zeros."""
        return {self._name: [self._smallest]}

    def _problem(self, volume: Any) -> str:
        try:
            edges = np.array(volume, dtype=np.float64).shape[1:]
        except ValueError:
            return "lines of different lengths"
        if any(edge % self._patch for edge in edges):
            return f"{edges} voxels are no whole patches of {self._patch}"
        patches = int(np.prod(edges)) // self._patch**3
        return "" if patches <= self._longest else f"{patches} patches, at most {self._longest} fit"


def _text(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < START).decode("utf-8", "replace")
