"""qtrain train on models of transformers: from a folder to a sample, resumed and evaluated without that folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from composition import composed
from transformers import AutoConfig, LlamaForCausalLM

from qtrain.commands import evaluate, generate, train
from qtrain.training.checkpoints import checkpoint_name
from qtrain.training.saved import checkpoint_of, read_checkpoint

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("huggingface")
    (root / "corpus").mkdir()
    for i in range(60):
        text = " ".join(f"bird {i} sings to bird {i + n} and bird {n} listens." for n in range(20))
        (root / "corpus" / f"{i}.txt").write_text(text)
    LlamaForCausalLM(AutoConfig.for_model("llama", **LLAMA)).save_pretrained(root / "llama")
    return root


def overrides(root: Path, *more: str) -> list[str]:
    return [
        "data=text",
        f"data.source.paths=[{root / 'corpus'}]",
        f"data.folder={root / 'shards'}",
        "data.tokenizer=bpe:270",
        "data.val_fraction=0.2",
        "model=huggingface",
        f"model.path={root / 'llama'}",
        "model.config.num_hidden_layers=2",
        "model.sequence_tokens=32",
        "batch_sequences=4",
        "steps=4",
        "checkpoint_every_steps=2",
        "eval_windows=2",
        "optimizer.lr=1e-2",
        "schedule=constant",
        "schedule.warmup_steps=1",
        "logger=none",
        "compile=false",
        "device=cpu",
        "sample.max_new_tokens=4",
        f"out={root / 'out'}",
        *more,
    ]


def ran(root: Path, *more: str) -> Path:
    cfg = composed("train", *overrides(root, *more))
    train.check(cfg)
    assert train.run(cfg) == 0
    return root / "out" / "train" / cfg.run


def test_from_raw_text_to_a_sample_and_on_without_the_folder_it_came_from(place: Path) -> None:
    run = ran(place, "run=whole", "g=int8_row_sr")
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[0] == pytest.approx(
        5.6, abs=0.1
    )  # ln 270 = 5.598: the tokenizer's vocabulary, not the folder's
    assert losses[-1] < losses[0] - 0.2
    assert "in 14 layers seen in their GEMMs, 0 failures" in summary["census"]  # 7 a layer, of 2 layers
    assert (run / "sample.txt").read_text()
    last = read_checkpoint(checkpoint_of(run))
    assert last["state_dict"]["model.lm_head.weight"].shape == (270, 32)
    assert "model.model.layers.1.mlp.down_proj.weight" in last["state_dict"]

    half = run / "checkpoints" / checkpoint_name(2)
    resumed = ran(place, "run=resumed", "g=int8_row_sr", f"resume={half}")
    again = read_checkpoint(checkpoint_of(resumed))["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in last["state_dict"].items())

    shutil.move(place / "llama", place / "moved")
    try:
        cfg = composed("evaluate", f"run={run}")
        evaluate.check(cfg)
        assert evaluate.run(cfg) == 0
        cfg = composed("generate", f"run={run}", "prompt=bird", "max_new_tokens=3")
        generate.check(cfg)
        assert generate.run(cfg) == 0
    finally:
        shutil.move(place / "moved", place / "llama")
    evaluated = json.loads(next(run.rglob("evaluation.json")).read_text())
    assert evaluated["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-6)


def test_another_architecture_is_another_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran(place, "run=first", "steps=1")
    more = (f"resume={place / 'out/train/first'}", "+model.config.rms_norm_eps=1e-3")
    assert train.run(composed("train", *overrides(place, "run=other", *more))) == 2
    said = capsys.readouterr().err
    assert "of another run (model.architecture.rms_norm_eps: 1e-06 there, 0.001 here)" in said


def test_experts_are_refused_before_anything_is_trained_and_trained_when_excluded(place: Path) -> None:
    moe = [
        "model.path=null",
        "model.config.model_type=mixtral",
        *(f"model.config.{key}={LLAMA[key]}" for key in list(LLAMA)[:5]),
        "+model.config.num_local_experts=2",
    ]
    with pytest.raises(ValueError, match=r"exclude .*'model\.layers\.\*\.mlp\.experts\.gate_up_proj'"):
        ran(place, "run=refused", *moe)
    exclude = "recipe.exclude=[lm_head,'*.mlp.gate','*.mlp.experts.*']"
    assert ran(place, "run=moe", "steps=1", exclude, *moe).is_dir()
