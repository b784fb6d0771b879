"""The parent of a run's processes: what they are told, how they end, and that none is left.

The processes here run small functions without torch; ``test_strategy`` trains through the same launcher.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtrain.interrupts import SIGNALS
from qtrain.training import launcher
from qtrain.training.launcher import launch

# What a child does; ``config["folder"]`` is where it leaves what it saw.
ENTRIES = '''
import json, os, signal, subprocess, sys, time
from pathlib import Path

RANK = os.environ["RANK"]
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
         "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")


def leave(config, name, value):
    path = Path(config["folder"]) / f"{name}-{RANK}"
    path.with_suffix(".partial").write_text(json.dumps(value))
    path.with_suffix(".partial").replace(path)


def look(config):
    words = Path("/proc/self/cmdline").read_text().split("\\0")
    found = {"environment": {n: os.environ[n] for n in NAMES}, "config": config, "words": words,
             "session": os.getsid(0), "pid": os.getpid(), "modules": sorted(sys.modules)}
    leave(config, "saw", found)
    print(f"out of {RANK}")
    print(f"err of {RANK}", file=sys.stderr)
    return 0


def end(config):
    """As ``config["ends"]`` says for this rank: an exit code, "raise", "kill", "sleep", ..."""
    how = config["ends"][int(RANK)]
    leave(config, "pid", os.getpid())
    if how == "raise":
        raise ValueError(f"rank {RANK} found a mistake")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stay":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave(config, "deaf", True)
    if how == "wait":  # until the other one is deaf
        while not (Path(config["folder"]) / "deaf-0").exists():
            time.sleep(0.02)
        return 5
    if how == "late":
        time.sleep(0.7)
        leave(config, "late", True)
        return 0
    if how in ("sleep", "stay"):
        time.sleep(60)
    return how


def listen(config):
    """Counts SIGUSR1; ends with 7 at SIGTERM."""
    count = 0

    def usr1(*_):
        nonlocal count
        count += 1
        leave(config, "count", count)

    def term(*_):
        sys.exit(7)

    signal.signal(signal.SIGUSR1, usr1)
    signal.signal(signal.SIGTERM, term)
    leave(config, "pid", os.getpid())
    while True:
        time.sleep(0.05)


def parent(config):
    """Leaves a process of its own behind."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    leave(config, "grandchild", child.pid)
    return 0
'''


@pytest.fixture
def entries(tmp_path, monkeypatch) -> Path:
    """A folder with the module ``entries``, on the path; what the children leave lies there too."""
    (tmp_path / "entries.py").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def left(folder: Path, name: str, processes: int = 2) -> list:
    return [json.loads((folder / f"{name}-{rank}").read_text()) for rank in range(processes)]


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs: neither gone nor dead and not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_children_are_told_their_places_and_the_whole_configuration(entries, capfd):
    config = {"folder": str(entries), "nested": {"list": [1, 2.5, None, True, "ä\n$HOME"], "rate": 1e-05}}
    assert launch(config, "entries:look", 3) == 0
    saw = left(entries, "saw", 3)
    assert [s["environment"]["RANK"] for s in saw] == ["0", "1", "2"]
    assert [s["environment"]["LOCAL_RANK"] for s in saw] == ["0", "1", "2"]
    cores = len(os.sched_getaffinity(0))
    shared = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for s in saw:
        assert s["environment"].items() >= {**shared, "OMP_NUM_THREADS": str(max(1, cores // 3))}.items()
        assert s["config"] == config
        assert not any(str(entries) in word or "HOME" in word for word in s["words"])
        assert s["session"] == s["pid"]  # of its own: a terminal's Ctrl-C does not reach it
        assert not {"torch", "lightning", "numpy"} & set(
            s["modules"]
        )  # nothing slow before it can end by itself
    assert len({(s["environment"]["MASTER_PORT"], s["environment"]["TORCHELASTIC_RUN_ID"]) for s in saw}) == 1
    out, err = capfd.readouterr()
    assert out == "out of 0\n"
    assert sorted(err.splitlines()) == sorted(
        ["err of 0", *(f"[rank {r}] {what} of {r}" for r in (1, 2) for what in ("out", "err"))]
    )


def test_threads_that_the_user_set_stay(entries, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch({"folder": str(entries)}, "entries:look", 1) == 0
    assert left(entries, "saw", 1)[0]["environment"]["OMP_NUM_THREADS"] == "5"


def test_no_module_comes_from_the_working_directory(entries, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("json", "qtrain", "runpy", "ctypes"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit(66)")
    monkeypatch.chdir(elsewhere)
    assert launch({"folder": str(entries)}, "entries:look", 1) == 0


@pytest.mark.parametrize("config", [{"a": (1, 2)}, {1: "a"}, {"a": {"b": {2: 3}}}])
def test_what_json_would_change_is_refused(config):
    with pytest.raises(ValueError, match="string keys"):
        launch(config, "entries:look", 1)


def test_numbers_that_json_lacks_arrive(entries):
    assert launch({"folder": str(entries), "x": [math.nan, math.inf]}, "entries:look", 1) == 0
    assert str(left(entries, "saw", 1)[0]["config"]["x"]) == "[nan, inf]"


@pytest.mark.parametrize("ends", [[3, 3], [0, 0], [0, 4]])
def test_the_exit_code_is_that_of_the_first_that_failed(entries, ends):
    assert launch({"folder": str(entries), "ends": ends}, "entries:end", 2) == max(ends)


def test_one_that_raises_ends_the_others(entries, capfd):
    begun = time.monotonic()
    config = {"folder": str(entries), "ends": ["sleep", "raise"]}
    assert launch(config, "entries:end", 2, grace_seconds=0.2) == 1
    assert time.monotonic() - begun < 20
    err = capfd.readouterr().err
    assert "[rank 1] ValueError: rank 1 found a mistake" in err
    assert "rank 1 ended with exit code 1; SIGTERM to rank 0" in err
    assert not any(alive(pid) for pid in left(entries, "pid"))


def test_one_that_is_deaf_to_sigterm_is_killed(entries, monkeypatch, capfd):
    monkeypatch.setattr(launcher, "KILL_SECONDS", 0.2)
    config = {"folder": str(entries), "ends": ["stay", "wait"]}
    assert launch(config, "entries:end", 2, grace_seconds=0.1) == 5
    assert "SIGTERM to rank 0" in capfd.readouterr().err
    assert not alive(left(entries, "pid")[0])


def test_the_others_have_their_grace(entries):
    """Rank 0 ends by itself, later than the one that failed: it gets no signal, which it would die of."""
    config = {"folder": str(entries), "ends": ["late", 3]}
    assert launch(config, "entries:end", 2, grace_seconds=10) == 3
    assert (entries / "late-0").exists()


def test_one_that_a_signal_killed(entries, capfd):
    assert launch({"folder": str(entries), "ends": ["kill", 0]}, "entries:end", 2) == 128 + signal.SIGKILL
    assert "rank 0 was killed by SIGKILL" in capfd.readouterr().err


def test_what_the_children_started_ends_with_them(entries):
    assert launch({"folder": str(entries)}, "entries:parent", 1) == 0
    pid = left(entries, "grandchild", 1)[0]
    wait_for(lambda: not alive(pid))


def test_handlers_are_as_before(entries):
    before = [signal.getsignal(number) for number in SIGNALS]
    launch({"folder": str(entries), "ends": [0]}, "entries:end", 1)
    assert [signal.getsignal(number) for number in SIGNALS] == before


PARENT = """
import sys
from qtrain.interrupts import Interrupted, exit_code
from qtrain.training.launcher import launch
sys.path.insert(0, sys.argv[1])
try:
    code = launch({"folder": sys.argv[1], "ends": ["sleep", "sleep"]}, sys.argv[2], 2)
except Interrupted as stop:
    sys.exit(exit_code(stop.signum))
print("the launcher returned")
sys.exit(code)
"""


def parent(folder: Path, entry: str) -> subprocess.Popen:
    """A launcher in a process of its own; its children are ready."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(folder), entry], stdout=subprocess.PIPE)
    wait_for(lambda: all((folder / f"pid-{rank}").exists() for rank in range(2)))
    return process


def test_signals_are_passed_on_as_often_as_they_come(entries):
    process = parent(entries, "entries:listen")
    for count in (1, 2, 3):
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda count=count: [p.exists() and p.read_text() for p in
                                      (entries / "count-0", entries / "count-1")] == [str(count)] * 2)  # fmt: skip
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert process.stdout.read() == b""  # it raised: a sweep goes no further


def test_an_interrupt_reaches_all_and_raises(entries):
    process = parent(entries, "entries:end")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not any(alive(pid) for pid in left(entries, "pid"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_children_of_a_parent_that_was_killed_end(entries):
    process = parent(entries, "entries:end")
    pids = left(entries, "pid")
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.wait(20)
    wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_a_child_whose_parent_is_gone_already_does_not_start(entries):
    code = f"import os\nfrom qtrain.training.worker import end_with\nend_with({os.getpid() + 100_000_000})\nprint('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("message", "traced"),
    [
        ("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer", False),
        ("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", False),
        ("connection closed by peer", True),
        ("gloo/transport: a mistake", True),
    ],
)  # fmt: skip
def test_a_lost_connection_is_a_sentence(tmp_path, message, traced):
    (tmp_path / "loses.py").write_text(f"def lose(config):\n    raise RuntimeError({message!r})\n")
    task = {"entry": "loses:lose", "config": {}, "path": [str(tmp_path), *sys.path]}
    code = (
        "import json, os, sys\n"
        f"task = {task!r}\n"
        "sys.path[:] = task['path']\n"
        "from qtrain.training.worker import work\n"
        "sys.exit(work({**task, 'parent': os.getppid()}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == traced
    assert ("the connection to another process of the run is lost" in done.stderr) != traced
