"""What a language model says next: log-probabilities of the next token, and the greedy completion.

Legend: B sequences, S positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_ray.models.backbone import Backbone


@torch.inference_mode()
def next_log_probs(model: Backbone, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities (B, V) of the token after each sequence, float32 on the CPU.

    Sequences of different lengths are padded at their end, which a causal model does not see; for another model they
    run by length. Only the last positions pass the head.
    """
    if not model.config.causal and len({len(tokens) for tokens in sequences}) > 1:
        return torch.cat([next_log_probs(model, [tokens]) for tokens in sequences])
    assert model.adapter is not None, "a language model has its adapter"
    assert model.head is not None, "a language model has its head"
    device = next(model.parameters()).device
    length_B = torch.tensor([len(tokens) for tokens in sequences], device=device)
    token_BS = torch.zeros(len(sequences), int(length_B.max()), dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        token_BS[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    x_BSD = model.adapter(token_BS.to(device))
    for layer in model.layers.values():
        x_BSD = layer(x_BSD)
    last_B1D = x_BSD[torch.arange(len(sequences), device=device), length_B - 1].unsqueeze(1)
    logit_BV = model.head(last_B1D).squeeze(1)
    return torch.log_softmax(logit_BV.float(), -1).cpu()


def complete(
    model: Backbone, prompts: Sequence[Sequence[int]], num_new: Sequence[int], *, stop: int | None, num_tokens: int
) -> list[list[int]]:
    """The most probable token, again and again, after each prompt.

    Args:
        model: language model.
        prompts: tokens.
        num_new: of each prompt, at most so many.
        stop: a token that ends a completion and is not part of it.
        num_tokens: tokens that may be chosen: those below it.

    Returns:
        The new tokens alone.
    """
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = [row for row, wanted in enumerate(num_new) if wanted > 0]
    while open_rows:
        chosen = next_log_probs(model, [[*prompts[row], *new[row]] for row in open_rows])[:, :num_tokens].argmax(-1)
        still = []
        for row, token in zip(open_rows, chosen.tolist(), strict=True):
            if token == stop:
                continue
            new[row].append(token)
            if len(new[row]) < num_new[row]:
                still.append(row)
        open_rows = still
    return new
