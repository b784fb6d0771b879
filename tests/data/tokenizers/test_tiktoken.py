import base64
import json

import pytest
import tokenizers as library

from qtrain.data.tokenizers import BpeTraining, TokenizerError, get_tokenizer
from qtrain.data.tokenizers.tiktoken import parse_ranks

TEXTS = [
    "the theatre, there and then: 1234 don't\n\n\n  x",
    "東京 naïve \U0001f600",
    " \t\r\n",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory):
    """encoder.json and vocab.bpe of a little vocabulary, in GPT-2's layout: bytes, merges, end of text last."""
    text = "the theatre there then and the other one don't 東京 naïve " * 5
    model = json.loads(BpeTraining(vocab_size=280).train([text]).files()["tokenizer.json"])["model"]
    merges = [tuple(m) for m in model["merges"]]
    letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *("".join(m) for m in merges), "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


def test_ids_are_those_of_the_other_library(gpt2_files):
    """Two programs read the same two files, and agree on every text."""
    ours = get_tokenizer(f"tiktoken:{gpt2_files}")
    files = (str(gpt2_files / "vocab.bpe"), str(gpt2_files / "encoder.json"))
    theirs = library.Tokenizer(library.models.BPE.from_file(*reversed(files)))
    theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.eot_token == ours.vocab_size - 1 == 279


def test_a_file_of_ranks_and_its_end_of_text(gpt2_files, tmp_path):
    folder = get_tokenizer(f"tiktoken:{gpt2_files}")
    path = tmp_path / "tiny.tiktoken"
    path.write_bytes(folder.files()["ranks.tiktoken"])
    with pytest.raises(TokenizerError, match=r"no special token '<\|endoftext\|>'.*name one"):
        get_tokenizer(f"tiktoken:{path}")
    tokenizer = get_tokenizer({"kind": "tiktoken", "name": str(path), "eot": "<|endoftext|>"})
    assert tokenizer.digest == folder.digest
    assert tokenizer.name == "tiny"
    other = get_tokenizer(
        {"kind": "tiktoken", "name": str(path), "eot": "<|endoftext|>", "pattern": r"[a-z]|[^a-z]"}
    )
    assert len(other.encode("the")) == 3  # no piece is longer than a letter
    path.write_bytes(path.read_bytes() + b"no rank\n")
    with pytest.raises(TokenizerError, match=r"tiny\.tiktoken:280: no 'BASE64 RANK' line"):
        get_tokenizer({"kind": "tiktoken", "name": str(path), "eot": "<|endoftext|>"})


def test_ranks_without_a_byte_are_refused(tmp_path):
    lines = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(255)]
    (tmp_path / "cut.tiktoken").write_bytes(b"".join(lines))
    with pytest.raises(TokenizerError, match="lack 1 of the 256 bytes, first 0xff"):
        get_tokenizer({"kind": "tiktoken", "name": str(tmp_path / "cut.tiktoken"), "eot": "x"})
    assert parse_ranks(b"YQ== 0\n\nYg== 1\n", "x") == {b"a": 0, b"b": 1}


def test_files_that_do_not_belong_together(gpt2_files, tmp_path):
    ids = json.loads((gpt2_files / "encoder.json").read_text())
    merges = (gpt2_files / "vocab.bpe").read_text()
    (tmp_path / "vocab.bpe").write_text(merges)
    with pytest.raises(TokenizerError, match=r"encoder\.json is missing"):
        get_tokenizer(f"tiktoken:{tmp_path}")
    first, second = ("".join(line.split()) for line in merges.splitlines()[1:3])
    ids[first], ids[second] = ids[second], ids[first]
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    with pytest.raises(TokenizerError, match="do not follow the merges"):
        get_tokenizer(f"tiktoken:{tmp_path}")
    del ids[first]
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    with pytest.raises(TokenizerError, match=rf"lacks the token '{first}'"):
        get_tokenizer(f"tiktoken:{tmp_path}")


def test_names(monkeypatch):
    import tiktoken

    with pytest.raises(TokenizerError, match=r"knows no encoding 'gpt7'.*cl100k_base"):
        get_tokenizer("tiktoken:gpt7")
    with pytest.raises(TokenizerError, match="leave pattern out"):
        get_tokenizer({"kind": "tiktoken", "name": "gpt2", "pattern": "."})
    ranks = {bytes([b]): b for b in range(256)}
    made = tiktoken.Encoding(
        "made", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: made)
    tokenizer = get_tokenizer("tiktoken:gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_token) == ("gpt2", 301, 300)
    with pytest.raises(ValueError, match=r"does not use one of the ids.*298"):
        tokenizer.decode([298])

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(TokenizerError, match=r"could not fetch.*encoder\.json and vocab\.bpe"):
        get_tokenizer("tiktoken:gpt2")
