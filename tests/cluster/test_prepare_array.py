"""A preparation as two arrays of a real SLURM, a task of which is killed, is that of one process."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from slurm_daemons import Slurm, until

from qtrain.data.prepare import prepare
from qtrain.data.sources import JsonLinesSource
from qtrain.data.tokenizers import BpeTraining

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "prepare_array.sbatch"
PARTS = 3


def ended(cluster: Slurm, *jobs: str) -> None:
    def none_left() -> bool:
        return not cluster.run("squeue", "-h", "-j", ",".join(jobs), "-t", "PD,CF,R,CG").strip()

    until(none_left, f"the end of {', '.join(jobs)}")


@pytest.mark.slow
def test_an_array_with_a_killed_task(cluster: Slurm, tmp_path: Path) -> None:
    draw = random.Random(1)
    (tmp_path / "corpus").mkdir()
    for k in range(5):
        rows = [" ".join(draw.choices([f"w{i}" for i in range(300)], k=40)) for _ in range(60)]
        lines = [json.dumps({"text": row}) + "\n" for row in rows]
        (tmp_path / "corpus" / f"{k}.jsonl").write_text("".join(lines))
    words = [
        "data=jsonl",
        f"data.source.paths=[{tmp_path / 'corpus'}]",
        "data.tokenizer=bpe:400",
        "data.val_fraction=0.1",
    ]
    words += ["data.num_workers=1", "data.shard_tokens=5000", f"data.folder={tmp_path / 'array'}"]

    def submit(stage: str, tasks: str, *options: str) -> str:
        short = ["--cpus-per-task=1", "--time=00:10:00", f"--array={tasks}", *options]
        return cluster.sbatch(*short, str(SCRIPT), str(PARTS), stage, *words, cwd=tmp_path)

    scan = submit("scan", f"0-{PARTS - 1}%2")
    encode = submit("encode", f"0-{PARTS - 1}%2", f"--dependency=afterok:{scan}")
    ended(cluster, scan)
    assert [cluster.state(f"{scan}_{part}") for part in range(PARTS)] == ["COMPLETED"] * PARTS
    # Before its first word: Python and its libraries take longer to start
    until(lambda: cluster.state(f"{encode}_1") == "RUNNING", f"the start of {encode}_1")
    cluster.run("scancel", f"{encode}_1")
    ended(cluster, encode)
    assert cluster.state(f"{encode}_1") == "CANCELLED"
    (work,) = (tmp_path / "array").iterdir()
    assert sorted(p.name for p in work.glob("part-*")) == ["part-00000", "part-00002"]
    ended(cluster, submit("encode", "1"))
    (found,) = (p for p in (tmp_path / "array").iterdir() if p != work)
    source, tokenizer = JsonLinesSource(tmp_path / "corpus"), BpeTraining(vocab_size=400)
    one = prepare(
        source, tokenizer, tmp_path / "one", val_fraction=0.1, shard_tokens=5000, num_workers=1
    ).directory
    assert found.name == one.name
    files = [p.relative_to(one) for p in one.rglob("*") if p.is_file()]
    assert len(files) > 5
    assert all((found / name).read_bytes() == (one / name).read_bytes() for name in files)
