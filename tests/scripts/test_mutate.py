"""scripts/mutate.py: which faults it plants, which tests it chooses, and that outcomes are told apart."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="pip install 'mutmut>=3.8'")
SCRIPT = Path(__file__).parents[2] / "scripts" / "mutate.py"

sys.path.insert(0, str(SCRIPT.parent))  # as when it runs as a script
spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
mutate = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutate)


def planted(source: str, path: str = "qtrain/quant/a.py") -> set[str]:
    """The changed line of each mutant of a source of one line a fault."""
    return {
        line[1:].strip()
        for m in mutate.mutants_of(path, source)
        for line in m.diff.splitlines()
        if line.startswith("+")
    }


def test_arithmetic():
    assert planted("def f(a, b):\n    return a - b\n") == {
        "return a + b",
        "return (b) - (a)",
        "return (a)",
        "return (b)",
    }


def test_calls():
    assert planted("import torch\n\n\ndef f(x, s):\n    return torch.maximum(x, s).abs()\n") == {
        "return torch.maximum(s, x).abs()",
        "return torch.maximum(s).abs()",
        "return torch.maximum(x, ).abs()",
        "return torch.maximum(x, s)",
        "return (x).abs()",
    }


def test_conditions_and_statements():
    assert planted("def f(x):\n    if x:\n        x.step()\n") == {
        "if False:",
        "if True:",
        "x",
        "pass",
    }


def test_booleans_and_strings():
    assert planted('def f(x):\n    return x == "row" or x is None\n') == {
        'return x != "row" or x is None',
        'return x == "XXrowXX" or x is None',
        'return x == "row" or x is not None',
        'return x == "row" and x is None',
        'return (x == "row")',
        "return (x is None)",
    }


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring: 1 + 1."""\n',
        "from a import b\nimport c.d as e\n",
        '__all__ = ["a", "b"]\n',
        "Operand = A | B | None\n",
        "def f(a: X | None) -> Y | Z: ...\n",
        "class A:\n    a: int\n    b: X[1]\n",
        "if TYPE_CHECKING:\n    x = 1 + 1\n",
        "x = 1  # pragma: no mutate\n",
    ],
)
def test_what_no_test_can_see_has_no_mutants(source):
    assert mutate.mutants_of("qtrain/quant/a.py", source) == []


def test_the_wording_of_an_error_has_none_but_the_error_has():
    assert planted('def f(x):\n    raise ValueError("no " + x)\n') == {
        'raise ValueError("no " - x)',
        'raise ValueError(("no "))',
        "raise ValueError((x))",
        "raise ValueError(None)",
    }


def test_mutants_compile_differ_and_name_their_line():
    path = "qtrain/quant/granularity.py"
    source = (SCRIPT.parents[1] / path).read_text()
    mutants = mutate.mutants_of(path, source)
    assert len(mutants) > 100
    assert len({m.id for m in mutants}) == len(mutants) == len({ast.dump(ast.parse(m.code)) for m in mutants})
    old = source.splitlines()
    for m in mutants:
        compile(m.code, path, "exec")
        new = m.code.splitlines()
        first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False), start=1) if a != b)
        assert m.line == first
        assert first in m.lines


def test_decorated_functions_have_mutants():
    assert planted("class A:\n    @property\n    def f(self):\n        return self.x * 2\n") >= {
        "return self.x / 2",
        "return self.x * 3",
        "return (self.x)",
    }


def test_mirrors():
    assert mutate.mirrored("qtrain/quant/ste.py") == {"tests/quant/test_ste.py"}
    assert mutate.mirrored("qtrain/quant/formats/__init__.py") == {
        "tests/quant/formats/test_init.py",
        "tests/quant/test_formats.py",
    }
    assert mutate.tests_folder("qtrain/quant/formats/base.py") == "tests/quant"


def test_the_tests_of_a_mutant():
    """Those that reach its lines, the mirrored file's first, one case of each function before second cases."""
    a, b = "tests/quant/test_a.py::", "tests/quant/test_b.py::"
    durations = {f"{b}w": 0.1, f"{a}x[1]": 0.2, f"{a}x[2]": 0.2, f"{a}y": 0.3, f"{a}z": 0.1}
    path = "qtrain/quant/a.py"
    facts = mutate.Facts(
        durations, {path: {3: [f"{a}x[1]", f"{a}x[2]", f"{b}w"], 4: [f"{a}y"], 9: ["", f"{a}y"]}}
    )

    def phases(*lines):
        return facts.phases(mutate.Mutant(path, lines[0], range(lines[0], lines[-1] + 1), "", "", ""))

    assert phases(3, 4) == [[f"{a}x[1]", f"{a}y", f"{a}x[2]"], [f"{b}w"]]
    assert phases(4) == [[f"{a}y"]]
    # reached by an import: all tests, those that reach it first; by nothing that leaves a trace: the mirrored file's
    assert phases(9) == [[f"{a}y", f"{a}z", f"{a}x[1]", f"{a}x[2]"], [f"{b}w"]]
    assert phases(7) == [[f"{a}z", f"{a}x[1]", f"{a}y", f"{a}x[2]"]]
    assert facts.phases(mutate.Mutant("qtrain/quant/b.py", 1, range(1, 2), "", "", "")) == []


A = """
def scaled(x, scale):
    return x * scale


def clipped(x):
    if x > 2:
        return 2
    return x


def count(n):
    while n > 0:
        n -= 1
    return n
"""

TEST_A = """
import subprocess, sys
from qtrain.quant.a import clipped, count, scaled

def test_clipped():
    assert clipped(5) == 2 and clipped(1) == 1

def test_count():
    assert count(3) == 0

def test_in_another_process():
    code = "from qtrain.quant.a import scaled; print(scaled(3, 5))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert scaled(0, 0) == 0 and done.stdout.strip() == "15"
"""


@pytest.fixture
def project(tmp_path):
    """A tree of one module, and a function that runs the script over it."""
    root = tmp_path / "project"
    for name, text in {
        "qtrain/__init__.py": "",
        "qtrain/quant/a.py": A,
        "tests/quant/test_a.py": TEST_A,
        "kernels/x.py": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    def run(*arguments: object):
        code = (
            f"import sys; from pathlib import Path; sys.path.insert(0, {str(SCRIPT.parent)!r}); import mutate\n"
            f"mutate.ROOT, mutate.GRACE_SECONDS = Path({str(root)!r}), 2.0\n"
            "sys.exit(mutate.main())"
        )
        command = ["--module", "qtrain/quant/a.py", "--cache", tmp_path / "cache", *arguments]
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, cwd=tmp_path
        )

    return root, run


def test_outcomes(project, tmp_path):
    """Killed here, in another process and by time; survivors are those of the bound, which no test stands on."""
    root, run = project
    done = run("--report", tmp_path / "report.json", "--fail-under", 50)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {tuple(row["diff"].splitlines()) for row in report["survivors"]} == {
        ("-    if x > 2:", "+    if x >= 2:"),
        ("-    if x > 2:", "+    if x > 3:"),
    }
    rows = [json.loads(line) for f in (tmp_path / "cache").iterdir() for line in f.read_text().splitlines()]
    outcomes = {row["diff"].splitlines()[1]: (row["outcome"], row["killer"]) for row in rows}
    assert outcomes["+    return x / scale"] == ("killed", "tests/quant/test_a.py::test_in_another_process")
    assert outcomes["+        n += 1"][0] == "timeout"
    assert outcomes["+        pass"][0] == "timeout"
    assert report["score"] == pytest.approx(100 * (1 - 2 / report["mutants"]))
    assert (root / "qtrain/quant/a.py").read_text() == A
    assert not list(root.rglob("__pycache__"))

    failing = run("--survivors-of", tmp_path / "report.json")  # all known: nothing is run
    assert failing.returncode == 1
    assert "2 " in failing.stdout
    (root / "tests/quant/test_a.py").write_text(TEST_A + "\ndef test_bound():\n    assert clipped(3) == 2\n")
    again = run("--survivors-of", tmp_path / "report.json", "--report", tmp_path / "again.json")
    assert again.returncode == 1
    (row,) = json.loads((tmp_path / "again.json").read_text())["survivors"]
    assert "x >= 2" in row["diff"]  # the same function: nothing can kill it


def test_red_tests_are_refused(project, tmp_path):
    root, run = project
    (root / "tests/quant/test_a.py").write_text("def test_red():\n    assert False\n")
    done = run("--limit", 2)
    assert done.returncode == 1
    assert "tests/quant is not green without a mutant" in done.stderr
    assert "test_red" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_self_test(project):
    _, run = project
    done = run("--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(" in ")[0] for line in done.stdout.splitlines() if "expected" in line] == [
        "raises at import: killed",
        "same behaviour: survived",
        "never ends: timeout",
    ]


def test_a_module_that_is_not_there(project):
    _, run = project
    done = run("--module", "qtrain/quant/b.py")
    assert done.returncode == 1
    assert "qtrain/quant/b.py: no such module" in done.stderr
