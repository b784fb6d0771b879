"""How a scaled GEMM is cut on a GPU: the configs to choose from, the rule that chooses, and what was measured.

``choose`` takes the config that was measured for the shape's bucket on this device with these versions, and where none was,
``by_rule``, which knows tile rates and counts waves. Nothing is measured unless somebody asks: with QTRAIN_TUNE_GEMMS=1
each bucket is measured when it first appears, and kept in ``cache_file`` for the runs that follow, resumed ones too.

int8 results are the same bits under every config (integer sums are exact). fp8 sums depend on their order, so that two
machines whose measurements differ may differ in the last bits.

Nothing here imports triton.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

FILE = "scaled_mm_configs.json"
TUNE_VARIABLE = "QTRAIN_TUNE_GEMMS"


@dataclass(frozen=True)
class Config:
    """How a GEMM is cut.

    ``variant``: "tma" (tensor descriptors, sm_90 and sm_100), "specialised" (the same with one warp that loads and two
    warpgroups that multiply, sm_90), "pointer" (masked loads, every GPU), "library" (``torch._scaled_mm``, fp8 alone).
    ``num_stages``: tiles of both operands in flight. ``GROUP_M``: rows of tiles that are walked together. ``persistent``:
    one program a multiprocessor. ``SPLIT``: parts of the contraction, each with sums of its own, added at the end.
    ``flatten``: loads of the next tile
    begin before the epilogue. ``store_tma``: the output goes through a descriptor as well; ``subtile``: in two halves of columns.
    """

    variant: str
    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 128
    num_warps: int = 8
    num_stages: int = 4
    GROUP_M: int = 8
    SPLIT: int = 1
    persistent: bool = True
    flatten: bool = True
    store_tma: bool = False
    subtile: bool = False

    @property
    def name(self) -> str:
        split = f", K in {self.SPLIT}" if self.SPLIT > 1 else ""
        size = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}{split}, {self.num_warps} warps, {self.num_stages} stages"
        return self.variant if self.variant == "library" else f"{self.variant} {size}"


LIBRARY = Config("library")
PROMOTED = 128
"""fp8 products that are summed in the tensor core before float32 takes over (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)."""
DATA_CENTER = (9, 10)
"""Major compute capabilities (Hopper, Blackwell) with descriptors and the shared memory of the tiles, 227 KB a block; sm_120 has 99."""
SPLITS = (1, 2, 3, 4, 6, 8)
MIN_SPLIT_K = 1024
"""Below, the sum over the parts costs more than the multiprocessors that it fills."""


def _tma(m: int, n: int, warps: int, stages: int, rate: float) -> tuple[Config, float]:
    # 128 x 256 sums of 4 bytes leave through shared memory in halves: all at once would not fit beside 3 stages
    return Config("tma", m, n, 128, warps, stages, subtile=n > 128), rate


# Tiles and their rate, relative to the best of the kind. fp8 keeps two accumulators, so that 128 x 256 would spill.
_SMALL = (_tma(64, 128, 4, 4, 0.6), _tma(64, 64, 4, 4, 0.4))
_TILES: dict[str, tuple[tuple[Config, float], ...]] = {
    "int8": (_tma(128, 256, 8, 3, 1.0), _tma(128, 128, 8, 4, 0.8), *_SMALL),
    "fp8": (_tma(128, 128, 8, 4, 1.0), *_SMALL),
}
_POINTER_TILES = (
    (Config("pointer", 128, 128, 64, 8, 3), 1.0),
    (Config("pointer", 64, 64, 64, 4, 4), 0.5),
)
# Of sm_90, for measurements: the rule has no rates of them
SPECIALISED: dict[str, tuple[Config, ...]] = {
    "int8": (Config("specialised", 256, 128, 128, 4, 4), Config("specialised", 128, 128, 128, 4, 6)),
    "fp8": (Config("specialised", 128, 128, 128, 4, 6),),
}
_BYTE_COST = 1.3
"""Multiply-adds that a multiprocessor does while the memory moves a byte: 2500 a clock against 1970 bytes (H100 SXM)."""


def candidates(kind: str, capability: tuple[int, int], K: int) -> list[tuple[Config, float]]:
    """The configs that run, with their relative rates. ``kind``: "int8" or "fp8"."""
    if capability[0] not in DATA_CENTER:
        return list(_POINTER_TILES)
    if capability[0] == 10:
        # The sums lie in tensor memory and leave through the registers of the epilogue: 256 columns and parts would spill
        return [(config, rate) for config, rate in _TILES[kind] if config.BLOCK_N <= 128]
    splits = [s for s in SPLITS if s == 1 or K // s >= MIN_SPLIT_K]
    tiles = _TILES[kind]
    return [(replace(config, SPLIT=s), rate) for config, rate in tiles for s in splits]


def measurable(kind: str, capability: tuple[int, int], K: int) -> list[Config]:
    """All configs that run, the specialised ones included."""
    specialised = SPECIALISED[kind] if capability == (9, 0) else ()
    return [*specialised, *(config for config, _ in candidates(kind, capability, K))]


def by_rule(kind: str, M: int, N: int, K: int, capability: tuple[int, int], multiprocessors: int) -> Config:
    """The cheapest candidate: waves of tiles times the work of a tile over its rate, and the traffic of the parts."""

    def cost(candidate: tuple[Config, float]) -> float:
        config, rate = candidate
        tiles = math.ceil(M / config.BLOCK_M) * math.ceil(N / config.BLOCK_N)
        waves = math.ceil(tiles * config.SPLIT / multiprocessors)
        work = waves * config.BLOCK_M * config.BLOCK_N * (K / config.SPLIT) / rate
        parts = 2 * config.SPLIT * M * N * 4 if config.SPLIT > 1 else 0
        return work + _BYTE_COST * parts

    return min(candidates(kind, capability, K), key=cost)[0]


def bucket(size: int) -> int:
    """``size`` rounded up to a multiple of a quarter of its power of two: 1000 -> 1024, 15872 -> 16384, 4100 -> 5120."""
    step = max(1, 2 ** (max(size, 1).bit_length() - 3))
    return -(-size // step) * step


def key(kind: str, M: int, N: int, K: int, out_dtype: torch.dtype, device: torch.device) -> str:
    """What a measurement is kept under: op, bucketed shape, output, device and versions."""
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{kind} {bucket(M)}x{bucket(N)}x{bucket(K)} {str(out_dtype)[6:]} on {where}, {versions}"


def cache_file() -> Path:
    """$QTRAIN_CACHE/kernels/scaled_mm_configs.json, by default under ~/.cache/qtrain."""
    root = os.environ.get("QTRAIN_CACHE")
    folder = Path(root).expanduser() if root else Path.home() / ".cache" / "qtrain"
    return folder / "kernels" / FILE


def read(path: Path) -> dict[str, Config]:
    """The measured configs of a file; empty where there is none. Raises ValueError for a file that is no such thing."""
    try:
        return {name: Config(**fields) for name, fields in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no GEMM configs ({error}); delete it, and tune again") from error


def write(path: Path, measured: dict[str, Config]) -> None:
    """Add to the file. A reader sees the old or the whole new one; of two writers at once the later may win."""
    merged = read(path) | measured
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(config) for name, config in sorted(merged.items())}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


_MEASURED: dict[Path, dict[str, Config]] = {}
_CHOSEN: dict[tuple[object, ...], Config] = {}


def measured() -> dict[str, Config]:
    """Of this process: the file as it was at the first call, and what was measured since."""
    path = cache_file()
    if path not in _MEASURED:
        _MEASURED[path] = read(path)
    return _MEASURED[path]


def remember(name: str, config: Config) -> None:
    """Take ``config`` for ``name`` from now on, in this process and in the file."""
    measured()[name] = config
    _CHOSEN.clear()
    write(cache_file(), {name: config})


Measure = Callable[[Sequence[Config]], Config]


def choose(
    kind: str, M: int, N: int, K: int, out_dtype: torch.dtype, device: torch.device, measure: Measure, extra: Sequence[Config] = ()
) -> Config:  # fmt: skip
    """The config of a problem. ``measure``: candidates -> the fastest, called where QTRAIN_TUNE_GEMMS=1 alone, and not
    while a CUDA graph is captured; ``extra``: candidates beside those of ``measurable``."""
    kind_of_key = kind + "".join(
        f" or {config.name}" for config in extra
    )  # what may win is part of the question
    problem = (kind_of_key, M, N, K, out_dtype, device, os.environ.get("QTRAIN_CACHE"))
    if problem not in _CHOSEN:
        capability, multiprocessors = properties(device)
        name = key(kind_of_key, M, N, K, out_dtype, device)
        found = measured().get(name)
        if (
            found is None
            and os.environ.get(TUNE_VARIABLE) == "1"
            and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        ):
            found = measure([*extra, *measurable(kind, capability, K)])
            remember(name, found)
        _CHOSEN[problem] = found or by_rule(kind, M, N, K, capability, multiprocessors)
    return _CHOSEN[problem]


def properties(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; on a CPU (the interpreter) as if a small Hopper."""
    if device.type != "cuda":
        return (9, 0), 2
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count
