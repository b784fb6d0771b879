"""Training windows of one shard after the other, each shuffled by itself: sample i is a function of (seed, i).

    epoch, position = divmod(i, n)                            n = sum_k n_k windows an epoch, n_k = N_k // S - 1
    place, rest     of position among the shards in the order permutation(seed, epoch)
    tokens          = shard k [offset + w S : ... + S + 1],   w = permutation(seed, epoch, k)(rest), offset in [0, S)

``stream.TokenWindows`` shuffles the windows of all shards together: a batch then needs as many shards as it has
sequences. Here training starts with one shard on the machine and goes on with the next being fetched, and all
processes of a run are at the same shard. What is mixed with what is a shard, 2^28 tokens by default; documents of a
source that is sorted should be shuffled before. No window crosses two shards, so up to 2 S tokens at a shard's ends are
left out, others in each epoch.

S sequence length in tokens, N_k tokens of shard k.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from torch import Tensor

from qtrain.data.checked_file import CheckedFile
from qtrain.data.shards import TokenSplit
from qtrain.data.stream import Permutation, Windows, item, mix_words


class ShardWindows(Windows):
    """Without end and without state. Reads ahead by one shard, and gives back the shards that are over."""

    def __init__(self, split: TokenSplit, sequence_tokens: int, seed: int) -> None:
        if sequence_tokens < 1:
            raise ValueError(f"sequence_tokens {sequence_tokens} must be at least 1")
        self.split, self.sequence_tokens, self.seed = split, sequence_tokens, seed
        starts = list(accumulate((segment.tokens for segment in split.segments), initial=0))
        # (number of the shard, first token, windows) of those that have any
        self._shards = [
            (k, start, segment.tokens // sequence_tokens - 1)
            for k, (segment, start) in enumerate(zip(split.segments, starts, strict=False))
            if segment.tokens // sequence_tokens > 1
        ]
        self.windows_per_epoch = sum(count for _, _, count in self._shards)
        if not self._shards:
            raise ValueError(
                f"split {split.name!r} has no shard of 2 * sequence_tokens = {2 * sequence_tokens} tokens; take a shorter "
                "sequence, more text, or shards of more tokens"
            )
        self._epoch = -1
        self._reached = (-1, -1)
        self._released = (0, 0)

    def _enter(self, epoch: int) -> None:
        """The order and the bounds of an epoch."""
        if epoch == self._epoch:
            return
        order = Permutation(len(self._shards), mix_words(self.seed, epoch))
        self._order = [self._shards[order[place]] for place in range(len(self._shards))]
        self._bounds = list(accumulate((count for _, _, count in self._order), initial=0))
        self._permutations: dict[int, Permutation] = {}
        self._epoch = epoch

    def place(self, index: int) -> tuple[int, int, int]:
        """(epoch, place in the epoch's order of shards, window in order) of sample ``index``."""
        if index < 0:
            raise IndexError(f"sample index {index} must not be negative")
        epoch, position = divmod(int(index), self.windows_per_epoch)
        self._enter(epoch)
        place = bisect_right(self._bounds, position) - 1
        return epoch, place, position - self._bounds[place]

    def start(self, index: int) -> int:
        """First token of sample ``index``; the sample covers S + 1 tokens from there."""
        epoch, place, window = self.place(index)
        number, first, count = self._order[place]
        key = mix_words(self.seed, epoch, number)
        if place not in self._permutations:
            self._permutations[place] = Permutation(count, key)
        offset = mix_words(key, count) % self.sequence_tokens
        return first + offset + self._permutations[place][window] * self.sequence_tokens

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.start(index)
        epoch, place, _ = self.place(index)
        if (epoch, place) > self._reached:
            self._reached = (epoch, place)
            self._file(epoch, place + 1).ahead()
        return item(self.split.read(start, start + self.sequence_tokens + 1))

    def _file(self, epoch: int, place: int) -> CheckedFile:
        """The file at a place of an epoch; the place after the last is the next epoch's first."""
        if place == len(self._shards):
            number = self._shards[Permutation(len(self._shards), mix_words(self.seed, epoch + 1))[0]][0]
        else:
            number = self._order[place][0]
        return self.split.segments[number].file

    def release(self, sample: int) -> None:
        epoch, place, _ = self.place(sample)
        now = self._order[place][0]
        if (epoch, place) > self._released:
            self._released = (epoch, place)
            for number, segment in enumerate(self.split.segments):
                if number != now:
                    segment.file.release()
