"""The command line: what is refused, how fast, and what a run or a sweep leaves behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtrain import cli
from qtrain.commands import ENTRIES

ROOT = Path(__file__).parent.parent
Toy = Callable[..., tuple[int, str]]


def runs() -> list[str]:
    """What the toy command was called with, in order."""
    path = Path("runs.txt")
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_gets_its_overrides_and_hydra_leaves_nothing(toy: Toy) -> None:
    code, _ = toy("size=3", "what=this")
    assert code == 0
    assert runs() == ["this 3 None"]
    assert os.listdir() == ["runs.txt"]


def test_exit_code_of_the_command_is_the_exit_code(toy: Toy) -> None:
    assert toy("code=4")[0] == 4


def test_a_bare_word_sets_the_positional_key(toy: Toy) -> None:
    assert toy("step", "size=2")[0] == 0
    assert runs() == ["step 2 None"]


def test_a_second_bare_word_is_refused(toy: Toy) -> None:
    code, text = toy("step", "kernels")
    assert code == 2
    assert "'kernels' is no key=value" in text


@pytest.mark.usefixtures("toy")
def test_a_forwarded_word_takes_the_rest_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "forward", "--op", "x=1", "--help"]) == 7
    assert capfd.readouterr().out == "['--op', 'x=1', '--help']\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sise=3", "sise: no such key in toy; did you mean size?"),
        ("rate=3", "did you mean nested.rate?"),
        ("nested.warmup=3", "did you mean nested.warmup_steps?"),
        ("nested.zzz=3", "nested has rate, warmup_steps"),
        ("qqqq=3", "the top-level keys are recipe, "),
        ("recipe=knbs", "recipe=knbs: no such option; did you mean knobs? Options of recipe: knobs, plain, weights"),
        ("recipe=null", "no such option. Options of recipe: knobs, plain, weights"),
        ("recip=knobs", "did you mean recipe"),
        ("w=int4_row", "w: no such key in toy; recipe=knobs|weights has it (this is recipe=plain)"),
        ("shape.layers=3", "shape=deep has it (this is shape=small)"),
        ("+w=int4_row", "+w: no such key in toy; recipe=knobs|weights has it"),
        ("++new=1", "++new: no such key"),
        ("~sise", "did you mean size?"),
        ("size=0", "size=0: must be at least 1"),
        ("size=1,2", "size=1,2 sweeps: add -m"),
        ("size=[", "is no key=value"),
        ("size=???", "size has no value and no default: give size=..."),
        ("size=${nowhere}", "size: Interpolation key 'nowhere' not found"),
        ("hydra.job.nme=x", "did you mean hydra.job.name"),
        ("hydra/launcher=bsic", "did you mean basic?"),
    ],
)  # fmt: skip
def test_refused_in_one_line(toy: Toy, override: str, expected: str) -> None:
    code, text = toy(override)
    assert code == 2, text
    assert expected in text
    assert text.startswith("qtrain: ")
    assert len(text.splitlines()) == 1
    assert runs() == []


def test_all_mistakes_are_named_at_once(toy: Toy) -> None:
    code, text = toy("sise=3", "rte=1")
    assert code == 2
    assert len(text.splitlines()) == 2


def test_a_knob_of_the_chosen_recipe_is_accepted(toy: Toy) -> None:
    assert toy("recipe=knobs", "w=int4_row")[0] == 0
    assert runs() == ["nothing 1 int4_row"]


def test_arguments_below_a_node_can_be_added(toy: Toy) -> None:
    assert toy("+nested.more=1")[0] == 0


def test_a_sweep_runs_every_combination(toy: Toy) -> None:
    code, _ = toy("-m", "size=1,2", "what=x,y")
    assert code == 0
    assert runs() == ["x 1 None", "y 1 None", "x 2 None", "y 2 None"]
    assert sorted(p.name for p in Path().rglob("*") if p.is_file()) == ["multirun.yaml", "runs.txt"]


def test_a_sweep_is_checked_before_its_first_run(toy: Toy) -> None:
    code, text = toy("-m", "size=2,1,0")
    assert code == 2
    assert "size=0: must be at least 1 (in the run size=0)" in text
    assert runs() == []


def test_a_swept_option_that_lacks_a_key_is_found_before_the_first_run(toy: Toy) -> None:
    code, text = toy("-m", "recipe=knobs,weights", "a=int4_row")
    assert code == 2
    assert "recipe=knobs has it (this is recipe=weights)" in text
    assert runs() == []


def test_a_fixed_knob_may_be_one_that_only_the_swept_recipes_have(toy: Toy) -> None:
    """Hydra alone refuses this: it applies w to the default recipe, which has none."""
    code, text = toy("-m", "recipe=knobs,weights", "w=int2_row")
    assert code == 0, text
    assert runs() == ["nothing 1 int2_row", "nothing 1 int2_row"]


def test_sweeps_of_a_config_are_checked_too(toy: Toy) -> None:
    code, text = toy("-m", "+sweep=sizes")
    assert code == 2, text
    assert "size=0: must be at least 1" in text
    assert toy("-m", "+sweep=sizes", "hydra.sweeper.params.size='1,2'")[0] == 0
    assert runs() == ["nothing 1 None", "nothing 2 None"]


def test_what_configs_sweep_needs_m_and_is_swept_once(toy: Toy) -> None:
    """Else one default run passes for a sweep, or a typed value is run once for each that it replaces."""
    code, text = toy("+sweep=sizes")
    assert code == 2, text
    assert "the configs sweep size=" in text
    assert "add -m" in text
    code, text = toy("-m", "+sweep=sizes", "size=7")
    assert code == 2, text
    assert "size is swept by the configs" in text
    assert "hydra.sweeper.params.size=" in text
    assert runs() == []


def test_a_failing_run_of_a_sweep_does_not_stop_the_others(toy: Toy) -> None:
    code, text = toy("-m", "fail=true,false", "size=5")
    assert code == 1
    assert runs() == ["nothing 5 None"]
    assert text.count("RuntimeError: a bug in run") == 1
    assert "fail=True" in text


def test_a_sweep_names_the_runs_that_ended_with_a_code(toy: Toy) -> None:
    code, text = toy("-m", "code=0,3,0")
    assert code == 3
    assert len(runs()) == 3
    assert "run 1 (code=3) ended with exit code 3" in text
    assert "Error" not in text


def test_a_bug_in_a_run_shows_its_trace(toy: Toy) -> None:
    code, text = toy("fail=true")
    assert code == 1
    assert "Traceback" in text
    assert "toy_command.py" in text


def test_a_bug_in_a_check_is_not_taken_for_a_user_error(toy: Toy) -> None:
    with pytest.raises(KeyError, match="a bug in check"):
        toy("bug=true")


def test_debug_shows_the_trace_of_a_user_error(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTRAIN_DEBUG", "1")
    code, text = toy("size=0")
    assert code == 2
    assert "Traceback" in text
    assert "toy_command.py" in text


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("os.system", "configs may name classes of qtrain only"),
        ("qtrainer.Evil", "configs may name classes of qtrain only"),
        ("qtrain.quant.recipe.fnmatch.os.system", "qtrain.quant.recipe has no class 'fnmatch.os.system'"),
        ("qtrain.optim.AdmW", "qtrain.optim has no class 'AdmW'; did you mean AdamW or "),
        ("qtrain.nothing.X", "qtrain has no class 'nothing.X'"),
    ],
)
def test_foreign_targets_are_refused_by_name(toy: Toy, target: str, expected: str) -> None:
    code, text = toy(f"+nested._target_={target}")
    assert code == 2
    assert f"nested._target_={target}: " in text
    assert expected in text
    assert runs() == []


def test_targets_of_this_package_and_of_allowed_ones_pass(toy: Toy) -> None:
    assert toy("+nested._target_=qtrain.optim.AdamW")[0] == 0
    assert toy("+nested._target_=qtrain.models.gpt.GPTConfig")[0] == 0
    assert toy("+nested._target_=mine.Thing", "--allow-target", "mine")[0] == 0
    assert toy("+nested._target_=mined.Thing", "--allow-target", "mine")[0] == 2


def test_a_target_in_a_list_or_in_hydras_part_is_found(toy: Toy) -> None:
    assert toy("+nested.list=[{_target_: os.system}]")[0] == 2
    code, text = toy("+hydra.callbacks.x._target_=os.system")
    assert code == 2
    assert "hydra.callbacks.x._target_=os.system" in text


def test_every_target_of_the_configs_exists() -> None:
    from omegaconf import OmegaConf

    from qtrain.targets import check_targets

    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if path.parent.name == "launcher":  # Hydra builds it, from a plug-in's name: tests/test_submission.py
            continue
        container = OmegaConf.to_container(OmegaConf.load(path))
        check_targets({path.stem: container})


def test_cfg_prints_the_config_and_runs_nothing(toy: Toy) -> None:
    code, text = toy("--cfg", "recipe=knobs", "w=int4_row")
    assert code == 0
    assert "w: int4_row" in text
    assert "hydra" not in text
    assert runs() == []


def test_help_of_a_command_names_keys_and_options(toy: Toy) -> None:
    code, text = toy("--help")
    assert code == 0
    assert "recipe=plain   of knobs, plain, weights" in text
    assert "warmup_steps: 3" in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, line) in ENTRIES.items():
        assert f"  {name} " in text
        assert line in text


def test_unknown_command_and_option(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capfd.readouterr().err
    assert "unknown option --fast" in toy("--fast")[1]
    assert cli.main(["toy", "--config-dir", "/nowhere/at/all"]) == 2
    assert "no such folder" in capfd.readouterr().err


def test_entries_name_modules_of_this_package() -> None:
    for name, (module, line) in ENTRIES.items():
        assert module == f"qtrain.commands.{name}"
        assert line


def test_config_dir_of_a_checkout_of_a_wheel_and_of_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.config_dir() == ROOT / "configs"
    package = tmp_path / "site-packages" / "qtrain"
    package.mkdir(parents=True)
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    (tmp_path / "site-packages" / "configs").mkdir()  # some other package's
    with pytest.raises(FileNotFoundError, match="install qtrain again"):
        cli.config_dir()
    (package / "configs").mkdir()
    assert cli.config_dir() == package / "configs"


def cpu_seconds(code: str, arguments: list[str], cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """(CPU seconds of a Python process, the process)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def in_a_process(arguments: list[str], cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    code = "import sys, qtrain.cli; c = qtrain.cli.main(); print('torch' in sys.modules); sys.exit(c)"
    return cpu_seconds(code, arguments, cwd)


@pytest.mark.parametrize(
    "arguments", [["doctor", "functionl=true"], ["dcotor"], ["train", "recipe=qpx"], ["train", "stps=3"]]
)
def test_misspelling_costs_no_torch_and_little_time(arguments: list[str], tmp_path: Path) -> None:
    seconds, done = in_a_process(arguments, tmp_path)
    assert done.returncode == 2
    assert done.stdout.split() == ["False"]
    assert seconds < 3.0
    assert os.listdir(tmp_path) == []


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m qtrain.cli bench --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("qtrain bench: ")
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["bench", "step"], ["train"]])
def test_an_impossible_combination_costs_little_time(arguments: list[str], tmp_path: Path) -> None:
    seconds, done = in_a_process([*arguments, "model.heads=5"], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "not divisible by heads 5" in done.stderr
    assert "Traceback" not in done.stderr
    # 3 s where the machine is idle and torch takes 1.3; shared cores stretch CPU time as well
    assert seconds < max(3.0, 2.5 * cpu_seconds("import torch", [], tmp_path)[0])


def test_hydra_s_global_state_ends_with_the_command(toy):
    from hydra.core.global_hydra import GlobalHydra

    for arguments in (["size=3"], ["size=0"], ["sise=3"], ["--cfg"]):
        toy(*arguments)
        assert not GlobalHydra.instance().is_initialized()
