"""What no run may do: execute what it reads, keep a secret, or talk to anybody unasked."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("qtrain", "kernels", "scripts") for p in (ROOT / folder).rglob("*.py"))
# As builtins, whether they are called or handed on
RUNNERS = {"eval", "exec", "__import__"}
CALLS = {
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "pandas.read_pickle",
    "runpy.run_path",
    "runpy.run_module",
}
# Of these, everything but what is named
YAML = {"yaml.safe_load", "yaml.safe_dump", "yaml.YAMLError"}
PACKAGES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "jsonpickle", "requests",
            "urllib.request", "urllib3", "httpx", "aiohttp", "http.client", "ftplib", "telnetlib", "smtplib", "socket",
            "torch.hub"}  # fmt: skip
# What is built, or imported, by a name that stands elsewhere: only where that name has been checked
BY_NAME = {"importlib.import_module", "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method",
           "hydra.utils.get_class", "hydra.utils.get_object"}  # fmt: skip
ALLOWED = {
    "qtrain/training/launcher.py": {"socket"},  # asks the kernel for a free port of this machine
    # Asks the kernel how many bytes the sockets that torch.distributed opened have sent
    "qtrain/planning/check_wire.py": {"socket"},
    "qtrain/cli.py": {"importlib.import_module"},
    # libyaml's safe loader, which yaml.safe_load does not take
    "qtrain/analysis/run_records.py": {"yaml.load", "yaml.CSafeLoader", "yaml.SafeLoader"},
    "qtrain/data/optional_libraries.py": {"importlib.import_module"},
    "qtrain/training/assembly.py": {"importlib.import_module"},
    "qtrain/training/worker.py": {"importlib.import_module"},
    "qtrain/quant/plugins.py": {"importlib.import_module"},
    "kernels/qtrain_kernels/op.py": {"importlib.import_module"},
    "qtrain/commands/bench.py": {"hydra.utils.instantiate"},
    "scripts/mutate.py": {"importlib.import_module"},
}


def origins(tree: ast.AST) -> dict[str, str]:
    """Local name -> what was imported under it, wherever in the file."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """``torch.load`` of ``t.load`` after ``import torch as t``; a builtin stays its name; else what stands there."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}".removeprefix("builtins.")
    return ast.unparse(node)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def call_breaches(node: ast.Call, names: dict[str, str]) -> list[str]:
    called, given = dotted(node.func, names), {k.arg: ast.unparse(k.value) for k in node.keywords}
    found = []
    if called == "compile":
        found.append("calls compile")
    if (
        called.startswith("torch.")
        and called.split(".")[-1] == "load"
        and given.get("weights_only") != "True"
    ):
        found.append(f"{called} without weights_only=True")
    if (called.endswith("load_from_checkpoint") or "ckpt_path" in given) and given.get(
        "weights_only"
    ) != "True":
        found.append(f"{called} loads a checkpoint without weights_only=True")
    # Positional: numpy.load(file, mmap_mode, allow_pickle)
    pickled = called == "numpy.load" and len(node.args) > 2
    if pickled or given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
        found.append(f"{called} with allow_pickle or shell")
    return found


def breaches(path: str, text: str) -> list[str]:
    """A line for everything in a source that could run what it reads, or reach out."""
    tree = ast.parse(text)
    names, allowed = origins(tree), ALLOWED.get(path, set())
    found = []
    for node in ast.walk(tree):
        said = [
            f"imports {n}"
            for n in imported(node)
            if any(f"{n}.".startswith(f"{p}.") for p in PACKAGES - allowed)
        ]
        if isinstance(node, ast.Call):
            said += call_breaches(node, names)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            used = dotted(node, names)
            if used in RUNNERS | CALLS | (BY_NAME - allowed) or (
                used.startswith("yaml.") and used not in YAML | allowed
            ):
                said.append(f"uses {used}")
        found += [f"{path}:{node.lineno}: {what}" for what in said]
    return found


def test_nothing_runs_what_it_reads():
    assert len(SOURCES) > 80
    found = [
        b for p in SOURCES for b in breaches(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8"))
    ]
    # The mutation tester compiles the sources that it mutates
    assert [b for b in found if not b.startswith("scripts/mutat")] == []


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')", "exec(text)", "run = exec", "map(eval, texts)", "import builtins; builtins.eval(text)",
        "compile(text, 'x', 'exec')", "compile(text, mode='exec', filename='x')", "__import__(name)",
        "import os; os.system('ls')", "from os import system; system('ls')", "from os import system as s; s('ls')",
        "import os as o; o.popen('ls')", "import runpy; runpy.run_path(path)", "import tempfile; tempfile.mktemp()",
        "import pickle", "def f():\n    import pickle", "from pickle import loads", "import pickle as p", "import _pickle",
        "from urllib import request", "import urllib.request", "from requests import get", "import socket",
        "from urllib3 import PoolManager", "import http.client",
        "import torch; torch.load(path)", "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=flag)", "import torch as t; t.load(path)",
        "from torch import load; load(path)", "from torch import load as l; l(path)",
        "from torch.serialization import load; load(path)", "import torch; torch.jit.load(path)",
        "import torch.hub", "from torch import hub", "trainer.fit(module, ckpt_path=path)",
        "trainer.fit(module, ckpt_path=path, weights_only=None)", "Module.load_from_checkpoint(path)",
        "import numpy as np; np.load(path, allow_pickle=True)", "import numpy as np; np.load(path, allow_pickle=flag)",
        "import numpy as np; np.load(path, None, True)", "from numpy import load; load(path, None, True)",
        "subprocess.run(words, shell=True)", "subprocess.run(words, shell=1)", "subprocess.run(words, shell=flag)",
        "import yaml; yaml.load(text)", "import yaml; yaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml; yaml.unsafe_load(text)", "import yaml; yaml.dump(x)", "from yaml import full_load; full_load(text)",
        "import importlib; importlib.import_module(name)", "from importlib import import_module; import_module(name)",
        "from hydra.utils import instantiate; instantiate(cfg)", "import hydra; hydra.utils.call(cfg)",
    ],
)  # fmt: skip
def test_the_fence_sees(line):
    assert len(breaches("qtrain/x.py", line)) >= 1


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path, weights_only=True)", "from torch import load; load(path, weights_only=True)",
        "import torch; torch.compile(f)", "model.compile()", "model.eval()", "import re; re.compile('x')", "parser.load(x)",
        "trainer.fit(module, ckpt_path=path, weights_only=True)", "import numpy as np; np.load(path)",
        "import numpy as np; np.load(path, allow_pickle=False)", "import yaml; yaml.safe_load(text)",
        "import yaml; yaml.safe_dump(x, sort_keys=False)", "subprocess.run(words)", "subprocess.run(words, shell=False)",
        "from urllib.parse import urlparse", "import torch.nn.functional as F", "compile: bool = False",
    ],
)  # fmt: skip
def test_the_fence_lets_pass(line):
    assert breaches("qtrain/x.py", line) == []


def test_an_exception_of_the_fence_is_of_one_file_and_one_name():
    line = "import importlib; importlib.import_module(name)"
    assert breaches("qtrain/cli.py", line) == []
    assert breaches("qtrain/cli.py", "import socket") != []
    assert breaches("qtrain/training/launcher.py", "import socket") == []
    assert breaches("qtrain/training/launcher.py", line) != []
    for path, names in ALLOWED.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(name.split(".")[-1] in text for name in names), path


SECRETS = {
    "WANDB_API_KEY": "5ec2e7a9" * 5,
    "HF_TOKEN": "hf_QzVnotatokenQzVnotatoken",
    "AWS_SECRET_ACCESS_KEY": "QzVaws0secret0access0key",
    "GITHUB_TOKEN": "ghp_QzVnotatokenQzVnotatoken",
    "MY_PASSWORD": "QzVcorrecthorse",
    "SLURM_JWT": "QzVeyJhbGciOiJIUzI1NiJ9",
}
NETRC_SECRET = "QzVnetrc" * 5
REMOTE = "https://QzVremoteuser:QzVremotepass@host.example/x.git?token=QzVremotequery"
TINY = ["data=text", "data.val_fraction=0.3", "model=gpt_1m", "model.layers=1", "sequence_tokens=32", "batch_sequences=2",
        "eval_windows=2", "schedule=constant", "schedule.warmup_steps=1", "compile=false", "device=cpu", "steps=2",
        "sample.max_new_tokens=1", "run=one"]  # fmt: skip


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(
            f"document {i} of some words about the number {i * 7919} and no other " * 4
        )


def make_repository(folder: Path) -> None:
    """A git repository with tokens in its remote's address and in what is not committed."""
    (folder / "notes.txt").write_text("first\n")
    for words in (
        ["init", "-q"],
        ["add", "notes.txt"],
        ["-c", "user.name=n", "-c", "user.email=QzVmail@host.example", "commit", "-qm", "first"],
        ["remote", "add", "origin", REMOTE],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "notes.txt").write_text("QzVuncommitted\n")


def test_no_secret_stays_in_the_run_folder(tmp_path):
    """Every byte of every file that the command leaves, W&B's records and logs included."""
    write_texts(tmp_path / "texts")
    make_repository(tmp_path)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {NETRC_SECRET}\n")
    (tmp_path / "netrc").chmod(0o600)
    environment = {
        **os.environ,
        **SECRETS,
        "NETRC": str(tmp_path / "netrc"),
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    words = [*TINY, f"data.source.paths=[{tmp_path / 'texts'}]", f"data.folder={tmp_path / 'shards'}",
             f"out={tmp_path / 'out'}", "logger=wandb", "logger.mode=offline"]  # fmt: skip
    command = [sys.executable, "-m", "qtrain.cli", "train", *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert any(p.name == "training.pt" for p in files)
    for path in files:
        data = path.read_bytes()
        assert b"QzV" not in data, path
        assert SECRETS["WANDB_API_KEY"].encode() not in data, path
    for name, secret in SECRETS.items():
        assert secret not in done.stdout + done.stderr, name


def test_a_secret_in_the_configuration_is_refused(tmp_path, monkeypatch, capfd):
    from qtrain import cli

    write_texts(tmp_path / "texts")
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"data.source.paths=[{tmp_path / 'texts'}]", f"logger.project={SECRETS['HF_TOKEN']}"]
    assert cli.main(["train", *words]) == 2
    said = capfd.readouterr().err
    assert "logger.project holds the value of $HF_TOKEN" in said
    assert not (tmp_path / "outputs").exists()


# Runs a command in a process that may speak to itself alone; what it tried is written down when it ends, so that
# threads and exit handlers count.
WATCHED = """
import atexit, json, socket, sys
tried, connect, look_up = [], socket.socket.connect, socket.getaddrinfo

def refuse(whom):
    tried.append(repr(whom))
    open(sys.argv[1], "w").write(json.dumps(tried))
    raise OSError(f"unasked: {whom}")

def connect_here(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

def look_up_nothing(host, *arguments, **named):
    return look_up(host, *arguments, **named) if host in (None, "127.0.0.1", "localhost", "::1") else refuse(host)

socket.socket.connect, socket.getaddrinfo = connect_here, look_up_nothing
if sys.argv[2] == "try":
    import urllib.request
    urllib.request.urlopen("http://192.0.2.1/")
from qtrain import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def watched(tmp_path):
    """watched(*words) -> (the process of the command, whom it tried to reach). Programs that it starts are told of a
    proxy on this machine, which is nobody but this test."""
    write_texts(tmp_path / "texts")
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = (
            "WANDB_API_KEY",
            "WANDB_MODE",
            "WANDB_BASE_URL",
            "WANDB_ERROR_REPORTING",
            "NO_PROXY",
            "no_proxy",
        )
        environment = {k: v for k, v in os.environ.items() if k not in names}
        environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
        environment |= {"NETRC": str(tmp_path / "netrc"), "HOME": str(tmp_path)}

        def call(*words: str, watch: bool = True) -> tuple[subprocess.CompletedProcess[str], list[str]]:
            report = tmp_path / "tried.json"
            code = (
                WATCHED
                if watch
                else "import sys, urllib.request as u; u.urlopen('http://192.0.2.1/', timeout=1)"
            )
            command = [sys.executable, "-c", code, str(report), *words]
            done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
            tried = json.loads(report.read_text()) if report.exists() else []
            with contextlib.suppress(BlockingIOError):
                while True:
                    proxy.accept()[0].close()
                    tried.append("the proxy")
            return done, tried

        yield call


@pytest.mark.parametrize("logger", ["none", "wandb"])
def test_nobody_is_called_unasked(watched, tmp_path, logger):
    """No connection but to this machine, whoever tries: names are not even looked up."""
    words = [
        f"data.source.paths=[{tmp_path / 'texts'}]",
        f"data.folder={tmp_path / 'shards'}",
        f"logger={logger}",
    ]
    done, tried = watched("train", *TINY, *words)
    assert done.returncode == 0, done.stderr
    assert tried == []
    assert bool(list(tmp_path.glob("outputs/train/one/wandb/offline-run-*/*.wandb"))) == (logger == "wandb")


def test_the_watch_sees_both(watched):
    done, tried = watched("try")
    assert "unasked" in done.stderr
    assert len(tried) == 1
    assert watched("try", watch=False)[1][-1] == "the proxy"
