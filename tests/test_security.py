"""What no run may do: execute what it reads, keep a secret, or talk to anybody unasked."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("qtrain", "kernels", "scripts") for p in (ROOT / folder).rglob("*.py"))
CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "requests", "urllib.request",
           "http.client", "ftplib", "telnetlib", "smtplib"}  # fmt: skip
# The one that asks the kernel for a free port of this machine
SOCKETS = {"qtrain/training/launcher.py"}


def breaches(path: str, text: str) -> list[str]:
    """A line for everything in a source that could run what it reads, or reach out."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"{path}:{node.lineno}: imports {n}" for n in names if n in MODULES]
        found += [
            f"{path}:{node.lineno}: imports {n}" for n in names if n == "socket" and path not in SOCKETS
        ]
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in CALLS or (called == "compile" and len(node.args) > 1):
            found.append(f"{path}:{node.lineno}: calls {called}")
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
        if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
            found.append(f"{path}:{node.lineno}: {called} with allow_pickle or shell")
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
        "eval('1')", "exec(text)", "compile(text, 'x', 'exec')", "import os; os.system('ls')", "import pickle",
        "from urllib import request", "import urllib.request", "from requests import get", "import socket",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)", "subprocess.run(words, shell=True)", "yaml.load(text)",
    ],
)  # fmt: skip
def test_the_fence_sees(line):
    assert len(breaches("qtrain/x.py", line)) >= 1


@pytest.mark.parametrize(
    "line",
    ["torch.load(path, weights_only=True)", "model.compile()", "yaml.safe_load(text)", "subprocess.run(words)", "model.eval()"],
)  # fmt: skip
def test_the_fence_lets_pass(line):
    assert breaches("qtrain/x.py", line) == []


SECRETS = {
    "WANDB_API_KEY": "5ec2e7a9" * 5,
    "HF_TOKEN": "hf_QzVnotatokenQzVnotatoken",
    "AWS_SECRET_ACCESS_KEY": "QzVaws0secret0access0key",
    "GITHUB_TOKEN": "ghp_QzVnotatokenQzVnotatoken",
    "MY_PASSWORD": "QzVcorrecthorse",
}
NETRC_SECRET = "QzVnetrc" * 5
TINY = ["data=text", "data.val_fraction=0.3", "model=gpt_1m", "model.layers=1", "sequence_tokens=32", "batch_sequences=2",
        "eval_windows=2", "schedule=constant", "schedule.warmup_steps=1", "compile=false", "device=cpu", "steps=2",
        "sample.max_new_tokens=1", "run=one"]  # fmt: skip


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(
            f"document {i} of some words about the number {i * 7919} and no other " * 4
        )


def test_no_secret_stays_in_the_run_folder(tmp_path):
    """Every byte of every file that the command leaves, W&B's logs included."""
    write_texts(tmp_path / "texts")
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
        for name, secret in {**SECRETS, "netrc": NETRC_SECRET}.items():
            assert secret.encode() not in data, (path, name)
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


@pytest.mark.parametrize("logger", [["logger=none"], ["logger=wandb"]], ids=["none", "wandb"])
def test_nobody_is_called_unasked(tmp_path, monkeypatch, capfd, logger):
    """No connection but to this machine, whoever tries: names are not even looked up."""
    from qtrain import cli

    write_texts(tmp_path / "texts")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    tried = []
    connect = socket.socket.connect

    def here_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError(f"unasked: {address}")
        return connect(self, address)

    look_up = socket.getaddrinfo

    def local_names(host, *arguments, **named):
        if host not in (None, "127.0.0.1", "::1", "localhost"):
            tried.append(host)
            raise OSError(f"unasked: {host}")
        return look_up(host, *arguments, **named)

    monkeypatch.setattr(socket.socket, "connect", here_only)
    monkeypatch.setattr(socket, "getaddrinfo", local_names)
    words = [
        *TINY,
        f"data.source.paths=[{tmp_path / 'texts'}]",
        f"data.folder={tmp_path / 'shards'}",
        *logger,
    ]
    assert cli.main(["train", *words]) == 0, capfd.readouterr().err
    assert tried == []
    with pytest.raises(OSError, match="unasked"):  # the watch itself works
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    assert tried
