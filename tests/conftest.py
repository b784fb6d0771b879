"""Shared by all tests."""

from __future__ import annotations

import http.client
import logging
import socket
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ``composition``

TOY = '''
"""A command for tests."""
from pathlib import Path

CONFIG = "toy"
POSITIONAL = "what"


def check(cfg):
    if cfg.size < 1:
        raise ValueError(f"size={cfg.size}: must be at least 1")
    if cfg.bug:
        raise KeyError("a bug in check")


def run(cfg):
    if cfg.fail:
        raise RuntimeError("a bug in run")
    with Path("runs.txt").open("a") as file:
        file.write(f"{cfg.what} {cfg.size} {cfg.get('w')}\\n")
    return cfg.code


FORWARDS = {"forward": lambda arguments: print(arguments) or 7}
'''
TOY_CONFIGS = {
    "toy.yaml": "defaults: [{recipe: plain}, {shape: small}, _self_]\n"
    "what: nothing\nsize: 1\ncode: 0\nfail: false\nbug: false\nnested: {rate: 0.1, warmup_steps: 3}\n",
    "recipe/plain.yaml": "# @package _global_\nrecipe: {linear: null}\n",
    "recipe/knobs.yaml": "# @package _global_\nw: int8_row\na: int8_row\nrecipe: {linear: '${w}'}\n",
    "recipe/weights.yaml": "# @package _global_\nw: int4_row\nrecipe: {linear: '${w}'}\n",
    "sweep/sizes.yaml": "# @package _global_\nhydra: {sweeper: {params: {size: '1,0'}}}\n",
    "shape/small.yaml": "width: 2\n",
    "shape/deep.yaml": "width: 2\nlayers: 9\n",
}


@pytest.fixture
def toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """``toy("size=3")`` runs ``qtrain toy size=3`` in a folder of its own -> (exit code, everything printed)."""
    from qtrain import cli
    from qtrain.commands import ENTRIES

    (tmp_path / "toy_command.py").write_text(TOY)
    for name, text in TOY_CONFIGS.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder = tmp_path / "work"
    folder.mkdir()
    # The package's recipes would be options beside the toy's
    package = tmp_path / "package"
    (package / "hydra").mkdir(parents=True)
    (package / "hydra" / "output").symlink_to(cli.config_dir() / "hydra" / "output")
    monkeypatch.setattr(cli, "config_dir", lambda: package)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ENTRIES, "toy", ("toy_command", "a command for tests"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str) -> tuple[int, str]:
        code = cli.main(["toy", "--config-dir", str(tmp_path / "configs"), *arguments])
        out, err = capfd.readouterr()
        return code, out + err

    yield call
    # Hydra sets the root logger up for the run
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.modules.pop("toy_command", None)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """A local object store that speaks S3 over HTTP."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(moto_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://NAME`` of a new bucket, which s3fs finds by the environment; no pause between attempts."""
    import s3fs

    from qtrain.data import object_store

    settings = {
        "ENDPOINT_URL": moto_endpoint,
        "ACCESS_KEY_ID": "qtrain",
        "SECRET_ACCESS_KEY": "a-secret-of-tests",
    }
    for name, value in {**settings, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "BACKOFF", (0.0, 0.0, 0.0))
    s3fs.S3FileSystem.clear_instance_cache()  # it would keep the endpoint of before
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


class _Flaky(BaseHTTPRequestHandler):
    """Passes requests on to ``upstream``, and answers every second one of a kind for an object with an error (mode 503) or not at
    all (drop). Mode never: every one with an error, once ``good`` of them were passed on."""

    upstream, mode, good = "", "503", 0
    seen: ClassVar[Counter[str]] = Counter()
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        cls = type(self)
        request = f"{self.command} {self.path}"
        cls.seen[request] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if cls.seen.total() > cls.good if cls.mode == "never" else cls.seen[request] % 2:
            if cls.mode == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection(cls.upstream.removeprefix("http://"))
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def flaky(bucket, moto_endpoint, monkeypatch):
    """flaky(mode, good): from now on the endpoint is one that fails, as ``_Flaky`` has it."""
    import s3fs

    handler = type("Handler", (_Flaky,), {"upstream": moto_endpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def choose(mode: str, good: int = 0) -> type[_Flaky]:
        handler.mode, handler.good, handler.seen = mode, good, Counter()
        # Neither library tries again by itself: what is tested is ours, and quick
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.server_address))
        s3fs.S3FileSystem.clear_instance_cache()
        return handler

    yield choose
    server.shutdown()
    server.server_close()
