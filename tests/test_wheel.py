"""The wheel, outside of any checkout: what is in it, and that it does what the checkout does.

The fresh environment holds the wheel, what its metadata require and nothing else. Those dependencies are links into the
environment that runs the tests, since torch alone would be hundreds of megabytes to download; its own qtrain, which is
this checkout, is not among them.
"""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qtrain.commands import ENTRIES

ROOT = Path(__file__).parents[1]
# quickstart's job on a smaller scale: a decoder of one layer, two steps, no compiler.
SHORT = [
    "experiment=quickstart", "steps=2", "model=gpt_1m", "model.layers=1", "sequence_tokens=64", "batch_sequences=2",
    "schedule.warmup_steps=1", "eval_windows=2", "sample.max_new_tokens=2", "logger=none", "compile=false", "device=cpu",
]  # fmt: skip


def build(source: Path, out: Path, *what: str) -> list[Path]:
    """What ``python -m build`` makes of ``source``, oldest first; ``what``: --wheel, --sdist or nothing for both."""
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=outside())
    return sorted(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def outside() -> dict[str, str]:
    """The environment without what could put a checkout on Python's path."""
    return {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "HYDRA", "QTRAIN"))
    }


def required(distribution: Distribution) -> list[Distribution]:
    """The distributions that this one requires, whatever they require included; no extra of it."""
    found: dict[str, Distribution] = {}
    waiting = [(distribution, "")]
    while waiting:
        parent, extra = waiting.pop()
        for text in parent.requires or []:
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
                continue
            held = importlib.metadata.distribution(wanted.name)
            assert wanted.specifier.contains(held.version, prereleases=True), (text, held.version)
            if (name := canonicalize_name(wanted.name)) not in found:
                found[name] = held
                waiting += [(held, ""), *((held, e) for e in wanted.extras)]
    return list(found.values())


def link(distribution: Distribution, site: Path) -> None:
    """The top-level files and folders of a distribution, as links in another site-packages."""
    here = Path(str(distribution.locate_file("")))
    for top in {
        file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")
    }:
        if (site / top).is_symlink() and (here / top).is_dir():
            continue  # a namespace that several share, from the same place
        (site / top).symlink_to(here / top)


class Environment:
    """A virtual environment with a wheel in it, and a folder far from the checkout to run it in."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.work = folder / "venv", folder / "work"
        self.work.mkdir(parents=True)
        venv.create(self.folder, with_pip=False, symlinks=True)
        self.python = self.folder / "bin" / "python"
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")[1].strip())
        install = [
            "-m",
            "pip",
            "--python",
            str(self.python),
            "install",
            "--no-index",
            "--no-deps",
            str(wheel),
        ]
        subprocess.run([sys.executable, *install], check=True, capture_output=True, text=True, env=outside())
        (own,) = [d for d in importlib.metadata.distributions(path=[str(self.site)]) if d.name == "qtrain"]
        for distribution in required(own):
            link(distribution, self.site)

    def run(self, *arguments: str, program: Path | None = None, **environ: str) -> tuple[int, str]:
        """(exit code, everything printed)."""
        command = [str(program or self.python), *arguments]
        env = {**outside(), "WANDB_MODE": "offline", **environ}
        done = subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def qtrain(self, *arguments: str, **environ: str) -> str:
        """What the installed command prints; it must succeed."""
        code, text = self.run(*arguments, program=self.folder / "bin" / "qtrain", **environ)
        assert code == 0, text
        return text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = build(ROOT, tmp_path_factory.mktemp("wheel"), "--wheel")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("fresh"), wheel)


@pytest.fixture(scope="module")
def corpus(fresh: Environment) -> list[str]:
    """Overrides for a text of the user's, in the folder that the commands run in."""
    (fresh.work / "corpus").mkdir()
    for i in range(40):
        text = f"document {i}: " + f"the cat of number {i} sleeps. " * 20
        (fresh.work / "corpus" / f"{i}.txt").write_text(text)
    return ["data=text", "data.source.paths=[corpus]", "data.folder=shards", "data.val_fraction=0.3"]


def sources(*folders: str) -> set[str]:
    """Files of the checkout below ``folders``, but for what Python leaves there; names from the root."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in found if path.parent.name != "__pycache__"}


def names(path: Path) -> Sequence[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_holds_package_kernels_and_configs_and_nothing_else(wheel: Path) -> None:
    held = [name for name in names(wheel) if not name.split("/")[0].endswith(".dist-info")]
    expected = sources("qtrain")
    expected |= {name.removeprefix("kernels/") for name in sources("kernels/qtrain_kernels")}
    expected |= {f"qtrain/{name}" for name in sources("configs")}
    assert len(expected) > 100
    assert sorted(held) == sorted(expected)


def test_metadata_say_what_pyproject_says(wheel: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_string(archive.read(path).decode())
        entries = archive.read(path.replace("METADATA", "entry_points.txt")).decode()
    assert entries.split() == ["[console_scripts]", "qtrain", "=", "qtrain.cli:main"]
    assert metadata["Name"] == "qtrain"
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    extras = project["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra") or []) == set(extras)
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]

    def applying(extra: str) -> set[str]:
        return {
            canonicalize_name(r.name)
            for r in requirements
            if r.marker is None or r.marker.evaluate({"extra": extra})
        }

    def wanted(texts: Sequence[str]) -> set[str]:
        all_of = [Requirement(text) for text in texts]
        return {canonicalize_name(r.name) for r in all_of if r.marker is None or r.marker.evaluate()}

    assert applying("") == wanted(project["dependencies"])
    for extra, texts in extras.items():
        assert applying(extra) == wanted([*project["dependencies"], *texts]), extra


def test_a_wheel_from_the_sdist_has_the_same_files(wheel: Path, tmp_path: Path) -> None:
    (sdist,) = build(ROOT, tmp_path / "sdist", "--sdist")
    with tarfile.open(sdist) as archive:
        members = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
        archive.extractall(tmp_path / "unpacked", **safely)
    assert {"pyproject.toml", "PKG-INFO", "README.md"} <= members
    assert sources("qtrain", "kernels", "configs", "scripts", "tests", "docs") <= members
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (again,) = build(unpacked, tmp_path / "wheel", "--wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        contents = [{n: archive.read(n) for n in archive.namelist()} for archive in (first, second)]
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


def test_the_fresh_environment_knows_the_wheel_alone(fresh: Environment) -> None:
    code, text = fresh.run(
        "-c",
        "import json, os, sys, qtrain, qtrain_kernels, qtrain.cli as c, importlib.util as u\n"
        "print(json.dumps([qtrain.__file__, qtrain_kernels.__file__, str(c.config_dir()), [os.path.realpath(p) for p in sys.path], "
        "[n for n in ('pytest', 'datasets', 'tiktoken', 'bitsandbytes') if u.find_spec(n)]]))",
    )
    assert code == 0, text
    package, kernels, configs, path, foreign = json.loads(text)
    assert package == str(fresh.site / "qtrain" / "__init__.py")
    assert kernels == str(fresh.site / "qtrain_kernels" / "__init__.py")
    assert configs == str(fresh.site / "qtrain" / "configs")
    assert not (fresh.site / "qtrain").is_symlink()
    assert [p for p in path if Path(p).is_relative_to(ROOT)] == []
    assert foreign == []  # those of the extras


def test_every_module_of_the_wheel_imports_without_the_extras(fresh: Environment) -> None:
    code, text = fresh.run(
        "-c",
        "import importlib, pkgutil, qtrain\n"
        # Hydra's launcher for SLURM is a class of an extra's: qtrain.submission alone imports it, and says what is missing
        "for m in pkgutil.walk_packages(qtrain.__path__, 'qtrain.'):\n"
        "    if m.name != 'qtrain.slurm_launcher': importlib.import_module(m.name)",
    )
    assert code == 0, text


@pytest.mark.parametrize("command", list(ENTRIES))
def test_every_command_shows_its_help(fresh: Environment, command: str) -> None:
    assert f"qtrain {command}: {ENTRIES[command][1]}" in fresh.qtrain(command, "--help")


def test_doctor_reports(fresh: Environment) -> None:
    text = fresh.qtrain("doctor")
    assert "The main job can run" in text


@pytest.mark.slow
def test_quickstarts_job_trains_evaluates_and_generates(fresh: Environment) -> None:
    text = fresh.qtrain("train", *SHORT, "run=one", QTRAIN_CACHE=str(fresh.work / "cache"))
    assert "validation loss" in text
    folder = fresh.work / "outputs" / "quickstart" / "one"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 < summary["val_loss"] < 6.0
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["git_commit"] is None
    assert versions["qtrain"] == importlib.metadata.version("qtrain")
    cache = {"QTRAIN_CACHE": str(fresh.work / "cache")}
    assert "validation loss" in fresh.qtrain("evaluate", "run=outputs/quickstart/one", **cache)
    assert fresh.qtrain("generate", "run=outputs/quickstart/one", "max_new_tokens=3", "device=cpu")


USERS = {
    "recipe/mine.yaml": "# @package _global_\n# Hypothesis: six bits are enough for weights.\nw: int6_row\nrecipe:\n"
    "  _target_: qtrain.quant.ModelRecipe\n  exclude: [lm_head]\n  linear:\n"
    '    fprop: {input: none, weight: "${w}"}\n    dgrad: {grad_output: none, weight: fprop}\n',
    "model/tiny.yaml": "_target_: qtrain.models.gpt.GPTConfig\nvocab_size: 257\nsequence_tokens: 32\nlayers: 1\n"
    "heads: 2\nwidth: 64\n",
    "data/notes.yaml": "defaults: [text]\nsource: {paths: [corpus]}\nfolder: shards\nval_fraction: 0.3\n",
    "experiment/question.yaml": "# @package _global_\n# Hypothesis: it runs.\ndefaults:\n  - override /recipe: mine\n"
    "  - override /model: tiny\n  - override /data: notes\n  - override /logger: none\nname: question\nsteps: 2\n"
    "batch_sequences: 2\neval_windows: 2\ncompile: false\ndevice: cpu\nschedule: {warmup_steps: 1}\n"
    "sample: {max_new_tokens: 2}\n",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("corpus")
def test_configs_of_the_user_stand_beside_the_packages(fresh: Environment) -> None:
    for name, text in USERS.items():
        path = fresh.work / "my_configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    mine = ("--config-dir", "my_configs")
    fresh.qtrain("train", *mine, "experiment=question", "run=mine")
    folder = fresh.work / "outputs" / "question" / "mine"
    # token embedding and lm_head 257 x 64 each, four 64 x 64 and two 64 x 256 matrices, three norm gains of 64
    parameters = 2 * 257 * 64 + 4 * 64 * 64 + 2 * 64 * 256 + 3 * 64
    assert json.loads((folder / "summary.json").read_text())["parameters"] == parameters
    assert "int6" in (folder / "surgery.txt").read_text()
    for group, option in (
        ("recipe", "mine"),
        ("model", "tiny"),
        ("data", "notes"),
        ("experiment", "question"),
    ):
        printed = fresh.qtrain("train", *mine, "--cfg", f"{group}={option}")
        assert "_target_" in printed
    assert "mine" in fresh.qtrain("train", *mine, "--help")
    code, text = fresh.run("train", "recipe=mine", program=fresh.folder / "bin" / "qtrain")
    assert code == 2
    assert "recipe=mine: no such option" in text
    code, text = fresh.run("train", "--config-dir", "my_config", program=fresh.folder / "bin" / "qtrain")
    assert code == 2
    assert "--config-dir my_config: no such folder" in text
