"""qtrain generate: what it refuses. What it writes is tested beside evaluate, on the same run."""

from __future__ import annotations

import pytest
from composition import composed

from qtrain.commands import generate
from qtrain.training.checkpoints import write_checkpoint


@pytest.mark.parametrize(
    ("override", "message"),
    [("temperature=-1", "temperature"), ("max_new_tokens=-2", "max_new_tokens")],
)
def test_check_refuses(override, message, tmp_path):
    path = write_checkpoint(tmp_path, {"state_dict": {}}, step=1, tokens=1)
    with pytest.raises(ValueError, match=message):
        generate.check(composed(generate.CONFIG, f"checkpoint={path}", override))


def test_a_file_is_no_checkpoint(tmp_path):
    import torch

    torch.save({"x": 1}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt is no checkpoint \(a folder with manifest\.json\)"):
        generate.check(composed(generate.CONFIG, f"checkpoint={tmp_path / 'a.ckpt'}"))
