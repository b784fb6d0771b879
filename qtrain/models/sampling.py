"""Text generation from any causal model tokens [B, S] -> logits [B, S, V].

Each step feeds the last ``sequence_tokens`` tokens again. That is quadratic in what a key-value cache makes
linear, and right for samples of a few hundred tokens during training: no second code path through the model
can disagree with the one that is trained.

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """``logits`` [B, V] with all but the allowed tokens at -inf.

    ``top_k``: the k most likely stay (ties with the k-th stay too). ``top_p``: of what top_k left, the smallest
    set of most likely tokens whose probability reaches p stays (Holtzman et al., 1904.09751), at least one.
    """
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability  # the mass ahead of each token
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} must not be negative")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} must not be negative; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1, or None for the whole vocabulary")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p {top_p} must lie in (0, 1], or be None for the whole vocabulary")


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    sequence_tokens: int | None = None,
) -> Tensor:
    """[B, S + max_new_tokens] int64: ``tokens`` [B, S], S >= 1, and what the model adds.

    ``temperature`` 0 is greedy and ignores the seed; else logits are divided by it, then filtered, then drawn
    with a generator of their own seeded by ``seed``. ``sequence_tokens``: the context the model sees at most;
    None takes ``model.config.sequence_tokens``. The model runs in eval mode and every submodule is put back
    into the mode it was in, also after an exception.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} must be [B, S] with S >= 1; start with the "
            "tokenizer's end-of-document token when there is no prompt"
        )
    context = sequence_tokens if sequence_tokens is not None else int(model.config.sequence_tokens)  # type: ignore
    generator = torch.Generator(tokens.device).manual_seed(seed)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = model(tokens[:, -context:])[:, -1].float()  # [B, V]
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                allowed = filter_logits(logits / temperature, top_k, top_p)
                chosen = torch.multinomial(allowed.softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat((tokens, chosen), dim=1)
    finally:
        for module, training in modes:
            module.training = training
    return tokens
