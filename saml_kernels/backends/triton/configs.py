"""Tile sizes, warps, stages and schedule, by chip, type and bucketed sizes: data, so that no call tunes.

A batch size is no key but through its bucket, and never compiled in. A machine's own choices, written by
``saml-rec bench --tune``, come before the built-in ones. Not yet measured on a GPU: what is built in was chosen so that
every configuration compiles for sm_80, sm_90, sm_100 and gfx942 without spills and within their shared memory
(docs/gpu-kernels.md).
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saml_kernels.backends.triton.availability import INTERPRETED
from saml_kernels.backends.triton.stages import (
    Layer,
    MutualBackward,
    MutualOwnRow,
    ProductStage,
    ProductTile,
    QuantizedLayer,
    QuantizeRows,
    RowsTile,
    Stage,
    Tile,
    WeightGradient,
)
from saml_kernels.checks import OLD_SCHEDULES

AMD = "amd"
SCHEDULES = ("persistent", "per_layer")
ROW_BUCKETS = (256, 1024, 4096, 16384)
SCENARIO_BUCKETS = (2, 4, 8, 16, 32)
WIDTH_BUCKETS = (64, 256, 512)
LAST_BUCKET = 2**62
CACHE_VARIABLE = "SAML_KERNELS_TUNED"
DEBUG_WAITS = "SAML_KERNELS_DEBUG_WAITS"
OLD_FIELDS = {
    "rows": "block_m",
    "columns": "block_n",
    "depth": "block_k",
    "warps": "num_warps",
    "stages": "num_stages",
}
"""Fields of a Config as files of version 0.1 call them."""


@dataclass(frozen=True)
class Config:
    """How a list of stages runs."""

    block_m: int
    """Rows of a product's tile, and of the tiles of rows that wait for each other."""
    block_n: int
    """Columns of a product's tile."""
    block_k: int
    """Steps of k that a product takes at a time."""
    num_warps: int
    num_stages: int
    """Stages of the software pipeline."""
    programs: int = 1
    """Programs a multiprocessor, of a persistent launch."""
    item_rows: int = 16
    """Rows of an item that is no product."""
    group_rows: int = 16
    """Of these, rows that a mutual unit takes at a time: the fewer, the more threads share a row."""
    thread_branches: int | None = None
    """Branches that a thread of a mutual unit holds at most; warps share the others. None: as registers have it."""


@dataclass(frozen=True)
class Choice:
    """Everything that is chosen for a call."""

    schedule: str
    forward: Config
    backward: Config
    weights: Config
    """``block_m`` and ``block_n`` are the weight's, ``block_k`` runs over the batch."""
    layer: Config | None = None
    """Of a layer of all branches that has a launch of its own; None: as ``forward``."""


@dataclass(frozen=True)
class Bucket:
    """The smallest bucket's bounds that hold a call's rows, scenarios and widest layer."""

    rows: int
    scenarios: int
    width: int

    @staticmethod
    def of(rows: int, scenarios: int, width: int) -> "Bucket":
        """The bucket of a call."""

        def bound(value: int, bounds: tuple[int, ...]) -> int:
            return next((limit for limit in bounds if value <= limit), LAST_BUCKET)

        return Bucket(bound(rows, ROW_BUCKETS), bound(scenarios, SCENARIO_BUCKETS), bound(width, WIDTH_BUCKETS))


# By bytes of an element. Of 16 bits what docs/gpu-model.md predicts to be fastest, of float32 what does not spill.
_FORWARD = {2: Config(64, 128, 64, 4, 3, programs=2), 4: Config(64, 64, 16, 8, 3)}
_FORWARD_OF_FEW_ROWS = {2: _FORWARD[2], 4: Config(32, 64, 16, 8, 3, programs=2)}
_SMALL, _MIDDLE, _DEEP = Config(64, 64, 64, 4, 3, programs=2), Config(64, 128, 64, 8, 3), Config(64, 128, 128, 8, 3)
_CHAIN = {
    2: ((8, _SMALL), (32, _DEEP), (LAST_BUCKET, _MIDDLE)),
    4: ((LAST_BUCKET, _FORWARD[4]),),
}
"""Up to so many scenarios each."""
_CHAIN_OF_FEW_ROWS = {2: _SMALL, 4: Config(32, 64, 32, 4, 2, programs=2)}
_ON_AMD = {2: _MIDDLE, 4: _FORWARD[4]}
"""Larger tiles need more shared memory than there is."""
RAGGED_TILE = {2: (64, 64, 32), 4: (32, 32, 16)}
"""By bytes of an element, BLOCK_M, BLOCK_N, BLOCK_K at most where a width is no multiple of a vector: there places need
addresses of their own, and larger tiles spill."""
RAGGED_WARPS = 8
"""Of a launch with such a stage, at least: fewer warps have more of those addresses each."""
ELEMENTS_OF_ACTIVATION = {"gelu": 32, "silu": 32, "tanh": 64, "sigmoid": 64}
"""Elements of a tile at most that a thread has, of a layer whose epilogue takes so many registers that more spill."""
ELEMENTS_OF_GATED = 32
"""The same where what is gated is read besides."""
MOST_REGISTERS = 255
"""A thread's, on NVIDIA's chips."""
REGISTERS_OF_WEIGHTS = 96
"""A thread's of float32 weight gradients there, of odd widths or of one factor (without an auxiliary network)."""
REGISTERS_OF_GELU = 192
"""A thread's of float32 layers with the longest epilogue."""
MATRIX_ROWS = 64
"""Of a matrix instruction of sm_90's."""
NARROWEST = 16
"""Columns and steps of k that matrix units want at least."""
VECTOR_BYTES = 16
WARP = 32
"""Threads; AMD's 64 hold two of what is meant for one."""
THREAD_BRANCHES = {2: 16, 4: 8}
"""By bytes of an element, branches whose streams and sums a thread's registers hold beside a product's."""
FEW_THREAD_BRANCHES = 8
"""Where that spills: of more than 32 branches, and in backward on chips but sm_90."""
QUANTIZED_COLUMNS, QUANTIZED_ELEMENTS = 256, 4096
"""Columns of a row that is quantised, and elements of a block of rows, that are read at a time."""
_WEIGHTS = {2: Config(128, 128, 64, 8, 3), 4: Config(64, 64, 16, 8, 3)}
_WEIGHTS_ON_AMD = {2: _MIDDLE, 4: _WEIGHTS[4]}
_LAYER = {
    "sm_80": Config(256, 128, 64, 8, 3),
    "sm_90": Config(256, 128, 32, 8, 4),
    "sm_100": Config(128, 256, 32, 8, 4),
}
"""Of 16-bit layers of all branches that have a launch of their own, by family of chips."""
_WIDE = Config(128, 128, 64, 8, 3)
_CANDIDATES = {
    ("forward", 2): (_FORWARD[2], _SMALL, _MIDDLE, _WIDE, Config(128, 128, 128, 8, 3)),
    ("layer", 2): (_WIDE,),
    ("backward", 2): (_SMALL, _MIDDLE, _DEEP),
    ("weights", 2): (
        _WEIGHTS[2],
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 128, 8, 3),
        _WEIGHTS_ON_AMD[2],
        Config(64, 128, 64, 8, 4),
    ),
    ("forward", 4): (_FORWARD[4], _FORWARD_OF_FEW_ROWS[4], _CHAIN_OF_FEW_ROWS[4]),
    ("layer", 4): (_FORWARD[4],),
    ("backward", 4): (_FORWARD[4], _FORWARD_OF_FEW_ROWS[4], _CHAIN_OF_FEW_ROWS[4]),
    ("weights", 4): (_WEIGHTS[4], _FORWARD_OF_FEW_ROWS[4]),
}
"""By part of a choice and bytes of an element."""
# Small tiles reach every edge with small tensors.
_INTERPRETED = Config(16, 32, 16, 4, 1, item_rows=8, group_rows=4)
FEW_ROWS = 1024
PERSISTENT_ROWS = 1024
"""Up to these rows the forward is one launch, above the per-layer ones: a prediction (docs/gpu-model.md)."""
ROWS_PER_CHUNK = 4096
"""Of a weight gradient: a scenario with more rows is summed in parts, in order."""
MAXIMUM_CHUNKS = 16
"""Rows beyond so many chunks make the chunks longer, which bounds the memory of their sums."""
SCRATCH_BYTES = 2**29
"""Of the streams of all branches where nothing is kept for backward: more rows go through in turns."""
INTERPRETED_ROWS_PER_CHUNK = 32


def built_in(bucket: Bucket, itemsize: int, family: str = "sm_90") -> Choice:
    """The choice where nothing was tuned, for a :func:`family` of chips."""
    schedule = "persistent" if bucket.rows <= PERSISTENT_ROWS else "per_layer"
    if family == AMD:
        chain = dataclasses.replace(_ON_AMD[itemsize], thread_branches=FEW_THREAD_BRANCHES)
        return Choice(schedule, _ON_AMD[itemsize], chain, _WEIGHTS_ON_AMD[itemsize])
    forward = _FORWARD[itemsize]
    chain = next(config for most, config in _CHAIN[itemsize] if bucket.scenarios <= most)
    if bucket.rows <= FEW_ROWS:
        forward, chain = _FORWARD_OF_FEW_ROWS[itemsize], _CHAIN_OF_FEW_ROWS[itemsize]
    if itemsize == 2 and bucket.scenarios > SCENARIO_BUCKETS[-1]:
        # Tables of so many scores want the registers of eight warps.
        forward = _MIDDLE
    if family != "sm_90":
        chain = dataclasses.replace(chain, thread_branches=FEW_THREAD_BRANCHES)
    layer = _LAYER.get(family) if itemsize == 2 else None
    return Choice(schedule, forward, chain, _WEIGHTS[itemsize], layer)


def family(device: torch.device) -> str:
    """AMD, or the NVIDIA architecture that a device's kernels are compiled for: "sm_90", also where there is no GPU."""
    if torch.version.hip is not None:
        return AMD
    return f"sm_{torch.cuda.get_device_capability(device)[0]}0" if device.type == "cuda" else "sm_90"


def tile(stage: Stage, config: Config, dtype: torch.dtype, starts_at_vectors: bool, precision: str) -> Tile:
    """How a stage is cut in a launch with a configuration.

    A stage of odd widths, or with a tensor that does not start at a vector, gets small tiles; the others of its launch
    do not. Quantised factors take as many bytes a step as others.
    """
    if isinstance(stage, MutualOwnRow | MutualBackward):
        return _mutual_tile(stage, config, dtype)
    if not isinstance(stage, ProductStage):
        item_rows = min(config.item_rows, config.block_m)
        width = stage.width if isinstance(stage, QuantizeRows) else 1
        columns = min(_power_of_two(width), QUANTIZED_COLUMNS)
        rows = max(1, min(QUANTIZED_ELEMENTS // columns, item_rows))
        return RowsTile(item_rows, rows, columns, vector=1)
    if isinstance(stage, QuantizedLayer):
        config = dataclasses.replace(config, block_k=config.block_k * dtype.itemsize // stage.itemsize)
    return _product_tile(stage, config, dtype, starts_at_vectors, precision)


def _mutual_tile(stage: MutualOwnRow | MutualBackward, config: Config, dtype: torch.dtype) -> RowsTile:
    """Blocks (rows, M, columns) in which a warp has whole rows of a block and a thread all branches.

    Triton gives consecutive vectors of a row to consecutive threads, what is left of a warp and all warps to rows.
    """
    item_rows = min(config.item_rows, config.block_m)
    rows = min(config.group_rows, item_rows)
    vector = VECTOR_BYTES // dtype.itemsize
    threads = min(WARP, max(1, config.num_warps * WARP // rows))
    columns = min(_power_of_two(stage.d), threads * vector)
    branches = _power_of_two(stage.num_scenarios)
    usual = THREAD_BRANCHES[dtype.itemsize] if branches <= 32 else FEW_THREAD_BRANCHES
    parts = max(1, branches // (config.thread_branches or usual))
    return RowsTile(item_rows, max(1, rows // parts), columns, min(vector, columns))


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


def weight_tile(
    stage: WeightGradient, config: Config, dtype: torch.dtype, starts_at_vectors: bool, precision: str
) -> ProductTile:
    """How a weight's gradient is cut: BLOCK_M by BLOCK_N of the weight, BLOCK_K rows of the batch at a time."""
    return _product_tile(stage, config, dtype, starts_at_vectors, precision)


def _product_tile(
    stage: ProductStage, config: Config, dtype: torch.dtype, starts_at_vectors: bool, precision: str
) -> ProductTile:
    whole = VECTOR_BYTES // dtype.itemsize
    vector = math.gcd(whole, *(stride or 0 for stride in stage.strides())) if starts_at_vectors else 1
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if isinstance(stage, Layer) and stage.activation in ELEMENTS_OF_ACTIVATION:
        elements = ELEMENTS_OF_GATED if stage.gated.present else ELEMENTS_OF_ACTIVATION[stage.activation]
        most = elements * config.num_warps * WARP
        # Four warps multiply 64 rows at least.
        block_m = min(block_m, max(MATRIX_ROWS, most // block_n))
        block_n = min(block_n, most // block_m)
    if vector < whole:
        ragged_m, ragged_n, ragged_k = RAGGED_TILE[dtype.itemsize]
        narrow = max(NARROWEST, _power_of_two(stage.columns))
        block_m, block_n, block_k = min(block_m, ragged_m), min(block_n, ragged_n, narrow), min(block_k, ragged_k)
    return ProductTile(
        block_m,
        block_n,
        block_k,
        vector=vector,
        whole_vectors=vector == whole,
        column_tiles=-(-stage.columns // block_n),
        row_parts=config.block_m // block_m,
        precision=precision,
    )


def is_ragged(stages: Iterable[Stage]) -> bool:
    """Whether some products of a launch take places one by one, as their widths or addresses are odd."""
    return any(isinstance(stage.tile, ProductTile) and not stage.tile.whole_vectors for stage in stages)


def _register_bound(stages: list[Stage], itemsize: int) -> int | None:
    """A thread's registers, where ptxas else keeps one more program on the multiprocessor by spilling a few."""
    ragged = is_ragged(stages)
    if itemsize == 2:
        return MOST_REGISTERS if ragged else None
    # Of float32's other products it reads ahead up to any bound, and spills for that.
    weights = [stage for stage in stages if isinstance(stage, WeightGradient)]
    if weights and (ragged or not any(stage.k2 for stage in weights)):
        return REGISTERS_OF_WEIGHTS
    if not ragged and any(isinstance(stage, Layer) and stage.activation == "gelu" for stage in stages):
        return REGISTERS_OF_GELU
    return None


def launch_options(config: Config, stages: Iterable[Stage], itemsize: int) -> dict[str, int]:
    """What Triton's compiler is told of a launch beside its constants."""
    told = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if torch.version.hip is None and (bound := _register_bound(list(stages), itemsize)):
        told["maxnreg"] = bound
    return told


@functools.cache
def most_polls() -> int:
    """Polls of a wait before its launch gives up and reports, as SAML_KERNELS_DEBUG_WAITS says; 0: no bound.

    Raises:
        ValueError: the variable is no whole number of at least 0.
    """
    told = os.environ.get(DEBUG_WAITS, "0")
    if not told.isdecimal():
        raise ValueError(f"{DEBUG_WAITS} must be a whole number of polls, 0 for no bound, got {told!r}")
    return int(told)


_forced: Choice | None = None


@contextmanager
def forced(wanted: Choice) -> Iterator[None]:
    """Every call inside takes ``wanted``, in all threads: autograd runs a backward in one of its own. For trials."""
    global _forced
    before, _forced = _forced, wanted
    try:
        yield
    finally:
        _forced = before


def choice(
    rows: int,
    scenarios: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Choice:
    """For a call with so many rows, scenarios and so wide a layer."""
    if _forced is not None:
        return _forced
    if INTERPRETED:
        return Choice("persistent", _INTERPRETED, _INTERPRETED, _INTERPRETED)
    return _choice(Bucket.of(rows, scenarios, width), dtype, device)


@functools.cache
def _choice(bucket: Bucket, dtype: torch.dtype, device: torch.device) -> Choice:
    found = tuned(cache_path()).get(key(device_name(device), dtype, bucket))
    return built_in(bucket, dtype.itemsize, family(device)) if found is None else found


def candidates(part: str, itemsize: int, family: str = "sm_90") -> tuple[Config, ...]:
    """What tuning tries for a part of a :class:`Choice`; tests compile all of them, and on sm_90 none spills."""
    if INTERPRETED:
        return (_INTERPRETED, dataclasses.replace(_INTERPRETED, block_n=16))
    found = _CANDIDATES[part, itemsize]
    return (*found, _LAYER[family]) if (part, itemsize) == ("layer", 2) and family in _LAYER else found


def rows_candidates(config: Config) -> tuple[Config, ...]:
    """The same tiles with other items of what is no product."""
    if INTERPRETED:
        return (config, dataclasses.replace(config, item_rows=4))
    pairs = ((item, group) for item in (8, 16, 32) for group in (8, 16, 32) if group <= item)
    return tuple(dataclasses.replace(config, item_rows=item, group_rows=group) for item, group in pairs)


def chunk_rows(rows: int) -> int:
    """Rows of a weight gradient that are summed without a break; a launch argument, not compiled in."""
    if INTERPRETED:
        return INTERPRETED_ROWS_PER_CHUNK
    parts = -(-rows // (MAXIMUM_CHUNKS * ROWS_PER_CHUNK))
    return ROWS_PER_CHUNK * max(1, parts)


@functools.cache
def multiprocessors(index: int) -> int:
    """Of the GPU with that index; the interpreter runs three programs."""
    return 3 if INTERPRETED else int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def _device_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


def device_name(device: torch.device) -> str:
    """As tuned choices are filed."""
    return "interpreter" if INTERPRETED else _device_name(device.index or 0)


def key(device: str, dtype: torch.dtype, bucket: Bucket) -> str:
    """Of a tuned choice."""
    name = str(dtype).removeprefix("torch.")
    return f"{device}/{name}/rows={bucket.rows}/scenarios={bucket.scenarios}/width={bucket.width}"


def cache_path() -> Path:
    """Where this user's tuned choices are: SAML_KERNELS_TUNED, else saml-kernels/triton.json in the cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saml-kernels" / "triton.json"


@functools.cache
def tuned(path: Path) -> dict[str, Choice]:
    """The choices in a file, none if there is no file.

    Raises:
        ValueError: a file that does not hold choices.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        entries: dict[str, Any] = json.loads(text)
        return {name: _parse(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold tuned choices ({error}); delete it, or write it again with saml-rec bench --tune"
        ) from error


def _parse(entry: dict[str, Any]) -> Choice:
    if "form" in entry:
        entry = {**entry, "schedule": OLD_SCHEDULES.get(entry["form"], entry["form"])}
    if entry["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {entry['schedule']!r}")
    forward, backward, weights = (_parse_config(entry[name]) for name in ("forward", "backward", "weights"))
    layer = _parse_config(entry["layer"]) if entry.get("layer") else None
    return Choice(entry["schedule"], forward, backward, weights, layer)


def _parse_config(numbers: dict[str, Any]) -> Config:
    return Config(**{OLD_FIELDS.get(name, name): number for name, number in numbers.items()})


def save(path: Path, choices: dict[str, Choice]) -> None:
    """Adds choices to those of a file, in one step: a reader never sees half of it."""
    merged = {**tuned(path), **choices}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({name: dataclasses.asdict(c) for name, c in merged.items()}, indent=1) + "\n")
    partial.replace(path)
    forget()


def forget() -> None:
    """Reads the file and the environment again at the next call."""
    most_polls.cache_clear()
    tuned.cache_clear()
    _choice.cache_clear()
