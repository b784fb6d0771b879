"""A model that is none of ours, and has what qtrain/models/protocol.py says and nothing else, is trained like ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from qtrain.data.tokenizers import get_tokenizer
from qtrain.models.protocol import ModelConfig
from qtrain.training.assembly import assemble
from qtrain.training.checkpoints import checkpoint_name
from qtrain.training.evaluation import evaluate
from qtrain.training.fit import train
from qtrain.training.identity import differences, recipe_digest
from qtrain.training.processes import ProcessSettings, connected
from qtrain.training.saved import TrainedRun, read_checkpoint
from qtrain.training.strategy import compile_for, shard


class Mixer(nn.Module):
    """Each position sees the mean of those up to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + torch.tanh(self.mix(x.cumsum(1) / count))


class MeanModel(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.inputs = nn.Embedding(vocabulary, width)
        self.stack = nn.Sequential(Mixer(width), Mixer(width))
        self.readout = nn.Linear(width, vocabulary)
        self.checkpointing = None

    def forward(self, tokens):
        return self.readout(self.stack(self.inputs(tokens)))

    def repeated_blocks(self):
        return list(self.stack)

    def set_activation_checkpointing(self, enabled):
        self.checkpointing = enabled


@dataclass(frozen=True)
class MeanConfig:
    vocab_size: int = 257
    sequence_tokens: int = 64
    builds: ClassVar[list] = []

    def build(self, *, seed, pretrained=True):
        self.builds.append(pretrained)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return MeanModel(self.vocab_size, 16)


def parts_of(configure, tmp_path, *overrides):
    parts = assemble(configure(tmp_path, "recipe=all_gemms", *overrides))
    recipe = replace(parts.recipe, exclude=("readout",))
    return replace(parts, model_config=MeanConfig(), recipe=recipe)


def test_it_trains_resumes_samples_and_is_evaluated(configure, tmp_path):
    MeanConfig.builds.clear()
    verdict, folder = train(parts_of(configure, tmp_path, "run=a", "checkpoint_every_steps=2"))
    assert verdict.good, verdict.message
    assert (folder / "sample.txt").read_text()
    half = folder / "checkpoints" / checkpoint_name(2)
    assert MeanConfig.builds == [True]
    again, other = train(parts_of(configure, tmp_path, "run=b", f"resume={half}"))
    assert again.good, again.message
    # The weights of a checkpoint follow: nothing else is read
    assert MeanConfig.builds == [True, False]
    last = folder / "checkpoints" / checkpoint_name(4)
    one, two = read_checkpoint(last), read_checkpoint(other / "checkpoints" / checkpoint_name(4))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, two["state_dict"][name]), name
    result = evaluate(TrainedRun(last, parts_of(configure, tmp_path), one, get_tokenizer("byte")))
    assert MeanConfig.builds == [True, False, False]
    assert abs(result.numbers["val_loss"] - 5.55) < 1.0


@pytest.mark.parametrize("enabled", [False, True])
def test_it_is_told_of_activation_checkpointing(configure, tmp_path, enabled):
    model = parts_of(configure, tmp_path, f"activation_checkpointing={enabled}").make_model()
    assert model.checkpointing is enabled


def test_its_blocks_are_compiled_and_sharded(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward.__self__) or forward)
    model = MeanConfig().build(seed=0)
    compile_for(model, "fsdp2")
    # The linear layers outside of blocks as well, and none of those inside
    assert compiled == [*model.stack, model.readout]
    with connected(ProcessSettings(strategy="fsdp2"), "cpu"):
        shard(model, init_device_mesh("cpu", (1,)))
    assert [m for m in model.modules() if isinstance(m, FSDPModule)] == [model, *model.stack]


def test_what_builds_no_model_is_refused(configure, tmp_path):
    config = configure(tmp_path)
    config["model"] = {"_target_": "qtrain.quant.FpropRecipe"}
    with pytest.raises(
        TypeError, match="model is a FpropRecipe: its _target_ must be a configuration that builds"
    ):
        assemble(config)
    assert isinstance(MeanConfig(), ModelConfig)


def test_a_vocabulary_left_open_is_the_tokenizers(configure, tmp_path):
    assert assemble(configure(tmp_path, "model.vocab_size=null")).model_config.vocab_size == 257
    assert assemble(configure(tmp_path, "model.vocab_size=300")).model_config.vocab_size == 300


def test_a_continuation_may_write_a_models_defaults_out(configure, tmp_path):
    """A checkpoint of before an option existed is of the same run as a config that gives the option's default."""
    config = configure(tmp_path)
    parts = assemble(config)
    saved = {
        "hyper_parameters": {"config": {**config, "model": dict(config["model"])}},
        "qtrain": {
            "recipe_sha256": recipe_digest(parts.recipe),
            "data": dict.fromkeys(("shards", "tokenizer_digest", "sequence_tokens"), 1),
        },
    }

    def found(change):
        saved["hyper_parameters"]["config"]["model"] = change(dict(config["model"]))
        return differences(saved, config, parts.model_config, parts.recipe, saved["qtrain"]["data"])

    assert found(lambda model: model) == []
    assert found(lambda model: {k: v for k, v in model.items() if k not in ("init_std", "init_from")}) == []
    assert found(lambda model: {**model, "vocab_size": 257}) == []  # the tokenizer's, written out
    assert found(lambda model: {**model, "vocab_size": 300})[0].startswith("model.")
    assert found(lambda model: {k: v for k, v in model.items() if k != "positions"})[0].startswith("model.")
    assert found(lambda model: {**model, "bias": True})[0].startswith("model.")
    assert found(lambda model: {**model, "_target_": "qtrain.models.llama.LlamaConfig"})[0].startswith(
        "model."
    )
