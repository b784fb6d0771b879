"""qtrain export: what it writes is the run, and what it refuses. And training from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from composition import composed

from qtrain.commands import evaluate, export, train
from qtrain.data.tokenizers.huggingface import HuggingFaceTokenizer
from qtrain.training.checkpoints import write_checkpoint
from qtrain.training.export import export_huggingface, weights_of
from qtrain.training.saved import checkpoint_of, read_checkpoint, trained_run

TOKENS = torch.arange(32).view(1, 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    (root / "corpus").mkdir()
    for i in range(60):
        (root / "corpus" / f"{i}.txt").write_text(f"document {i}: " + f"bird {i} sings and sings. " * 20)
    return root


def trained(root: Path, run: str, *overrides: str) -> Path:
    common = [
        "data=text",
        f"data.source.paths=[{root / 'corpus'}]",
        f"data.folder={root / 'shards'}",
        "data.val_fraction=0.3",
        "sequence_tokens=32",
        "batch_sequences=4",
        "steps=4",
        "eval_windows=6",
        "recipe=qpt",
        "schedule.warmup_steps=1",
        "logger=none",
        "compile=false",
        "device=cpu",
        "precision=fp32",
        "sample.max_new_tokens=2",
        f"out={root / 'out'}",
        f"run={run}",
    ]
    cfg = composed("train", *common, *overrides)
    train.check(cfg)
    assert train.run(cfg) == 0
    return root / "out" / "train" / run


@pytest.fixture(scope="module")
def finished(root):
    return trained(root, "one", "model=llama_1m", "model.layers=1", "model.kv_heads=2")


def exported(run: Path, out: Path) -> Path:
    cfg = composed("export", f"run={run}", f"out={out}")
    export.check(cfg)
    assert export.run(cfg) == 0
    return out


def test_the_folder_is_the_trained_model(finished, tmp_path, capsys):
    out = exported(finished, tmp_path / "hf")
    said = capsys.readouterr().out
    assert "high-precision masters: whoever loads them computes without the recipe's quantization" in said
    assert "no tokenizer files: the tokenizer 'byte' has no Hugging Face form" in said
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in said
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.eos_token_id == 256
    run = trained_run(checkpoint_of(finished), {"device": "cpu"})
    ours = run.parts.make_model()
    before = ours(TOKENS)
    ours.load_state_dict(weights_of(run)[0])
    assert (ours(TOKENS) - before).abs().max() > 1e-2  # it was trained
    torch.testing.assert_close(model(TOKENS).logits, ours(TOKENS), rtol=0, atol=1e-4)


def test_a_run_starts_from_the_folder(root, finished, tmp_path):
    """At a vanishing rate its loss is that of the weights it started from, and without the folder it goes on."""
    out = exported(finished, tmp_path / "hf")
    shape = [
        "model=llama_1m",
        "model.layers=1",
        f"model.init_from={out}",
        "optimizer.lr=1e-12",
        "schedule=constant",
    ]
    cfg = composed("train", *shape, "compile=false", "logger=none")
    with pytest.raises(ValueError, match=r"is a model of another shape; say model\.kv_heads=2$"):
        train.check(cfg)
    folder = trained(root, "two", *shape, "model.kv_heads=2")
    first, second = (json.loads((run / "summary.json").read_text()) for run in (finished, folder))
    assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-5)
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    cfg = composed("evaluate", f"run={folder}", f"out={tmp_path / 'evaluation'}")
    assert evaluate.run(cfg) == 0
    again = trained(root, "three", *shape, "model.kv_heads=2", f"resume={folder}", "steps=6")
    third = json.loads((again / "summary.json").read_text())
    assert third["val_loss"] == pytest.approx(second["val_loss"], abs=1e-5)


def test_gpt2_too(root, tmp_path):
    shape = [
        "model.norm=layernorm",
        "model.bias=true",
        "model.tie_embeddings=true",
        "model.activation=gelu_tanh",
    ]
    run = trained(root, "gpt", "model=gpt_1m", "model.layers=1", *shape)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(run, tmp_path / "hf"))
    assert type(model).__name__ == "GPT2LMHeadModel"
    ours = trained_run(checkpoint_of(run), {"device": "cpu"})
    state = weights_of(ours)[0]
    reference = ours.parts.make_model()
    reference.load_state_dict(state)
    torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (["model=hf_llama_1m", "model.config.num_hidden_layers=1"], "LlamaForCausalLM"),
        (
            [
                "model=huggingface",
                "model.config.model_type=gpt2",
                "model.sequence_tokens=32",
                *(f"+model.config.{key}" for key in ("n_layer=1", "n_embd=64", "n_head=2")),
            ],
            "GPT2LMHeadModel",  # with a tied head
        ),
    ],
)
def test_models_of_transformers_too(root, tmp_path, config, kind):
    run = trained(root, kind, *config)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(run, tmp_path / "hf"))
    assert type(model).__name__ == kind
    assert model.config.eos_token_id == 256  # bytes come first
    ours = trained_run(checkpoint_of(run), {"device": "cpu"})
    reference = ours.parts.make_model()
    fresh = {name: t.clone() for name, t in reference.state_dict().items()}
    reference.load_state_dict(weights_of(ours)[0])
    held = model.state_dict()
    assert held.keys() == fresh.keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(held[name], tensor), name
    assert any(not torch.equal(held[name], fresh[name]) for name in held)  # it has been trained
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, reference.eval()(TOKENS))


def test_ranges_of_quantizers_are_left_out_and_said(finished, tmp_path):
    run = trained_run(checkpoint_of(finished), {"device": "cpu"})
    name = "model.blocks.0.attn.q.quantizers.fprop.input.range"
    run.checkpoint["state_dict"][name] = torch.ones(1)
    notes = export_huggingface(run, tmp_path / "hf")
    assert "left out: the ranges of 1 quantizers, which the format does not hold" in notes
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf") is not None


def test_a_tokenizer_of_hugging_face_s_is_written(finished, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<end>"])
    run = trained_run(checkpoint_of(finished), {"device": "cpu"})
    tiny = HuggingFaceTokenizer(words.to_str(), "<end>", "tiny")
    notes = export_huggingface(replace(run, tokenizer=tiny), tmp_path / "hf")
    assert notes[-1] == "the tokenizer 'tiny' is written too; <end> (id 2) ends a document"
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("b a b")["input_ids"] == [1, 0, 1]
    assert loaded.eos_token_id == 2
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == 2


def test_check_refuses(finished, tmp_path):
    for override, message in (
        ("format=gguf", "format='gguf': allowed are huggingface"),
        ("out=.", "out=. exists"),
    ):
        with pytest.raises(ValueError, match=message):
            export.check(composed("export", f"run={finished}", f"out={tmp_path / 'new'}", override))
    with pytest.raises(ValueError, match="out: a value is missing"):
        export.check(composed("export", f"run={finished}"))
    with pytest.raises(ValueError, match="give either run="):
        export.check(composed("export", f"out={tmp_path / 'new'}"))


def test_what_hugging_face_has_no_model_for_is_refused(root, tmp_path):
    run = trained(root, "plain", "model=gpt_1m", "model.layers=1")
    with pytest.raises(ValueError, match=r"GPT-2 has .* this model .*'rmsnorm'"):
        export.run(composed("export", f"run={run}", f"out={tmp_path / 'hf'}"))
    assert not (tmp_path / "hf").exists()


def test_code_of_others_is_not_run(finished, tmp_path):
    saved = read_checkpoint(checkpoint_of(finished))
    saved["hyper_parameters"]["config"]["model"]["_target_"] = "os.system"
    path = write_checkpoint(tmp_path / "evil", saved, step=1, tokens=1)
    with pytest.raises(ValueError, match="names code that is not qtrain's"):
        export.run(composed("export", f"checkpoint={path}", f"out={tmp_path / 'hf'}"))
