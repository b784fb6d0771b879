"""A checkpoint is enough by itself: it brings its tokenizer, wherever it is read."""

from __future__ import annotations

import shutil

import pytest
import tokenizers as library

from qtrain.data.tokenizers import BpeTraining, load_tokenizer
from qtrain.training.assembly import assemble
from qtrain.training.checkpoints import load_checkpoint, write_checkpoint
from qtrain.training.evaluation import complete, evaluate
from qtrain.training.fit import train
from qtrain.training.saved import checkpoint_of, trained_run
from qtrain.training.settings import SampleSettings

SAMPLE = SampleSettings(prompt="the cat", max_new_tokens=5)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "mine"
    BpeTraining(vocab_size=280).train(["the cat sees a dog and then hears the old bird " * 9]).save(folder)
    return folder


def finished(configure, out, tokenizer):
    config = configure(out, "model.vocab_size=null", "run=one")
    config["data"]["tokenizer"] = tokenizer
    verdict, folder = train(assemble(config))
    assert verdict.good, verdict.message
    return config, folder


def test_a_bpe_run_without_its_cache(configure, tmp_path):
    config, folder = finished(configure, tmp_path, "bpe:290")
    run = trained_run(checkpoint_of(folder), {})
    assert run.tokenizer.vocab_size == run.parts.model_config.vocab_size == 290
    assert load_tokenizer(folder / "tokenizer").digest == run.tokenizer.digest
    first, text = evaluate(run), complete(run, SAMPLE, 0)
    assert text.startswith("the cat")
    # Elsewhere the data are prepared, and the tokenizer is trained, once more
    moved = trained_run(checkpoint_of(folder), {"data": {**config["data"], "folder": str(tmp_path / "new")}})
    again = evaluate(moved)
    assert again.numbers["val_loss"] == first.numbers["val_loss"]
    assert again.numbers["val_bits_per_byte"] == pytest.approx(
        # nats a token, over the bytes of the text that a token stands for
        first.numbers["val_loss"] / 0.6931471805599453 / bytes_a_token(tmp_path / "new"),
        rel=1e-6,
    )
    assert complete(moved, SAMPLE, 0) == text


def bytes_a_token(root):
    from qtrain.data.shards import TokenShards

    (folder,) = root.iterdir()
    val = TokenShards.open(folder).val
    text = TokenShards.open(folder).tokenizer.decode(val.read(0, len(val)))
    return len(text.encode()) / len(val)


def test_a_run_without_the_tokenizer_s_folder(configure, tmp_path, hf_folder):
    copy = tmp_path / "mine"
    shutil.copytree(hf_folder, copy)
    spec = {"kind": "hf", "name": str(copy / "tokenizer.json"), "eot": "<|endoftext|>"}
    config, folder = finished(configure, tmp_path, spec)
    text = complete(trained_run(checkpoint_of(folder), {}), SAMPLE, 0)
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match="no Hugging Face tokenizer"):
        assemble(config)
    run = trained_run(checkpoint_of(folder), {"data": {**config["data"], "folder": str(tmp_path / "new")}})
    assert complete(run, SAMPLE, 0) == text
    assert evaluate(run).numbers["data"]["tokenizer_digest"] == run.tokenizer.digest
    # It decodes what it was trained on, by another program's reading of the same file
    theirs = library.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    assert run.tokenizer.encode("the old cat").tolist() == theirs.encode("the old cat").ids


def test_an_altered_tokenizer_is_refused(configure, tmp_path):
    _, folder = finished(configure, tmp_path, "bpe:280")
    checkpoint = dict(load_checkpoint(checkpoint_of(folder)))
    state = checkpoint["qtrain"]["tokenizer"]
    files = {
        **state["files"],
        "tokenizer.json": state["files"]["tokenizer.json"].replace(b"Gel", b"Gle") + b" ",
    }
    checkpoint["qtrain"] = {**checkpoint["qtrain"], "tokenizer": {**state, "files": files}}
    altered = write_checkpoint(tmp_path / "altered", checkpoint, step=4, tokens=512)
    with pytest.raises(ValueError, match="contents were altered"):
        trained_run(altered, {})


def test_the_data_of_another_tokenizer_are_not_evaluated(configure, tmp_path, monkeypatch):
    _, folder = finished(configure, tmp_path, "bpe:280")
    run = trained_run(checkpoint_of(folder), {})
    other = BpeTraining(vocab_size=280).train(["another text altogether, xyz " * 30 + "abcdefghijklmnop" * 3])
    object.__setattr__(run, "tokenizer", other)
    with pytest.raises(ValueError, match="are not of the run's tokenizer"):
        evaluate(run)
