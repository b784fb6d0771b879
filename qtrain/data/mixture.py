"""Several corpora in one run, by weight: which one sample i comes from is a function of (seed, i) alone.

The parts in order of falling weight w_1 >= ... >= w_K are split off one after the other. Among the first n samples of
what is left, part k takes

    c(n) = floor(n r + phase),     r = w_k / (w_k + ... + w_K),   phase(seed, k) in [0, 1)

so that sample n is part k's c(n)-th where c(n + 1) > c(n), and else sample n - c(n) of what is left. c(n) is within 1
of n r, and what the later splits add is never more than 1 each: after any number n of samples,

    |samples of part k - w_k n| < max(1, K - 1)

A draw at random would be off by sqrt(w (1 - w) n), and would need a sum over all earlier samples to say which of its
own samples a part is at. Each part goes through its samples in the order that it has alone, with its own epochs.

Ratios are whole multiples of 2^-48: proportions are exact to n 2^-48 samples, and n r + phase never rounds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qtrain.data.corpus import Corpus, DataPlan, check_recorded
from qtrain.data.stream import Windows, mix_words
from qtrain.data.tokenizers import BpeTraining, Tokenizer
from qtrain.data.validation import ValidationPart, ValidationSet

_BITS = 48
# Weights are written by hand: 0.333 three times is taken for a third
_SUM_TOLERANCE = 2e-3


class Interleaving:
    """Which part sample i comes from, and which of that part's samples it is. weights: name -> positive; their sum is
    1 up to rounding."""

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.names = sorted(weights, key=lambda name: (-weights[name], name))
        left = math.fsum(weights.values())
        self._ratios, self._phases = [], []
        for k, name in enumerate(self.names[:-1]):
            self._ratios.append(round(weights[name] / left * (1 << _BITS)))
            self._phases.append(mix_words(seed, k) >> (64 - _BITS))
            left -= weights[name]

    def __getitem__(self, i: int) -> tuple[str, int]:
        """(part, its sample) of sample i."""
        if i < 0:
            raise IndexError(f"sample index {i} must not be negative")
        for name, ratio, phase in zip(self.names, self._ratios, self._phases, strict=False):
            before = (i * ratio + phase) >> _BITS
            if ((i + 1) * ratio + phase) >> _BITS > before:
                return name, before
            i -= before
        return self.names[-1], i

    def counts(self, n: int) -> dict[str, int]:
        """How many of the first n samples each part has; their sum is n."""
        found = {}
        for name, ratio, phase in zip(self.names, self._ratios, self._phases, strict=False):
            found[name] = (n * ratio + phase) >> _BITS
            n -= found[name]
        return {**found, self.names[-1]: n}


def check_weights(weights: Mapping[str, Any]) -> dict[str, float]:
    """The weights with a sum of exactly 1. Raises ValueError."""
    if not weights:
        raise ValueError("data.parts is empty; name at least one, as in data.parts={code:{weight:1,...}}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(
                f"data.parts.{name}.weight={weight!r}: must be a positive number, a part's share of the tokens"
            )
    total = math.fsum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    if abs(total - 1) > _SUM_TOLERANCE:
        proposed = ", ".join(f"{name}: {share:.4g}" for name, share in shares.items())
        raise ValueError(
            f"data.parts: the weights add to {total:g}, not to 1; in these proportions: {proposed}"
        )
    return shares


class Mixture:
    """parts: name -> (weight, plan). Raises ValueError where weights do not add to 1 or the tokenizers differ."""

    def __init__(self, parts: Mapping[str, tuple[float, DataPlan]]) -> None:
        self.weights = check_weights({name: weight for name, (weight, _) in parts.items()})
        self.plans = {name: plan for name, (_, plan) in parts.items()}
        _check_tokenizers(self.plans)

    @property
    def tokenizer(self) -> Tokenizer | BpeTraining | None:
        return next(iter(self.plans.values())).tokenizer

    @property
    def vocab_size(self) -> int:
        return max(plan.vocab_size for plan in self.plans.values())

    def open(self, recorded: Mapping[str, Any] | None = None) -> MixedCorpus:
        known = {} if recorded is None else recorded.get("parts", {})
        corpora = {name: plan.open(known.get(name)) for name, plan in self.plans.items()}
        corpus = MixedCorpus(corpora, self.weights)
        check_recorded(recorded, corpus.identity(), "Give the parts and weights of that run")
        return corpus


def _check_tokenizers(plans: Mapping[str, DataPlan]) -> None:
    found = {name: plan.tokenizer for name, plan in plans.items()}
    unnamed = [name for name, tokenizer in found.items() if tokenizer is None]
    if unnamed and len(plans) > 1:
        raise ValueError(
            f"data.parts.{unnamed[0]} names no tokenizer, and nothing says that its ids mean what those of the other "
            f"parts mean; give data.parts.{unnamed[0]}.tokenizer"
        )
    for name, tokenizer in found.items():
        if isinstance(tokenizer, BpeTraining):
            raise ValueError(
                f"data.parts.{name}.tokenizer is to be trained on its own part, and the parts of a mixture share one; train "
                "it first (qtrain prepare) and give data.tokenizer=saved:FOLDER/tokenizer"
            )
    if len({tokenizer.digest for tokenizer in found.values() if tokenizer is not None}) > 1:
        listed = ", ".join(f"{name}: {t.name}" for name, t in found.items() if t is not None)
        raise ValueError(
            f"data.parts: their tokenizers differ in their contents ({listed}); an id must mean the same in all parts"
        )


class MixedCorpus:
    """The opened parts."""

    def __init__(self, corpora: Mapping[str, Corpus], weights: Mapping[str, float]) -> None:
        self.corpora, self.weights = dict(corpora), dict(weights)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return next(iter(self.corpora.values())).tokenizer

    def identity(self) -> dict[str, Any]:
        """With those of the ``parts``."""
        parts = {
            name: {**corpus.identity(), "weight": self.weights[name]} for name, corpus in self.corpora.items()
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        first = next(iter(parts.values()))
        common = {key: value for key, value in first.items() if key.startswith("tokenizer")}
        return {"shards": f"mixture-{digest[:16]}", "fingerprint": digest, **common, "parts": parts}

    def train_windows(self, sequence_tokens: int, seed: int) -> MixedWindows:
        windows = {name: corpus.train_windows(sequence_tokens, seed) for name, corpus in self.corpora.items()}
        return MixedWindows(windows, Interleaving(self.weights, seed))

    def validation(self, sequence_tokens: int, max_windows: int | None) -> ValidationSet:
        """``max_windows`` are shared by the weights, with at least one for each part."""
        parts = []
        for name, corpus in self.corpora.items():
            weight = self.weights[name]
            share = None if max_windows is None else max(1, round(max_windows * weight))
            (own,) = corpus.validation(sequence_tokens, share).parts  # no mixture is a part of another
            parts.append(ValidationPart(name, weight, own.windows, own.tokens_per_byte))
        return ValidationSet(parts)

    def check_unchanged(self) -> None:
        for corpus in self.corpora.values():
            corpus.check_unchanged()


class MixedWindows(Windows):
    """The samples of ``parts`` in the order of ``interleaving``."""

    def __init__(self, parts: Mapping[str, Windows], interleaving: Interleaving) -> None:
        self.parts, self.interleaving = dict(parts), interleaving

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name, sample = self.interleaving[int(index)]
        return self.parts[name][sample]

    def state_dict(self, sample: int) -> dict[str, Any] | None:
        """Of the parts that have one."""
        at = self.interleaving.counts(sample)
        found = {name: part.state_dict(at[name]) for name, part in self.parts.items()}
        return {name: state for name, state in found.items() if state is not None} or None

    def load_state_dict(self, state: Mapping[str, Any] | None, sample: int) -> None:
        states, at = state or {}, self.interleaving.counts(sample)
        if not set(states) <= set(self.parts):
            raise ValueError(
                f"the checkpoint holds states of the parts {sorted(states)}; here are {sorted(self.parts)}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(states.get(name), at[name])

    def release(self, sample: int) -> None:
        for name, count in self.interleaving.counts(sample).items():
            self.parts[name].release(count)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()
