"""Runs on streams, mixtures and token files: stopped, continued and spread over processes, they see the same samples."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from same_run import assert_same

from qtrain.training.assembly import assemble, data_plan
from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.datamodule import StreamLoader, WindowsDataModule, _WholeRun, open_corpus
from qtrain.training.evaluation import complete, evaluate
from qtrain.training.fit import train
from qtrain.training.report import NO_TOKENIZER
from qtrain.training.saved import checkpoint_of, read_checkpoint, trained_run
from qtrain.training.settings import SampleSettings


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory) -> Path:
    """``stream``: JSON lines in three files; ``ids.bin``: the same bytes as ids; both from the tiny corpus."""
    root = tmp_path_factory.mktemp("streams")
    (root / "stream").mkdir()
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    for k in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[k::3]]
        (root / "stream" / f"{k}.jsonl").write_text("".join(lines))
    ids = [i for text in texts for i in (*text.encode(), 256)]
    np.array(ids, "<u2").tofile(root / "ids.bin")
    return root


@pytest.fixture
def configured(configure, place, tmp_path, monkeypatch):
    """configured(kind, *overrides) -> the plain configuration of a tiny run on data of that kind."""
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))

    def make(kind, *more):
        config = configure(tmp_path / "out", *more)
        data = {
            "stream": {
                "_target_": "qtrain.data.streamed_text.StreamedText",
                "path": str(place / "stream"),
                "val_documents": 9,
                "shuffle_documents": 16,
                "tokenizer": "byte",
            },
            "bins": {
                "_target_": "qtrain.data.token_files.TokenFiles",
                "train": str(place / "ids.bin"),
                "val_fraction": 0.1,
                "tokenizer": "byte",
            },
        }
        data["ids"] = {**data["bins"], "tokenizer": None, "vocab_size": 257}
        data["mixture"] = {
            "tokenizer": "byte",
            "folder": None,
            "parts": {
                "web": {**data["stream"], "weight": 0.6, "tokenizer": None},
                "bins": {**data["bins"], "weight": 0.4},
            },
        }
        return {**config, "data": data[kind]}

    return make


@pytest.mark.parametrize("kind", ["stream", "mixture"])
@pytest.mark.parametrize("seed", range(3))
def test_the_samples_go_on_over_any_number_of_processes(configured, kind, seed):
    """Each segment is read by other processes, each with a stream of its own, from the last one's checkpoint."""
    config, draw, total, batch = configured(kind)["data"], random.Random(seed), 30, 12
    rows, at, state = [], 0, None
    while at < total:
        world = draw.choice([1, 2, 3])
        micro = draw.choice([m for m in range(1, 13) if batch // world % m == 0])
        accumulate = batch // world // micro
        sizes = {"global_batch": batch, "micro_batch": micro, "world_size": world, "accumulate": accumulate}
        position = [at]
        loaders = []
        for rank in range(world):
            sampler = _WholeRun(start_step=0, max_steps=total, rank=rank, **sizes)
            windows = data_plan(config).open().train_windows(32, 5)
            loaders.append(StreamLoader(windows, sampler, lambda now=position: now[0]))
            if state is not None:
                loaders[-1].load_state_dict(state)
        streams = [iter(loader) for loader in loaders]
        for _ in range(min(draw.randint(1, 12), total - at)):
            for _ in range(accumulate):
                rows += [next(stream)["input"] for stream in streams]
            at = position[0] = at + 1
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = json.loads(json.dumps(states[0]))
        for loader in loaders:
            loader.dataset.close()
    windows = data_plan(config).open().train_windows(32, 5)
    assert torch.equal(torch.cat(rows), torch.stack([windows[i]["input"] for i in range(total * batch)]))
    windows.close()


@pytest.mark.parametrize("files", [[40], [1, 0, 30, 9], [8, 8, 8, 8, 8]])
@pytest.mark.parametrize("worlds", [(1, 2, 4), (4, 1, 2), (2, 4, 4)])
def test_every_document_is_read_once_an_epoch_whoever_reads(tmp_path, files, worlds):
    """Held against the files themselves. Fewer files than processes, an empty one, very unequal ones; a new number of
    processes in the middle of each epoch, each with streams of its own."""
    draw, every = random.Random(sum(files)), []
    for k, count in enumerate(files):
        texts = [
            "".join(draw.choice("abc ") for _ in range(draw.randint(1, 90))) + f"#{k}.{i}"
            for i in range(count)
        ]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{k}.jsonl").write_text("".join(lines))
        every += texts
    held, training = every[:3], every[3:]
    config = {
        "_target_": "qtrain.data.streamed_text.StreamedText",
        "path": str(tmp_path),
        "val_documents": len(held),
        "shuffle_documents": 7,
        "tokenizer": "byte",
    }
    epoch_tokens = sum(len(text) + 1 for text in training)
    batch, sequence, epochs = 4, 16, 3
    total = epochs * epoch_tokens // (batch * sequence) + 1
    rows, at, state = [], 0, None
    bounds = [total * (2 * k + 1) // (2 * epochs) for k in range(epochs - 1)]
    for world, end in zip(worlds, [*bounds, total], strict=True):
        position, loaders = [at], []
        for rank in range(world):
            sampler = _WholeRun(
                start_step=0,
                max_steps=total,
                rank=rank,
                world_size=world,
                global_batch=batch,
                micro_batch=batch // world,
            )
            windows = data_plan(config).open().train_windows(sequence, 5)
            loaders.append(StreamLoader(windows, sampler, lambda now=position: now[0]))
            if state is not None:
                loaders[-1].load_state_dict(state)
        streams = [iter(loader) for loader in loaders]
        for _ in range(end - at):
            rows += [next(stream)["input"] for stream in streams]
            at = position[0] = at + 1
        state = json.loads(json.dumps(loaders[0].state_dict()))
        for loader in loaders:
            loader.dataset.close()
    ids = torch.cat(rows).flatten().tolist()
    for epoch in range(epochs):
        part = ids[epoch * epoch_tokens : (epoch + 1) * epoch_tokens]
        documents = bytes(10 if i == 256 else i for i in part).decode().splitlines()
        assert sorted(documents) == sorted(training)


@pytest.mark.parametrize("kind", ["stream", "mixture", "bins"])
def test_a_run_that_was_stopped_is_the_run_that_was_not(configured, tmp_path, kind):
    more = ["eval_every_steps=3"]
    straight, folder = train(assemble(configured(kind, *more, "steps=6", "run=straight")))
    train(assemble(configured(kind, *more, "steps=3", "run=stopped")))
    again, stopped = train(assemble(configured(kind, *more, "steps=6", "run=stopped", "resume=auto")))
    assert straight.good
    assert again.good
    assert_same(folder, stopped)
    saved = read_checkpoint(checkpoint_of(stopped))["qtrain"]
    assert saved["data"]["tokenizer"] == "byte"


def test_other_data_are_another_run(configured):
    train(assemble(configured("mixture", "steps=2", "run=one")))
    config = configured("mixture", "steps=4", "run=one", "resume=auto")
    config["data"]["parts"]["web"]["weight"], config["data"]["parts"]["bins"]["weight"] = 0.5, 0.5
    with pytest.raises(ValueError, match="another run \\(data shards: mixture-"):
        train(assemble(config))


def test_a_mixture_reports_its_parts(configured):
    _, folder = train(assemble(configured("mixture", "steps=2", "eval_windows=10", "run=one")))
    row = read_metrics(folder / "metrics.jsonl")[-1]
    assert row["val_loss"] == pytest.approx(0.6 * row["val_loss/web"] + 0.4 * row["val_loss/bins"], rel=1e-12)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_losses"] == {"web": row["val_loss/web"], "bins": row["val_loss/bins"]}
    numbers = evaluate(trained_run(checkpoint_of(folder), {"device": "cpu"})).numbers
    assert numbers["val_losses"] == pytest.approx(summary["val_losses"])
    assert numbers["val_loss"] == pytest.approx(row["val_loss"])
    data = WindowsDataModule(
        assemble(configured("mixture", "eval_windows=10")), data_plan(configured("mixture")["data"]).open()
    )
    assert [len(part.windows) for part in data.val.parts] == [6, 4]


def test_ids_without_a_tokenizer_give_losses_and_no_text(configured):
    verdict, folder = train(assemble(configured("ids", "steps=2", "model.vocab_size=300", "run=one")))
    assert verdict.good
    assert (folder / "sample.txt").read_text() == NO_TOKENIZER
    assert "val_bits_per_byte" not in read_metrics(folder / "metrics.jsonl")[-1]
    assert not (folder / "tokenizer").exists()
    run = trained_run(checkpoint_of(folder), {"device": "cpu"})
    numbers = evaluate(run).numbers
    assert numbers["val_bits_per_byte"] is None
    assert numbers["val_loss"] == pytest.approx(json.loads((folder / "summary.json").read_text())["val_loss"])
    with pytest.raises(ValueError, match="no text can be made"):
        complete(run, SampleSettings(), 0)


def test_a_stream_that_ends_ends_the_run_with_a_verdict(configured):
    config = configured("stream", "steps=500", "eval_every_steps=400", "run=one")
    config["data"]["at_end"] = "stop"
    config["data"]["val_documents"] = 110
    verdict, _ = train(assemble(config))
    assert verdict.outcome == "data_unavailable"
    assert "came to its end" in verdict.message
    assert verdict.step > 5


def test_altered_token_files_stop_a_checkpoint(configured, place, tmp_path):
    copy = tmp_path / "copy.bin"
    copy.write_bytes((place / "ids.bin").read_bytes())
    config = configured("bins", "run=one")
    config["data"]["train"] = str(copy)
    parts = assemble(config)
    corpus = open_corpus(parts)
    with copy.open("r+b") as file:
        file.write(b"\1\0")
    with pytest.raises(ValueError, match=r"copy\.bin was altered"):
        corpus.check_unchanged()
