import itertools
import json
import os
import subprocess
import sys

import pytest
import tokenizers as library
from transformers import PreTrainedTokenizerFast

from qtrain.data.tokenizers import BpeTraining, HuggingFaceTokenizer, TokenizerError, get_tokenizer

TEXT = "low lower lowest newer newest wider widest the low end " * 3


@pytest.fixture
def word_level():
    """A tokenizer.json with what must be undone: a template that adds tokens, truncation, padding."""
    words = ["<unk>", "</s>", "<s>", "the", "cat", "sleeps"]
    backend = library.Tokenizer(
        library.models.WordLevel({w: 2 * i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = library.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>", "<s>"])
    backend.post_processor = library.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 2)]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    return backend


def test_a_text_becomes_its_own_ids_and_nothing_else(word_level):
    tokenizer = HuggingFaceTokenizer(word_level.to_str(), "</s>", "words")
    assert tokenizer.encode("the cat sleeps the").tolist() == [6, 8, 10, 6]
    assert (tokenizer.eot_token, tokenizer.vocab_size) == (2, 11)  # ids with gaps: the highest decides
    assert 2 not in tokenizer.encode("the </s> cat")


def test_a_folder_as_transformers_saves_it(word_level, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="</s>").save_pretrained(tmp_path / "words")
    tokenizer = get_tokenizer(f"hf:{tmp_path / 'words'}")
    assert tokenizer.name == "words"
    assert tokenizer.eot_token == 2
    assert tokenizer.encode("cat sleeps").tolist() == [8, 10]
    assert get_tokenizer({"kind": "hf", "name": str(tmp_path / "words"), "eot": "<s>"}).eot_token == 4


def test_without_an_end_of_text_one_must_be_named(word_level, tmp_path):
    folder = tmp_path / "words"
    PreTrainedTokenizerFast(tokenizer_object=word_level).save_pretrained(folder)
    with pytest.raises(TokenizerError, match="declares no end-of-sequence token; name one"):
        get_tokenizer(f"hf:{folder}")
    bare = tmp_path / "bare"
    bare.mkdir()
    word_level.save(str(bare / "tokenizer.json"))
    for place in (bare, bare / "tokenizer.json"):
        with pytest.raises(TokenizerError, match="does not say which token ends a text"):
            get_tokenizer(f"hf:{place}")
    assert get_tokenizer({"kind": "hf", "name": str(bare), "eot": "</s>"}).eot_token == 2
    with pytest.raises(TokenizerError, match=r"no token '<\|end\|>'"):
        get_tokenizer({"kind": "hf", "name": str(bare), "eot": "<|end|>"})
    with pytest.raises(TokenizerError, match="'cat' is an ordinary token"):
        get_tokenizer({"kind": "hf", "name": str(bare), "eot": "cat"})


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="no Hugging Face tokenizer can be loaded from"):
        get_tokenizer(f"hf:{tmp_path / 'empty'}")


def most_frequent_pairs(words, merges):
    """Byte pair encoding as Sennrich et al. wrote it, on {word: count}: the merges, first to last."""
    split = {tuple(word): count for word, count in words.items()}
    found = []
    for _ in range(merges):
        pairs = {}
        for word, count in split.items():
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + count
        best = max(pairs.values())
        (pair,) = [p for p, n in pairs.items() if n == best]  # the text has no ties
        found.append(pair)
        merged = {}
        for word, count in split.items():
            out = []
            for symbol in word:
                if out and (out[-1], symbol) == pair:
                    out[-1] += symbol
                else:
                    out.append(symbol)
            merged[tuple(out)] = count
        split = merged
    return found


def test_merges_are_those_of_the_algorithm():
    counts = {"abc": 31, "bcd": 17, "abx": 9, "xcd": 4, "dab": 2}
    text = "\n".join(word for word, n in counts.items() for _ in range(n))
    tokenizer = BpeTraining(vocab_size=257 + 5).train([text])
    merges = json.loads(tokenizer.files()["tokenizer.json"])["model"]["merges"]
    assert [tuple(m) for m in merges] == most_frequent_pairs(counts, 5)
    assert tokenizer.vocab_size == 262
    assert tokenizer.name == "bpe-262"


def test_training_reads_the_first_bytes_only():
    def documents():
        yield "abab " * 50
        yield "é" * 3  # cut within a character
        raise AssertionError("a document after the limit was read")

    limited = BpeTraining(vocab_size=259, train_bytes=255).train(documents())
    assert limited.digest == BpeTraining(vocab_size=259).train(["abab " * 50, "éé"]).digest


def test_too_little_text():
    with pytest.raises(TokenizerError, match=r"vocabulary of 2\d\d tokens, fewer than bpe:5000.*more text"):
        BpeTraining(vocab_size=5000).train(["hello world"])


def test_training_gives_the_same_in_every_process():
    code = (
        "from qtrain.data.tokenizers import BpeTraining; import random\n"
        "r = random.Random(0)\n"
        "texts = [' '.join(''.join(r.choices('abcdefgh', k=4)) for _ in range(200)) for _ in range(50)]\n"
        "print(BpeTraining(vocab_size=900).train(texts).digest)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(found) == 1
