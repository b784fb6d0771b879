"""Mutation testing: how many small faults, planted one at a time, do the tests notice?

    score = (killed + timed out) / mutants

python scripts/mutate.py                                            qtrain/quant and qtrain/nn, every mutant
python scripts/mutate.py --limit 200 --seed 0                       a random sample of them
python scripts/mutate.py --module qtrain/quant/ranges.py            a file or a folder; may be repeated
python scripts/mutate.py --survivors-of report.json                 the survivors of an earlier run again
python scripts/mutate.py --self-test                                planted mutants of known outcome

The operators are mutmut's, and a few that aim at arithmetic (``mutation_operators.py``). mutmut's runner is not used: it
leaves out decorated functions (each property and every autograd.Function here) and puts a trampoline before the
others, which torch.compile(fullgraph=True) does not take. Instead a process that has torch imported forks once a
mutant; the child writes the mutant into a copy of the tree and runs pytest there: first the test files that mirror
the mutated one, then the rest of their folder, and of both only the tests that reach the mutated statement.
Rules and results: docs/mutation.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutation_operators import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("qtrain/quant", "qtrain/nn")
DEPENDS = {"tests/quant": ("qtrain/quant",)}  # code that a folder's outcomes depend on; else all of it
COPIED = ("qtrain", "kernels", "configs", "scripts", "tests", "pyproject.toml", "README.md")
PYTEST = ["-x", "-q", "--no-header", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
PYTEST += ["-p", "no:unraisableexception"]  # collects garbage six times at the end of each run
GRACE_SECONDS = 10.0  # of processor time for imports and collection, and again for each test
SLOWDOWN = 4.0  # beyond it a test may take this times what it took without a mutant before it counts as hung
WALL_SECONDS = 600.0  # for one that hangs without computing
MEMORY_BYTES = 4 << 30  # address space beyond that of the warm process: a mutant may size a tensor absurdly
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"


# --- running tests ---------------------------------------------------------------------------------------------


class Baseline:
    """Plugin of the run without a mutant: which tests reach which lines, and how long each takes."""

    def __init__(self, tree: Path) -> None:
        import coverage

        self.coverage = coverage.Coverage(data_file=None, source=[str(tree / "qtrain")], config_file=False)
        self.durations: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid} (collection)")

    def result(self) -> dict[str, Any]:
        data = self.coverage.get_data()
        return {
            "durations": self.durations,
            "failed": self.failed,
            "contexts": {name: data.contexts_by_lineno(name) for name in data.measured_files()},
            "modules": list(sys.modules),
        }


class Chosen:
    """Plugin of a run with a mutant: keeps the chosen tests in the chosen order, and checks what was imported."""

    def __init__(self, tests: list[str], durations: dict[str, float], mutated: Path) -> None:
        self.order, self.durations = {name: i for i, name in enumerate(tests)}, durations
        self.mutated = str(mutated)
        self.killer = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        limit_processor_time(self.durations[nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.killer = self.killer or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.killer = self.killer or f"{report.nodeid} (collection)"

    def result(self) -> dict[str, Any]:
        loaded = {getattr(m, "__file__", None) for m in list(sys.modules.values())}
        return {"killer": self.killer, "imported": self.mutated in loaded}


@dataclass(frozen=True)
class Facts:
    """What the run without a mutant showed of one folder of tests."""

    durations: dict[str, float]
    contexts: dict[str, dict[int, list[str]]]

    def phases(self, mutant: Mutant) -> list[list[str]]:
        """Tests for a mutant: of the mirrored files, then of the others. Those that reach the statement; all of
        them where an import reaches it; where nothing does, the mirrored ones (compiled code leaves no trace),
        and no test at all in a file that no test enters. One case of each test function comes before the second
        cases."""
        by_line = self.contexts.get(mutant.path, {})
        reached = {test for line in mutant.lines for test in by_line.get(line, [])}
        if not reached and not any(test for tests in by_line.values() for test in tests):
            return []
        everything = "" in reached or not reached
        counts: dict[str, int] = {}
        keys = {}
        for test in self.durations:
            function = test.partition("[")[0]
            counts[function] = counts.get(function, 0) + 1
            keys[test] = (test not in reached, counts[function], self.durations[test])
        chosen = sorted((t for t in self.durations if everything or t in reached), key=keys.__getitem__)
        mirrors = mirrored(mutant.path)
        first = [t for t in chosen if t.partition("::")[0] in mirrors]
        rest = [t for t in chosen if t.partition("::")[0] not in mirrors]
        rest.sort(key=lambda t: t.partition("::")[0])
        return [phase for phase in (first, rest if reached or not first else []) if phase]


def mirrored(path: str) -> set[str]:
    """qtrain/a/b.py -> tests/a/test_b.py; a package's __init__ also tests/test_a.py beside its folder."""
    relative = Path(path).relative_to("qtrain")
    names = {Path("tests") / relative.parent / f"test_{relative.stem.strip('_')}.py"}
    if relative.stem == "__init__":
        names.add(Path("tests") / relative.parent.parent / f"test_{relative.parent.name}.py")
    return {name.as_posix() for name in names}


def tests_folder(path: str) -> str:
    return f"tests/{Path(path).parts[1]}"


def limit_processor_time(usual_seconds: float) -> None:
    """From now on; SIGPROF ends the process when it is used up. Processor time, since machines are shared."""
    signal.setitimer(signal.ITIMER_PROF, GRACE_SECONDS + SLOWDOWN * usual_seconds)


def copy_tree(source: Path, target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=ignore)
        elif (source / name).exists():
            shutil.copy2(source / name, target / name)
    return target


def fork_pytest(tree: Path, arguments: list[str], plugin: Any, *, write_bytecode: bool = False) -> int:
    """Start pytest in a forked child inside ``tree``; returns its process id. The child leaves ``plugin.result()``
    in result.json and what was printed in output.txt."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)  # a timeout ends what the tests started as well
        with open(tree / "output.txt", "wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(tree)
        paths = [str(tree), str(tree / "kernels")]
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        sys.dont_write_bytecode = not write_bytecode
        if not write_bytecode:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
            limit_processor_time(0.0)
        import pytest

        if isinstance(plugin, Baseline):
            plugin.coverage.start()
        code = int(pytest.main([*PYTEST, f"--basetemp={tree / 'temporary'}", *arguments], plugins=[plugin]))
        if isinstance(plugin, Baseline):
            plugin.coverage.stop()
        Path("result.json").write_text(json.dumps(plugin.result()))
        sys.stdout.flush()
    finally:
        os._exit(code)


def baseline(tree: Path, folder: str) -> Facts:
    """Run the folder without a mutant; SystemExit unless it is green. Loads afterwards, into this process, every
    module from outside the tree that the tests needed, so that no mutant's child pays for it again."""
    (tree / "result.json").unlink(missing_ok=True)
    pid = fork_pytest(tree, [folder], Baseline(tree), write_bytecode=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    result = json.loads((tree / "result.json").read_text()) if (tree / "result.json").exists() else {}
    if code:
        output = (tree / "output.txt").read_text(errors="replace")
        failed = "\n  ".join(result.get("failed", [])[:10])
        raise SystemExit(
            f"{folder} is not green without a mutant (exit {code}):\n  {failed}\n{output[-2000:]}"
        )
    own = ("qtrain", "tests", "conftest", *(p.stem for p in (tree / "kernels").iterdir()))
    for name in result["modules"]:
        if name not in sys.modules and not name.startswith(own) and "__main__" not in name:
            with contextlib.suppress(Exception):  # one that cannot be loaded alone is loaded by the children
                importlib.import_module(name)
    gc.freeze()  # what is loaded now is shared with the children, whose collections need not walk it
    contexts = {
        Path(name).relative_to(tree).as_posix(): {int(line): tests for line, tests in lines.items()}
        for name, lines in result["contexts"].items()
    }
    return Facts(result["durations"], contexts)


class Slot:
    """A copy of the tree in which one mutant at a time is tested."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.stamp = int(time.time()) + 10_000
        self.pid = 0
        self.mutant: Mutant | None = None

    def plant(self, mutant: Mutant, phases: list[list[str]], durations: dict[str, float]) -> None:
        self.mutant, self.phases, self.durations = mutant, list(phases), durations
        self.target = self.tree / mutant.path
        self.original = self.target.read_text()
        self.started = time.monotonic()
        self.killer = ""
        self.write(mutant.code)
        if self.phases:
            self.next_phase()

    def write(self, text: str) -> None:
        """A time of change that no cached bytecode has: two mutants of a second may have the same size."""
        self.target.write_text(text)
        self.stamp += 2
        os.utime(self.target, (self.stamp, self.stamp))

    def next_phase(self) -> None:
        tests = self.phases.pop(0)
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        (self.tree / "result.json").unlink(missing_ok=True)
        chosen = Chosen(tests, self.durations, self.target)
        self.pid = fork_pytest(self.tree, files, chosen)
        self.deadline = time.monotonic() + WALL_SECONDS

    def poll(self) -> str | None:
        """The outcome once it is known."""
        if not self.pid:
            return self.finish(SURVIVED)  # no test enters the file
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done:
            if time.monotonic() < self.deadline:
                return None
            self.stop()
            return self.finish(TIMEOUT)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGPROF:
            return self.finish(TIMEOUT)
        if code == 5:
            raise RuntimeError(f"no test was selected for a mutant of {self.target}")
        result = json.loads((self.tree / "result.json").read_text()) if code in (0, 1, 2) else {}
        if code:
            self.killer = result.get("killer") or f"exit {code}"
            return self.finish(KILLED)
        if not result["imported"]:
            raise RuntimeError(
                f"the tests of {self.target} did not import the mutant, but another copy or none"
            )
        if self.phases:
            self.next_phase()
            return None
        return self.finish(SURVIVED)

    def finish(self, outcome: str) -> str:
        self.write(self.original)
        self.pid = 0
        self.seconds = time.monotonic() - self.started
        return outcome

    def stop(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


# --- the run as a whole ----------------------------------------------------------------------------------------


def digest(paths: Iterable[Path]) -> str:
    h = hashlib.sha256()
    for path in sorted(paths):
        h.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return h.hexdigest()[:16]


class Results:
    """Outcomes by mutant, one JSONL file for each state of code and tests: an interrupted run goes on."""

    def __init__(self, cache: Path, tree: Path, folder: str) -> None:
        rooms = DEPENDS.get(folder, (*MODULES, "kernels"))
        code = digest(p for room in rooms for p in (tree / room).rglob("*.py"))
        key = f"{code}-{digest((tree / folder).rglob('*.py'))}"
        self.file = cache / f"{folder.replace('/', '-')}-{key}.jsonl"
        self.known: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the line an interruption cut
                    self.known |= {(row := json.loads(line))["id"]: row}

    def add(self, row: dict[str, Any]) -> None:
        self.known[row["id"]] = row
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as f:
            f.write(json.dumps(row) + "\n")


def run_all(mutants: list[Mutant], trees: list[Path], cache: Path) -> list[dict[str, Any]]:
    """Rows of outcomes, in the order of ``mutants``; those on record are not run again."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    folders = sorted({tests_folder(m.path) for m in mutants})
    results = {folder: Results(cache, trees[0], folder) for folder in folders}
    pending = [m for m in mutants if m.id not in results[tests_folder(m.path)].known]
    facts = {folder: baseline(trees[0], folder) for folder in sorted({tests_folder(m.path) for m in pending})}
    for tree in trees[1:]:
        shutil.copytree(trees[0], tree, dirs_exist_ok=True)
    slots, counts = [Slot(tree) for tree in trees], {KILLED: 0, SURVIVED: 0, TIMEOUT: 0}
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(
        *columns, auto_refresh=False
    ) as progress:  # a refreshing thread would be forked with its locks
        task = progress.add_task("", total=len(pending))
        try:
            while pending or any(slot.mutant for slot in slots):
                for slot in slots:
                    if slot.mutant is None and pending:
                        mutant = pending.pop(0)
                        known = facts[tests_folder(mutant.path)]
                        slot.plant(mutant, known.phases(mutant), known.durations)
                    if (m := slot.mutant) is None or (outcome := slot.poll()) is None:
                        continue
                    slot.mutant = None
                    row = {"id": m.id, "path": m.path, "line": m.line, "operator": m.operator, "diff": m.diff}
                    row |= {"outcome": outcome, "killer": slot.killer, "seconds": round(slot.seconds, 2)}
                    results[tests_folder(m.path)].add(row)
                    counts[outcome] += 1
                    progress.update(task, advance=1, description=f"{counts[SURVIVED]} survived", refresh=True)
                time.sleep(0.01)
        finally:
            for slot in slots:
                slot.stop()
    return [results[tests_folder(m.path)].known[m.id] for m in mutants]


def score(rows: list[dict[str, Any]]) -> float:
    """Percent of mutants that some test noticed."""
    return 100.0 * sum(row["outcome"] != SURVIVED for row in rows) / len(rows) if rows else math.nan


def print_report(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    for row in sorted((r for r in rows if r["outcome"] == SURVIVED), key=lambda r: (r["path"], r["line"])):
        print(f"{row['path']}:{row['line']}  {row['operator']}\n{row['diff']}\n")
    numbers = (Column(name, justify="right") for name in ("mutants", KILLED, SURVIVED, TIMEOUT, "score %"))
    table = Table(Column("file", min_width=max(len(row["path"]) for row in rows)), *numbers)
    groups = {path: [r for r in rows if r["path"] == path] for path in sorted({r["path"] for r in rows})}
    for path, group in {**groups, "all": rows}.items():
        counts = [sum(r["outcome"] == outcome for r in group) for outcome in (KILLED, SURVIVED, TIMEOUT)]
        table.add_row(path, str(len(group)), *map(str, counts), f"{score(group):.1f}")
    Console(width=120).print(table)


def self_test(trees: list[Path], path: str) -> int:
    """Plant mutants whose outcome is known; exit code 1 unless each comes out as it must."""
    source = (trees[0] / path).read_text()
    last = range(len(source.splitlines()), len(source.splitlines()) + 1)
    planted = {
        "raises at import": ("raise RuntimeError('planted')", KILLED),
        "same behaviour": ("_PLANTED = 0", SURVIVED),
        "never ends": ("while True:\n    pass", TIMEOUT),
    }
    mutants = [
        Mutant(path, last[0], last, name, f"{source}\n{code}\n", code) for name, (code, _) in planted.items()
    ]
    with tempfile.TemporaryDirectory() as cache:
        rows = run_all(mutants, trees, Path(cache))
    for row in rows:
        print(
            f"{row['operator']}: {row['outcome']} in {row['seconds']} s, expected {planted[row['operator']][1]}"
        )
    return int(any(row["outcome"] != planted[row["operator"]][1] for row in rows))


def choose(arguments: argparse.Namespace, tree: Path) -> list[Mutant]:
    """The mutants that the arguments name, in the order of the seed."""
    wanted, files = arguments.module or list(MODULES), set()
    if arguments.survivors_of:
        rows = json.loads(arguments.survivors_of.read_text())["survivors"]
        wanted = arguments.module or sorted({row["path"] for row in rows})
    for name in wanted:
        path = tree / name
        found = set(path.rglob("*.py")) if path.is_dir() else {path}
        if not any(p.exists() for p in found):
            raise SystemExit(
                f"{name}: no such module; give a file or folder under qtrain, such as qtrain/quant/ste.py"
            )
        files |= found
    mutants = [m for p in sorted(files) for m in mutants_of(p.relative_to(tree).as_posix(), p.read_text())]
    if arguments.survivors_of:
        kept = {(row["path"], row["diff"]) for row in rows}
        mutants = [m for m in mutants if (m.path, m.diff) in kept]
    random.Random(arguments.seed).shuffle(mutants)
    return mutants[: arguments.limit]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Plant faults one at a time and count those that tests notice."
    )
    parser.add_argument("--module", action="append", metavar="PATH", help=f"default: {' and '.join(MODULES)}")
    parser.add_argument("--limit", type=int, metavar="N", help="test a random sample of N mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and so of the sample (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at a time (default 1)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write scores and survivors as JSON")
    parser.add_argument("--survivors-of", type=Path, metavar="FILE", help="test only a report's survivors")
    parser.add_argument("--fail-under", type=float, default=90.0, metavar="PERCENT", help="(default 90)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "mutation", metavar="DIR")
    parser.add_argument(
        "--without", action="append", default=[], metavar="TESTS", help="leave out an unfinished test file"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--self-test", action="store_true", help="plant mutants of known outcome and stop")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that scratch is removed
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        trees = [Path(scratch).resolve() / str(i) for i in range(arguments.jobs)]
        copy_tree(ROOT, trees[0])
        for name in arguments.without:
            (trees[0] / name).unlink()
        if arguments.self_test:
            return self_test(trees, (arguments.module or [f"{MODULES[0]}/ste.py"])[0])
        mutants = choose(arguments, trees[0])
        if arguments.list:
            print("\n\n".join(f"{m.path}:{m.line}  {m.operator}\n{m.diff}" for m in mutants))
            print(len(mutants), "mutants")
            return 0
        rows = run_all(mutants, trees, arguments.cache)
    print_report(rows)
    if arguments.report:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        scores = {p: score([r for r in rows if r["path"] == p]) for p in sorted({r["path"] for r in rows})}
        survivors = [r for r in rows if r["outcome"] == SURVIVED]
        content = {"command": sys.argv[1:], "commit": commit.stdout.strip(), "mutants": len(rows)}
        content |= {"score": score(rows), "scores": scores, "survivors": survivors}
        arguments.report.write_text(json.dumps(content, indent=1))
    return int(not score(rows) >= arguments.fail_under)


if __name__ == "__main__":
    sys.exit(main())
