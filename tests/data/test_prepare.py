import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qtrain.data import cache, encoding, file_stamps
from qtrain.data.cache import cache_root, sha256_of
from qtrain.data.prepare import open_prepared, prepare
from qtrain.data.shards import ShardError, TokenShards
from qtrain.data.sources import StdlibSource, TextFilesSource
from qtrain.data.tokenizers import BpeTraining, ByteTokenizer
from qtrain.data.worker_pool import WorkerDied

from .folder_contents import contents


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
        if (stage, done) == ("tokenize", 40):
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


@pytest.mark.parametrize("name", ["../elsewhere", "", "a b", "x/y", "..", "x\n"])
def test_a_source_s_name_is_a_folder_s(corpus, tmp_path, name):
    source = TextFilesSource(corpus)
    source.name = name
    with pytest.raises(ValueError, match="letters, digits, - and _ are allowed"):
        prepare(source, ByteTokenizer(), tmp_path / "out", val_fraction=0.3)
    assert not (tmp_path / "out").exists()


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


def test_progress_reports_each_batch(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 10)
    calls = []
    prepare(
        TextFilesSource(corpus),
        ByteTokenizer(),
        tmp_path / "out",
        val_fraction=0.2,
        progress=lambda *call: calls.append(call),
    )
    assert calls[0] == ("fingerprint", 0, None)
    assert [c for c in calls if c[0] == "deduplicate and split"][-1][1] == 40
    assert [c for c in calls if c[0] == "tokenize"] == [("tokenize", i, 40) for i in (10, 20, 30, 40)]


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


def test_the_number_of_processes_changes_no_byte(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 3)
    shards = [
        prepare(
            TextFilesSource(corpus),
            BpeTraining(vocab_size=300),
            tmp_path / str(workers),
            val_fraction=0.2,
            shard_tokens=5000,
            num_workers=workers,
        )
        for workers in (1, 2, 3)
    ]
    assert len(shards[0].train.files) > 1
    assert contents(shards[0].directory) == contents(shards[1].directory) == contents(shards[2].directory)


def test_a_bpe_learns_from_the_training_documents_alone(corpus, tmp_path):
    source = TextFilesSource(corpus)
    shards = prepare(source, BpeTraining(vocab_size=320), tmp_path / "out", val_fraction=0.3)
    byte = prepare(source, ByteTokenizer(), tmp_path / "out", val_fraction=0.3)
    texts = byte.tokenizer.decode(byte.train.read(0, len(byte.train))).splitlines(keepends=True)
    assert shards.tokenizer.digest == BpeTraining(vocab_size=320).train(texts).digest
    everything = [document.text for document in source.documents()]
    assert shards.tokenizer.digest != BpeTraining(vocab_size=320).train(everything).digest
    for split, bytes_ in ((shards.train, byte.train), (shards.val, byte.val)):
        text = shards.tokenizer.decode(split.read(0, len(split)))
        assert text == byte.tokenizer.decode(bytes_.read(0, len(bytes_)))
        # The same text, in fewer tokens: bits per byte weigh a token by its bytes
        assert split.info.text_bytes == bytes_.info.text_bytes == len(text.encode())
        assert split.tokens_per_byte == len(split) / len(text.encode()) < bytes_.tokens_per_byte
    assert shards.manifest.tokenizer["digest"] == shards.tokenizer.digest
    (shards.directory / "tokenizer" / "about.json").write_text(json.dumps(byte.tokenizer.about))
    with pytest.raises(ShardError, match="not the tokenizer of the manifest"):
        _ = TokenShards.open(shards.directory).tokenizer


def test_the_cache_is_found_by_the_training_s_numbers(corpus, tmp_path, monkeypatch):
    def directory(**numbers):
        return prepare(
            TextFilesSource(corpus), BpeTraining(**numbers), tmp_path / "o", val_fraction=0.3
        ).directory

    first = directory(vocab_size=300)
    assert directory(vocab_size=301) != first
    assert directory(vocab_size=300, train_bytes=10_000) != first

    def never(self, texts):
        raise AssertionError("trained again")

    monkeypatch.setattr(BpeTraining, "train", never)
    assert directory(vocab_size=300) == first


class Deadly(ByteTokenizer):
    """Kills the process that encodes with it, unless that is the one that made it."""

    def __init__(self, parent):
        super().__init__()
        self.parent = parent

    def encode_batch(self, texts):
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)

    def __reduce__(self):
        return Deadly, (self.parent,)


def test_a_killed_worker_is_an_error_and_leaves_nothing(corpus, tmp_path):
    with pytest.raises(WorkerDied, match=r"worker process was killed.*num_workers"):
        prepare(TextFilesSource(corpus), Deadly(os.getpid()), tmp_path / "o", val_fraction=0.2, num_workers=2)
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_nothing(corpus, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 3)

    def interrupted(stage, done, total):
        if stage == "tokenize" and done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            TextFilesSource(corpus),
            ByteTokenizer(),
            tmp_path / "o",
            val_fraction=0.2,
            num_workers=workers,
            progress=interrupted,
        )
    assert list((tmp_path / "o").iterdir()) == []
    assert multiprocessing.active_children() == []


def test_settled_files_are_not_read_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    # As if everything had been written long ago
    monkeypatch.setattr(file_stamps, "_TICK_NS", -1)
    read = []
    monkeypatch.setattr(cache, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    monkeypatch.setattr(cache.RememberedDigests.get, "__defaults__", (lambda path: cache.sha256_of(path),))

    def again():
        read.clear()
        return prepare(TextFilesSource(corpus), ByteTokenizer(), val_fraction=0.2)

    shards = again()
    assert len(read) == 40 + 2  # every text once, the two shards once
    again()
    assert read == []
    (corpus / "07.txt").write_text("another text")
    assert again().directory != shards.directory
    assert read[0] == "07.txt"
    assert len(read) == 1 + 2
    path = shards.directory / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")
    with pytest.raises(ShardError, match="altered"):
        open_prepared(shards.directory)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_number_of_workers_that_cannot_be(corpus, tmp_path, workers):
    with pytest.raises(ValueError, match=f"num_workers {workers} must be at least 1"):
        prepare(TextFilesSource(corpus), ByteTokenizer(), tmp_path, num_workers=workers)
