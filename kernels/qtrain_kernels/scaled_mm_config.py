"""How a scaled GEMM is cut on a GPU: the configs to choose from, the rule that chooses, and what was measured.

``choose`` takes the config that was measured for the shape's bucket on this device with these versions, and where none was,
``by_rule``, which counts waves and knows what a tile takes. Nothing is measured unless somebody asks: with QTRAIN_TUNE_GEMMS=1
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
    ``num_stages``: tiles of both operands in flight. ``GROUP_M``: rows of tiles that are walked together. ``SPLIT``: parts
    of the contraction, each with sums of its own, added at the end. ``subtile``: a "tma" tile leaves in two halves of columns.
    """

    variant: str
    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 128
    num_warps: int = 8
    num_stages: int = 4
    GROUP_M: int = 8
    SPLIT: int = 1
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
SPLITS = (1, 2, 3, 4, 6, 7, 8)
MIN_SPLIT_K = 1024
"""Below, the sum over the parts costs more than the multiprocessors that it fills."""


@dataclass(frozen=True)
class Tile:
    """A config and what one tile of it takes a multiprocessor: microseconds for 128 products along K, and once."""

    config: Config
    step: float
    once: float


# Of an H200, torch 2.11, triton 3.6: from the times of 15872x12288x4096, 15872x4096x12288, 15872x4096x4096 and, in float32,
# of 12288x4096x15872 and 4096x4096x15872. With float32 outputs "pointer" loses a third: one block a multiprocessor instead of two
HOPPER: dict[tuple[str, torch.dtype], tuple[Tile, ...]] = {
    ("int8", torch.bfloat16): (
        Tile(Config("specialised", 256, 128, 128, 4, 4), 0.765, 1.0),
        Tile(Config("pointer", 128, 128, 128, 8, 3), 0.385, 1.3),
    ),
    ("int8", torch.float32): (Tile(Config("specialised", 256, 128, 128, 4, 4), 0.68, 0.5),),
    ("fp8", torch.bfloat16): (Tile(Config("specialised", 128, 128, 128, 4, 6), 0.46, 0.5),),
    ("fp8", torch.float32): (Tile(Config("specialised", 128, 128, 128, 4, 6), 0.44, 0.5),),
}
LONG = 4096
"""K from which the specialised int8 kernel, whose stores wait for its sums, may win with bfloat16 outputs over two blocks of
"pointer", which hide each other's."""
# Not measured: relative rates of tiles. Sums lie in tensor memory and leave through the registers of the epilogue: 256 columns
# and parts would spill
BLACKWELL = (
    Tile(Config("tma", 128, 128, 128, 8, 4), 1.0, 0.0),
    Tile(Config("tma", 64, 128, 128, 4, 4), 0.67, 0.0),
    Tile(Config("tma", 64, 64, 128, 4, 4), 0.5, 0.0),
)
ELSEWHERE = (
    Tile(Config("pointer", 128, 128, 64, 8, 3), 1.0, 0.0),
    Tile(Config("pointer", 64, 64, 64, 4, 4), 0.5, 0.0),
)
# Beside those of the rule, where a measurement is asked for. 128 x 256 spills some registers in its epilogue, and was 0 to 4 %
# faster than 256 x 128
MORE: dict[str, tuple[Config, ...]] = {
    "int8": (Config("specialised", 128, 256, 128, 4, 4, 16), Config("specialised", 128, 128, 128, 4, 6)),
    "fp8": (Config("pointer", 128, 128, 128, 8, 3), Config("tma", 256, 128, 128, 8, 3, subtile=True)),
}
BYTES_A_MICROSECOND, SECOND_KERNEL = 3.3e6, 3.0
"""Of the parts of a split contraction: what the memory moves (two thirds of 4.8 TB/s), and the launch that adds them."""


def candidates(kind: str, capability: tuple[int, int], K: int, out_dtype: torch.dtype) -> list[Tile]:
    """What the rule chooses from, all of which runs. ``kind``: "int8" or "fp8"."""
    if capability[0] not in DATA_CENTER:
        return list(ELSEWHERE)
    if capability[0] == 10:
        return list(BLACKWELL)
    found = []
    for tile in HOPPER[kind, out_dtype]:
        specialised = tile.config.variant == "specialised"
        splits = SPLITS if specialised and out_dtype == torch.float32 else (1,)
        found += [
            replace(tile, config=replace(tile.config, SPLIT=s))
            for s in splits
            if s == 1 or K // s >= MIN_SPLIT_K
        ]
    return found


def measurable(kind: str, capability: tuple[int, int], K: int, out_dtype: torch.dtype) -> list[Config]:
    """All configs that run, those included that the rule does not know."""
    more = MORE[kind] if capability == (9, 0) else ()
    return [*more, *(tile.config for tile in candidates(kind, capability, K, out_dtype))]


def by_rule(
    kind: str, M: int, N: int, K: int, out_dtype: torch.dtype, capability: tuple[int, int], multiprocessors: int
) -> Config:  # fmt: skip
    """The cheapest candidate: waves of tiles times what a tile takes, and the traffic of the parts."""

    def cost(tile: Tile) -> float:
        config = tile.config
        tiles = math.ceil(M / config.BLOCK_M) * math.ceil(N / config.BLOCK_N)
        waves = math.ceil(tiles * config.SPLIT / multiprocessors)
        steps = math.ceil(math.ceil(K / PROMOTED) / config.SPLIT)
        parts = 2 * config.SPLIT * M * N * 4 / BYTES_A_MICROSECOND + SECOND_KERNEL if config.SPLIT > 1 else 0
        return waves * (steps * tile.step + tile.once) + parts

    tiles = candidates(kind, capability, K, out_dtype)
    if K < LONG and any(tile.config.variant == "pointer" for tile in tiles):
        tiles = [tile for tile in tiles if tile.config.variant == "pointer"]
    return min(tiles, key=cost).config


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
    """The config of a problem: what was measured for its bucket, else the first of ``extra``, else ``by_rule``. ``measure``:
    candidates -> the fastest, called where QTRAIN_TUNE_GEMMS=1 alone, and not while a CUDA graph is captured; ``extra``:
    candidates beside those of ``measurable``, faster by what is known."""
    # What may win is part of the question
    kind_of_key = kind + "".join(f" or {config.name}" for config in extra)
    problem = (kind_of_key, M, N, K, out_dtype, device, os.environ.get("QTRAIN_CACHE"))
    if problem not in _CHOSEN:
        capability, multiprocessors = properties(device)
        name = key(kind_of_key, M, N, K, out_dtype, device)
        found = measured().get(name)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if found is None and os.environ.get(TUNE_VARIABLE) == "1" and not capturing:
            found = measure([*extra, *measurable(kind, capability, K, out_dtype)])
            remember(name, found)
        _CHOSEN[problem] = found or (
            extra[0] if extra else by_rule(kind, M, N, K, out_dtype, capability, multiprocessors)
        )
    return _CHOSEN[problem]


def properties(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; on a CPU as if a small Blackwell, since the
    interpreter cannot run the specialised kernel."""
    if device.type != "cuda":
        return (10, 0), 2
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count
