"""Faults, injected into real runs at seeded moments and places; what became of each run, as a table.

    python scripts/inject_faults.py --faults 500 --seed 0 --workers 2 --table docs/reliability.md
    python scripts/inject_faults.py --faults 40 --only "kill -9" --only "bit flipped"

A run of 12 small steps (stochastic rounding, dropout, accumulation, 8-bit states, a checkpoint every third) is
disturbed, and started again by the same command (resume=auto) until it is complete. It survived if its weights, its
packed optimizer states and its whole curve are then, bit for bit, those of an undisturbed run. A run that completes
otherwise is silently corrupted. The exit status is 1 unless all survived.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked children inherit no thread

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from fault_trials import EVERY, FAULTS, RARE, STEPS, Lab, Trial

BEGIN, END = "<!-- fault table: begin -->", "<!-- fault table: end -->"


@dataclass
class Row:
    """What became of one kind of fault."""

    injected: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)
    corrupted: int = 0
    problems: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        mean = sum(self.lost) / max(len(self.lost), 1)
        return [
            str(self.injected),
            str(self.survived),
            f"{mean:.1f}",
            str(max(self.lost, default=0)),
            str(self.corrupted),
        ]


def planned(kinds: list[str], faults: int) -> list[str]:
    """Which kind each fault is: the kinds in turns, rare ones but a few times."""
    plan: list[str] = []
    while len(plan) < faults:
        turn = [k for k in kinds if plan.count(k) < RARE.get(k, faults)]
        if not turn:
            raise ValueError(f"{faults} faults of {', '.join(kinds)} alone: at most {len(plan)} are injected")
        plan += turn[: faults - len(plan)]
    return plan


def campaign(
    lab: Lab, plan: list[str], seed: int, progress: Callable[[int], None], share: tuple[int, int] = (0, 1)
) -> dict[str, Row]:
    """Injects the faults of ``plan``; of ``share`` (i, n) every n-th from the i-th."""
    rows = {kind: Row() for kind in plan}
    mine = range(share[0], len(plan), share[1])
    for done, number in enumerate(mine, start=1):
        row = rows[plan[number]]
        trial = Trial(lab, random.Random(f"{seed}/{number}"), lab.root / f"trial-{number}")
        ended = FAULTS[plan[number]](trial) or trial.finish()
        row.injected += 1
        row.survived += ended == "survived"
        row.corrupted += ended == "silently corrupted"
        row.lost.append(trial.lost)
        if ended == "survived":
            shutil.rmtree(trial.out)
        else:
            row.problems.append(f"trial {number} ({trial.out}): {ended}")
        progress(done)
    return rows


def shared_campaign(arguments: list[str], workers: int) -> dict[str, Row]:
    """The same campaign by several processes of this script, each its share."""
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(workers)]
        commands = [
            [sys.executable, __file__, *arguments, "--json", str(file), "--share", str(i), str(workers)]
            for i, file in enumerate(files)
        ]
        for process in [subprocess.Popen(c, stdout=subprocess.DEVNULL) for c in commands]:
            process.wait()
        for file in files:
            for kind, found in json.loads(file.read_text()).items():
                row = rows.setdefault(kind, Row())
                for name, value in found.items():
                    setattr(row, name, getattr(row, name) + value)
    return rows


def table(rows: dict[str, Row], faults: int, seed: int) -> str:
    header = ["fault", "injected", "survived", "steps again: mean", "most", "silently corrupted"]
    total = Row()
    for row in rows.values():
        total.injected += row.injected
        total.survived += row.survived
        total.corrupted += row.corrupted
        total.lost += row.lost
    lines = [f"`python scripts/inject_faults.py --faults {faults} --seed {seed}`: runs of {STEPS} steps, a checkpoint every "
             f"{EVERY}, torch {torch.__version__} on CPU.", ""]  # fmt: skip
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {kind} | {' | '.join(row.cells())} |" for kind, row in rows.items() if row.injected]
    lines.append(f"| **all** | {' | '.join(total.cells())} |")
    return "\n".join(lines)


def insert(path: Path, text: str) -> None:
    """Puts the table between its marks."""
    page = path.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} has no marks {BEGIN} and {END}: nothing says where the table belongs")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="part of a kind's name; repeatable")
    parser.add_argument("--table", type=Path, help="a page with the table's marks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the faults")
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), help="of a worker: its number, and how many"
    )
    options = parser.parse_args(arguments)
    kinds = [k for k in FAULTS if not options.only or any(part in k for part in options.only)]
    if not kinds:
        parser.error(f"--only {options.only}: the kinds are {', '.join(FAULTS)}")
    begun, shown = time.monotonic(), [0.0]
    share = (options.share[0], options.share[1])
    all_mine = len(range(share[0], options.faults, share[1]))

    def progress(done: int) -> None:
        if time.monotonic() - shown[0] > 10 or done == all_mine:
            shown[0] = time.monotonic()
            left = (shown[0] - begun) / done * (all_mine - done)
            print(f"{done} of {all_mine} faults, {left:.0f} s left", file=sys.stderr, flush=True)

    plan = planned(kinds, options.faults)
    if options.workers > 1:
        words = ["--faults", str(options.faults), "--seed", str(options.seed)]
        rows = shared_campaign(
            [*words, *(w for part in options.only for w in ("--only", part))], options.workers
        )
    else:
        lab = Lab(Path(tempfile.mkdtemp(prefix="qtrain-faults-")))
        lab.build()
        rows = campaign(lab, plan, options.seed, progress, share)
        if not any(row.problems for row in rows.values()):
            shutil.rmtree(lab.root)
    print(table(rows, options.faults, options.seed))
    if options.table is not None:
        insert(options.table, table(rows, options.faults, options.seed))
    if options.json is not None:
        options.json.write_text(json.dumps({k: asdict(r) for k, r in rows.items()}, indent=1))
    problems = [p for row in rows.values() for p in row.problems]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
