"""An n-gram baseline: what counting alone reaches, in nats per token.

A language model that does not beat a trigram has learned nothing worth quantizing, so every quick run is
held against this number. The estimator is interpolated modified Kneser-Ney (Chen and Goodman, "An Empirical
Study of Smoothing Techniques for Language Modeling", 1999), the strongest of the simple ones:

    p_k(w | c) = max(n(c w) - D(n(c w)), 0) / n(c) + g(c) p_{k-1}(w | c')       c' = c without its oldest token
    g(c)       = (D1 N1(c) + D2 N2(c) + D3 N3+(c)) / n(c)                       so that p_k sums to 1
    p_0        = 1 / V

At the highest order n(.) counts occurrences; below, it counts distinct left neighbours. D1, D2, D3+ follow
from the counts of counts in closed form: D_j = j - (j + 1) Y t_{j+1} / t_j, Y = t_1 / (t_1 + 2 t_2), where
t_j n-grams occur j times. A context that never occurred has p_k = p_{k-1}.

V vocabulary, N training tokens, M predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Where a count of counts is zero (tiny texts) the closed form is undefined; Ney's customary absolute
# discount stands in. It keeps the distribution proper: 0 < D <= every count.
_DEFAULT_DISCOUNT = 0.75


@dataclass(frozen=True)
class _Level:
    """One order: n-grams (sorted keys), their discounted counts, and of each context 1/n(c) and g(c)."""

    keys: NDArray[np.int64]
    discounted: NDArray[np.float64]
    contexts: NDArray[np.int64]
    totals: NDArray[np.float64]
    backoff: NDArray[np.float64]


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[4] float64: D(0) = 0, D1, D2, D3+."""
    t = np.bincount(np.minimum(counts, 5), minlength=6)[:5].astype(np.float64)
    discounts = np.array([0.0, *[_DEFAULT_DISCOUNT] * 3])
    if t[1] == 0 or t[2] == 0:
        return discounts
    y = t[1] / (t[1] + 2 * t[2])
    for j in (1, 2, 3):
        if t[j] > 0:
            value = j - (j + 1) * y * t[j + 1] / t[j]
            if 0.0 < value <= j:
                discounts[j] = value
    return discounts


def _level(keys: NDArray[np.int64], counts: NDArray[np.int64], vocab: int) -> _Level:
    """``keys`` [K] sorted, key = context * V + token; ``counts`` [K] >= 1."""
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(keys // vocab, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    removed = np.add.reduceat(discount, first)
    return _Level(keys, counts - discount, contexts, totals, removed / totals)


def _find(
    sorted_keys: NDArray[np.int64], keys: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Position of each key, and whether it is there."""
    position = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return position, sorted_keys[position] == keys


class NgramModel:
    """Interpolated modified Kneser-Ney of ``order`` (1: unigram, 3: trigram) fitted on ``tokens`` [N]."""

    def __init__(self, tokens: NDArray[np.integer], vocab: int, order: int) -> None:
        tokens = _checked(tokens, vocab).reshape(-1)
        if order < 1 or vocab**order >= 1 << 63:
            raise ValueError(
                f"order {order} with vocab {vocab} must be at least 1 and have vocab^order < 2^63 (keys are int64)"
            )
        if len(tokens) < order:
            raise ValueError(f"{len(tokens)} training tokens hold no {order}-gram; give at least {order}")
        self.vocab, self.order = vocab, order
        grams = np.zeros(len(tokens) - order + 1, dtype=np.int64)
        for k in range(order):
            grams = grams * vocab + tokens[k : len(tokens) - order + 1 + k]
        keys, counts = np.unique(grams, return_counts=True)
        levels = [_level(keys, counts, vocab)]
        for k in range(order - 1, 0, -1):
            keys, counts = np.unique(keys % vocab**k, return_counts=True)
            levels.append(_level(keys, counts, vocab))
        self._levels = levels[::-1]  # of order 1 first

    def probability(self, grams: NDArray[np.integer]) -> NDArray[np.float64]:
        """p(last token | the ones before), [M] float64, of ``grams`` [M, order]."""
        grams = _checked(grams, self.vocab)
        p = np.full(len(grams), 1.0 / self.vocab)
        key = np.zeros(len(grams), dtype=np.int64)
        scale = 1
        for k, level in enumerate(self._levels, start=1):
            key = key + grams[:, self.order - k] * scale
            scale *= self.vocab
            context, known = _find(level.contexts, key // self.vocab)
            gram, seen = _find(level.keys, key)
            counted = np.where(seen, level.discounted[gram], 0.0) / level.totals[context]
            p = np.where(known, counted + level.backoff[context] * p, p)
        return p


def _checked(tokens: NDArray[np.integer], vocab: int) -> NDArray[np.int64]:
    tokens = np.asarray(tokens)
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
        raise ValueError(
            f"token ids [{tokens.min()}, {tokens.max()}] are outside the vocabulary [0, {vocab})"
        )
    return tokens.astype(np.int64)


def ngram_nats_per_token(
    train_tokens: NDArray[np.integer], val_tokens: NDArray[np.integer], vocab: int, order: int
) -> float:
    """Mean -ln p over every predicted token of ``val_tokens``, fitted on ``train_tokens`` alone.

    ``val_tokens``: one stream [N] or windows [n, S + 1] (``ValidationWindows.tokens``). In each row every
    token but the first is predicted from the tokens before it in that row, exactly as a model reads windows;
    where a row has fewer than order - 1 of them, a model of lower order predicts.
    """
    rows = np.atleast_2d(_checked(val_tokens, vocab))
    if rows.shape[1] < 2:
        raise ValueError(
            f"val_tokens of shape {rows.shape} hold nothing to predict; give at least 2 tokens a row"
        )
    total, predictions = 0.0, rows.size - len(rows)
    for used in range(min(2, order), order + 1):
        columns = rows[:, :used] if used < order else rows
        if columns.shape[1] < used:
            break
        grams = np.lib.stride_tricks.sliding_window_view(columns, used, axis=1)
        if order == 1:
            grams = grams[:, 1:]
        total -= float(
            np.log(NgramModel(train_tokens, vocab, used).probability(grams.reshape(-1, used))).sum()
        )
    return total / predictions


def trigram_nats_per_token(
    train_tokens: NDArray[np.integer], val_tokens: NDArray[np.integer], vocab: int
) -> float:
    """``ngram_nats_per_token`` of order 3; about a second for 12 MB of bytes on one core."""
    return ngram_nats_per_token(train_tokens, val_tokens, vocab, 3)
