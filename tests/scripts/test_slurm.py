"""scripts/slurm: the command that each batch script starts is one, and its last line has srun's exit status."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from qtrain import cli

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts" / "slurm").glob("*.sbatch"))
SRUN = '#!/bin/bash\nprintf "%s\\n" "$@" > "$HERE/srun.txt"\necho "$SRUN_CPUS_PER_TASK" > "$HERE/cpus.txt"\nkill -TERM $PPID\nexit 75\n'
PYTHON = '#!/bin/bash\necho "$@" > "$HERE/last.txt"\n'
SLURM = {
    "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_JOB_ID": "120",
    "SLURM_ARRAY_TASK_ID": "3",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_batch_script_trains_and_asks_for_more(
    script: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"srun": SRUN, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, **SLURM, "HERE": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = ["recipe=none", "batch_sequences=16", *(["run=mine"] if "array" not in script.stem else [])]
    subprocess.run(["bash", str(script), *words], env=environment, check=True)
    assert (tmp_path / "last.txt").read_text() == "-m qtrain.cluster.requeue 75\n"
    assert (tmp_path / "cpus.txt").read_text() == "8\n"
    given = (tmp_path / "srun.txt").read_text().splitlines()
    given = given[given.index("python") :]
    assert given[:4] == ["python", "-m", "qtrain.cli", "train"]
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
