"""The data of a run: training windows by global sample index, and the fixed validation windows.

The position of the training stream is one number, the optimizer step, and it travels in the checkpoint through
the loader's ``state_dict``; no shuffled order needs to be kept (``qtrain.data.stream``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from qtrain.data.cache import cache_root
from qtrain.data.prepare import open_prepared, prepare
from qtrain.data.progress import Progress, shown_progress
from qtrain.data.shards import TokenShards
from qtrain.data.stream import GlobalBatchSampler, TokenWindows, ValidationWindows

from .assembly import Assembly

Batch = dict[str, Tensor]


class _WholeRun(GlobalBatchSampler):
    """Its length is that of the whole run: Lightning counts batches from the run's start, also when it resumes."""

    def __len__(self) -> int:
        return self.max_steps * self.accumulate


class StreamLoader(DataLoader):
    """A DataLoader over a GlobalBatchSampler with a position. next_step: the step that the run takes next."""

    def __init__(
        self, windows: TokenWindows, sampler: GlobalBatchSampler, next_step: Callable[[], int]
    ) -> None:
        super().__init__(windows, batch_sampler=sampler)
        self._stream, self._next_step = sampler, next_step

    def state_dict(self) -> dict[str, int]:
        return {"next_sample": self._next_step() * self._stream.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where the position lies within a step of this batch size, or after the run's end."""
        step, rest = divmod(state["next_sample"], self._stream.global_batch)
        if rest or step > self._stream.max_steps:
            raise ValueError(
                f"the checkpoint stands at sample {state['next_sample']}, which is no step of {self._stream.max_steps} "
                f"steps of {self._stream.global_batch} sequences; resume with the run's batch_sequences and enough steps"
            )
        self._stream.start_step = step


def open_shards(parts: Assembly, recorded: str | None = None) -> TokenShards:
    """The prepared data of a run, from the cache or newly written.

    recorded: the name of the shard folder that the data must be, as a checkpoint records it. Raises ValueError
    where the source now gives other data and the recorded folder is not in the cache.
    """
    data = parts.config["data"]
    root = Path(data["folder"]) if data["folder"] is not None else cache_root()
    if recorded is not None and (root / recorded).is_dir():
        return open_prepared(root / recorded)
    with ExitStack() as stack:
        bars: list[Progress] = []

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage != "fingerprint":  # which is all that happens where the data are prepared already
                if not bars:
                    bars.append(stack.enter_context(shown_progress()))
                bars[0](stage, done, total)

        shards = prepare(
            parts.source,
            parts.tokenizer,
            root,
            val_fraction=data["val_fraction"],
            num_workers=data.get("num_workers"),  # changes no byte; runs of before it have none
            progress=progress,
        )
    if recorded is not None and shards.directory.name != recorded:
        raise ValueError(
            f"the run was trained on {recorded}, and its source now gives {shards.directory.name}: the texts changed. "
            f"Put the folder {recorded} back under {root}, or point data.folder to where it is"
        )
    return shards


class WindowsDataModule(LightningDataModule):
    """``parts``: of the run; ``shards``: from ``open_shards``."""

    def __init__(self, parts: Assembly, shards: TokenShards) -> None:
        super().__init__()
        self.settings, self.shards = parts.settings, shards
        self.val = ValidationWindows(shards.val, self.settings.sequence_tokens, self.settings.eval_windows)

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs' validation losses to be comparable."""
        return {
            "shards": self.shards.directory.name,
            "fingerprint": self.shards.manifest.source.get("fingerprint"),
            "tokenizer": self.shards.manifest.tokenizer["name"],
            "tokenizer_digest": self.shards.manifest.tokenizer["digest"],
            "sequence_tokens": self.settings.sequence_tokens,
            "val_windows": len(self.val),
        }

    def train_windows(self) -> TokenWindows:
        """Raises ValueError where the text is too short for one window."""
        return TokenWindows(self.shards.train, self.settings.sequence_tokens, self.settings.seed)

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
