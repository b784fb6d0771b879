import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from qtrain.data.worker_pool import WorkerDied, map_in_order, usable_cores


def slow_first(item):
    """Later items are done earlier."""
    time.sleep(0.2 if item == 0 else 0)
    return item, os.getpid()


def test_order_and_processes():
    found = list(map_in_order(slow_first, range(12), 2))
    assert [item for item, _ in found] == list(range(12))
    assert os.getpid() not in {pid for _, pid in found}
    assert multiprocessing.active_children() == []
    assert {pid for _, pid in map_in_order(slow_first, range(3), 1)} == {os.getpid()}


def identity(item):
    return item


def test_few_items_are_in_memory():
    taken = 0

    def items():
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield i

    results = map_in_order(identity, items(), 2)
    for _ in range(3):
        next(results)
    assert taken <= 3 + 2 * 2 + 1
    results.close()
    assert multiprocessing.active_children() == []


def broken(item):
    raise KeyError(f"item {item}")


def test_what_the_function_raises_arrives():
    with pytest.raises(KeyError, match="item 5"):
        list(map_in_order(broken, [5], 2))
    assert multiprocessing.active_children() == []


def deadly(item):
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_an_error_and_no_hang():
    with pytest.raises(WorkerDied, match="killed"):
        list(map_in_order(deadly, range(100), 2))
    assert multiprocessing.active_children() == []


def deaf_to_ctrl_c(item):
    os.kill(os.getpid(), signal.SIGINT)
    return os.environ["TOKENIZERS_PARALLELISM"]


def test_workers_leave_ctrl_c_to_their_parent():
    assert list(map_in_order(deaf_to_ctrl_c, range(3), 2)) == ["false"] * 3


PARENT = """
import time
from qtrain.data.worker_pool import map_in_order
from module_of_workers import where

for pid in map_in_order(where, range(8), 2):
    print(pid, flush=True)
"""
WORKERS = """
import os, time

def where(item):
    time.sleep(0 if item < 3 else 100)
    return os.getpid()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "module_of_workers.py").write_text(WORKERS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = {int(parent.stdout.readline()) for _ in range(3)}
    assert all(alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_cores_are_those_of_this_process():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert usable_cores() == 1
        finally:
            os.sched_setaffinity(0, before)
