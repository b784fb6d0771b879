from __future__ import annotations

import pickle
import random

import numpy as np
import pytest

from qtrain.data import stored_shards
from qtrain.data.object_store import ObjectStore
from qtrain.data.prepare import prepare
from qtrain.data.shards import ShardError
from qtrain.data.sources import TextFilesSource
from qtrain.data.stored_shards import fetched_shards, open_stored, prepare_in, upload
from qtrain.data.tokenizers import BpeTraining, ByteTokenizer

SHAPE = {"val_fraction": 0.2, "shard_tokens": 1000, "num_workers": 1}


@pytest.fixture
def source(tmp_path) -> TextFilesSource:
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        words = random.Random(i).choices(["the", "cat", "sees", "a", "dog"], k=30)
        (tmp_path / "corpus" / f"{i}.txt").write_text(" ".join(words))
    return TextFilesSource(tmp_path / "corpus")


def tokens_of(split) -> list[int]:
    return split.read(0, len(split)).tolist()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BpeTraining(vocab_size=270)])
def test_what_is_prepared_at_an_address_is_what_is_prepared_here(source, bucket, tmp_path, tokenizer):
    stored = prepare_in(f"{bucket}/corpora", source, tokenizer, **SHAPE)
    here = prepare(source, tokenizer, tmp_path / "here", **SHAPE)
    assert stored.directory.name == here.directory.name
    assert stored.manifest == here.manifest
    assert stored.tokenizer.digest == here.tokenizer.digest
    assert not list(fetched_shards().folder.glob("*.bin"))
    assert tokens_of(stored.train) == tokens_of(here.train)
    assert tokens_of(stored.val) == tokens_of(here.val)
    stored.check_unchanged()


def test_it_is_found_again_and_nothing_is_prepared(source, bucket, monkeypatch):
    first = prepare_in(bucket, source, ByteTokenizer(), **SHAPE)
    monkeypatch.setattr(stored_shards, "prepare", lambda *_, **__: pytest.fail("it was prepared again"))
    assert prepare_in(bucket, source, ByteTokenizer(), **SHAPE).manifest == first.manifest


def test_half_an_upload_is_nobodys_and_the_next_one_completes_it(source, bucket, tmp_path, monkeypatch):
    shards = prepare(source, ByteTokenizer(), tmp_path / "here", **SHAPE)
    store = ObjectStore(f"{bucket}/{shards.directory.name}")
    write, written = ObjectStore.write_file, []

    def failing(self, local, name):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        write(self, local, name)

    monkeypatch.setattr(ObjectStore, "write_file", failing)
    with pytest.raises(KeyboardInterrupt):
        upload(shards.directory, store)
    with pytest.raises(
        ShardError, match=r"holds no whole prepared data: there is no object .*manifest\.json"
    ):
        open_stored(store.address, fetched_shards())
    again = []
    monkeypatch.setattr(ObjectStore, "write_file", lambda self, a, b: (again.append(b), write(self, a, b)))
    upload(shards.directory, store)
    assert again[-1] == "manifest.json"
    assert not set(again) & set(written)
    assert tokens_of(open_stored(store.address, fetched_shards()).train) == tokens_of(shards.train)


def test_a_tokenizer_that_is_not_the_manifests_is_refused(source, bucket, tmp_path):
    shards = prepare_in(bucket, source, BpeTraining(vocab_size=270), **SHAPE)
    other = prepare(source, ByteTokenizer(), tmp_path / "other", **SHAPE)
    store = ObjectStore(f"{bucket}/{shards.directory.name}")
    store.write_file(other.directory / "tokenizer" / "about.json", "tokenizer/about.json")
    with pytest.raises(ShardError, match="tokenizer"):
        open_stored(store.address, fetched_shards())


def test_other_data_at_the_same_address_are_seen(source, bucket, tmp_path):
    store = ObjectStore(f"{bucket}/corpus")
    upload(prepare(source, BpeTraining(vocab_size=270), tmp_path / "a", **SHAPE).directory, store)
    assert open_stored(store.address, fetched_shards()).tokenizer.vocab_size == 270
    other = prepare(source, ByteTokenizer(), tmp_path / "b", **SHAPE)
    for path in other.directory.rglob("*"):
        if path.is_file():
            store.write_file(path, path.relative_to(other.directory).as_posix())
    import s3fs

    for name in set(store.names("tokenizer")) - {p.name for p in (other.directory / "tokenizer").iterdir()}:
        s3fs.S3FileSystem().rm_file(store.at(f"tokenizer/{name}"))
    found = open_stored(store.address, fetched_shards())
    assert found.tokenizer.vocab_size == 257
    assert tokens_of(found.train) == tokens_of(other.train)


def test_files_are_given_back_and_taken_again_and_travel_to_other_processes(source, bucket):
    shards = prepare_in(bucket, source, ByteTokenizer(), **SHAPE)
    before = shards.train.read(500, 2500)
    cache = fetched_shards()
    assert not cache._removed(cache.path(shards.train.files[0].info))
    for file in shards.train.files:
        file.release()
    assert cache._removed(cache.path(shards.train.files[0].info))
    assert np.array_equal(shards.train.read(500, 2500), before)
    assert np.array_equal(
        pickle.loads(pickle.dumps(shards.train.files))[1].pread(20, 0), shards.train.files[1].pread(20, 0)
    )


def test_what_was_altered_is_seen_before_it_is_given_back(source, bucket):
    shards = prepare_in(bucket, source, ByteTokenizer(), **SHAPE)
    shards.train.read(500, 2500)
    file = shards.train.files[0]
    content = file.path.read_bytes()
    file.path.write_bytes(b"x" + content[1:])
    with pytest.raises(ShardError, match="was altered while the run read it"):
        file.release()


@pytest.mark.parametrize("value", [0, -1, "64", True, float("nan"), float("inf")])
def test_a_cache_without_room_is_refused(value):
    with pytest.raises(ValueError, match=r"data\.cache_gib="):
        fetched_shards(None, value)
