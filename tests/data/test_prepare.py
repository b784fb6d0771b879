import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qtrain.data.prepare import cache_root, prepare, rich_progress
from qtrain.data.shards import ShardError, TokenShards
from qtrain.data.sources import StdlibSource, TextFilesSource
from qtrain.data.tokenizers import ByteTokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        rng = random.Random(i)
        words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(200)]
        (folder / f"{i:02d}.txt").write_text(" ".join(words) + "\n")
    return folder


def test_every_document_lies_on_one_side_and_ends_with_eot(corpus, tmp_path):
    shards = prepare(TextFilesSource(corpus), ByteTokenizer(), tmp_path / "out", val_fraction=0.2)
    seen = []
    for split in (shards.train, shards.val):
        tokens = split.read(0, len(split))
        assert tokens[-1] == 256
        documents = bytes(tokens[tokens != 256].astype("uint8")).decode().splitlines(keepends=True)
        assert len(documents) == (tokens == 256).sum() == split.info.documents
        assert sum(map(len, documents)) == split.info.text_bytes
        seen += documents
    assert sorted(seen) == sorted(path.read_text() for path in corpus.iterdir())
    source = shards.manifest.source
    assert source["fingerprint"] == TextFilesSource(corpus).fingerprint()
    assert source["documents"] == 40
    assert source["sides"]["train"] + source["sides"]["val"] == 40
    assert shards.manifest.settings["val_fraction"] == 0.2


def test_cache_is_found_again_and_missed_on_any_change(corpus, tmp_path):
    def directory(**kwargs):
        return prepare(TextFilesSource(corpus), ByteTokenizer(), tmp_path / "out", **kwargs).directory

    first = directory(val_fraction=0.2)
    stamp = (first / "manifest.json").stat().st_mtime_ns
    assert directory(val_fraction=0.2) == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    assert directory(val_fraction=0.3) != first
    assert directory(val_fraction=0.2, shard_tokens=1000) != first
    (corpus / "new.txt").write_text("a new document")
    assert directory(val_fraction=0.2) != first
    assert directory(val_fraction=0.2).name.startswith("files-byte-")


def test_an_altered_cache_is_refused_not_repaired(corpus, tmp_path):
    def again():
        return prepare(TextFilesSource(corpus), ByteTokenizer(), tmp_path / "out", val_fraction=0.2)

    path = again().directory / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")
    with pytest.raises(ShardError, match="altered"):
        again()


def test_a_source_that_changes_meanwhile_is_never_published(corpus, tmp_path):
    def progress(stage, done, total):
        if (stage, done) == ("tokenize", 5):
            (corpus / "39.txt").write_text("another text under the same name")

    with pytest.raises(RuntimeError, match="changed while it was being prepared"):
        prepare(TextFilesSource(corpus), ByteTokenizer(), tmp_path / "o", val_fraction=0.2, progress=progress)
    assert list((tmp_path / "o").iterdir()) == []


def test_two_processes_at_once(corpus, tmp_path):
    code = textwrap.dedent("""
        import sys
        from qtrain.data.prepare import prepare
        from qtrain.data.sources import TextFilesSource
        from qtrain.data.tokenizers import ByteTokenizer
        sys.stdin.readline()
        shards = prepare(TextFilesSource(sys.argv[1]), ByteTokenizer(), sys.argv[2], val_fraction=0.2)
        print(shards.directory)
    """)
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "out")]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    found = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(found) == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == [Path(found.pop().strip()).name]


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "elsewhere"))
    assert cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("QTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache/qtrain/data"


def test_default_place_is_the_cache(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    shards = prepare(TextFilesSource(corpus), ByteTokenizer(), val_fraction=0.2)
    assert shards.directory.parent == tmp_path / "cache"


def test_progress_reports_each_document(corpus, tmp_path):
    calls = []
    prepare(
        TextFilesSource(corpus),
        ByteTokenizer(),
        tmp_path / "out",
        val_fraction=0.2,
        progress=lambda *call: calls.append(call),
    )
    assert calls[0] == ("fingerprint", 0, None)
    assert [c for c in calls if c[0] == "tokenize"] == [("tokenize", i, 40) for i in range(1, 41)]


def test_the_bar_reaches_its_end(corpus, tmp_path, capsys):
    with rich_progress() as progress:
        prepare(TextFilesSource(corpus), ByteTokenizer(), tmp_path / "o", val_fraction=0.2, progress=progress)
    assert "40/40" in capsys.readouterr().out


def test_the_standard_library_takes_seconds(tmp_path):
    begin = time.process_time()
    shards = prepare(StdlibSource(), ByteTokenizer(), tmp_path)
    assert time.process_time() - begin < 20
    assert len(shards.train) > 5e6
    assert len(shards.val) > 1e5
    assert TokenShards.open(shards.directory).manifest == shards.manifest


def test_the_room_imports_nothing_heavy():
    code = textwrap.dedent("""
        import sys
        import qtrain.data.ngram, qtrain.data.prepare, qtrain.data.stream
        heavy = {"lightning", "datasets", "rich", "transformers", "hydra", "wandb"}
        rooms = {"qtrain.quant", "qtrain.nn", "qtrain.models", "qtrain.training"}
        print(sorted((heavy | rooms) & set(sys.modules)))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
