"""The stream of a run that is stopped and goes on elsewhere, and data that change while it runs."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from qtrain.data.shards import ShardError
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.checkpoint import Checkpoints
from qtrain.training.datamodule import StreamLoader, WindowsDataModule, _WholeRun, open_corpus
from qtrain.training.fit import make_trainer
from qtrain.training.module import QuantizedTransformer
from qtrain.training.verdict import RunStopped


def loaders(windows, sizes, max_steps, position, state=None):
    """The loaders of all ranks. ``position``: a function that gives the step that the run takes next."""
    made = [
        StreamLoader(windows, _WholeRun(start_step=0, max_steps=max_steps, rank=rank, **sizes), position)
        for rank in range(sizes["world_size"])
    ]
    for loader in made if state is not None else ():
        loader.load_state_dict(state)
    return made


@pytest.mark.parametrize("seed", range(6))
def test_the_stream_goes_on_over_any_number_of_processes(configure, tmp_path, seed):
    """Each segment has other processes and micro-batches, and takes its position from the last one's checkpoint."""
    draw, total, batch = random.Random(seed), 40, 12
    parts = assemble(configure(tmp_path, f"seed={seed}", "sequence_tokens=128"))
    windows = WindowsDataModule(parts, open_corpus(parts)).train_windows()
    assert windows.windows_per_epoch < total * batch / 2  # more than two epochs
    at, state, rows = [0], None, []
    while at[0] < total:
        world = draw.choice([1, 2, 3, 4, 6, 12])
        micro = draw.choice([m for m in range(1, 13) if batch // world % m == 0])
        accumulate = batch // world // micro
        sizes = {"global_batch": batch, "micro_batch": micro, "world_size": world, "accumulate": accumulate}
        ranks = loaders(windows, sizes, total, lambda: at[0], state)
        assert all(len(rank) == total * accumulate for rank in ranks)
        streams = [iter(rank) for rank in ranks]
        for _ in range(draw.randint(1, 9)):
            if at[0] == total:
                break
            for _ in range(accumulate):
                rows += [next(stream)["input"] for stream in streams]
            at[0] += 1
        states = [rank.state_dict() for rank in ranks]
        assert all(s == {"next_sample": at[0] * batch} for s in states)
        state = draw.choice(states)
    assert torch.equal(torch.cat(rows), torch.stack([windows[i]["input"] for i in range(total * batch)]))


def test_a_position_within_a_step_is_refused(configure, tmp_path):
    parts = assemble(configure(tmp_path))
    windows = WindowsDataModule(parts, open_corpus(parts)).train_windows()
    sizes = {"global_batch": 4, "micro_batch": 4, "world_size": 1}
    (loader,) = loaders(windows, sizes, 10, lambda: 0)
    for sample in (6, 44):
        with pytest.raises(ValueError, match=f"sample {sample}, which is no step of 10 steps of 4 sequences"):
            loader.load_state_dict({"next_sample": sample})
    loader.load_state_dict({"next_sample": 40})
    assert list(loader) == []


class At(Callback):
    """Calls ``do`` after the second step."""

    def __init__(self, do):
        self.do = do

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            self.do()


def trained(configure, tmp_path, do):
    """Four steps with a checkpoint after each, ``do(folder of the shards)`` after the second.
    Returns a call that trains, and the folder of the checkpoints."""
    parts = assemble(configure(tmp_path, f"data.folder={tmp_path / 'shards'}", "recipe=none"))
    data = WindowsDataModule(parts, open_corpus(parts))
    trainer = make_trainer(
        parts,
        tmp_path,
        max_steps=4,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[At(lambda: do(data.corpus.shards.directory)), Checkpoints(1, keep=None)],
    )
    return lambda: trainer.fit(QuantizedTransformer(parts), data), tmp_path / "checkpoints"


def alter(folder: Path) -> None:
    with (folder / "train-00000.bin").open("r+b") as file:
        file.write(b"\x00\x00" * 5)


def test_no_checkpoint_records_steps_on_altered_data(configure, tmp_path):
    train, checkpoints = trained(configure, tmp_path, alter)
    with pytest.raises(
        RunStopped, match=r"train-00000\.bin was altered while the run read it; go back to a checkpoi"
    ) as stopped:
        train()
    assert stopped.value.verdict.outcome == "data_changed"
    assert [p.name for p in sorted(checkpoints.iterdir())] == ["step-000001"]


def test_truncated_data_end_the_run_with_a_message(configure, tmp_path):
    def truncate(folder):
        os.truncate(folder / "train-00000.bin", 100)

    train, checkpoints = trained(configure, tmp_path, truncate)
    with pytest.raises((ShardError, RunStopped), match=r"train-00000\.bin (ends early|was altered)"):
        train()
    assert [p.name for p in sorted(checkpoints.iterdir())] == ["step-000001"]


def test_touched_or_removed_data_change_nothing(configure, tmp_path):
    def touch(folder):
        os.utime(folder / "train-00000.bin", (0, 0))
        (folder / "val-00000.bin").unlink()

    train, checkpoints = trained(configure, tmp_path, touch)
    train()
    assert sorted(p.name for p in checkpoints.iterdir())[-1] == "step-000004"
    assert len(list(checkpoints.iterdir())) == 4
