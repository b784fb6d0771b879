"""qtrain prepare, as a user types it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qtrain.cli import main
from qtrain.data.shards import TokenShards


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    rows = [{"body": " ".join(draw.choices(["the", "cat", "sees", "a", "dog"], k=40))} for _ in range(60)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "corpus"


def prepared(capsys, corpus, *more):
    words = ["prepare", "data=jsonl", f"data.source.paths=[{corpus}]", "data.source.text_key=body"]
    code = main([*words, "data.val_fraction=0.2", *more])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_corpus_becomes_shards_and_a_summary(corpus, capsys):
    code, out, _ = prepared(capsys, corpus, "data.tokenizer=bpe:270")
    assert code == 0
    shards = TokenShards.open(Path(out.splitlines()[0]))
    assert "tokenizer  bpe-270: 270 ids as uint16, end of text 0" in out
    for split in (shards.train, shards.val):
        info = split.info
        assert f"{split.name} " in out
        per_token = info.text_bytes / info.tokens
        assert (
            f"{info.tokens:,} tokens, {info.documents} documents, {info.text_bytes:,} bytes: {per_token:.2f} bytes"
            in out
        )
    assert "left out   0 duplicates, 0 near-duplicates" in out
    # Found again, and anew under another tokenizer
    assert prepared(capsys, corpus, "data.tokenizer=bpe:270")[1].splitlines()[0] == str(shards.directory)
    saved = f"data.tokenizer=saved:{shards.directory / 'tokenizer'}"
    again = TokenShards.open(Path(prepared(capsys, corpus, saved)[1].splitlines()[0]))
    assert again.tokenizer.digest == shards.tokenizer.digest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source.text_key=none", r"a\.jsonl:1: no key 'none'"),
        ("data.source.paths=[nowhere]", "no file matches 'nowhere'"),
        ("data.tokenizer=bpe:5000", "fewer than bpe:5000"),
        ("data.tokenizer=wordpiece", "unknown tokenizer 'wordpiece'"),
        ("data.tokenizer=hf:/nowhere", "no Hugging Face tokenizer can be loaded from '/nowhere'"),
        ("data.tokenizer={kind:bpe,vocab_size:12}", "vocab_size=12 must be"),
        ("data.val_fraction=2", "val_fraction 2 must lie"),
        ("data.num_workers=0", "num_workers 0 must be"),
        ("data.folder=/proc/none", "cannot write the prepared data"),
        ("data.source.bad_lines=drop", "bad_lines 'drop'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(corpus, capsys, override, message):
    code, _, err = prepared(capsys, corpus, override)
    assert code == 2
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert not list((corpus.parent / "cache").glob("jsonl-*"))


def test_an_array_of_tasks_prepares_what_one_process_does(corpus, tmp_path):
    """The batch script, with a stand-in for srun; two tasks of a stage at once."""
    rows = corpus.joinpath("a.jsonl").read_text().splitlines(keepends=True)
    for k in range(3):
        (corpus / f"{k}.jsonl").write_text("".join(rows[20 * k : 20 * k + 20]))
    (corpus / "a.jsonl").unlink()
    words = [
        "data=jsonl",
        f"data.source.paths=[{corpus}]",
        "data.source.text_key=body",
        "data.val_fraction=0.2",
    ]
    words += ["data.num_workers=1", "data.shard_tokens=2000"]
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script = Path(__file__).parents[2] / "scripts" / "slurm" / "prepare_array.sbatch"
    said = []
    for stage in ("scan", "encode"):
        running = [
            subprocess.Popen(
                ["bash", str(script), "2", stage, *words],
                env={
                    **os.environ,
                    "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "SLURM_ARRAY_TASK_ID": str(part),
                    "SLURM_CPUS_PER_TASK": "1",
                },
                stdout=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
            for part in range(2)
        ]
        said += [process.communicate(timeout=120)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0]
    assert "stage scan of part 1 is done" in said[1]
    merged = [text for text in said[2:] if "left out" in text]
    assert merged
    directory = Path(merged[0].splitlines()[0])
    array = {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}
    assert len(array) > 4
    shutil.rmtree(directory)
    assert main(["prepare", *words]) == 0
    assert {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()} == array


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stage=encode", "part=0", "parts=2"], "2 of 2 parts have not ended stage=scan"),
        (["stage=scan", "part=2", "parts=2"], "part=2: stage=scan needs the task's number, 0 to 1"),
        (["stage=merge"], "parts=None: give the number of tasks"),
        (["data.folder=s3://key:secret@bucket/x"], "leave credentials and endpoints to the environment"),
    ],
)
def test_tasks_that_cannot_be_done_are_refused(corpus, capsys, more, message):
    code, _, err = prepared(capsys, corpus, *more)
    assert code == 2
    assert message in err


def test_parts_are_uploaded_by_whoever_merges_them(corpus, capsys, bucket):
    folder = f"data.folder={bucket}/corpora"
    for part in range(2):
        assert prepared(capsys, corpus, folder, "stage=scan", f"part={part}", "parts=2")[0] == 0
    assert (
        "stage encode of part 0 is done"
        in prepared(capsys, corpus, folder, "stage=encode", "part=0", "parts=2")[1]
    )
    code, out, _ = prepared(capsys, corpus, folder, "stage=encode", "part=1", "parts=2")
    assert code == 0
    assert out.startswith(f"{bucket}/corpora/jsonl-byte-")
    assert prepared(capsys, corpus, folder)[1] == out
