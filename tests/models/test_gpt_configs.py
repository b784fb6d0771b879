"""Every configs/model/gpt_SIZE.yaml is a GPTConfig whose model has the size it is named after."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qtrain.models.gpt import GPT, GPTConfig

FOLDER = Path(__file__).parents[2] / "configs" / "model"
FILES = sorted(FOLDER.glob("gpt_*.yaml"))
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def named_size(stem: str) -> tuple[float, float]:
    """Parameters, and half a unit of the last digit given: "gpt_124m" -> 124e6, .5e6; "gpt_1b3" -> 1.3e9, .05e9."""
    size = stem.removeprefix("gpt_")
    unit = next(c for c in size if c in UNITS)
    whole, decimals = size.split(unit)
    return float(f"{whole}.{decimals or 0}") * UNITS[unit], 0.5 * UNITS[unit] * 10.0 ** -len(decimals)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_size_is_its_name(file):
    config = instantiate(OmegaConf.load(file))
    assert isinstance(config, GPTConfig)
    with torch.device("meta"):
        model = GPT(config)
    size, half_digit = named_size(file.stem)
    # 5%, or within the rounding of a one-digit name
    assert abs(model.num_parameters() - size) <= max(0.05 * size, half_digit), model.num_parameters()


def test_all_sizes_are_there():
    sizes = ["10m", "124m", "1b3", "1m", "2m", "30m", "350m", "770m"]
    assert {f.stem for f in FILES} >= {f"gpt_{size}" for size in sizes}


@pytest.mark.parametrize("name", ["gpt_1m", "gpt_2m"])
def test_small_ones_run(name):
    config = instantiate(OmegaConf.load(FOLDER / f"{name}.yaml"))
    model = GPT(config)
    logits = model(torch.randint(0, config.vocab_size, (2, config.sequence_tokens)))
    assert logits.shape == (2, config.sequence_tokens, 257)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.randint(0, 257, (logits[..., 0].numel(),))
    )
    assert abs(loss.item() - 5.55) < 0.1  # ln 257: an untrained model knows nothing


def test_the_study_model_and_gpt2_small_are_exact():
    counts = {}
    for name in ("gpt_1m", "gpt_124m"):
        with torch.device("meta"):
            counts[name] = GPT(instantiate(OmegaConf.load(FOLDER / f"{name}.yaml"))).num_parameters()
    assert counts["gpt_1m"] == 869_504 + 2 * 128  # one more token, in the embedding and in the head
    assert counts["gpt_124m"] == 124_439_808 + (50304 - 50257) * 768  # GPT-2's, with its vocabulary padded
