"""From the launcher's section to the lines of a batch script; what bash and SLURM make of them: test_real_slurm.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtrain.cluster.allocation import Request, Shape

LAUNCHER = Path(__file__).parents[2] / "configs" / "hydra" / "launcher"
SECTION = yaml.safe_load((LAUNCHER / "slurm.yaml").read_text())


def asked(**changed: Any) -> Request:
    return Request.of({**SECTION, **changed})


def run(devices: Any = 1, num_nodes: Any = 1, device: str = "auto") -> dict[str, Any]:
    return {"trainer": {"devices": devices, "num_nodes": num_nodes}, "device": device}


def test_the_shape_follows_from_the_run():
    assert asked().shape(run(4, 2)) == Shape(2, 4, 4)
    assert asked().shape(run(4, 2, "cpu")) == Shape(2, 4, 0)
    assert asked(gpus=False).shape(run(3)) == Shape(1, 3, 0)
    assert asked(nodes=2, tasks_per_node=4).shape(run(4, 2, "cuda")) == Shape(2, 4, 4)


@pytest.mark.parametrize(
    ("changed", "config", "said"),
    [
        ({"nodes": 3}, run(4, 2), "nodes=3, and trainer.num_nodes=2.*set trainer.num_nodes=3"),
        ({"tasks_per_node": 1}, run(4, 2), "tasks_per_node=1, and trainer.devices=4.*set trainer.devices=1"),
        ({"gpus": False}, run(device="cuda"), "device=cuda, and hydra.launcher.gpus=false"),
        ({}, run("auto"), "trainer.devices='auto': must be a whole number"),
        ({}, run(1, 0), "trainer.num_nodes=0"),
    ],
)
def test_a_shape_that_does_not_agree_is_refused(changed, config, said):
    with pytest.raises(ValueError, match=said):
        asked(**changed).shape(config)


def test_the_options_of_sbatch():
    given = asked(
        account="proj", partition="gpu", qos="long", constraint="a100", gpu_type="a100", cpus_per_task=8, mem_gb=64,
        timeout_min=90, signal_delay_s=300, sbatch={"mail-type": "END", "exclusive": True},
    )  # fmt: skip
    assert given.options(Shape(2, 4, 4), "train") == {
        "account": "proj", "partition": "gpu", "qos": "long", "constraint": "a100", "gpus-per-node": "a100:4",
        "cpus-per-task": 8, "mem": "64G", "time": 90, "signal": "USR1@300", "requeue": True, "open-mode": "append",
        "job-name": "train", "nodes": 2, "ntasks-per-node": 4, "mail-type": "END", "exclusive": True,
    }  # fmt: skip
    few = asked(requeue=False).options(Shape(1, 1, 0), "train")
    assert few == {
        "time": 240, "signal": "USR1@120", "no-requeue": True, "open-mode": "append", "job-name": "train", "nodes": 1,
        "ntasks-per-node": 1,
    }  # fmt: skip
    assert asked().options(Shape(1, 2, 2), "t")["gpus-per-node"] == 2


def test_the_lines_before_srun_are_what_bash_reads():
    given = asked(
        modules=["cuda/12.4"],
        environment={"A": "$HOME/x y"},
        scratch="$HOME/scratch",
        setup=["B=3", "set -e"],
        cpus_per_task=2,
    )
    script = "module() { echo module $*; }\n" + "\n".join(given.before())
    script += '\nprintf "%s\\n" "$A" "$QTRAIN_CACHE" "$B" "$SRUN_CPUS_PER_TASK" "$OMP_NUM_THREADS" "${WANDB_SERVICE-none}"; kill -TERM $$; false; echo alive'
    env = {"HOME": "/home/me", "PATH": "/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "2"}
    env["WANDB_SERVICE"] = "3-7-unix-/tmp/of-the-login-node"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    lines = [
        "module load cuda/12.4",
        "/home/me/x y",
        "/home/me/scratch/qtrain",
        "3",
        "2",
        "2",
        "none",
        "alive",
    ]
    assert done.stdout.splitlines() == lines, done.stderr


def test_the_line_after_srun_reads_its_exit_status(tmp_path):
    """As submitit writes it: behind an empty line and a comment."""
    (line,) = asked(max_requeues=7).after()
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\necho "$@"\nexit 9\n')
    fake.chmod(0o755)
    script = "(exit 75)\n\n# teardown\n" + line.replace(sys.executable, str(fake))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("-m qtrain.cluster.requeue --most 7 75\n", 9)


def test_python_runs_in_the_container_and_the_last_line_outside():
    given = asked(container="apptainer exec x.sif", python="python3", srun=["--container-image=y"])
    assert given.interpreter() == "apptainer exec x.sif python3"
    assert given.srun_arguments() == ["--wait=60", "--container-image=y"]
    assert "apptainer" not in given.after()[0]
    assert asked().interpreter() == sys.executable


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"partition": "a\ncurl evil"}, r"hydra.launcher.partition='a\\ncurl evil': must be one line"),
        ({"account": "a\x00"}, "hydra.launcher.account"),
        ({"partition": ""}, "hydra.launcher.partition=''"),
        (
            {"setup": "module load x"},
            r"hydra.launcher.setup='module load x': must be a list.*setup=\[module load x\]",
        ),
        ({"setup": ["a\nb"]}, r"hydra.launcher.setup\[0\]"),
        ({"modules": ["a\rb"]}, r"hydra.launcher.modules\[0\]"),
        ({"environment": {"A;B": "1"}}, "'A;B' is no name"),
        ({"environment": {"A": "1\n2"}}, "hydra.launcher.environment.A"),
        ({"environment": ["A=1"]}, "must be a mapping"),
        ({"sbatch": {"--mail": "x"}}, "no long option"),
        ({"sbatch": {"mail-type": "x\ny"}}, "hydra.launcher.sbatch.mail-type"),
        ({"sbatch": {"signal": "TERM@9"}}, "set hydra.launcher.signal_delay_s"),
        ({"sbatch": {"output": "x"}}, "set hydra.launcher.folder"),
        ({"sbatch": {"wait": True}}, "set hydra.launcher.wait"),
        (
            {"sbatch": {"chdir": "/scratch/me"}},
            r"hydra.launcher.sbatch.chdir='/scratch/me': out=.*submit from that folder",
        ),
        ({"sbatch": {"parsable": True}}, "hydra.launcher.sbatch.parsable=True: sbatch's answer is read"),
        ({"sbatch": {"quiet": True}}, "hydra.launcher.sbatch.quiet=True: the job's number"),
        ({"sbatch": {"test-only": True}}, "hydra.launcher.sbatch.test-only=True: nothing would be submitted"),
        ({"timeout_min": 0}, "hydra.launcher.timeout_min=0: must be a whole number, 1 or more"),
        ({"timeout_min": "4:00:00"}, "hydra.launcher.timeout_min='4:00:00'"),
        ({"timeout_min": None}, "hydra.launcher.timeout_min=None"),
        ({"timeout_min": 2}, "signal_delay_s=120 leaves nothing of hydra.launcher.timeout_min=2"),
        ({"array_parallelism": True}, "hydra.launcher.array_parallelism=True"),
        ({"wait": "no"}, "hydra.launcher.wait='no': must be true or false"),
        ({"poll_seconds": 0}, "hydra.launcher.poll_seconds=0"),
        ({"partitoin": "x"}, "hydra.launcher.partitoin is unknown"),
    ],
)
def test_a_value_that_is_no_line_of_a_script_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        asked(**changed)


def test_a_key_left_out_is_refused():
    with pytest.raises(ValueError, match=r"hydra\.launcher\.account is missing"):
        Request.of({key: value for key, value in SECTION.items() if key != "account"})


def test_the_example_is_one():
    Request.of(
        {
            **SECTION,
            **{
                k: v
                for k, v in yaml.safe_load((LAUNCHER / "slurm_example.yaml").read_text()).items()
                if k != "defaults"
            },
        }
    )
