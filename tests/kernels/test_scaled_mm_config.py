"""The configs of the scaled GEMMs: the rule, the buckets, the cache, and that nothing is measured unasked."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from qtrain_kernels import scaled_mm_config as configs
from qtrain_kernels.scaled_mm_config import LIBRARY, Config, bucket, by_rule, candidates, choose

HOPPER, MULTIPROCESSORS = (9, 0), 132
CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test alone."""
    pytest.importorskip("triton")
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path))
    monkeypatch.delenv(configs.TUNE_VARIABLE, raising=False)
    monkeypatch.setattr(configs, "_MEASURED", {})
    monkeypatch.setattr(configs, "_CHOSEN", {})
    return tmp_path


def never(_) -> Config:
    raise AssertionError("measured unasked")


def tiles(config: Config, M: int, N: int) -> int:
    return math.ceil(M / config.BLOCK_M) * math.ceil(N / config.BLOCK_N) * config.SPLIT


def rule(kind: str, M: int, N: int, K: int, out: torch.dtype) -> Config:
    return by_rule(kind, M, N, K, out, HOPPER, MULTIPROCESSORS)


@pytest.mark.parametrize(
    ("M", "N", "K", "out", "variant"),
    [
        (15872, 12288, 4096, BF16, "specialised"),
        (15872, 4096, 4096, BF16, "specialised"),
        (12288, 4096, 15872, FP32, "specialised"),
        (4096, 4096, 15872, FP32, "specialised"),
        (15872, 4096, 12288, BF16, "pointer"),  # of the specialised tiles, 1984, the last 4 take a wave
        (16384, 2304, 768, BF16, "pointer"),
        (16384, 768, 3072, BF16, "pointer"),
    ],
)
def test_the_rule_takes_what_was_fastest_on_an_h200(M, N, K, out, variant) -> None:
    config = rule("int8", M, N, K, out)
    assert (config.variant, config.SPLIT) == (variant, 1)
    assert rule("fp8", M, N, K, out).variant == "specialised"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("M", "N", "K"), [(768, 768, 16384), (256, 256, 8192), (768, 3072, 16384)])
def test_a_small_output_of_a_long_contraction_fills_the_gpu(kind, M, N, K) -> None:
    config = rule(kind, M, N, K, FP32)
    assert config.SPLIT > 1
    assert tiles(config, M, N) > MULTIPROCESSORS / 2 or max(configs.SPLITS) == config.SPLIT
    assert K / config.SPLIT >= configs.MIN_SPLIT_K


def test_short_contractions_stay_whole() -> None:
    for M, N in ((64, 64), (300, 500), (15872, 4096)):
        for out in (BF16, FP32):
            assert rule("int8", M, N, 768, out).SPLIT == 1


def test_the_variants_are_those_of_the_architecture() -> None:
    def variants(capability):
        return {tile.config.variant for tile in candidates("int8", capability, 8192, BF16)}

    for capability in ((8, 0), (8, 9), (12, 0)):
        assert variants(capability) == {"pointer"}
    assert variants(HOPPER) == {"specialised", "pointer"}
    assert variants((10, 0)) == {"tma"}
    assert max(tile.config.BLOCK_N for tile in candidates("int8", (10, 0), 8192, BF16)) == 128


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 7, 8, 9, 1000, 15872, 16384, 16385, 4100)] == [
        1, 2, 7, 8, 10, 1024, 16384, 16384, 20480, 5120,
    ]  # fmt: skip
    for n in range(1, 3000):
        assert n <= bucket(n) <= 1.25 * n
        assert bucket(bucket(n)) == bucket(n)


def test_the_key_names_what_a_measurement_depends_on() -> None:
    import triton

    base = configs.key("int8", 15872, 4096, 768, BF16, CPU)
    assert configs.key("int8", 16000, 4096, 768, BF16, CPU) == base, "T is bucketed"
    others = [
        ("fp8", 15872, 4096, 768, BF16),
        ("int8", 4096, 15872, 768, BF16),
        ("int8", 15872, 4096, 768, torch.float32),
    ]
    assert len({base, *(configs.key(*other, CPU) for other in others)}) == 4
    assert torch.__version__ in base
    assert triton.__version__ in base


def test_nothing_is_measured_unasked_and_what_was_measured_is_taken(cache, monkeypatch) -> None:
    measured = Config("tma", 64, 64, 128, 4, 4, SPLIT=2)
    problem = ("int8", 500, 600, 4096, BF16, CPU)
    assert choose(*problem, never) == by_rule("int8", 500, 600, 4096, BF16, (10, 0), 2) != measured
    monkeypatch.setenv(configs.TUNE_VARIABLE, "1")
    configs._CHOSEN.clear()
    asked = []

    def measure(found):
        asked.append(list(found))
        return measured

    assert choose(*problem, measure) == measured
    assert choose("int8", 510, 590, 4090, BF16, CPU, never) == measured, "the same bucket"
    assert asked == [configs.measurable("int8", (10, 0), 4096, BF16)]
    monkeypatch.setattr(configs, "_MEASURED", {})  # as a new process finds it
    configs._CHOSEN.clear()
    monkeypatch.delenv(configs.TUNE_VARIABLE)
    assert choose(*problem, never) == measured
    assert [p.name for p in (cache / "kernels").iterdir()] == [configs.FILE], "no temporary file is left"


def test_the_library_is_chosen_only_where_it_may_run(monkeypatch) -> None:
    problem = ("fp8", 512, 768, 4096, BF16, CPU)
    monkeypatch.setenv(configs.TUNE_VARIABLE, "1")
    assert choose(*problem, lambda found: found[0], [LIBRARY]) == LIBRARY
    monkeypatch.delenv(configs.TUNE_VARIABLE)
    assert choose(*problem, never, [LIBRARY]) == LIBRARY
    assert choose(*problem, never) == by_rule("fp8", 512, 768, 4096, BF16, (10, 0), 2) != LIBRARY


def test_the_library_is_the_rule_where_it_may_run() -> None:
    assert choose("fp8", 512, 768, 4096, BF16, CPU, never, [LIBRARY]) == LIBRARY


def test_writers_add_to_the_file(cache) -> None:
    path = configs.cache_file()
    assert path.is_relative_to(cache)
    for i in (1, 2):
        configs.write(path, {f"key {i}": Config("tma", SPLIT=i)})
    assert configs.read(path) == {f"key {i}": Config("tma", SPLIT=i) for i in (1, 2)}


def test_an_interrupted_writer_leaves_the_old_file(cache, monkeypatch) -> None:
    path = configs.cache_file()
    configs.write(path, {"key": LIBRARY})
    monkeypatch.setattr(configs.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        configs.write(path, {"other": LIBRARY})
    assert configs.read(path) == {"key": LIBRARY}
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"key": {"variant": "tma", "tiles": 3}}', '{"key": 3}'])
def test_a_file_that_is_no_cache_is_named(text) -> None:
    path = configs.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{configs.FILE}.*delete it, and tune again"):
        configs.read(path)


def test_configs_survive_json() -> None:
    for config in configs.measurable("int8", HOPPER, 8192, FP32):
        assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
