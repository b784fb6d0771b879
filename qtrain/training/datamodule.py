"""The data of a run: training windows by global sample index, and the fixed validation windows.

The position of the training stream is one number, the optimizer step, and it travels in the checkpoint through
the loader's ``state_dict``; no shuffled order needs to be kept (``qtrain.data.stream``). A stream that is read once and
forwards adds its state there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from qtrain.data.corpus import Corpus
from qtrain.data.stream import GlobalBatchSampler, Windows

from .assembly import Assembly

Batch = dict[str, Tensor]


class _WholeRun(GlobalBatchSampler):
    """Its length is that of the whole run: Lightning counts batches from the run's start, also when it resumes."""

    def __len__(self) -> int:
        return self.max_steps * self.accumulate


class StreamLoader(DataLoader):
    """A DataLoader over a GlobalBatchSampler with a position. next_step: the step that the run takes next."""

    def __init__(self, windows: Windows, sampler: GlobalBatchSampler, next_step: Callable[[], int]) -> None:
        super().__init__(windows, batch_sampler=sampler)
        self._windows, self._stream, self._next_step = windows, sampler, next_step

    def _next_sample(self) -> int:
        return self._next_step() * self._stream.global_batch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            self._windows.release(self._next_sample())  # a checkpoint is of this step or a later one
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The same on every process."""
        sample = self._next_sample()
        stream = self._windows.state_dict(sample)
        return {"next_sample": sample} if stream is None else {"next_sample": sample, "stream": stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the position lies within a step of this batch size, or after the run's end."""
        step, rest = divmod(state["next_sample"], self._stream.global_batch)
        if rest or step > self._stream.max_steps:
            raise ValueError(
                f"the checkpoint stands at sample {state['next_sample']}, which is no step of {self._stream.max_steps} "
                f"steps of {self._stream.global_batch} sequences; resume with the run's batch_sequences and enough steps"
            )
        self._stream.start_step = step
        self._windows.load_state_dict(state.get("stream"), state["next_sample"])


def open_corpus(parts: Assembly, recorded: Mapping[str, Any] | None = None) -> Corpus:
    """The data of a run. recorded: what they must be, as a checkpoint's ``data`` says; raises ValueError where they
    are others now."""
    return parts.data.open(recorded)


class WindowsDataModule(LightningDataModule):
    """``parts``: of the run; ``corpus``: from ``open_corpus``."""

    def __init__(self, parts: Assembly, corpus: Corpus) -> None:
        super().__init__()
        self.settings, self.corpus = parts.settings, corpus
        self.val = corpus.validation(self.settings.sequence_tokens, self.settings.eval_windows)
        self._train: Windows | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs' validation losses to be comparable."""
        return {
            **self.corpus.identity(),
            "sequence_tokens": self.settings.sequence_tokens,
            "val_windows": len(self.val),
        }

    def train_windows(self) -> Windows:
        """Raises ValueError where the text is too short for one window."""
        if self._train is None:
            self._train = self.corpus.train_windows(self.settings.sequence_tokens, self.settings.seed)
        return self._train

    def close(self) -> None:
        """Ends what reads ahead."""
        if self._train is not None:
            self._train.close()

    def train_dataloader(self) -> StreamLoader:
        assert self.trainer is not None
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = _WholeRun(
            start_step=0,
            max_steps=self.settings.steps,
            global_batch=self.settings.batch_sequences,
            micro_batch=self.settings.micro_batch_sequences,
            rank=rank,
            world_size=world_size,
            accumulate=self.settings.accumulate(world_size),
        )
        trainer = self.trainer
        return StreamLoader(self.train_windows(), sampler, lambda: trainer.global_step)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Of the batches that one process would take, in order, every world-size-th. All ranks take as many: one
        without a batch left takes the last one again, whose losses ``QuantizedTransformer`` then leaves out."""
        assert self.trainer is not None
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        batch = self.settings.micro_batch_sequences
        batches = [list(range(i, min(i + batch, len(self.val)))) for i in range(0, len(self.val), batch)]
        rounds = -(-len(batches) // world_size)
        mine = [batches[min(i * world_size + rank, len(batches) - 1)] for i in range(rounds)]
        return DataLoader(self.val, batch_sampler=mine)
