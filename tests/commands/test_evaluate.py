"""qtrain evaluate gives the number that the run gave, and others where it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from composition import composed

from qtrain.commands import evaluate, generate, train
from qtrain.training.checkpoints import write_checkpoint
from qtrain.training.saved import checkpoint_of, read_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run under stochastic 4-bit forwards, where any other bits would change the loss."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "corpus").mkdir()
    for i in range(60):
        (root / "corpus" / f"{i}.txt").write_text(f"document {i}: " + f"bird {i} sings and sings. " * 20)
    overrides = [
        "data=text",
        f"data.source.paths=[{root / 'corpus'}]",
        f"data.folder={root / 'shards'}",
        "data.val_fraction=0.3",
        "model=gpt_1m",
        "model.layers=1",
        "model.vocab_size=320",
        "sequence_tokens=32",
        "batch_sequences=4",
        "steps=12",
        "eval_windows=6",
        "eval_every_steps=5",
        "recipe=qpt",
        "w=int4_row",
        "a=int4_row_sr",
        "schedule.warmup_steps=1",
        "logger=none",
        "compile=false",
        "device=cpu",
        "sample.max_new_tokens=20",
        f"out={root / 'out'}",
        "run=one",
    ]
    assert train.run(composed("train", *overrides)) == 0
    return root / "out" / "train" / "one"


def evaluated(finished: Path, out: Path, *overrides: str) -> dict:
    cfg = composed("evaluate", f"run={finished}", f"out={out}", *overrides)
    evaluate.check(cfg)
    assert evaluate.run(cfg) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_it_reproduces_the_final_loss_exactly(finished, tmp_path, capsys):
    found = evaluated(finished, tmp_path)
    summary = json.loads((finished / "summary.json").read_text())
    assert found["val_loss"] == summary["val_loss"]
    assert found["val_bits_per_byte"] == summary["val_bits_per_byte"]
    assert found["perplexity"] == pytest.approx(np.exp(found["val_loss"]))
    losses = np.load(tmp_path / "window_losses.npy")
    assert losses.shape == (6,)
    assert losses.astype(np.float64).mean() == found["val_loss"]
    assert f"{found['val_loss']:.4f} nats/token" in capsys.readouterr().out


def test_a_checkpoint_is_enough(finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint_of(finished), moved)
    assert evaluate.run(composed("evaluate", f"checkpoint={moved}")) == 0
    found = json.loads((tmp_path / "evaluations" / "trained" / "evaluation.json").read_text())
    assert found["val_loss"] == json.loads((finished / "summary.json").read_text())["val_loss"]


def test_without_the_recipe_the_loss_is_another(finished, tmp_path):
    found = evaluated(finished, tmp_path, "recipe=none")
    assert found["quantized_fraction"] == 0
    difference = abs(found["val_loss"] - json.loads((finished / "summary.json").read_text())["val_loss"])
    # 4-bit operands err by about a tenth of their size: visible, and no other model
    assert 1e-5 < difference < 0.5


def test_another_recipe_quantizes_the_trained_weights(finished, tmp_path):
    found = evaluated(finished, tmp_path, "recipe=all_gemms", "w=int2_row", "eval_windows=3")
    assert found["quantized_fraction"] > 0.8  # all but lm_head
    assert found["data"]["val_windows"] == 3


PLANTED = """
from pathlib import Path
Path("made").mkdir()
"""


@pytest.mark.parametrize("command", [evaluate, generate], ids=["evaluate", "generate"])
@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("data.source", {"_target_": "os.mkdir", "path": "made"}, r"data\.source\._target_=os\.mkdir"),
        (
            "schedule",
            {"_target_": "qtrain.cli.main", "argv": ["train", "--allow-target", "os"]},
            r"schedule\._target_=qtrain\.cli\.main",
        ),
        ("optimizer.states.exp_avg", "planted:Format", r"optimizer\.states\.exp_avg=planted:Format"),
        ("recipe.linear.fprop.input", {"format": "planted:Format"}, r"fprop\.input\.format=planted:Format"),
    ],
    ids=["target", "command line", "spec", "format"],
)
def test_a_checkpoint_names_no_code_of_its_choice(
    finished, tmp_path, monkeypatch, command, where, value, said
):
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved = read_checkpoint(checkpoint_of(finished))
    node = saved["hyper_parameters"]["config"]
    *parents, last = where.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    path = write_checkpoint(tmp_path, saved, step=9, tokens=9)
    with pytest.raises(ValueError, match=said):
        command.run(composed(command.CONFIG, f"checkpoint={path}"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("overrides", [[], ["run=a", "checkpoint=b"]])
def test_one_run_must_be_named(overrides):
    with pytest.raises(ValueError, match="give either run="):
        evaluate.check(composed("evaluate", *overrides))


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        evaluate.check(composed("evaluate", f"run={tmp_path / 'nothing'}"))


def test_generation_repeats_itself_and_the_run_s_sample(finished, capsys):
    texts = []
    for seed in (0, 0, 1):
        cfg = composed("generate", f"run={finished}", "max_new_tokens=20", f"seed={seed}")
        generate.check(cfg)
        assert generate.run(cfg) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == (finished / "sample.txt").read_text() + "\n"
