"""The answers in slurm_answers/ are what SLURM 22.05 printed of jobs that were really submitted, held, requeued, cancelled,
preempted, killed by a time limit and lost with their node, with slurmdbd (accounts) and without it (no_accounts)."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qtrain.cluster.queue import Queue, ask_slurm

ANSWERS = Path(__file__).parent / "slurm_answers"
NAMES = [*map(str, range(1, 13)), *(f"5_{i}" for i in range(6)), "18", "19", "20", *(f"21_{i}" for i in range(4)), "22", "999"]  # fmt: skip


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``programs(squeue="cat FILE")``: what these programs do, alone on PATH but for the shell's own; their arguments are
    written to calls.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cat", "sleep", "sh", "env"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    calls = tmp_path / "calls.txt"
    calls.touch()

    def make(**scripts: str) -> Path:
        for name, script in scripts.items():
            path = folder / name
            path.write_text(f'#!{folder}/sh\necho "{name} $*" >> {calls}\n{script}\n')
            path.chmod(0o755)
        return calls

    return make


def without_accounts(**others: str) -> dict[str, str]:
    place = ANSWERS / "no_accounts"
    return {
        "squeue": f"cat {place}/squeue",
        "sacct": f"cat {place}/sacct.err >&2; exit 1",
        # scontrol --oneliner show job NAME
        "scontrol": f'cat {place}/scontrol-$4 2>/dev/null || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}',
        **others,
    }


def with_accounts(**others: str) -> dict[str, str]:
    place = ANSWERS / "accounts"
    return {"squeue": f"cat {place}/squeue", "sacct": f"cat {place}/sacct", **others}


def states(queue: Queue) -> dict[str, str]:
    return {name: job.state for name, job in queue.jobs.items()}


def test_states_of_real_jobs(programs):
    programs(**with_accounts())
    queue = ask_slurm(NAMES)
    assert states(queue) == {
        "1": "FAILED", "2": "COMPLETED", "3": "FAILED", "4": "CANCELLED", "6": "RUNNING", "7": "CANCELLED",
        "8": "PENDING", "9": "CANCELLED", "10": "PENDING", "11": "CANCELLED", "12": "CANCELLED",
        "5_0": "COMPLETED", "5_1": "FAILED", "5_2": "CANCELLED", "5_3": "CANCELLED", "5_5": "CANCELLED",
        "18": "TIMEOUT", "19": "NODE_FAIL", "20": "PENDING", "21_0": "FAILED", "21_1": "RUNNING",
        "21_2": "PENDING", "21_3": "PENDING", "22": "RUNNING",
    }  # fmt: skip
    jobs = queue.jobs
    # 20 was requeued: squeue has it PENDING, the accounts REQUEUED; the queue is newer
    assert (jobs["20"].waiting, jobs["20"].reason) == (True, "BeginTime")
    assert (jobs["8"].reason, jobs["21_3"].reason) == ("JobHeldUser", "JobArrayTaskLimit")
    assert (jobs["21_1"].active, jobs["21_1"].nodes, jobs["21_1"].job, jobs["21_1"].elapsed) == (
        True,
        "n0",
        "24",
        "0:09",
    )
    assert (jobs["1"].exit_code, jobs["3"].exit_code, jobs["5_1"].exit_code) == ("3", "signal 9", "7")
    assert jobs["9"].reason == "by root"
    assert (jobs["18"].ended, jobs["18"].time_limit, jobs["18"].reason) == (True, "1:00", "TimeLimit")
    assert jobs["7"].nodes is None
    assert queue.asked
    assert queue.notes == ()


def test_all_jobs_in_one_call_of_each_program(programs):
    calls = programs(**with_accounts())
    ask_slurm(NAMES)
    first, second = calls.read_text().splitlines()
    assert first.startswith("squeue --noheader --array --states=all --jobs=1,2,3,4,5,6,7,8,9,10,11,12,18,")
    # only those that squeue leaves unclear
    assert second.startswith(
        "sacct --noheader --parsable2 --allocations --jobs=1,3,4,5,7,9,11,12,18,19,21,999 "
    )


def test_without_accounts_it_says_what_is_not_known(programs):
    calls = programs(**without_accounts())
    queue = ask_slurm(["1", "3", "5_1", "9", "18", "19", "999", "5_4"])
    assert states(queue) == {"1": "FAILED", "3": "FAILED", "5_1": "FAILED", "9": "CANCELLED", "18": "TIMEOUT", "19": "NODE_FAIL"}  # fmt: skip
    assert len(queue.notes) == 2
    assert "accounting storage is disabled" in queue.notes[0]
    assert "how 2 jobs (999, 5_4) ended is known from the runs and their logs alone" in queue.notes[0]
    # scontrol-9 was not kept, as if the controller had just forgotten the job
    assert "scontrol failed: slurm_load_jobs error: Invalid job id" in queue.notes[1]
    assert "scontrol --oneliner show job 1" in calls.read_text()
    queue = ask_slurm(["1", "3", "5_1", "18"])
    assert [queue.jobs[n].exit_code for n in ("1", "3", "5_1", "18")] == ["3", "signal 9", "7", "signal 15"]
    assert queue.notes == ()


def test_exit_codes_that_are_not_asked_for_are_named(programs):
    jobs = [str(n) for n in range(1, 24)]
    rows = "\\n".join(f"{n}|{n}|FAILED|main||0:01|1:00|NonZeroExitCode" for n in jobs)
    programs(**without_accounts(squeue=f"printf '{rows}\\n'", scontrol="echo JobId=$4 ExitCode=3:0"))
    queue = ask_slurm(jobs)
    assert [queue.jobs[n].exit_code for n in jobs] == ["3"] * 20 + [None] * 3
    assert queue.notes == ("exit codes of 3 jobs (21, 22, 23) were not asked for: 20 at once are",)


def test_a_job_that_scontrol_forgot_hides_no_other_s_exit_code(programs):
    programs(**without_accounts())
    queue = ask_slurm(["9", "1"])
    assert (queue.jobs["9"].exit_code, queue.jobs["1"].exit_code) == (None, "3")


def test_a_program_that_cannot_be_started_is_named(programs, tmp_path):
    programs(squeue="exit 0")
    (tmp_path / "bin" / "squeue").write_bytes(b"\x7fELF")
    queue = ask_slurm(["1"])
    assert "squeue could not be started" in queue.notes[0]
    assert not queue.asked


def test_a_job_that_left_the_queue_is_in_the_accounts(programs):
    programs(**with_accounts(squeue='echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'))
    queue = ask_slurm(["18", "9", "20"])
    assert states(queue) == {"18": "TIMEOUT", "9": "CANCELLED", "20": "REQUEUED"}
    assert queue.jobs["9"].elapsed == "00:00:28"
    assert queue.jobs["20"].waiting
    assert queue.asked
    assert queue.notes == ()


def test_a_program_that_hangs_is_ended_with_its_children_and_named(programs):
    programs(**with_accounts(squeue="sleep 100 & sleep 100"))
    begun = time.monotonic()
    queue = ask_slurm(["18", "8"], seconds=0.5)
    assert time.monotonic() - begun < 20
    assert "squeue did not answer within 0.5 s" in queue.notes[0]
    assert not queue.asked
    assert states(queue) == {"18": "TIMEOUT", "8": "PENDING"}  # the accounts know more than nothing


def test_a_controller_that_is_down(programs):
    message = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    programs(squeue=f'echo "{message}" >&2; exit 1')
    queue = ask_slurm(["18"])
    assert (queue.jobs, queue.asked) == ({}, False)
    assert queue.notes == (f"squeue failed: {message}: which of 1 jobs wait or run is not known",)


def test_no_jobs_ask_nothing_and_a_machine_without_slurm_says_so(programs):
    assert ask_slurm([]) == Queue()
    queue = ask_slurm(["120_0", "120_1"])
    assert queue.jobs == {}
    assert queue.notes == ("there is no squeue on this machine: which of 2 jobs wait or run is not known",)


def test_what_the_user_set_for_squeue_does_not_filter_the_answer(programs, monkeypatch):
    calls = programs()
    monkeypatch.setenv("SQUEUE_USERS", "somebody")
    monkeypatch.setenv("SQUEUE_FORMAT", "%A")
    programs(squeue=f'echo "users=$SQUEUE_USERS format=$SQUEUE_FORMAT" >> {calls}')
    ask_slurm(["1"])
    assert "users= format=" in calls.read_text()


def test_answers_cut_in_the_middle_are_left_out(programs, tmp_path):
    text = (ANSWERS / "accounts" / "squeue").read_text()
    (tmp_path / "cut").write_text(text[: text.index("NODE_FAIL") + 4])
    programs(squeue=f"cat {tmp_path}/cut", sacct="exit 0")
    found = Counter(states(ask_slurm(NAMES)).values())
    assert found == Counter({"CANCELLED": 8, "FAILED": 4, "COMPLETED": 2})


def test_many_jobs_go_in_several_calls(programs):
    calls = programs(squeue="exit 0", sacct="exit 0")
    ask_slurm([str(n) for n in range(450)])
    assert Counter(line.split()[0] for line in calls.read_text().splitlines()) == {"squeue": 3, "sacct": 3}
