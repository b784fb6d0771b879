"""qtrain analyze on a small trained run, by the command line."""

from __future__ import annotations

import json
import math

import pytest
from composition import composed

from qtrain import cli
from qtrain.commands import analyze, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run under 4-bit weights."""
    root = tmp_path_factory.mktemp("analyze")
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
        "steps=8",
        "eval_windows=8",
        "recipe=qpt",
        "w=int4_row",
        "a=none",
        "g=none",
        "schedule.warmup_steps=1",
        "precision=fp32",
        "logger=none",
        "compile=false",
        "device=cpu",
        "sample.max_new_tokens=2",
        f"out={root / 'out'}",
        "run=one",
    ]
    assert train.run(composed("train", *overrides)) == 0
    return root / "out" / "train" / "one"


def test_gradients(finished, capfd):
    words = [
        "recipes=[trained,none,'qpt w=none a=none g=int4_row_sr']",
        "batch_sequences=2",
        "draws=4",
        "rows=1",
    ]
    assert cli.main(["analyze", "gradients", f"run={finished}", *words]) == 0
    out = capfd.readouterr().out
    assert "whole gradient, 4 draws" in out
    found = json.loads((finished / "analysis" / "gradients.json").read_text())["recipes"]
    assert list(found) == ["trained", "none", "qpt w=none a=none g=int4_row_sr"]
    trained, none, rounded = found.values()
    assert none["total"]["bias"] == 0.0
    assert none["total"]["cosine"] == pytest.approx(1)
    assert 0.8 < trained["total"]["cosine"] < 0.99999
    assert trained["loss"] != none["loss"] == rounded["loss"], "the forward is quantized by the first alone"
    assert rounded["total"]["deviation"] > 0.01
    assert rounded["layers"]["blocks.0.mlp.up/dgrad"]["own"]["cosine"] == pytest.approx(1.0), (
        "qpt leaves dX alone"
    )
    assert rounded["layers"]["blocks.0.mlp.up/wgrad"]["own"]["cosine"] < 0.9999
    assert (finished / "analysis" / "gradients.png").stat().st_size > 10_000
    assert not list((finished / "analysis").glob(".*"))


def test_sharpness(finished, tmp_path, capfd):
    words = [
        "batch_sequences=2",
        "micro_batches=2",
        "ascent_steps=2",
        "iterations=3",
        f"out={tmp_path / 'o'}",
    ]
    assert cli.main(["analyze", "sharpness", f"run=[{finished}]", *words]) == 0
    out = capfd.readouterr().out
    assert "double_back" in out
    trained, none = json.loads((tmp_path / "o" / "sharpness.json").read_text())["found"]
    assert (trained["recipe"], none["recipe"]) == ("trained", "none")
    assert trained["eigenvalue"]["method"] == "finite_differences"
    assert none["eigenvalue"]["method"] == "double_backward"
    assert trained["sharpness"]["loss"] != none["sharpness"]["loss"]
    for one in (trained, none):
        assert one["sharpness"]["mean"] > 0
        assert math.isfinite(one["eigenvalue"]["value"])
    assert (tmp_path / "o" / "sharpness.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes=[allgemms]"], "no such option; did you mean all_gemms"),
        (["recipes=['all_gemms v=int4_row']"], "v: no such key"),
        (["recipes=['all_gemms int4']"], "no recipe; write its name and then knobs"),
        (["recipes=['all_gemms w=int44_row']"], "'int44' is no number format"),
        (["draws=0"], "draws=0: must be a whole number of at least 1"),
        (["rho=2"], "rho=2: a share of the weights' norm"),
        (["what=curvature"], "allowed are gradients and sharpness"),
        (["run=nowhere"], "no checkpoint"),
        (["run=[a,b]"], "name one run"),
    ],
)
def test_what_cannot_be_is_refused(finished, capfd, words, said):
    first = [] if any(w.startswith(("what", "run")) for w in words) else [f"run={finished}"]
    assert cli.main(["analyze", *first, *words]) == 2
    assert said in capfd.readouterr().err


def test_a_batch_larger_than_the_validation_text_is_refused(finished):
    with pytest.raises(ValueError, match="900 sequences wanted"):
        analyze.run(composed("analyze", f"run={finished}", "batch_sequences=900"))
