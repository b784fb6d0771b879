"""A preparation in any number of parts gives, byte for byte, what one process gives."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import textwrap

import pytest

from qtrain.data.parted import PartedPreparation, PartsMissing, check_parts
from qtrain.data.prepare import prepare
from qtrain.data.sources import HuggingFaceSource, JsonLinesSource, SourceError, TextFilesSource
from qtrain.data.tokenizers import BpeTraining, ByteTokenizer

from .folder_contents import contents

VAL, SHARD = 0.2, 3000


def text_of(draw: random.Random, words: int) -> str:
    return " ".join(
        draw.choice(
            ["the", "a", "cat", "dog", "bird", "sees", "hears", "chases", "small", "old", "quick", "river"]
        )
        for _ in range(words)
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten files of very different sizes: 150 documents, some of them again in other files, some nearly so, some no text."""
    root = tmp_path_factory.mktemp("corpus")
    draw = random.Random(5)
    rows = [text_of(draw, draw.randint(5, 120)) for _ in range(150)]
    rows += [draw.choice(rows) for _ in range(15)]  # exact duplicates
    rows += [row.replace("river", "rivers", 1) + " " for row in draw.sample(rows[:150], 20)]
    rows += ["", "  \n "]
    draw.shuffle(rows)
    at = 0
    for k, size in enumerate([1, 60, 3, 3, 40, 0, 50, 20, 10, 0]):
        lines = [json.dumps({"text": row}) for row in rows[at : at + size]]
        if k in (1, 6):
            lines.insert(1, "no JSON")
        (root / f"{k}.jsonl").write_text("".join(line + "\n" for line in lines))
        at += size
    assert at == len(rows)
    return root


def sources(corpus, kind):
    if kind == "jsonl":
        return JsonLinesSource(corpus, bad_lines="skip")
    return TextFilesSource(str(corpus / "*.jsonl"), separator="\n")


def tokenizer_of(kind):
    return BpeTraining(vocab_size=300) if kind == "bpe" else ByteTokenizer()


def alone(source, tokenizer, place):
    return prepare(source, tokenizer, place, val_fraction=VAL, shard_tokens=SHARD, num_workers=1)


def tasks(source, tokenizer, parts, place):
    return PartedPreparation(
        source, tokenizer, parts, place, val_fraction=VAL, shard_tokens=SHARD, num_workers=1
    )


@pytest.mark.parametrize("kind", ["jsonl", "text"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_any_number_of_parts_gives_the_bytes_of_one_process(corpus, tmp_path, kind, tokenizer):
    one = alone(sources(corpus, kind), tokenizer_of(tokenizer), tmp_path / "one")
    sides = one.manifest.source["sides"]
    assert min(sides.values()) > 0
    assert one.manifest.source["skipped"] == (2 if kind == "jsonl" else 0)
    assert len(one.train.files) >= 3
    for parts in (1, 2, 5, 7, 12):
        place = tmp_path / f"parts-{parts}"
        draw = random.Random(parts)
        for stage in ("scan", "encode"):
            done = []
            for part in draw.sample(
                range(parts), parts
            ):  # each task as in a process of its own, in any order
                task = tasks(sources(corpus, kind), tokenizer_of(tokenizer), parts, place)
                done.append(getattr(task, stage)(part))
            assert [d is not None for d in done] == [False] * (parts - 1) + [stage == "encode"]
        assert done[-1].directory.name == one.directory.name
        assert contents(done[-1].directory) == contents(one.directory)
        (work,) = place.glob("parts-*")
        assert sorted(p.name for p in work.iterdir()) == ["merge.lock", "merged.json", "settle.lock"]


@pytest.mark.parametrize("streaming", [True, False])
def test_shares_of_a_dataset_too(tmp_path, corpus, streaming):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for k, file in enumerate(sorted(corpus.glob("*.jsonl"))):
        rows = [json.loads(line) for line in file.read_text().splitlines() if line != "no JSON"]
        rows.insert(1, {"text": None})
        (folder / f"{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = HuggingFaceSource(str(folder), streaming=streaming)
    one = alone(source, ByteTokenizer(), tmp_path / "one")
    assert one.manifest.source["skipped"] == 10
    for parts in (2, 5, 11):
        for stage in ("scan", "encode"):
            for part in range(parts):
                task = tasks(
                    HuggingFaceSource(str(folder), streaming=streaming),
                    ByteTokenizer(),
                    parts,
                    tmp_path / "p",
                )
                done = getattr(task, stage)(part)
        assert contents(done.directory) == contents(one.directory)
        shutil.rmtree(done.directory)


def test_a_folder_of_a_dataset_that_changes_meanwhile_is_never_published(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    file = folder / "0.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i} of some"}) + "\n" for i in range(60)))
    task = tasks(HuggingFaceSource(str(folder), streaming=True), ByteTokenizer(), 1, tmp_path / "p")
    task.scan(0)
    file.write_text(file.read_text().replace("some", "more"))
    with pytest.raises(RuntimeError, match="changed while it was being prepared"):
        task.encode(0)
    source = HuggingFaceSource(str(folder))
    assert source.fingerprint_of(["a", "a"]) == "a"
    with pytest.raises(SourceError, match="changed between its parts"):
        source.fingerprint_of(["a", "b"])


def test_the_first_rows_of_a_stream_cannot_be_shared(tmp_path, corpus):
    source = HuggingFaceSource(str(corpus), max_documents=10, name="d")
    with pytest.raises(SourceError, match=r"max_documents=10 of a stream .* take streaming=false"):
        tasks(source, ByteTokenizer(), 2, tmp_path).scan(0)


def test_missing_parts_are_named(corpus, tmp_path):
    def task():
        return tasks(sources(corpus, "jsonl"), ByteTokenizer(), 4, tmp_path)

    task().scan(0)
    task().scan(2)
    with pytest.raises(
        PartsMissing, match=r"2 of 4 parts have not ended stage=scan in .*: 1, 3; .*stage=scan part=1 parts=4"
    ):
        task().encode(0)
    for part in (1, 3):
        task().scan(part)
    for part in (0, 1, 3):
        assert task().encode(part) is None
    with pytest.raises(PartsMissing, match=r"1 of 4 parts have not ended stage=encode .*: 2; "):
        task().merge()
    assert task().encode(2) is not None


def test_a_late_task_finds_the_result_and_a_removed_result_is_made_again(corpus, tmp_path):
    def every(stage):
        return [
            getattr(tasks(sources(corpus, "jsonl"), ByteTokenizer(), 2, tmp_path), stage)(p) for p in range(2)
        ]

    every("scan")
    done = every("encode")[-1]
    before = contents(done.directory)
    assert all(d.directory == done.directory for d in [*every("scan"), *every("encode")])
    shutil.rmtree(done.directory)
    every("scan")
    assert contents(every("encode")[-1].directory) == before


def test_a_source_that_changes_meanwhile_is_never_published(corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    for part in range(2):
        tasks(sources(copy, "jsonl"), ByteTokenizer(), 2, tmp_path / "p").scan(part)
    # Changed before the next stage: another work folder, in which nothing is done yet
    file = copy / "1.jsonl"
    with file.open("a") as more:
        more.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(PartsMissing, match="2 of 2 parts"):
        tasks(sources(copy, "jsonl"), ByteTokenizer(), 2, tmp_path / "p").encode(0)
    # Changed while it is read
    for part in range(2):
        task = tasks(sources(copy, "jsonl"), ByteTokenizer(), 2, tmp_path / "p")
        task.scan(part)
    file.write_text(file.read_text().replace("cat", "cow"))
    with pytest.raises(RuntimeError, match="changed while it was being prepared"):
        [task.encode(part) for part in range(2)]


KILLED = textwrap.dedent("""
    import os, signal, sys
    from qtrain.data.parted import PartedPreparation
    from qtrain.data.sources import JsonLinesSource
    from qtrain.data.tokenizers import ByteTokenizer

    def progress(stage, done, total):
        if stage == sys.argv[4] and done >= 3:
            os.kill(os.getpid(), signal.SIGKILL)

    source = JsonLinesSource(sys.argv[1], bad_lines="skip")
    task = PartedPreparation(source, ByteTokenizer(), 3, sys.argv[2], val_fraction=0.2, shard_tokens=3000, num_workers=1,
                             progress=progress)
    getattr(task, sys.argv[3])(1)
""")


def test_killed_tasks_are_run_again_alone(corpus, tmp_path):
    one = alone(sources(corpus, "jsonl"), ByteTokenizer(), tmp_path / "one")

    def task():
        return tasks(sources(corpus, "jsonl"), ByteTokenizer(), 3, tmp_path / "p")

    for stage, at in (("scan", "scan"), ("encode", "tokenize")):
        command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "p"), stage, at]
        for part in (0, 2):
            getattr(task(), stage)(part)
        assert subprocess.run(command).returncode == -9
        with pytest.raises(PartsMissing, match=f"stage={stage} .*: 1; "):
            task().merge()
        done = getattr(task(), stage)(1)
    assert contents(done.directory) == contents(one.directory)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (("tokenize", 0, 2), "stage='tokenize': .* stages scan, encode, merge"),
        ((None, 0, 2), "stage=None"),
        (("scan", 0, None), "parts=None: give the number of tasks"),
        (("scan", 2, 2), "part=2: stage=scan needs the task's number, 0 to 1 of parts=2"),
        (("encode", None, 2), "part=None"),
        (("merge", 1, 2), "merging is one task; leave part out"),
    ],
)
def test_tasks_that_there_cannot_be_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        check_parts(*task)
    check_parts(None, None, None)
    check_parts("merge", None, 3)
