"""Which processes a run has, where this one is, and what they agree on."""

from __future__ import annotations

import json

import pytest
import torch
from torch import distributed

from qtrain.training import processes
from qtrain.training.launcher import launch
from qtrain.training.processes import (
    ProcessSettings,
    any_rank,
    barrier,
    broadcast,
    by_rank_zero,
    connected,
    rank,
    rank_zero_first,
    started_externally,
    summed,
    world_size,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Started by nobody but the tests."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("trainer", "world", "sharding"),
    [
        ({}, 1, "none"),
        ({"devices": 1, "strategy": "ddp"}, 1, "none"),
        ({"devices": 2, "strategy": "auto"}, 2, "ddp"),
        ({"devices": 4, "num_nodes": 3, "strategy": "ddp"}, 12, "ddp"),
        ({"devices": 2, "strategy": "fsdp2"}, 2, "fsdp2"),
        ({"devices": 1, "strategy": "fsdp2"}, 1, "fsdp2"),
    ],
)
def test_what_a_trainer_comes_to(trainer, world, sharding):
    settings = ProcessSettings.of(trainer)
    assert (settings.world_size, settings.sharding) == (world, sharding)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"devices": 0}, r"trainer.devices=0: must be a whole number, 1 or more"),
        ({"devices": True}, r"trainer.devices=True"),
        ({"devices": "auto"}, r"trainer.devices='auto'"),
        ({"num_nodes": 1.5}, r"trainer.num_nodes=1.5"),
        ({"strategy": "fsdp"}, r"trainer.strategy='fsdp': allowed are auto, ddp, fsdp2"),
        ({"strategy": "deepspeed_stage_3"}, r"allowed are auto, ddp, fsdp2"),
        ({"timeout_seconds": 0}, r"trainer.timeout_seconds=0: must be positive"),
        ({"timeout_seconds": "long"}, r"trainer.timeout_seconds='long'"),
    ],
)
def test_what_is_refused(trainer, message):
    with pytest.raises(ValueError, match=message):
        ProcessSettings.of(trainer)


def test_the_other_keys_are_lightnings():
    trainer = {"devices": 2, "num_nodes": 1, "strategy": "ddp", "timeout_seconds": 5, "profiler": "simple"}
    assert ProcessSettings.others(trainer) == {"profiler": "simple"}


@pytest.mark.parametrize(
    ("trainer", "environment", "message"),
    [
        ({"devices": 1}, {"WORLD_SIZE": "2"}, r"trainer.devices=1 .* makes 1 process.* started 2 \(WORLD_SIZE\)"),
        ({"devices": 2, "num_nodes": 2}, {"WORLD_SIZE": "2"}, r"trainer.num_nodes=2 makes 4 process"),
        ({"devices": 2, "num_nodes": 2}, {}, r"trainer.num_nodes=2: .* torchrun or srun"),
    ],
)  # fmt: skip
def test_what_cannot_run_here(monkeypatch, trainer, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        ProcessSettings.of(trainer).check("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ProcessSettings(devices=2).check("cuda")
    ProcessSettings(devices=3).check("cpu")
    with pytest.raises(ValueError, match=r"trainer.devices=3, and torch sees 2 CUDA device"):
        ProcessSettings(devices=3).check("cuda")


def test_who_starts_whom(monkeypatch):
    assert ProcessSettings(devices=2).starts_others
    assert not ProcessSettings(devices=1).starts_others
    monkeypatch.setenv("WORLD_SIZE", "2")
    ProcessSettings(devices=2).check("cpu")
    assert not ProcessSettings(devices=2).starts_others


SLURM = {
    "SLURM_NTASKS": "6",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04,07]",
}


def test_a_task_of_srun_gets_torchruns_variables():
    environment = dict(SLURM)
    assert started_externally(environment) == 6
    expected = {"RANK": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "6", "MASTER_ADDR": "gpu03"}
    assert environment.items() >= expected.items()
    other = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert started_externally(other) == 6
    assert other["MASTER_PORT"] == environment["MASTER_PORT"]
    assert 15000 <= int(other["MASTER_PORT"]) < 25000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("a1,b2", "a1"),
        ("n[7,9]", "n7"),
        ("rack-2-n[010-012],x", "rack-2-n010"),
        ("c-1", "c-1"),
    ],
)
def test_the_first_host_listens(nodes, first):
    environment = {**SLURM, "SLURM_STEP_NODELIST": nodes}
    started_externally(environment)
    assert environment["MASTER_ADDR"] == first


def test_what_the_user_set_stays():
    environment = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    started_externally(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize("change", [{"SLURM_NTASKS": "1"}, {"SLURM_STEP_ID": None}])
def test_a_batch_script_itself_starts_the_processes(change):
    """SLURM sets the number of tasks there too; only srun's tasks have a step."""
    environment = {k: v for k, v in {**SLURM, **change}.items() if v is not None}
    assert started_externally(environment) is None
    assert "WORLD_SIZE" not in environment


def test_one_process_agrees_with_itself():
    with connected(ProcessSettings(), "cpu"):
        assert not distributed.is_initialized()
        assert (rank(), world_size()) == (0, 1)
        assert broadcast({"a": 1}) == {"a": 1}
        assert any_rank(True)
        assert not any_rank(False)
        assert summed(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert by_rank_zero(lambda: 7) == 7
        assert rank_zero_first(lambda: 8) == 8
        barrier()


def test_one_process_of_fsdp2_has_a_group_while_it_runs():
    for _ in range(2):
        with connected(ProcessSettings(strategy="fsdp2"), "cpu"):
            assert distributed.get_world_size() == 1
        assert not distributed.is_initialized()
    with pytest.raises(KeyError), connected(ProcessSettings(strategy="fsdp2"), "cpu"):
        raise KeyError
    assert not distributed.is_initialized()


def test_another_backend_than_that_of_the_group_is_refused(monkeypatch):
    with connected(ProcessSettings(strategy="fsdp2"), "cpu"):
        monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
        with pytest.raises(RuntimeError, match=r"connected by gloo, and device=cuda needs nccl"):
            processes._init_processes(ProcessSettings(devices=2), "cuda")


def test_three_processes_agree(tmp_path):
    assert launch({"out": str(tmp_path)}, "collectives:work", 3) == 0
    found = [json.loads((tmp_path / f"found-{i}.json").read_text()) for i in range(3)]
    assert [f["place"] for f in found] == [[i, 3] for i in range(3)]
    for f in found:
        assert f["broadcast"] == {"from": 0}
        assert f["any"] == [True, False, True]
        assert f["sum"] == "[3.0, 3.0, nan]"
        assert f["alone"] == 0
    assert [f["first"] for f in found] == [False, True, True]  # whether the file was there before
    assert found[0]["error"].startswith("FileExistsError")
    assert [f["error"].startswith("RankZeroFailed: FileExistsError: ") for f in found[1:]] == [True, True]
