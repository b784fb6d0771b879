"""Formats, clips, estimators and transforms from a package outside of qtrain."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch

from qtrain import cli
from qtrain.nn.census import take_census
from qtrain.nn.surgery import apply_recipe
from qtrain.quant import LinearRecipe, ModelRecipe, QuantSpec, Transform, fake_quantize, get_format
from qtrain.quant.plugins import is_plugin, load_function

PACKAGE = """
    from dataclasses import dataclass

    import torch
    from qtrain.quant import Transform
    from qtrain.quant.formats import CodebookFormat

    FIVE = CodebookFormat("five", (-2.0, -1.0, 0.0, 1.0, 2.0))


    def half_of_absmax(blocks, counts):
        assert counts.shape == (blocks.shape[0], 1, blocks.shape[2], 1)
        return blocks.abs().amax((1, 3), keepdim=True) / 2


    class Nearer:
        def __call__(self, v, values):
            return (v - values).abs() < 0.25


    @dataclass(frozen=True)
    class Reversed(Transform):
        def forward(self, x, signs=None):
            return x.to(torch.float32).flip(-1) * -1

        def inverse(self, x, signs=None):
            return x.to(torch.float32).flip(-1) * -1

        def check(self, contraction, where):
            if contraction % 2:
                raise ValueError(f"{where}: an even contraction")


    THREE = 3
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The name of a package that is no part of qtrain."""
    folder = tmp_path / "outside" / "my_lab"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "grids.py").write_text(textwrap.dedent(PACKAGE))
    monkeypatch.syspath_prepend(str(tmp_path / "outside"))
    yield "my_lab.grids"
    for name in ("my_lab.grids", "my_lab"):
        sys.modules.pop(name, None)
    get_format.cache_clear()
    Transform.parse.cache_clear()


def spec_of(lab: str) -> dict[str, str]:
    return {"format": f"{lab}:FIVE", "clip": f"{lab}:half_of_absmax", "estimator": f"{lab}:Nearer"}


def test_format_clip_and_estimator(lab):
    spec = QuantSpec.of(spec_of(lab))
    x = torch.tensor([[4.0, 1.2, -0.9, 0.6, -4.0, 0.1]], requires_grad=True)
    y = fake_quantize(x, spec)
    # the end of the range is 2, so the scale is 1; what moved by a quarter or more has no gradient
    assert y.tolist() == [[2.0, 1.0, -1.0, 1.0, -2.0, 0.0]]
    y.backward(torch.ones_like(y))
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0, 1.0]]
    assert fake_quantize(torch.tensor([[1.0, float("nan")]]), spec).isnan().all()


def test_all_of_them_in_a_layer_pass_the_census(lab):
    fprop = {"input": "int8_row", "weight": spec_of(lab), "transform": f"{lab}:Reversed"}
    recipe = LinearRecipe(fprop=fprop, dgrad={"weight": "fprop"}, wgrad={})
    assert recipe.fprop.transform is LinearRecipe(fprop=fprop).fprop.transform
    assert str(recipe.fprop.transform) == f"{lab}:Reversed"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    weight = model[0].weight.detach().clone()
    report = apply_recipe(model, ModelRecipe(linear=recipe))
    x = torch.randn(8, 6, requires_grad=True)

    def loss_of(model):
        return model(x).square().sum()

    take_census(model, report, loss_of).check()
    loss_of(model).backward()
    scale = weight.abs().amax(1, keepdim=True) / 4
    v = -weight.flip(-1) / scale
    q = v.round().clamp(-2, 2)
    rotated = -x.detach().flip(-1)
    a = rotated.abs().amax(1, keepdim=True) / 127
    g = 2 * ((rotated / a).round() * a @ (q * scale).t() + model[0].bias.detach())
    want = torch.where((q - v).abs() < 0.25, g.t() @ rotated, 0.0)
    torch.testing.assert_close(model[0].weight.grad, -want.flip(-1), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said(lab):
    with pytest.raises(TypeError, match=r"^clip 'my_lab.grids:THREE' is a int, which cannot be called$"):
        QuantSpec.of({"format": "int4", "clip": f"{lab}:THREE"})
    with pytest.raises(
        ValueError, match=r"^estimator 'my_lab.grids:Four': no 'Four' in a module 'my_lab.grids'"
    ):
        QuantSpec.of({"format": "int4", "estimator": f"{lab}:Four"})
    with pytest.raises(
        TypeError, match=r"transform 'my_lab.grids:THREE' is a int, not a qtrain.quant.Transform"
    ):
        LinearRecipe(fprop={"transform": f"{lab}:THREE"})
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    odd = ModelRecipe(linear={"fprop": {"weight": "int4", "transform": f"{lab}:Reversed"}})
    with pytest.raises(ValueError, match="an even contraction"):
        apply_recipe(model, odd)
    with pytest.raises(ValueError, match="is symmetric"):
        QuantSpec.of({**spec_of(lab), "format": "int4", "symmetric": False})
    assert load_function(f"{lab}:Nearer", "estimator")(torch.zeros(1), torch.ones(1)).item() is False


@pytest.mark.parametrize(
    ("name", "is_one"), [("a.b:C", True), ("a:b", True), ("rms:2", False), ("a:b:c", False)]
)
def test_the_shape_of_a_name(name, is_one):
    assert is_plugin(name) == is_one


@pytest.fixture
def run_of(lab, tmp_path):
    """Arguments of ``qtrain train`` for two steps with a recipe of the lab's."""
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_text(
            f"document {i}: " + f"the cat of number {i} sleeps. " * 20
        )
    configs = tmp_path / "configs" / "recipe"
    configs.mkdir(parents=True)
    recipe = {
        "_target_": "qtrain.quant.ModelRecipe",
        "exclude": ["lm_head"],
        "linear": {
            "fprop": {"input": "int8_row", "weight": spec_of(lab), "transform": f"{lab}:Reversed"},
            "dgrad": {"weight": "fprop"},
        },
    }
    (configs / "lab.yaml").write_text(f"# @package _global_\nrecipe: {json.dumps(recipe)}\n")
    return [
        "train",
        "--config-dir",
        str(configs.parent),
        "recipe=lab",
        "data=text",
        f"data.source.paths=[{tmp_path / 'corpus'}]",
        f"data.folder={tmp_path / 'shards'}",
        "data.val_fraction=0.3",
        "model=gpt_1m",
        "model.layers=1",
        "sequence_tokens=32",
        "batch_sequences=2",
        "steps=2",
        "eval_windows=2",
        "schedule.warmup_steps=1",
        "logger=none",
        "compile=false",
        "device=cpu",
        "sample.max_new_tokens=2",
        f"out={tmp_path / 'out'}",
        "run=one",
    ]


def test_the_command_line_takes_an_allowed_package_and_no_other(run_of, tmp_path, capsys):
    assert cli.main(run_of) == 2
    assert "--allow-target my_lab" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*run_of, "--allow-target", "my_lab"]) == 0
    census = json.loads((tmp_path / "out" / "train" / "one" / "census.json").read_text())
    assert census["failures"] == []
    seen = {o["spec"] for o in census["eager"]["observations"]}
    assert "my_lab.grids:FIVE row my_lab.grids:half_of_absmax my_lab.grids:Nearer" in seen
