"""The set-up scripts, in a copy of the checkout whose pip is a stub: what is installed, and when nothing is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("scripts/setup_venv.sh", "scripts/quickstart.sh", "scripts/test.sh", ".ci/run")
STUB_PYTHON = f"""#!/usr/bin/env bash
# The interpreter of a made venv: modules are logged instead of run.
if [ "$1" = -m ] && [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$1" = -m ]; then
    echo "${{@:2}}" >>"$LOG"
    if [ "$2" = pip ] && [ -n "${{PIP_FAILS:-}}" ]; then exit 1; fi
else
    exec {sys.executable} "$@"
fi
"""
TOOLS = ("bash", "env", "dirname", "cat", "mkdir", "cp", "id")


class Checkout:
    """A copy of the scripts beside a pyproject.toml, with a PATH of stubs and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.log = root / "copy", root / "bin", root / "log"
        for name in SCRIPTS:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.bin.mkdir(parents=True)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.stub("python3", STUB_PYTHON)

    def stub(self, name: str, text: str = "#!/bin/sh\nexit 0\n") -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **environ: str) -> tuple[int, str, list[str]]:
        """(exit code, what was printed, the modules that were run)."""
        self.log.write_text("")
        env = {"PATH": str(self.bin), "LOG": str(self.log), "HOME": str(self.root), **environ}
        command = ["bash", str(self.root / script), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=self.root.parent)
        return done.returncode, done.stdout + done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def pip(lines: list[str]) -> list[str]:
    return [line.removeprefix("pip install ") for line in lines if line.startswith("pip")]


def test_quickstart_installs_torch_first_then_runs_the_main_job(checkout: Checkout) -> None:
    code, text, lines = checkout.run("scripts/quickstart.sh")
    assert code == 0, text
    assert pip(lines) == ["torch==2.13.0", f"-e {checkout.root}"]
    assert lines[-1] == "qtrain.cli train experiment=quickstart compile=false"
    assert "No C++ compiler found" in text


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.run("scripts/quickstart.sh")
    _, _, lines = checkout.run("scripts/quickstart.sh", "steps=3")
    assert lines == ["qtrain.cli train experiment=quickstart compile=false steps=3"]


def test_a_changed_pyproject_installs_again(checkout: Checkout) -> None:
    checkout.run("scripts/quickstart.sh")
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert len(pip(checkout.run("scripts/quickstart.sh")[2])) == 2


def test_a_failed_installation_leaves_no_stamp_and_says_what_to_set(checkout: Checkout) -> None:
    code, text, lines = checkout.run("scripts/quickstart.sh", PIP_FAILS="1")
    assert code != 0
    assert "QTRAIN_TORCH" in text
    assert pip(lines) == ["torch==2.13.0"]
    assert len(pip(checkout.run("scripts/quickstart.sh")[2])) == 2


def test_with_a_gpu_the_ordinary_torch_and_compile(checkout: Checkout) -> None:
    checkout.stub("nvidia-smi")
    _, _, lines = checkout.run("scripts/quickstart.sh")
    assert pip(lines)[0] == "torch>=2.11"
    assert lines[-1] == "qtrain.cli train experiment=quickstart"


def test_a_driver_without_a_device_is_no_gpu(checkout: Checkout) -> None:
    checkout.stub("nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert pip(checkout.run("scripts/quickstart.sh")[2])[0] == "torch==2.13.0"


def test_with_a_compiler_compile_stays_on(checkout: Checkout) -> None:
    checkout.stub("g++")
    assert checkout.run("scripts/quickstart.sh")[2][-1] == "qtrain.cli train experiment=quickstart"


def test_variables_choose_torch_index_and_experiment(checkout: Checkout) -> None:
    environ = {"QTRAIN_TORCH": "torch==2.12.0", "QTRAIN_TORCH_INDEX": "INDEX", "QTRAIN_EXPERIMENT": "mine"}
    _, _, lines = checkout.run("scripts/quickstart.sh", **environ)
    assert pip(lines) == ["--index-url INDEX torch==2.12.0", f"-e {checkout.root}"]
    assert "experiment=mine" in lines[-1]


def test_without_a_python_it_says_so(checkout: Checkout) -> None:
    (checkout.bin / "python3").unlink()
    code, text, lines = checkout.run("scripts/quickstart.sh")
    assert code != 0
    assert "No Python 3.10 or newer" in text
    assert lines == []


def test_an_old_python_is_passed_over(checkout: Checkout) -> None:
    checkout.stub("python3.13", "#!/bin/sh\nexit 1\n")
    assert checkout.run("scripts/quickstart.sh")[0] == 0
    code, text, _ = Checkout(checkout.root.parent / "other").run(
        "scripts/test.sh", QTRAIN_PYTHON="/no/python"
    )
    assert code != 0
    assert "QTRAIN_PYTHON=/no/python" in text


def test_tests_run_lint_format_types_then_pytest_last(checkout: Checkout) -> None:
    code, text, lines = checkout.run(".ci/run", "-k", "this")
    assert code == 0, text
    assert pip(lines)[1] == f"-e {checkout.root}[test]"
    assert [line.split()[0] for line in lines[2:]] == ["ruff", "ruff", "mypy", "pytest"]
    assert lines[-1] == "pytest -n 2 --dist worksteal -k this"
    assert pip(checkout.run(".ci/run")[2]) == []


def test_the_test_extra_and_the_base_have_their_own_stamps(checkout: Checkout) -> None:
    checkout.run("scripts/quickstart.sh")
    assert pip(checkout.run("scripts/test.sh")[2])[1].endswith("[test]")
    assert pip(checkout.run("scripts/quickstart.sh")[2]) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound(script: str) -> None:
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "://" not in path.read_text()
    assert os.access(path, os.X_OK) or script == "scripts/setup_venv.sh"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(path)], check=True, cwd=ROOT)
