"""qtrain train as a command: exit status, and what must not enter a saved configuration."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from composition import CONFIGS, composed

from qtrain.commands import train


def cpu(*overrides: str):
    return composed(train.CONFIG, "compile=false", "device=cpu", *overrides)


@pytest.fixture
def tiny(tmp_path):
    """Overrides of a run of two steps in ``tmp_path``."""
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"document {i}: " + f"dog {i} barks. " * 20)
    return [
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
        "sample.max_new_tokens=2",
        f"out={tmp_path / 'out'}",
        "run=one",
    ]


def test_a_good_run_exits_with_0(tiny, tmp_path, capsys):
    cfg = cpu(*tiny)
    train.check(cfg)
    assert train.run(cfg) == 0
    shown = capsys.readouterr().out
    assert "validation loss" in shown
    assert "a sample" in shown
    assert (tmp_path / "out" / "train" / "one" / "summary.json").exists()


def test_a_run_that_diverges_exits_with_3_and_no_trace(tiny, tmp_path, capsys, monkeypatch):
    from qtrain.training.module import QuantizedTransformer

    losses = QuantizedTransformer.token_losses

    def poisoned(self, batch):
        bad = self.training and self.trainer.global_step == 1
        return losses(self, batch) * (math.nan if bad else 1.0)

    monkeypatch.setattr(QuantizedTransformer, "token_losses", poisoned)
    assert train.run(cpu(*tiny)) == 3
    errors = capsys.readouterr().err
    assert "stopped: the loss of step 2 is nan" in errors
    assert "Traceback" not in errors
    folder = tmp_path / "out" / "train" / "one"
    assert json.loads((folder / "verdict.json").read_text())["step"] == 2
    assert (folder / "checkpoints" / "step-000001").is_dir()
    assert (folder / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("w=int9_row", "int9"),
        ("recipe.linear.fprop.weight=none", "dgrad.weight"),
        ("m1=dynamic7", "exp_avg"),
        ("steps=0", "steps=0"),
        ("micro_batch_sequences=3", "no multiple"),
        ("sequence_tokens=4096", "exceeds model.sequence_tokens"),
        ("model.vocab_size=200", "257 ids"),
        ("model.heads=3", "heads"),
        ("schedule.warmup_steps=1000", "warmup"),
        ("optimizer.lr=-1", "lr"),
        ("optimizer.clip_norm=0", "clip_norm"),
        ("+optimizer.momentum=1", "momentum"),
        ("recipe._target_=qtrain.quant.Recipe", "Recipe"),
        ("logger.mode=sometimes", "logger.mode"),
        ("precision=fp16", "bf16, fp32"),
        ("name=a/b", "one folder name"),
        ("data=text", "data.source.paths"),
        ("recipe=mxfp4_sr sequence_tokens=10 batch_sequences=1", "divisible by 64"),
    ],
)
def test_check_refuses(override, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train.check(cpu(*override.split()))


@pytest.fixture
def other(tmp_path):
    """What does not fit a run of ``tiny``: FOLDER, its texts prepared by a BPE, and RUN, evaluated on other data."""
    from qtrain.training.assembly import assemble

    texts = ["data=text", f"data.source.paths=[{tmp_path / 'corpus'}]", f"data.folder={tmp_path / 'bpe'}"]
    config = train.plain(cpu(*texts, "data.val_fraction=0.3", "data.tokenizer=bpe:300"))
    folder = assemble(config).data.open().shards.directory
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"val_loss": 1.0, "data": {"shards": "others"}}')
    return {"FOLDER": str(folder), "RUN": str(tmp_path / "run")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # When the data are opened
        ("data=prepared data.address=FOLDER data.tokenizer=byte", "were made by another one"),
        ("model.sequence_tokens=4096 sequence_tokens=4096", "too few for one window"),
        ("baseline=RUN", "was evaluated on other data"),
        # When the run is put together: what checked it was another machine, with a compiler
        ("compile=true", r"needs a C\+\+ compiler"),
    ],
)
def test_what_a_run_meets_before_it_has_a_folder_is_one_line_and_2(
    tiny, tmp_path, other, words, message, capsys, monkeypatch
):
    for name, value in other.items():
        words = words.replace(name, value)
    if "data=prepared" in words:
        tiny = [word for word in tiny if not word.startswith("data")]
    monkeypatch.setattr("qtrain.training.assembly.shutil.which", lambda name: None)
    config = cpu(*tiny, *words.split())
    assert train.run(config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"qtrain: .*{message}", line)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("QTRAIN_DEBUG", "1")
    assert train.run(config) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_the_program_keeps_its_trace(tiny, monkeypatch):
    """A ValueError while it trains is nobody's refusal."""
    from qtrain.training.module import QuantizedTransformer

    def broken(self, batch):
        raise ValueError("a bug")

    monkeypatch.setattr(QuantizedTransformer, "token_losses", broken)
    with pytest.raises(ValueError, match="a bug"):
        train.run(cpu(*tiny))


def test_check_does_not_import_lightning():
    code = (
        "import sys\n"
        "from hydra import compose, initialize_config_dir\n"
        "from qtrain.commands import train\n"
        f"with initialize_config_dir({str(CONFIGS)!r}, version_base='1.3'):\n"
        "    train.check(compose('train', ['compile=false']))\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('lightning', 'wandb', 'matplotlib')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "override", ["+logger.key=${oc.env:SOME_API_KEY}", "name=x-sekret-0123", "+a.b=[sekret-0123]"]
)
def test_secrets_do_not_enter_the_configuration(override, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sekret-0123")
    with pytest.raises(ValueError, match=r"\$SOME_API_KEY"):
        train.plain(cpu(override))


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def ran(*words: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_a_sweep_of_runs_in_two_processes(tiny, tmp_path):
    one = tmp_path / "out" / "train" / "one"
    tiny = [*tiny[:-1], "precision=fp32"]
    assert train.run(cpu(*tiny, "run=one")) == 0
    more = [
        "compile=false",
        "device=cpu",
        "trainer=ddp",
        "seed=0,1",
        "run=seed${seed}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    done = ran(sys.executable, "-m", "qtrain.cli", "train", "-m", *tiny, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 2  # rank 0 of each run prints
    first, second = (one.parent / f"seed{seed}" for seed in (0, 1))
    # Sums in another order, and codes near a threshold that flip (docs/reliability.md)
    assert losses(first) == pytest.approx(losses(one), rel=3e-5)
    assert losses(second) != pytest.approx(losses(one), rel=1e-3)
    for folder in (first, second):
        saved = json.loads((folder / "summary.json").read_text())
        assert saved["steps"] == 2


@pytest.mark.slow
@pytest.mark.inductor
def test_under_torchrun_sharded_and_compiled(tiny, tmp_path):
    more = ["compile=true", "device=cpu", "trainer=fsdp2", "recipe=qpt"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = ran(*torchrun, "qtrain.cli", "train", *tiny, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1
    one = tmp_path / "out" / "train" / "one"
    assert train.run(cpu(*tiny[:-1], "recipe=qpt", "run=eager")) == 0
    # Compiled bfloat16 skips roundings
    assert losses(one) == pytest.approx(losses(one.parent / "eager"), rel=2e-3)
    census = json.loads((one / "census.json").read_text())
    assert not census["failures"]
    assert census["compiled"]["gain"] == pytest.approx(1.0, abs=0.5)


def test_another_number_of_processes_than_torchrun_started_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"makes 2 process.* started 3"):
        train.check(cpu(*tiny, "trainer=ddp"))


def test_an_attempt_s_words_name_its_run(monkeypatch):
    """A sweep's template of names (run='r${hydra:job.num}') means nothing to whoever goes on with one run of it."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: False))
    assert train.started_with("r3") is None
    words = ["w=int8_row", "run=r$\\{hydra:job.num\\}", "name=n"]
    config = OmegaConf.create({"overrides": {"task": words}})
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: config))
    assert train.started_with("r3") == ["w=int8_row", "run=r3", "name=n"]
    words[1] = "run=mine"
    config.overrides.task = words
    assert train.started_with("mine") == words
