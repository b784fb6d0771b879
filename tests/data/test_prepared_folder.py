from __future__ import annotations

import pytest

from qtrain.data.corpus import PreparedText
from qtrain.data.object_store import ObjectStore
from qtrain.data.prepare import prepare
from qtrain.data.prepared_folder import PreparedFolder
from qtrain.data.shards import ShardError, TokenShards
from qtrain.data.sources import TextFilesSource
from qtrain.data.stored_shards import upload
from qtrain.data.tokenizers import BpeTraining, ByteTokenizer


@pytest.fixture
def shards(tmp_path, monkeypatch) -> TokenShards:
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"document {i} of the cat " * 5)
    source = TextFilesSource(tmp_path / "corpus")
    return prepare(source, BpeTraining(vocab_size=270), tmp_path / "out", val_fraction=0.3, shard_tokens=500)


def samples(corpus) -> list[list[int]]:
    windows = corpus.train_windows(16, 3)
    return [windows[i]["input"].tolist() for i in range(60)]


@pytest.mark.parametrize("shuffle", ["shards", "windows"])
def test_a_path_and_an_address_are_the_same_data(shards, bucket, shuffle):
    upload(shards.directory, ObjectStore(f"{bucket}/x/{shards.directory.name}"))
    here = PreparedFolder(str(shards.directory), shuffle=shuffle)
    there = PreparedFolder(f"{bucket}/x/{shards.directory.name}/", shuffle=shuffle)
    assert there.vocab_size == here.vocab_size == 270
    one, other = here.open(), there.open()
    assert one.identity() == other.identity()
    assert one.identity().get("order") == (None if shuffle == "windows" else "shards")
    assert samples(one) == samples(other)
    assert there.open(one.identity()).identity() == one.identity()


def test_the_order_of_windows_is_that_of_prepared_text(shards, tmp_path):
    text = PreparedText(
        TextFilesSource(tmp_path / "corpus"),
        {"kind": "bpe", "vocab_size": 270},
        0.3,
        None,
        str(tmp_path / "out"),
        500,
    ).open()
    folder = PreparedFolder(str(shards.directory), shuffle="windows").open()
    assert folder.identity() == text.identity()
    assert samples(folder) == samples(text)
    assert samples(PreparedFolder(str(shards.directory)).open()) != samples(text)


def test_other_tokenizers_and_other_data_are_refused(shards):
    place = str(shards.directory)
    with pytest.raises(ValueError, match=r"were made by another one, bpe-270; leave data.tokenizer out"):
        PreparedFolder(place, tokenizer=ByteTokenizer()).open()
    assert PreparedFolder(place, tokenizer=shards.tokenizer).open()
    with pytest.raises(
        ValueError, match=r"the run was trained on other-1, and the data are .* Give the address"
    ):
        PreparedFolder(place).open({"shards": "other-1"})
    with pytest.raises(ShardError, match="holds no manifest"):
        PreparedFolder(str(shards.directory / "nowhere")).open()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shuffle": "documents"}, "data.shuffle='documents': allowed are windows, shards"),
        ({"cache_gib": 0}, "data.cache_gib=0"),
        ({"address": "s3://key:secret@b/x"}, "holds more than a place"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_read(more, message):
    with pytest.raises(ValueError, match=message):
        PreparedFolder(**{"address": "s3://bucket/x", **more})
