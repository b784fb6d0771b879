"""scripts/prepare_data.py, as a user runs it."""

import random
import subprocess
import sys
from pathlib import Path

from qtrain.data.shards import TokenShards

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_cut_file_becomes_shards_and_a_summary(tmp_path):
    rng = random.Random(0)
    pieces = ["".join(rng.choices("abcdef ", k=400)).strip() for _ in range(50)]
    (tmp_path / "input.txt").write_text("\n\n".join(pieces))
    done = run(
        *("--files", tmp_path / "input.txt", "--separator", "\\n\\n"),
        *("--out", tmp_path / "out", "--val-fraction", "0.2"),
    )
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "out").iterdir()
    shards = TokenShards.open(directory)
    assert shards.train.info.documents + shards.val.info.documents == 50
    assert str(directory) in done.stdout.replace("\n", "")
    assert f"train: {len(shards.train):,} tokens" in done.stdout


def test_options_that_do_not_go_together_are_refused():
    for arguments in (("--separator", "x"), ("--files", "x", "--include-tests")):
        done = run(*arguments)
        assert done.returncode == 1
        assert arguments[-1 if "--files" in arguments else 0] in done.stderr
