"""What a sweep for SLURM is asked before anything is submitted; the command line of ``train``, up to a fake ``sbatch``."""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hydra.core.utils
import pytest
from omegaconf import DictConfig, OmegaConf

from qtrain import cli, submission
from qtrain.cluster import sweep_file
from qtrain.commands import train as train_command

Train = Callable[..., tuple[int, str]]
TINY = ["device=cpu", "logger=none", "schedule.warmup_steps=1", "steps=2", "hydra.launcher.wait=false"]
SBATCH = '#!/bin/bash\ncp "$1" {folder}/script.sh\n{answer}\n'
TAKEN = "echo Submitted batch job 120"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Train:
    """``train("-m", ...)`` -> (exit code, everything printed), on a machine whose SLURM takes every job as number 120."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "sbatch": SBATCH.format(folder=tmp_path, answer=TAKEN),
        "srun": "#!/bin/bash\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*words: str) -> tuple[int, str]:
        given = {word.split("=")[0] for word in words}
        code = cli.main(["train", *words, *(word for word in TINY if word.split("=")[0] not in given)])
        out, err = capfd.readouterr()
        assert (code == 0) == (tmp_path / "script.sh").exists()
        return code, out + err

    return call


def test_a_sweep_is_submitted_and_can_be_found_again(train: Train, tmp_path: Path) -> None:
    words = ["w=int8_row,int4_row", "seed=0", "trainer.devices=2", "trainer.num_nodes=2"]
    code, text = train(
        "-m",
        "hydra/launcher=slurm",
        *words,
        "hydra.launcher.partition=gpu",
        "hydra.launcher.array_parallelism=1",
    )
    assert code == 0, text
    (path,) = Path("multirun").glob("*/*/sweep.json")
    sweep = json.loads(path.read_text())
    assert (sweep["command"], sweep["job"], sweep["cwd"]) == ("train", "120", str(tmp_path / "work"))
    assert [arm["job"] for arm in sweep["arms"]] == ["120_0", "120_1"]
    for number, arm in enumerate(sweep["arms"]):
        run = Path(arm["folder"]).name
        assert arm["folder"] == f"outputs/train/{run}"
        assert run.endswith(f"-{number}")
        assert arm["overrides"][0] == f"w={['int8_row', 'int4_row'][number]}"
        assert arm["overrides"][-2:] == ["resume=auto", f"run={run}"]
        assert arm["log"] == str(path.parent.absolute() / "slurm" / f"120_{number}_0_log.out")
        assert (path.parent / "slurm" / f"120_{number}_submitted.pkl").is_file()
    assert f"submitted job 120: 2 run(s), {path.absolute()}" in text
    assert "scancel 120" in text
    script = (tmp_path / "script.sh").read_text()
    for line in ("--array=0-1%1", "--nodes=2", "--ntasks-per-node=2", "--partition=gpu", "--signal=USR1@120", "--requeue", "--time=240", "--open-mode=append"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "gpus" not in script  # device=cpu
    assert (
        script.rstrip().splitlines()[-1] == f"exec {sys.executable} -m qtrain.cluster.requeue --most 100 $?"
    )


def test_a_run_keeps_the_name_that_a_config_or_the_user_gives(train: Train) -> None:
    code, text = train("-m", "hydra/launcher=slurm", "run=seed${seed}", "seed=3,4", "resume=auto")
    assert code == 0, text
    (path,) = Path("multirun").glob("*/*/sweep.json")
    arms = json.loads(path.read_text())["arms"]
    assert [arm["folder"] for arm in arms] == ["outputs/train/seed3", "outputs/train/seed4"]
    assert [arm["overrides"][-1] for arm in arms] == ["run=seed3", "run=seed4"]


def test_an_arm_runs_the_config_that_was_submitted(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its YAML was edited since, and at each attempt of a requeued job; what names the node is the node's."""
    mine = tmp_path / "mine" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nbatch_sequences: 12\nsample: {prompt: '${oc.env:NODE}'}\n")
    monkeypatch.setenv("NODE", "login")
    words = ["--config-dir", str(tmp_path / "mine"), "experiment=mine", "seed=3,4", "hydra/launcher=slurm"]
    code, text = train("-m", *words)
    assert code == 0, text
    (path,) = Path("multirun").glob("*/*/sweep.json")
    run = Path(json.loads(path.read_text())["arms"][1]["folder"]).name
    mine.write_text("# @package _global_\nbatch_sequences: 20\nsample: {prompt: edited}\neval_windows: 3\n")

    from submitit.core.utils import DelayedSubmission

    configs: list[DictConfig] = []
    monkeypatch.setattr(train_command, "run", lambda config: configs.append(config) or 0)
    node = {"NODE": "n7", "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "121", "SLURM_JOB_NUM_NODES": "1"}
    for name, value in {**node, "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        DelayedSubmission.load(path.parent / "slurm" / "120_1_submitted.pkl").result()
    for config in configs:
        assert (config.batch_sequences, config.seed, config.eval_windows) == (12, 4, 64)
        assert (config.run, config.resume, config.sample.prompt) == (run, "auto", "n7")
    assert len(configs) == 2


def test_devices_are_those_of_the_nodes(train: Train, tmp_path: Path) -> None:
    """Whoever submits may have no GPU, and has not the processes."""
    words = [
        "seed=0,1",
        "trainer.devices=4",
        "trainer.num_nodes=2",
        "batch_sequences=16",
        "hydra.launcher.gpu_type=a100",
    ]
    code, text = train("-m", "hydra/launcher=slurm", *words, "device=cuda")
    assert code == 0, text
    assert "#SBATCH --gpus-per-node=a100:4\n" in (tmp_path / "script.sh").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/launcher=slurm", "seed=0"], "add -m"),
        (["-m", "hydra/launcher=slurm", "seed=0,1", "run=x"], "runs 0 and 1 would both be outputs/train/x"),
        (["-m", "hydra/launcher=slurm", "seed=0,1", "run=null"], "run=null"),
        (["-m", "hydra/launcher=slurm", "trainer.devices=1,2"], "run 1 2|jobs of an array are alike"),
        (["-m", "hydra/launcher=slurm", "hydra.launcher.nodes=2"], "trainer.num_nodes=1"),
        (["-m", "hydra/launcher=slurm", "seed=0,1", "resume=outputs/train/x"], "resume=outputs/train/x"),
        (["-m", "hydra/launcher=slurm", "w=int3_rwo"], "int3_rwo"),
        (["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=1"], "signal_delay_s=120 leaves nothing"),
        (["-m", "hydra/launcher=slurm", "hydra.launcher.partitoin=x"], "partition"),
        (["-m", "hydra/launcher=slurm", "seed=0,1", "hydra.sweeper.max_batch_size=1"], "array_parallelism"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_not_submitted(train: Train, words: list[str], said: str) -> None:
    code, text = train(*words)
    assert code == 2
    assert any(part in text for part in said.split("|")), text
    assert not Path("multirun").exists()


def test_a_run_that_exists_is_gone_on_with_by_word_only(train: Train) -> None:
    Path("outputs/train/mine").mkdir(parents=True)
    code, text = train("-m", "hydra/launcher=slurm", "seed=0", "run=mine")
    assert (code, "the run outputs/train/mine exists; go on with it (resume=auto)" in text) == (2, True), text
    assert train("-m", "hydra/launcher=slurm", "seed=0", "run=mine", "resume=auto")[0] == 0


def test_a_refusal_of_slurm_is_said_and_leaves_nothing(train: Train, tmp_path: Path) -> None:
    refusing = "echo sbatch: error: invalid partition specified: gpu >&2; rm {folder}/script.sh; exit 1"
    (tmp_path / "programs" / "sbatch").write_text(
        SBATCH.format(folder=tmp_path, answer=refusing.format(folder=tmp_path))
    )
    code, text = train("-m", "hydra/launcher=slurm", "seed=0,1")
    assert code == 2
    assert "SLURM did not take the jobs: " in text
    assert "invalid partition specified: gpu" in text
    assert list(Path("multirun").glob("*/*")) == []


def test_sweeps_of_one_second_share_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = SimpleNamespace(strftime=lambda pattern: "then")
    monkeypatch.setattr(hydra.core.utils, "datetime", SimpleNamespace(now=lambda: then))
    monkeypatch.setattr(submission.time, "strftime", lambda *_: "then")
    for number in range(2):
        code, text = train("-m", "hydra/launcher=slurm", f"seed={number},7")
        assert code == 0, text
    sweeps = [json.loads(path.read_text()) for path in sorted(Path("multirun").glob("*/*/sweep.json"))]
    assert [sweep["arms"][0]["overrides"][0] for sweep in sweeps] == ["seed=0", "seed=1"]
    assert len({arm["folder"] for sweep in sweeps for arm in sweep["arms"]}) == 4
    for number, place in enumerate(("then", "then-2")):
        folder = tmp_path / "work" / "multirun" / "then" / place
        assert f"seed={number},7" in (folder / "multirun.yaml").read_text()
        assert sweeps[number]["arms"][1]["log"] == str(folder / "slurm" / "120_1_0_log.out")


def said(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What a submission prints that ends with exit code 1, since SLURM may have taken it."""
    assert cli.main(["train", "-m", "hydra/launcher=slurm", *TINY, *words]) == 1
    return capfd.readouterr().err


def test_jobs_that_cannot_be_written_down_are_named(
    train: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_file.os, "fsync", full)
    text = said(capfd, "seed=3,4", "run=s${seed}", "resume=auto")
    for part in ("taken the sweep as job 120", "No space left on device", "scancel 120 ends them"):
        assert part in text
    assert re.findall(r"(120_\d): (\S+)  .*seed=(\d)", text) == [
        ("120_0", "outputs/train/s3", "3"),
        ("120_1", "outputs/train/s4", "4"),
    ]
    assert len(list(Path("multirun").glob("*/*/slurm/120_*_submitted.pkl"))) == 2  # the jobs need them


def test_where_a_job_may_have_been_taken_it_says_so(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An answer of sbatch that has no number; submitit's files that cannot be moved to where the job looks for them."""
    (tmp_path / "programs" / "sbatch").write_text("#!/bin/bash\necho Hello\n")
    text = said(capfd, "seed=3,4")
    assert "Hello" in text
    assert "squeue --me shows its job" in text
    (tmp_path / "programs" / "sbatch").write_text(SBATCH.format(folder=tmp_path, answer=TAKEN))

    def full(self: object, *arguments: object, **options: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("submitit.core.utils.JobPaths.move_temporary_file", full)
    text = said(capfd, "seed=3,4")
    assert "Disk quota exceeded" in text
    assert "squeue --me shows its job" in text


def test_a_refusal_of_slurm_leaves_a_folder_that_was_there(train: Train, tmp_path: Path) -> None:
    """With the submitted arms of other sweeps, whose jobs may still wait."""
    (tmp_path / "programs" / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "7_0_submitted.pkl").touch()
    assert (
        train("-m", "hydra/launcher=slurm", "seed=0,1", f"hydra.launcher.folder={tmp_path / 'logs'}")[0] == 2
    )
    assert (tmp_path / "logs" / "7_0_submitted.pkl").exists()


def test_another_command_is_not_submitted(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "-m", "hydra/launcher=slurm"]) == 2
    assert "prepare is not submitted to a cluster, train is" in capfd.readouterr().err


def test_without_slurm_it_says_what_works(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    code, text = train("-m", "hydra/launcher=slurm", "seed=0,1")
    assert code == 2
    assert "hydra/launcher=submitit_local" in text


def test_without_the_plugin_it_gives_the_command(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qtrain.slurm_launcher", raising=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, text = train("-m", "hydra/launcher=slurm", "seed=0,1")
    assert code == 2
    assert "pip install 'qtrain[slurm]'" in text


EVIL = "{launcher: {setup: ['touch EVIL']}}"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        # An experiment that adds a line of shell to the launcher that the user chose
        ("experiment/e.yaml", f"# @package _global_\nhydra: {EVIL}\n", ["hydra/launcher=slurm", "experiment=e"]),
        # ... by a harmless key, which bash would read all the same
        ("experiment/e.yaml", "# @package _global_\nhydra: {launcher: {python: 'touch EVIL;'}}\n", ["hydra/launcher=slurm", "experiment=e"]),
        # ... and that chooses the launcher
        ("experiment/e.yaml", "# @package _global_\ndefaults: [{override /hydra/launcher: slurm}]\n", ["experiment=e"]),
        # ... and with it the plug-in's own launcher for SLURM, which takes shell too
        ("experiment/e.yaml", "# @package _global_\ndefaults: [{override /hydra/launcher: submitit_slurm}]\n", ["experiment=e"]),
        # The primary config, shadowed
        ("train.yaml", None, ["hydra/launcher=slurm"]),
    ],
)  # fmt: skip
def test_a_config_from_elsewhere_adds_no_shell(
    train: Train, tmp_path: Path, file: str, text: str | None, words: list[str]
) -> None:
    path = tmp_path / "theirs" / file
    path.parent.mkdir(parents=True)
    own = OmegaConf.load(cli.config_dir() / "train.yaml")
    path.write_text(
        text
        if text is not None
        else OmegaConf.to_yaml(OmegaConf.merge(own, OmegaConf.create(f"hydra: {EVIL}")))
    )
    options = (
        [word for word in TINY if not word.startswith("hydra.")]
        if "hydra/launcher=slurm" not in words
        else TINY
    )
    code = cli.main(["train", "-m", "--config-dir", str(tmp_path / "theirs"), *words, "seed=0,1", *options])
    assert code == 2
    assert not (tmp_path / "script.sh").exists()


def test_a_cluster_s_file_of_one_s_own_is_taken(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "mine" / "hydra" / "launcher" / "jz.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("defaults: [slurm]\naccount: proj\nsetup: ['echo hello']\nmodules: [cuda/12.4]\n")
    code, text = train(
        "-m", "--config-dir", str(tmp_path / "mine"), "hydra/launcher=jz", "seed=0", "hydra.launcher.mem_gb=3"
    )
    assert code == 0, text
    script = (tmp_path / "script.sh").read_text()
    for line in ("#SBATCH --account=proj", "#SBATCH --mem=3G", "module load cuda/12.4", "echo hello"):
        assert f"\n{line}\n" in script
    assert "--array" not in script  # one arm is a job of its own
    (sweep,) = Path("multirun").glob("*/*/sweep.json")
    assert [arm["job"] for arm in json.loads(sweep.read_text())["arms"]] == ["120"]


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted((cli.config_dir() / "hydra" / "launcher").glob("*.yaml"))]
)
def test_every_launcher_s_file_is_one(train: Train, tmp_path: Path, name: str) -> None:
    code, text = train("-m", f"hydra/launcher={name}", "seed=0,1")
    assert code == 0, text
    assert stat.S_ISREG((tmp_path / "script.sh").stat().st_mode)
    assert submission.TARGET in (cli.config_dir() / "hydra" / "launcher" / "slurm.yaml").read_text()
