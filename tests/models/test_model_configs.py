"""Every configs/model/FAMILY_SIZE.yaml of ours builds a model of the size it is named after."""

from dataclasses import MISSING, fields

import pytest
import torch
from composition import CONFIGS, composed
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qtrain.models.decoder import DecoderConfig

FOLDER = CONFIGS / "model"
FILES = [f for family in ("gpt", "llama") for f in sorted(FOLDER.glob(f"{family}_*.yaml"))]
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def named_size(stem: str) -> tuple[float, float]:
    """Parameters, and half a unit of the last digit given: "gpt_124m" -> 124e6, .5e6; "gpt_1b3" -> 1.3e9, .05e9."""
    size = stem.split("_")[1]
    unit = next(c for c in size if c in UNITS)
    whole, decimals = size.split(unit)
    return float(f"{whole}.{decimals or 0}") * UNITS[unit], 0.5 * UNITS[unit] * 10.0 ** -len(decimals)


def config_of(stem: str) -> DecoderConfig:
    cfg = composed("bench", f"model={stem}").model
    more = {"vocab_size": 257} if cfg.vocab_size is None else {}  # left to the tokenizer: bytes
    return instantiate(cfg, **more, _convert_="all")


def parameters_of(stem: str) -> int:
    with torch.device("meta"):
        return config_of(stem).build(seed=0).num_parameters()


@pytest.mark.parametrize("stem", [f.stem for f in FILES])
def test_size_is_its_name(stem):
    size, half_digit = named_size(stem)
    # 5%, or within the rounding of a one-digit name
    assert abs(parameters_of(stem) - size) <= max(0.05 * size, half_digit), parameters_of(stem)


def test_all_sizes_are_there():
    gpts = {f"gpt_{size}" for size in ("10m", "124m", "1b3", "1m", "2m", "30m", "350m", "770m")}
    llamas = {f"llama_{size}" for size in ("1m", "10m", "60m", "130m", "222m", "350m", "1b")}
    assert {f.stem for f in FILES} >= gpts | llamas


@pytest.mark.parametrize("name", ["gpt_1m", "gpt_2m", "llama_1m", "llama_10m"])
def test_small_ones_run(name):
    config = config_of(name)
    model = config.build(seed=0)
    logits = model(torch.randint(0, config.vocab_size, (2, 128)))
    assert logits.shape == (2, 128, 257)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.randint(0, 257, (logits[..., 0].numel(),))
    )
    assert abs(loss.item() - 5.55) < 0.1  # ln 257: an untrained model knows nothing


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_base_names_every_option_at_its_default(family):
    base = OmegaConf.to_container(OmegaConf.load(FOLDER / "base" / f"{family}.yaml"))
    config = config_of(f"{family}_1m")
    optional = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    assert base.pop("_target_") == f"{type(config).__module__}.{type(config).__name__}"
    assert base == optional


def test_the_known_ones_are_exact():
    assert parameters_of("gpt_1m") == 869_504 + 2 * 128  # one more token, in the embedding and in the head
    # GPT-2's, with its vocabulary padded
    assert parameters_of("gpt_124m") == 124_439_808 + (50304 - 50257) * 768
    assert parameters_of("llama_1b") == 1_100_048_384  # TinyLlama's
    assert parameters_of("llama_1m") == 4 * (4 * 128**2 + 3 * 128 * 344 + 2 * 128) + 128 + 2 * 257 * 128
