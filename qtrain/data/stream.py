"""Resumable streams of training windows: sample i is a pure function of (seed, i).

    epoch, position = divmod(i, n)                         n windows an epoch
    window          = permutation(seed, epoch)(position)   a bijection of [0, n)
    tokens          = split[offset + window * S : ... + S + 1],  offset(seed, epoch) in [0, S)

``TokenWindows`` has no state, so workers, processes, batch size and interruptions cannot change the data: step k
always consumes samples [k * B, (k + 1) * B), and a resume is ``start_step=k``. A shuffled index array would
give the same but holds 8 n bytes in every worker; the permutation here is a Feistel network over the next
even power of two whose values outside [0, n) are walked on (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002), which needs no memory.

Windows of S + 1 tokens overlap by one, so that within an epoch every token but the ends is a target once. The
offset moves the cuts from epoch to epoch.

S sequence length in tokens, B global batch in windows, n windows an epoch, N tokens of the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from qtrain.data.shards import TokenSplit

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment, 2^64 / golden ratio
# Four rounds make a pseudo-random permutation (Luby and Rackoff 1988) when halves are large; halves of a few
# bits, for splits of few windows, mix less a round.
_ROUNDS = 8


def _mix(x: int) -> int:
    """splitmix64's finaliser on 64-bit Python integers."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix_words(*words: int) -> int:
    """64 bits that depend on every one of ``words`` and on their order."""
    state = 0
    for word in words:
        state = _mix(state + _GOLDEN + _mix(word + _GOLDEN))
    return state


class Permutation:
    """A seeded bijection of [0, size): ``permutation[i]`` in O(1) memory and, on average, under 4 passes."""

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._keys = [mix_words(key, r) for r in range(_ROUNDS)]

    def _encipher(self, x: int) -> int:
        left, right = x >> self._half_bits, x & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._half_mask)
        return (left << self._half_bits) | right

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        x = self._encipher(index)
        while x >= self.size:
            x = self._encipher(x)
        return x


def item(window: NDArray[np.integer]) -> dict[str, Tensor]:
    """[S + 1] tokens -> input [S] and target [S], int64; target[t] is the token after input[t]."""
    tokens = torch.from_numpy(window.astype(np.int64))
    return {"input": tokens[:-1], "target": tokens[1:]}


def _check_sequence(sequence_tokens: int) -> None:
    if sequence_tokens < 1:
        raise ValueError(f"sequence_tokens {sequence_tokens} must be at least 1")


class Windows(Dataset[dict[str, Tensor]]):
    """Training samples by GLOBAL index i = 0, 1, 2, ...; item: ``input`` [S] and ``target`` [S], int64. There is no
    ``__len__``: use it with ``GlobalBatchSampler``.

    Samples that are a function of (seed, i) have no state. Those of a stream that is read once and forwards
    (``streamed_text``) have one: it says how to go on from sample i, and holds for any number of processes.
    """

    def state_dict(self, sample: int) -> dict[str, Any] | None:
        """What ``load_state_dict`` needs to go on with ``sample``, as plain containers; None where it needs nothing."""
        return None

    def load_state_dict(self, state: Mapping[str, Any] | None, sample: int) -> None:
        """Before the first sample is read. Raises ValueError where ``state`` is no state of these samples."""
        if state is not None:
            raise ValueError(
                "the checkpoint holds the state of a stream, and these data have none: they are others"
            )

    def release(self, sample: int) -> None:
        """Nothing before ``sample`` will be read or asked for again."""

    def close(self) -> None:
        """Ends what reads ahead."""


class TokenWindows(Windows):
    """Windows of a split in shuffled order, without end and without state.

    ``windows_per_epoch`` is n = N // S - 1, which leaves room for every offset in [0, S).
    """

    def __init__(self, split: TokenSplit, sequence_tokens: int, seed: int) -> None:
        _check_sequence(sequence_tokens)
        self.split, self.sequence_tokens, self.seed = split, sequence_tokens, seed
        self.windows_per_epoch = len(split) // sequence_tokens - 1
        if self.windows_per_epoch < 1:
            raise ValueError(
                f"split {split.name!r} has {len(split)} tokens, too few for one window of sequence_tokens "
                f"{sequence_tokens} at a random offset (it needs {2 * sequence_tokens}); take a shorter sequence or "
                "more text"
            )
        self._epoch = -1
        self._permutation: Permutation

    def start(self, index: int) -> int:
        """First token of sample ``index``; the sample covers S + 1 tokens from there."""
        if index < 0:
            raise IndexError(f"sample index {index} must not be negative")
        epoch, position = divmod(int(index), self.windows_per_epoch)
        if epoch != self._epoch:
            key = mix_words(self.seed, epoch)
            self._permutation = Permutation(self.windows_per_epoch, key)
            self._offset = mix_words(key, _ROUNDS) % self.sequence_tokens
            self._epoch = epoch
        return self._offset + self._permutation[position] * self.sequence_tokens

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.start(index)
        return item(self.split.read(start, start + self.sequence_tokens + 1))


class GlobalBatchSampler(Sampler[list[int]]):
    """Which samples this rank reads, micro-batch by micro-batch.

    Step k consumes samples [k * B, (k + 1) * B); micro-step m of rank r takes the ``micro_batch`` samples from
    k * B + (m * world_size + r) * micro_batch. So the samples of a step, and their order, depend on B alone:
    a run may resume on another number of ranks. ``accumulate`` micro-steps make a step.
    """

    def __init__(
        self,
        *,
        start_step: int,
        max_steps: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        sizes = {"global_batch": global_batch, "micro_batch": micro_batch, "world_size": world_size}
        for name, value in {**sizes, "accumulate": accumulate}.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must lie in [0, world_size) with world_size {world_size}")
        if not 0 <= start_step <= max_steps:
            raise ValueError(f"start_step {start_step} must lie in [0, max_steps] with max_steps {max_steps}")
        if global_batch != micro_batch * world_size * accumulate:
            raise ValueError(_indivisible(global_batch, micro_batch, world_size, accumulate))
        self.start_step, self.max_steps = start_step, max_steps
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate

    def __len__(self) -> int:
        """Micro-batches of this rank from start_step to max_steps."""
        return (self.max_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            for micro in range(self.accumulate):
                slot = micro * self.world_size + self.rank
                first = step * self.global_batch + slot * self.micro_batch
                yield list(range(first, first + self.micro_batch))


def _indivisible(global_batch: int, micro_batch: int, world_size: int, accumulate: int) -> str:
    message = (
        f"global_batch {global_batch} is not micro_batch {micro_batch} * world_size {world_size} * accumulate "
        f"{accumulate} = {micro_batch * world_size * accumulate}; "
    )
    per_micro_step = micro_batch * world_size
    if global_batch % per_micro_step == 0:
        return message + f"set accumulate={global_batch // per_micro_step}"
    below = max(global_batch // per_micro_step, 1) * per_micro_step
    return (
        message
        + f"set global_batch to a multiple of {per_micro_step} (such as {below}) or change micro_batch"
    )


class ValidationWindows(Dataset[dict[str, Tensor]]):
    """A fixed set of windows of a split, in order, the same at every evaluation of every run.

    ``max_windows``: None takes all (N - 1) // S consecutive windows; a number takes at most so many, evenly
    spread over the split, so that a quick evaluation sees all kinds of documents and not only the first.
    """

    def __init__(self, split: TokenSplit, sequence_tokens: int, max_windows: int | None = None) -> None:
        _check_sequence(sequence_tokens)
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"max_windows {max_windows} must be at least 1, or None for all windows")
        self.split, self.sequence_tokens = split, sequence_tokens
        self._available = (len(split) - 1) // sequence_tokens
        if self._available < 1:
            raise ValueError(
                f"split {split.name!r} has {len(split)} tokens, too few for one window of sequence_tokens "
                f"{sequence_tokens} (it needs {sequence_tokens + 1}); take a shorter sequence or more text"
            )
        self._count = self._available if max_windows is None else min(max_windows, self._available)

    def __len__(self) -> int:
        """Number of windows."""
        return self._count

    def _window(self, index: int) -> NDArray[np.integer]:
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} is outside [0, {self._count})")
        start = index * self._available // self._count * self.sequence_tokens
        return self.split.read(start, start + self.sequence_tokens + 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return item(self._window(index))

    def tokens(self) -> NDArray[np.int64]:
        """All windows, [len(self), S + 1] int64: what an n-gram baseline needs for the same predictions."""
        return np.stack([self._window(i) for i in range(self._count)]).astype(np.int64)
