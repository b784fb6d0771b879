"""qtrain generate: what it refuses. What it writes is tested beside evaluate, on the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from qtrain.commands import generate

CONFIGS = Path(__file__).parents[2] / "configs"


def composed(*overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(generate.CONFIG, list(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [("temperature=-1", "temperature"), ("max_new_tokens=-2", "max_new_tokens")],
)
def test_check_refuses(override, message, tmp_path):
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(ValueError, match=message):
        generate.check(composed(f"checkpoint={tmp_path / 'a.ckpt'}", override))


def test_a_file_that_is_no_checkpoint(tmp_path):
    import torch

    torch.save({"x": 1}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a qtrain run"):
        generate.run(composed(f"checkpoint={tmp_path / 'a.ckpt'}"))
