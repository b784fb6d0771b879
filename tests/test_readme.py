"""What the README shows works as it stands there: its loop, its recipe and its command lines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qtrain import cli
from qtrain.commands import ENTRIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def command_lines() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith("qtrain")]


def test_the_plain_loop_trains_a_quantized_model(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from torch import nn

    from qtrain.nn.linear import QuantizedLinear

    (loop,) = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(loop, "README.md", "exec"), names)
    # A uniform guess among 64 tokens costs ln 64 = 4.16 nats; 128 random targets are soon learned by heart
    assert names["loss"].item() < 3.5
    quantized = [n for n, m in names["model"].named_modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == 12
    assert isinstance(names["model"].lm_head, nn.Linear)
    assert not isinstance(names["model"].lm_head, QuantizedLinear)
    # Six linear layers a block, six operands each
    assert len(names["census"].quantized()) == 12 * 6
    assert names["census"].failures() == []
    held = names["optimizer"].state_bytes()
    assert held["total"] < 0.5 * held["as_float32"]
    assert torch.isfinite(names["loss"])
    assert "quantized operands" in capsys.readouterr().out


def test_the_census_of_the_loop_fails_without_the_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loop, its GEMMs replaced by plain ones behind the same names, must not get past its census."""
    from qtrain.nn import simulated
    from qtrain.nn.census import CensusError

    def plain(self: Any, view: Any, operand: str, **_: Any) -> None:
        return None

    monkeypatch.setattr(simulated.SimulatedGemms, "_quantized", plain)
    monkeypatch.setattr(
        simulated.SimulatedGemms,
        "_entered",
        lambda self, view, q, operand: simulated.GemmOperand(view.to(self.dtype), None),
    )
    (loop,) = blocks("python")
    with pytest.raises(CensusError):
        exec(compile(loop, "README.md", "exec"), {})


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_accepted(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Composed and checked, not run. Runs to evaluate do not exist here: of those the keys are checked."""
    (recipe,) = blocks("yaml")
    path = tmp_path / "my_configs" / "recipe" / "first_layer_8.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_launch", lambda *arguments: 0)
    words = shlex.split(line)[1:]
    if any(word.startswith(("run=", "runs=")) for word in words):
        words.append("--cfg")
    assert cli.main(words) == 0, capfd.readouterr().err


def documented() -> list[str]:
    """The command lines of docs/experiments.md, in its tables and its blocks."""
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    found = re.findall(r"`(qtrain [^`]*=[^`]*)`", text) + re.findall(
        r"^ *(qtrain .*)$", text, flags=re.MULTILINE
    )
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", documented())
def test_every_documented_experiment_composes(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        word for word in shlex.split(line)[1:] if not word.startswith("seed=")
    ]  # a seed composes like another
    assert cli.main([*words, "--cfg"]) == 0, capfd.readouterr().err


def test_every_sweep_and_optimizer_is_documented() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for group in ("sweep", "optimizer"):
        for file in (ROOT / "configs" / group).glob("*.yaml"):
            assert f"sweep={file.stem}" in text or f"`{file.stem}`" in text, file
    assert len(documented()) > 12


def test_the_readme_names_every_command() -> None:
    shown = {line.split()[1] for line in command_lines()}
    assert shown == set(ENTRIES)


def test_every_part_of_a_spec_in_the_table_parses() -> None:
    from qtrain.quant import QuantSpec

    rows = dict(re.findall(r"^\| (format|granularity|modifier) \| (.*) \|$", README, flags=re.MULTILINE))
    assert set(rows) == {"format", "granularity", "modifier"}
    for name in re.findall(r"`(\w+)`", rows["format"]):
        QuantSpec.parse(name)
    for part in ("granularity", "modifier"):
        for name in re.findall(r"`(\w+)`", rows[part]):
            QuantSpec.parse(f"int8_{name}")


def test_what_the_readme_names_exists() -> None:
    for path in re.findall(r"`((?:qtrain|configs|scripts|tests|kernels)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"bash (scripts/\S+\.sh)", README):
        assert (ROOT / script).is_file(), script
    assert "://" not in README
