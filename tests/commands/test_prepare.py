"""qtrain prepare, as a user types it."""

from __future__ import annotations

import json
import random
import re
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
