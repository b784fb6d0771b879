"""Local folders go through the same ``load_dataset`` as names on the hub; only the hub itself is played."""

import json
import sys

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from qtrain.data.sources import Document, HuggingFaceSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    place = tmp_path / "corpus"
    place.mkdir()
    for k in range(2):
        rows = [json.dumps({"text": f"text {k} {i}", "body": f"body {i}"}) for i in range(3)]
        (place / f"train-{k}.json").write_text("\n".join(rows) + "\n")
    return place


@pytest.mark.parametrize("streaming", [True, False])
def test_a_local_folder_of_json(folder, streaming):
    source = HuggingFaceSource(str(folder), streaming=streaming)
    texts = [f"text {k} {i}" for k in range(2) for i in range(3)]
    for _ in range(2):  # as often as it is asked
        assert list(source.documents()) == [Document(f"train#{i}", t) for i, t in enumerate(texts)]
    assert source.name == "corpus"


def test_a_local_folder_of_parquet_with_nulls(tmp_path):
    (tmp_path / "corpus").mkdir()
    table = pyarrow.table({"content": ["x", None, "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "corpus" / "train.parquet")
    source = HuggingFaceSource(str(tmp_path / "corpus"), column="content")
    assert [d.text for d in source.documents()] == ["x", "z"]
    assert source.skipped == ("train#1",)


def test_what_chooses_among_the_rows(folder):
    assert [d.text for d in HuggingFaceSource(str(folder), max_documents=2).documents()] == [
        "text 0 0",
        "text 0 1",
    ]
    one = HuggingFaceSource(str(folder), data_files="train-1.json")
    assert [d.text for d in one.documents()] == ["text 1 0", "text 1 1", "text 1 2"]
    bodies = HuggingFaceSource(str(folder), column="body")
    assert [d.text for d in bodies.documents()][:2] == ["body 0", "body 1"]
    sources = [HuggingFaceSource(str(folder)), HuggingFaceSource(str(folder), max_documents=2), one, bodies]
    assert len({s.fingerprint() for s in sources}) == 4
    before = sources[0].fingerprint()
    (folder / "train-1.json").write_text('{"text": "other", "body": ""}\n')
    assert sources[0].fingerprint() != before


def test_what_cannot_be(folder):
    with pytest.raises(ValueError, match="has no column 'content'; it has text, body"):
        list(HuggingFaceSource(str(folder), column="content").documents())
    with pytest.raises(ValueError, match=r"split 'test'\) cannot be loaded"):
        list(HuggingFaceSource(str(folder), split="test").documents())
    with pytest.raises(ValueError, match=r"revision 'v1' is of the hub"):
        HuggingFaceSource(str(folder), revision="v1")
    with pytest.raises(ValueError, match="max_documents 0"):
        HuggingFaceSource(str(folder), max_documents=0)


def test_rows_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"row 0 .*'text' holds a int"):
        list(HuggingFaceSource(str(tmp_path)).documents())


class Hub:
    """Answers as the hub would; counts how often it is asked."""

    asked = ()
    sha = COMMIT

    def dataset_info(self, name, revision=None):
        type(self).asked += ((name, revision),)
        return type("Info", (), {"sha": self.sha})()


def test_data_of_the_hub_are_known_by_their_commit(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", ())
    source = HuggingFaceSource("org/corpus", config="en", revision="v2")
    first = source.fingerprint()
    assert source.fingerprint() == first
    assert Hub.asked == (("org/corpus", "v2"),)
    # The commit that a branch names, not the branch
    assert HuggingFaceSource("org/corpus", config="en", revision=COMMIT).fingerprint() == first
    assert HuggingFaceSource("org/corpus", config="en").fingerprint() == first
    monkeypatch.setattr(Hub, "sha", COMMIT[::-1])
    assert HuggingFaceSource("org/corpus", config="en").fingerprint() != first
    assert HuggingFaceSource("org/corpus", config="de", revision=COMMIT).fingerprint() != first
    assert source.name == "corpus-en"


def test_the_commit_is_what_is_loaded(monkeypatch, folder):
    import datasets

    asked = {}

    def load_dataset(name, config, **more):
        asked.update(more, name=name, config=config)
        return real(str(folder), split="train", streaming=True)

    real = datasets.load_dataset
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HuggingFaceSource("org/corpus", config="en")
    assert len(list(source.documents())) == 6
    assert asked == {
        "name": "org/corpus", "config": "en", "split": "train", "revision": COMMIT, "data_files": None,
        "streaming": True,
    }  # fmt: skip


def test_without_a_network_the_commit_must_be_pinned():
    with pytest.raises(ValueError, match=r"which commit 'main' of the dataset 'org/corpus'.*pin revision"):
        HuggingFaceSource("org/corpus").fingerprint()
    assert HuggingFaceSource("org/corpus", revision=COMMIT).fingerprint()


def test_without_the_library(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        list(HuggingFaceSource(str(folder)).documents())
