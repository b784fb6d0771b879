"""scripts/slurm: the command that each batch script starts is one, and its last line has srun's exit status."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from qtrain import cli

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts" / "slurm").glob("*.sbatch"))
TRAINING = [path for path in SCRIPTS if path.stem != "prepare_array"]
# SLURM's signal reaches the script too; one that `exec`s srun has left nobody to kill but whoever called it
SRUN = r"""#!/bin/bash
printf "%s\n" "$@" > "$HERE/srun.txt"
echo "$SRUN_CPUS_PER_TASK" > "$HERE/cpus.txt"
echo "${WANDB_SERVICE-none}" > "$HERE/service.txt"
[ "$(cat /proc/$PPID/comm)" = bash ] || { echo "srun is not a child of the script" >&2; exit 1; }
kill -TERM $PPID
exit 75
"""
PYTHON = '#!/bin/bash\necho "$@" > "$HERE/last.txt"\n'
SLURM = {
    "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_JOB_ID": "120",
    "SLURM_ARRAY_TASK_ID": "3", "WANDB_SERVICE": "3-7-unix-/tmp/of-the-login-node",
}  # fmt: skip


def started_by(script: Path, here: Path, words: list[str]) -> list[str]:
    """The words after ``srun``'s own options that ``script`` starts its tasks with, where a signal ends them."""
    for name, text in {"srun": SRUN, "python": PYTHON}.items():
        (here / name).write_text(text)
        (here / name).chmod(0o755)
    environment = {**os.environ, **SLURM, "HERE": str(here), "PATH": f"{here}:/usr/bin:/bin"}
    subprocess.run(["bash", str(script), *words], env=environment, check=True)
    assert (here / "last.txt").read_text() == "-m qtrain.cluster.requeue 75\n"
    assert (here / "cpus.txt").read_text() == "8\n"
    given = (here / "srun.txt").read_text().splitlines()
    return given[given.index("python") :]


@pytest.mark.parametrize("script", TRAINING, ids=lambda path: path.stem)
def test_a_batch_script_trains_and_asks_for_more(
    script: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe=none", "batch_sequences=16", *(["run=mine"] if "array" not in script.stem else [])]
    given = started_by(script, tmp_path, words)
    assert given[:4] == ["python", "-m", "qtrain.cli", "train"]
    assert (tmp_path / "service.txt").read_text() == "none\n"  # W&B's process of who submits is not the run's
    assert cli.main([*given[3:], "--cfg"]) == 0
    config = capfd.readouterr().out
    shape = {"one_node": ("4", "1"), "many_nodes": ("4", "2"), "array": ("1", "1")}[script.stem]
    assert re.findall(r"^  (?:devices|num_nodes): (\d+)", config, flags=re.MULTILINE) == list(shape)
    for line in ("resume: auto", "recipe:", "run: mine" if "array" not in script.stem else "run: 120_seed3"):
        assert f"\n{line}" in config
    directives = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?", script.read_text(), flags=re.MULTILINE)
    found = dict(directives)
    assert re.fullmatch(r"USR1@\d+", found["--signal"])
    assert {"--requeue", "--open-mode", "--time", "--ntasks-per-node"} <= set(found)


def test_the_script_of_an_array_prepares_a_part(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (script,) = set(SCRIPTS) - set(TRAINING)
    given = started_by(script, tmp_path, ["16", "scan", "data=stdlib"])
    assert given[:4] == ["python", "-m", "qtrain.cli", "prepare"]
    assert cli.main([*given[3:], "--cfg"]) == 0
    config = capfd.readouterr().out
    for line in ("stage: scan", "part: 3", "parts: 16"):
        assert f"\n{line}" in config
