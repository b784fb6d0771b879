"""Runs on shards in a real object store over HTTP are the runs on the same shards on this disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3fs
from same_run import assert_same

from qtrain.data.prepare import prepare
from qtrain.data.shards import TokenShards
from qtrain.data.sources import TextFilesSource
from qtrain.data.stored_shards import prepare_in
from qtrain.data.tokenizers import ByteTokenizer
from qtrain.training.assembly import assemble
from qtrain.training.fit import train
from qtrain.training.resume import StartRefused

# Of 27,000 tokens: eight shards
SHARD_TOKENS = 4000
SHAPE = {"val_fraction": 0.2, "shard_tokens": SHARD_TOKENS, "num_workers": 1}


@pytest.fixture
def shards(bucket, corpus) -> TokenShards:
    """Prepared and uploaded below the bucket; also in the cache, where they were made."""
    prepare_in(f"{bucket}/corpora", TextFilesSource(corpus), ByteTokenizer(), **SHAPE)
    return prepare(TextFilesSource(corpus), ByteTokenizer(), **SHAPE)


@pytest.fixture
def configured(configure, tmp_path, bucket, shards):
    """configured(place, *overrides) -> a run on the shards in the ``store`` or ``here``."""

    def make(place: str, *more: str, **data) -> dict:
        config = configure(tmp_path / "out", "eval_every_steps=20", *more)
        name = shards.directory.name
        return {
            **config,
            "data": {
                "_target_": "qtrain.data.prepared_folder.PreparedFolder",
                "address": f"{bucket}/corpora/{name}" if place == "store" else str(shards.directory),
                "tokenizer": None,
                **data,
            },
        }

    return make


def fetched(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "fetched").glob("*.bin"))


@pytest.mark.parametrize("shuffle", ["shards", "windows"])
def test_a_run_on_stored_shards_is_the_run_on_local_ones_also_resumed_elsewhere(
    configured, tmp_path, shuffle
):
    here = configured("here", "steps=40", "run=here", "~callbacks.census", shuffle=shuffle)
    assert train(assemble(here))[0].good
    first = configured("store", "steps=20", "run=store", "~callbacks.census", shuffle=shuffle)
    assert train(assemble(first))[0].good
    if shuffle == "shards":
        assert len(fetched(tmp_path)) < 8  # it trained before everything was fetched
    shutil.rmtree(tmp_path / "cache" / "fetched")
    again = configured(
        "store", "steps=40", "run=store", "resume=auto", "~callbacks.census", shuffle=shuffle, cache_gib=1
    )
    assert train(assemble(again))[0].good
    assert_same(tmp_path / "out" / "train" / "here", tmp_path / "out" / "train" / "store")


def test_a_run_needs_little_room(configured, tmp_path):
    """Five shards fit: three of the training tokens, and two of validation."""
    gib = 5 * 2 * SHARD_TOKENS / (1 << 30)
    config = configured("store", "steps=150", "run=one", "~callbacks.census", cache_gib=gib)
    assert train(assemble(config))[0].good
    assert 3 <= len(fetched(tmp_path)) <= 5
    refused = configured("store", "steps=9", "run=two", cache_gib=gib, shuffle="windows")
    with pytest.raises(StartRefused, match=r"data\.shuffle=windows needs .* GiB .*take data\.shuffle=shards"):
        train(assemble(refused))


def test_another_order_is_another_run_but_comparable(configured):
    train(assemble(configured("here", "steps=4", "run=one", "~callbacks.census")))
    other = configured("here", "steps=8", "run=one", "resume=auto", "~callbacks.census", shuffle="windows")
    with pytest.raises(ValueError, match="data order: shards there, None here"):
        train(assemble(other))
    baseline = configured(
        "here", "steps=4", "run=two", "~callbacks.census", "baseline=train/one", shuffle="windows"
    )
    baseline["baseline"] = str(Path(baseline["out"]) / "train" / "one")
    assert train(assemble(baseline))[0].good


def test_a_store_that_goes_away_ends_the_run_with_a_verdict_and_it_goes_on(configured, tmp_path, flaky):
    train(assemble(configured("here", "steps=100", "run=here", "~callbacks.census")))
    more = ["run=store", "steps=100", "checkpoint_every_steps=10", "~callbacks.census"]
    flaky("never", good=16)
    verdict, folder = train(assemble(configured("store", *more)))
    assert verdict.outcome == "data_unavailable"
    assert verdict.step > 10
    assert "s3://bucket-" in verdict.message
    assert "cannot be reached, 4 attempts in a row" in verdict.message
    assert json.loads((folder / "verdict.json").read_text())["outcome"] == "data_unavailable"
    flaky("503")
    assert train(assemble(configured("store", *more, "resume=auto")))[0].good
    assert_same(tmp_path / "out" / "train" / "here", folder)


@pytest.mark.parametrize("harm", ["altered", "truncated", "missing"])
def test_objects_that_are_not_what_they_were_end_the_run(configured, bucket, shards, harm):
    files = s3fs.S3FileSystem()
    for path in files.glob(f"{bucket}/corpora/*/train-*.bin"):
        content = files.cat_file(path)
        if harm == "missing":
            files.rm_file(path)
        else:
            files.pipe_file(path, content[:-2] if harm == "truncated" else b"\1" + content[1:])
    verdict, _ = train(assemble(configured("store", "run=one", "~callbacks.census")))
    assert verdict.outcome == "data_changed"
    assert {"altered": "was altered", "truncated": "bytes long", "missing": "is missing"}[
        harm
    ] in verdict.message


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_go_on_as_if_nothing_had_been(configured, tmp_path):
    def command(*more: str, place: str) -> list[str]:
        config = configured(place)
        data = [f"data.address={config['data']['address']}", "data=prepared"]
        shape = [
            "model=gpt_1m", "model.layers=1", "sequence_tokens=32", "batch_sequences=4", "eval_windows=8",
            "schedule=constant", "schedule.warmup_steps=1", "logger=none", "compile=false", "device=cpu",
            "sample.max_new_tokens=4", "eval_every_steps=20", "checkpoint_every_steps=5", "steps=40",
            "trainer.devices=2", "~callbacks.census", f"out={tmp_path / 'out'}",
        ]  # fmt: skip
        return [sys.executable, "-m", "qtrain.cli", "train", *data, *shape, *more]

    killed = subprocess.Popen(command("run=store", place="store"), start_new_session=True)
    checkpoints = tmp_path / "out" / "train" / "store" / "checkpoints"
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (checkpoints.parent / "verdict.json").exists()
    shutil.rmtree(tmp_path / "cache" / "fetched")
    subprocess.run(command("run=store", "resume=auto", place="store"), check=True)
    subprocess.run(command("run=here", place="here"), check=True)
    assert_same(tmp_path / "out" / "train" / "here", tmp_path / "out" / "train" / "store")
