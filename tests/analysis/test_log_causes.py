"""The lines of SLURM are what slurmstepd 22.05 wrote of real jobs; Python's are those of its tracebacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.analysis.log_causes import KINDS, cause_in, end_of, last_attempt, logs_beside

STEPS = "step 1/100  loss 5.5\nstep 20/100  loss 3.1\n"
TRACE = 'Traceback (most recent call last):\n  File "a.py", line 3, in f\n    raise ValueError("x")\n'
TIME_LIMIT = "slurmstepd-n0: error: *** JOB 18 ON n0 CANCELLED AT 2026-11-26T18:23:38 DUE TO TIME LIMIT ***\n"
PREEMPTED = "slurmstepd-n1: error: *** JOB 16 ON n1 CANCELLED AT 2026-11-26T18:21:35 DUE TO PREEMPTION ***\n"
REQUEUED = "slurmstepd-n0: error: *** JOB 20 ON n0 CANCELLED AT 2026-11-26T18:25:01 DUE TO JOB REQUEUE ***\n"


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        (STEPS + TIME_LIMIT, "time limit", "DUE TO TIME LIMIT"),
        (STEPS + PREEMPTED, "preempted", "DUE TO PREEMPTION"),
        (
            "slurmstepd-n1: error: *** JOB 19 ON n1 CANCELLED AT 2026-11-26T18:23:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
            "node failure",
            "NODE FAILURE",
        ),
        (
            STEPS + "slurmstepd-n0: error: *** JOB 9 ON n0 CANCELLED AT 2026-11-26T18:20:49 ***\n",
            "cancelled",
            "JOB 9",
        ),
        (
            TRACE
            + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\nsrun: error: n0: task 0: Exited with exit code 1\n",
            "gpu memory",
            "Tried to allocate",
        ),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.\n", "memory", "oom-kill"),
        (TRACE + "OSError: [Errno 28] No space left on device: 'x'\n", "disk", "No space left"),
        ("qtrain: lr=-1: must be positive\n", "refused", "must be positive"),
        (TRACE + "ValueError: x\nmore prose\n", "error", "ValueError: x"),
        (TRACE + "qtrain.training.resume.StartRefused: no\n", "error", "StartRefused: no"),
        (TRACE + "KeyError: 'a'\n" + TRACE + "RuntimeError: b\n", "error", "RuntimeError: b"),
        ("bash: line 1: 12 Segmentation fault      (core dumped) python\n", "crash", "Segmentation"),
        (STEPS, "unknown", "step 20/100"),
        # The attempt that was preempted went on, and that one failed
        (STEPS + PREEMPTED + REQUEUED + STEPS + TRACE + "ValueError: x\n", "error", "ValueError: x"),
        # A failure before the preemption of a later attempt is not why it ended
        (TRACE + "ValueError: x\n" + REQUEUED + STEPS + PREEMPTED, "preempted", "JOB 16"),
        ("a bar 10%\ra bar 99%\rMemoryError\n", "memory", "MemoryError"),
    ],
)
def test_the_telling_line(tmp_path: Path, text: str, kind: str, line: str) -> None:
    log = tmp_path / "120_0_0_log.out"
    log.write_text(text)
    cause = cause_in([log])
    assert cause is not None
    assert (cause.kind, cause.log) == (kind, log)
    assert line in cause.line
    assert cause.remedy == KINDS[kind]


def test_an_indented_error_in_a_trace_is_not_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "a.out"
    log.write_text('Traceback:\n    ValueError: quoted source\n  File "b"\nTypeError: the real one\n')
    cause = cause_in([log])
    assert cause is not None
    assert cause.line == "TypeError: the real one"


def test_nothing_in_it_or_no_log(tmp_path: Path) -> None:
    (tmp_path / "empty.out").write_text("\n\n")
    assert cause_in([tmp_path / "empty.out", tmp_path / "none"]) is None


def test_of_a_long_log_the_end_is_read_and_a_long_line_cut(tmp_path: Path) -> None:
    log = tmp_path / "a.out"
    log.write_bytes(
        b"MemoryError\n" + b"x" * 200_000 + b"\n\xff\xfeValueError\nRuntimeError: " + b"y" * 1000 + b"\n"
    )
    cause = cause_in([log])
    assert cause is not None
    assert cause.kind == "error"
    assert len(cause.line) == 300
    assert len(end_of(log)) == 3


def test_the_logs_of_all_processes_are_read(tmp_path: Path) -> None:
    for name in ("120_0_0_log.out", "120_0_1_log.out", "120_1_0_log.out", "120_0_0_log.err"):
        (tmp_path / name).write_text(STEPS)
    (tmp_path / "120_0_1_log.out").write_text(TRACE + "ValueError: on rank 1\n")
    logs = logs_beside(tmp_path / "120_0_0_log.out")
    assert [log.name for log in logs] == ["120_0_0_log.out", "120_0_0_log.err", "120_0_1_log.out"]
    cause = cause_in(logs)
    assert cause is not None
    assert cause.line == "ValueError: on rank 1"
    (tmp_path / "slurm-7.err").write_text("MemoryError")
    (tmp_path / "slurm-7.out").write_text(STEPS)
    assert [log.name for log in logs_beside(tmp_path / "slurm-7.out")] == ["slurm-7.out", "slurm-7.err"]


def test_last_attempt() -> None:
    lines = [*"ab", PREEMPTED, "c", REQUEUED]
    assert last_attempt(lines) == ["c", REQUEUED]
    assert last_attempt(["a", REQUEUED]) == ["a", REQUEUED]
    assert last_attempt([]) == []
