"""What every tokenizer promises: round trips, an end-of-text id that no text gives, contents that rebuild it."""

import json
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.data.tokenizers import (
    BpeTraining,
    ByteTokenizer,
    TiktokenTokenizer,
    TokenizerError,
    get_tokenizer,
    is_training,
    load_tokenizer,
)
from qtrain.data.tokenizers.tiktoken import GPT2_PATTERN

WORDS = [
    "the",
    "cat",
    "sleeps",
    "naïve",
    "façade",
    "東京",
    "\U0001f600",
    "12",
    "\n\n",
    "  x",
    "<|endoftext|>",
]


def prose(seed=0, words=400):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def tiny_ranks():
    merges = [b"th", b"the", b" c", b" ca", b" cat", b"\n\n"]
    return {bytes([b]): b for b in range(256)} | {m: 256 + i for i, m in enumerate(merges)}


TOKENIZERS = {
    "byte": ByteTokenizer(),
    "bpe": BpeTraining(vocab_size=300).train([prose()]),
    "tiktoken": TiktokenTokenizer(
        tiny_ranks(), GPT2_PATTERN, {"<|endoftext|>": 262}, "<|endoftext|>", "tiny"
    ),
}
# Texts as unicode has them: combining marks, bidirectional controls, unassigned code points, NUL, private use
odd = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
EDGES = ["", "\0", "a\r\n\r\nb", "e\u0301\u0301\u0301", "\u202eabc", "\U0010ffff", "\ufeffx", "<|endoftext|>" * 2, " " * 70, "½ ¾"]  # fmt: skip


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=odd)
def test_round_trip(name, text):
    ids = TOKENIZERS[name].encode(text)
    assert TOKENIZERS[name].decode(ids) == text
    assert TOKENIZERS[name].decode(ids.tolist()) == text


def test_edges_and_no_text_gives_the_end_of_text(tokenizer):
    batch = tokenizer.encode_batch(EDGES)
    for text, ids in zip(EDGES, batch, strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_token not in ids
    assert tokenizer.decode([*batch[2], tokenizer.eot_token, *batch[2]]) == EDGES[2] * 2
    assert tokenizer.decode([tokenizer.eot_token]) == ""


def test_ids_outside_are_refused(tokenizer):
    for bad in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=f"{bad} is outside the vocabulary"):
            tokenizer.decode([1, bad])


def test_saved_contents_and_pickles_give_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "runs" / "t")
    tokenizer.save(tmp_path / "runs" / "t")  # it is there already
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["t"]
    text = prose(1)
    for again in (
        load_tokenizer(tmp_path / "runs" / "t"),
        get_tokenizer(f"saved:{tmp_path / 'runs' / 't'}"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.about == tokenizer.about
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_another_tokenizer_does_not_take_the_folder(tmp_path):
    TOKENIZERS["byte"].save(tmp_path / "t")
    with pytest.raises(TokenizerError, match="holds another tokenizer"):
        TOKENIZERS["bpe"].save(tmp_path / "t")


def test_what_a_killed_writer_left_goes_with_the_next_attempt(tmp_path, monkeypatch):
    import os
    import shutil

    tokenizer = get_tokenizer("byte")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # a kill runs no handler either
        patched.setattr(os, "fsync", killed)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.save(tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
    assert len(list(tmp_path.iterdir())) == 1
    tokenizer.save(tmp_path / "tokenizer")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]
    assert load_tokenizer(tmp_path / "tokenizer").digest == tokenizer.digest


def test_altered_contents_are_refused(tmp_path):
    TOKENIZERS["tiktoken"].save(tmp_path / "t")
    ranks = tmp_path / "t" / "ranks.tiktoken"
    lines = ranks.read_bytes().splitlines(keepends=True)
    # Two merges change places: it loads, and gives other ids
    first, second = lines[256].split()[0], lines[257].split()[0]
    lines[256:258] = [second + b" 256\n", first + b" 257\n"]
    ranks.write_bytes(b"".join(lines))
    with pytest.raises(TokenizerError, match="altered"):
        load_tokenizer(tmp_path / "t")
    ranks.unlink()
    with pytest.raises(TokenizerError, match=r"ranks\.tiktoken.*missing"):
        load_tokenizer(tmp_path / "t")
    about = json.loads((tmp_path / "t" / "about.json").read_text())
    (tmp_path / "t" / "about.json").write_text(json.dumps({**about, "kind": "other"}))
    with pytest.raises(TokenizerError, match=r"unknown kind.*'other'"):
        load_tokenizer(tmp_path / "t")
    with pytest.raises(TokenizerError, match=r"no about\.json"):
        load_tokenizer(tmp_path / "nothing")


def test_the_digest_is_of_the_mapping_not_of_the_name():
    one = TOKENIZERS["tiktoken"]
    renamed = TiktokenTokenizer(tiny_ranks(), GPT2_PATTERN, {"<|endoftext|>": 262}, "<|endoftext|>", "other")
    assert renamed.digest == one.digest
    others = [
        TiktokenTokenizer(tiny_ranks(), r"\w+|\W", {"<|endoftext|>": 262}, "<|endoftext|>", "tiny"),
        TiktokenTokenizer(tiny_ranks(), GPT2_PATTERN, {"<|endoftext|>": 263}, "<|endoftext|>", "tiny"),
    ]
    assert len({t.digest for t in (one, *others, *TOKENIZERS.values())}) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wordpiece", r"unknown tokenizer 'wordpiece'; allowed: byte, bpe:"),
        ("byte:3", "unknown tokenizer"),
        ("bpe", "unknown tokenizer"),
        ("hf:", "unknown tokenizer"),
        ("bpe:many", "a number of tokens"),
        ("bpe:256", "257 or more"),
        ({"kind": "bpe"}, "vocab_size"),
        ({"kind": "bpe", "vocab_size": 300, "dropout": 1}, "dropout"),
        ({"name": "gpt2"}, "unknown tokenizer"),
        (7, "unknown tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(spec, message):
    with pytest.raises(TokenizerError, match=message):
        get_tokenizer(spec)


def test_names_become_folders_names():
    name = TiktokenTokenizer(tiny_ranks(), GPT2_PATTERN, {"e": 262}, "e", "../org/a b:c").name
    assert name == "-org-a-b-c"


def test_trainings_are_told_without_looking_anything_up():
    assert is_training("bpe:300")
    assert is_training({"kind": "bpe", "vocab_size": 300})
    assert not is_training("hf:/nowhere")
    assert not is_training({"kind": "tiktoken", "name": "bpe"})
