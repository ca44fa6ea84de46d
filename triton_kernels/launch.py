"""From tensors to launches: which kernel, which tile, which grid. Checks of users' input are the callers'."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import tuning
from .configs import (
    WORKS,
    PersistentTile,
    Tile,
    legality,
    persistent_tile_for,
    persistent_tiles,
    rest_of,
    tile_for,
    work_of,
)
from .exponential import EXPONENTIAL
from .kept_launch import weigh_kept_tiles
from .merge import merge_kernel
from .pairs import Pairs
from .persistent import LINE
from .persistent_launch import copies_by_tma, multiprocessors, start_tiles
from .score import rest_kernel, score_kernel
from .sigmoid import SIGMOID
from .start import INTERPRETED, TRITON_VERSION, Arguments, start

__all__ = [
    "INTERPRETED",
    "MERGE_BLOCK",
    "MERGE_PARTS",
    "TERMS",
    "TRITON_VERSION",
    "Pairs",
    "Scratch",
    "Vectors",
    "forget_tiles",
    "gpu_name",
    "guide_constants",
    "measure",
    "measure_all",
    "multiprocessors",
    "persistent_of",
    "precision_of",
    "probe",
    "rest_programs",
    "run_panel",
    "scratch_floats",
    "tile_of",
]

#: Rows (or columns) that one program of the merge kernel takes, and how many of their partial results at a time.
MERGE_BLOCK, MERGE_PARTS = 32, 32

#: Programs that look for tiles that are left, and how many each looks after.
REST_PROGRAMS, REST_TILES = 1024, 32
#: The pair terms by name.
TERMS = {"exponential": EXPONENTIAL, "sigmoid": SIGMOID}
#: A guide's float32 features that are multiplied at a time without the tensor cores, beside 16-bit operands.
_IEEE_BLOCK = 16
#: A tile of unequal sides, so that the interpreter's tests tell rows from columns.
_INTERPRETED_TILE = Tile(64, 128, 32, 4, 1)


class Vectors(NamedTuple):
    """What goes with a panel's rows (or columns); None where this side takes no part."""

    #: [state_rows, n], its rows dense
    state: Tensor | None = None
    #: [2, n], its rows dense
    normalizer: Tensor | None = None
    #: [n]
    gain: Tensor | None = None
    #: [2, n], its rows dense
    target: Tensor | None = None
    #: the state is memory that nobody has written
    fresh: bool = False


class Scratch(NamedTuple):
    """The partial results of one panel, in one vector of float32: rows, columns, params; which tiles are unusual."""

    rows: int
    cols: int
    params: int
    unusual: int
    #: the line and the gains that persistent_kernel reads
    referred: int
    #: beside exponentials that are kept
    row_moments: int
    col_moments: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, tile: Tile, rows: int, cols: int, kept: bool = False) -> Scratch:
        """Sizes for a panel of this shape, in whole 16 bytes: each part begins as aligned as the first."""
        row_blocks, col_blocks = -(-rows // tile.block_m), -(-cols // tile.block_n)
        blocks = row_blocks * col_blocks
        referred = LINE + -(-rows // 4) * 4 + -(-cols // 4) * 4
        of_tiles = (2 * rows * col_blocks, 2 * cols * row_blocks, 2 * blocks, blocks)
        sizes = (*of_tiles, referred, kept * rows * col_blocks, kept * cols * row_blocks)
        return cls(*(-(-size // 4) * 4 for size in sizes))


def precision_of(dtype: torch.dtype) -> str:
    """How operands of this dtype are multiplied: float32 by torch's own setting."""
    if dtype.itemsize == 2:
        return "16-bit"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch 2.9; reading allow_tf32 beside it may raise
    if setting is None:
        return "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if setting == "tf32" else "ieee"


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def gpu_name(device: torch.device) -> str:
    """The name of a GPU, as measured tiles are filed under it."""
    return torch.cuda.get_device_name(device)


@cache
def tile_of(
    device: torch.device, precision: str, work: str, features: int, capped: bool = False, guided: bool = False
) -> Tile:
    """The tile for panels on this device: the measured one, if someone has measured, or the table's.

    capped, guided: the table's for ceilings of rows and columns, and for a guide, which nobody measures.
    """
    if INTERPRETED:
        return _INTERPRETED_TILE
    capability = _capability(device)
    if capped or guided:
        return tile_for(capability, precision, work, features, capped, guided)
    measured = tuning.tiles.get(tuning.key(gpu_name(device), triton.__version__, precision, work, features))
    if measured is not None and legality(measured, capability, precision) is None:
        return measured
    return tile_for(capability, precision, work, features)


@cache
def persistent_of(
    device: torch.device, precision: str, work: str, term: str, features: int, capped: bool = False
) -> PersistentTile | None:
    """The same of persistent tiles, if there is one; those of the exponential term are measured."""
    capability = _capability(device)
    tile = persistent_tile_for(capability, precision, work, term, capped)
    if tile is None or capped or term != "exponential":
        return tile
    name = tuning.key(gpu_name(device), triton.__version__, precision, tuning.persistently(work), features)
    measured = tuning.tiles.get(name)
    if isinstance(measured, PersistentTile) and legality(measured, capability, precision) is None:
        return measured
    return tile


def scratch_floats(
    rows: int, cols: int, device: torch.device, dtype: torch.dtype, features: int, kept: bool = False,
    capped: bool = False, guided: bool = False,
) -> int:  # fmt: skip
    """float32 that the partial results of a panel take at most.

    kept: beside exponentials; capped: with ceilings, or guided.
    """
    return _scratch_floats(rows, cols, device, precision_of(dtype), features, kept, capped, guided)


@lru_cache(maxsize=256)
def _scratch_floats(
    rows: int, cols: int, device: torch.device, precision: str, features: int, kept: bool, capped: bool, guided: bool
) -> int:
    tiles = {tile_of(device, precision, work, features, capped, guided) for work in WORKS}
    if not INTERPRETED and not guided:
        tiles |= {tile.part for tile in persistent_tiles(_capability(device), precision, capped)}
        measured = (persistent_of(device, precision, work, "exponential", features, capped) for work in WORKS)
        tiles |= {tile.part for tile in measured if tile is not None}
    return max(sum(Scratch.of(tile, rows, cols, kept)) for tile in tiles)


def run_panel(
    term: str,
    x: Tensor,
    y: Tensor,
    params: Tensor,
    pairs: Pairs,
    row: Vectors,
    col: Vectors,
    scratch: Tensor,
    weights: Tensor | None = None,
    factor: Tensor | None = None,
    dparams: Tensor | None = None,
    tile: Tile | None = None,
    kept: bool = False,
) -> None:
    """One panel: its statistics into the states, its weights times `factor`, its sums into dparams [2].

    x [R, D], y [C, D] with dense rows; params [3]; scratch: at least scratch_floats of float32. The tile is chosen
    unless it is given. kept: the statistics, without a factor, leave exponentials in the weights' place and sums in the
    scratch, and the weights are made of these.
    """
    (n, d), m = x.shape, y.shape[0]
    keeps = kept and factor is None
    weighs = weights is not None and not keeps
    has_row, has_col = ((v.gain if weighs else v.state) is not None for v in (row, col))
    precision = precision_of(x.dtype)
    statistics = row.state is not None or col.state is not None
    work = "fused" if kept else work_of(weighs, statistics, has_row and has_col)
    if tile is None:
        guided = pairs.row_guide is not None
        tile = None if guided else _persistent_tile(x, y, weights, precision, work, pairs.capped, term)
        tile = tile or tile_of(x.device, precision, work, d, pairs.capped, guided)
    persistent = tile if isinstance(tile, PersistentTile) else None
    tile = tile if persistent is None else persistent.part
    blocks = -(-n // tile.block_m) * -(-m // tile.block_n)
    sizes = Scratch.of(tile, n, m, kept)
    parts = scratch[: sum(sizes)].split_with_sizes(sizes)
    row_partials, col_partials, params_partials, unusual, referred, row_moments, col_moments = parts
    if INTERPRETED and pairs.row_guide is not None and pairs.col_guide is not None:  # see UPCAST
        pairs = pairs._replace(row_guide=pairs.row_guide.float(), col_guide=pairs.col_guide.float())
    of_pairs = pairs.arguments(n, m, row.target, col.target)
    values = params, *of_pairs, row.normalizer, row.gain, col.normalizer, col.gain
    outputs = (
        None if row.state is None else row_partials,
        None if col.state is None else col_partials,
        None if dparams is None else params_partials,
        row_moments if keeps else None,
        col_moments if keeps and has_col else None,
        unusual,
    )
    arguments = Arguments(
        x, y, *values, weights, factor, *outputs,
        n, m, d, x.stride(0), y.stride(0), 0 if weights is None else weights.stride(0),
        *(0 if v.normalizer is None else v.normalizer.stride(0) for v in (row, col)),
    )  # fmt: skip
    constants = {
        "TERM": TERMS[term], "ROW": has_row, "COL": has_col, "COLUMNS": pairs.width, "EQUAL_IDS": pairs.equal_ids,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "GROUP": tile.group,
        "INPUT_PRECISION": "ieee" if precision == "ieee" else "tf32",
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16, **guide_constants(pairs.row_guide, tile),
    }  # fmt: skip
    if kept and weights is not None and not keeps:
        kept_parts = row_partials, col_partials, row_moments, col_moments, outputs[2], unusual
        weigh_kept_tiles(TERMS[term], tile, params, row, col, weights, factor, kept_parts)
    elif persistent is not None:
        start_tiles(persistent, x, y, weights, referred, (*values, factor, *outputs), constants)
    else:
        _launch(
            score_kernel, blocks, arguments, **constants,
            BLOCK_K=tile.block_k, EVEN_K=d % tile.block_k == 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    rest = rest_of(tile)
    _launch(
        rest_kernel, rest_programs(blocks),
        arguments, **constants, BLOCK_K=rest.block_k, EVEN_K=d % rest.block_k == 0, PIECE=rest.block_n,
        TILES=REST_TILES, num_warps=rest.num_warps, num_stages=rest.num_stages,
    )  # fmt: skip
    _merge(term, tile, row, col, row_partials, col_partials, dparams, params_partials, n, m)


def guide_constants(guide: Tensor | None, tile: Tile) -> dict[str, Any]:
    """How a guide's features [R, E] are multiplied; None: there are none."""
    if guide is None:
        return {"BLOCK_E": tile.block_k, "EVEN_E": True, "GUIDE_PRECISION": "tf32"}
    precision = precision_of(guide.dtype)
    block = _IEEE_BLOCK if precision == "ieee" else tile.block_k
    return {
        "BLOCK_E": block, "EVEN_E": guide.shape[1] % block == 0,
        "GUIDE_PRECISION": "ieee" if precision == "ieee" else "tf32",
    }  # fmt: skip


def _merge(
    term: str, tile: Tile, row: Vectors, col: Vectors, row_partials: Tensor, col_partials: Tensor,
    dparams: Tensor | None, params_partials: Tensor, n: int, m: int,
) -> None:  # fmt: skip
    """A panel's partial results into the states and dparams, as far as they are wanted."""
    programs = sum(-(-size // MERGE_BLOCK) for size, v in ((n, row), (m, col)) if v.state is not None)
    programs += dparams is not None
    if programs:
        states = [v.state for v in (row, col) if v.state is not None]
        _launch(
            merge_kernel, programs,
            Arguments(
                row.state, col.state, row_partials, col_partials, dparams, params_partials,
                n, m, -(-n // tile.block_m), -(-m // tile.block_n),
                *(0 if v.state is None else v.state.stride(0) for v in (row, col)),
            ),
            TERM=TERMS[term], STATE_ROWS=states[0].shape[0] if states else 1,
            ROW_FRESH=row.fresh and row.state is not None, COL_FRESH=col.fresh and col.state is not None,
            BLOCK=MERGE_BLOCK, PARTS=MERGE_PARTS, num_warps=4, num_stages=1,
        )  # fmt: skip


def _persistent_tile(
    x: Tensor, y: Tensor, weights: Tensor | None, precision: str, work: str, capped: bool, term: str
) -> PersistentTile | None:
    """The tile of persistent_kernel for a large panel that the TMA unit can copy."""
    if INTERPRETED or x.numel() == 0:
        return None
    tile = persistent_of(x.device, precision, work, term, x.shape[1], capped)
    if tile is None or not tile.fills(x.shape[0], y.shape[0], multiprocessors(x.device)):
        return None
    return tile if copies_by_tma(x, y, *(() if weights is None else (weights,))) else None


def rest_programs(blocks: int) -> int:
    """Programs that look after so many tiles."""
    return -(-blocks // REST_TILES) if blocks > REST_PROGRAMS * REST_TILES else min(blocks, REST_PROGRAMS)


def _launch(kernel: Any, programs: int, arguments: Arguments, **constants: Any) -> Any:
    """The one place where kernels start; the compiled kernel."""
    return start(kernel, programs, arguments, constants)


def probe(device: torch.device, work: str, features: int, dtype: torch.dtype, side: int) -> Callable[[Tile], None]:
    """Launches a panel of side x side scores of random unit vectors, with the tile that it is given.

    The temperature is 0.07 and the normalisers are near the rows' own: tiles take the branch that nearly all take.
    """
    made: dict[str, Any] = {"dtype": torch.float32, "device": device}
    x, y = (torch.nn.functional.normalize(torch.randn(side, features, **made)).to(dtype) for _ in range(2))
    state, gain = torch.zeros(2, side, **made), torch.ones(side, **made)
    normalizer = torch.zeros(2, side, **made)
    normalizer[1] = math.log(side)
    params = torch.zeros(3, **made)
    params[0] = 1 / 0.07
    scratch = torch.empty(sum(Scratch.of(Tile(64, 64, 16, 4, 1), side, side)), **made)
    weighs, both = work != "reduce", work != "weights"
    row = Vectors(state if work in ("reduce", "fused") else None, *((normalizer, gain) if weighs else (None, None)))
    col = row if both else Vectors()
    weights = torch.empty(side, side, dtype=dtype, device=device) if weighs else None
    dparams = torch.zeros(2, dtype=torch.float64, device=device) if weighs else None

    def run(tile: Tile) -> None:
        run_panel("exponential", x, y, params, Pairs(0), row, col, scratch, weights, params[:1], dparams, tile)

    return run


def measure(
    device: torch.device, precision: str, work: str, features: int, dtype: torch.dtype, side: int,
    candidates: list[Tile] | None = None,
) -> Tile:  # fmt: skip
    """The fastest legal tile for panels of side x side scores, by the GPU's own clock; or of these candidates."""
    from triton.testing import do_bench

    run = probe(device, work, features, dtype, side)

    def seconds(tile: Tile) -> float | None:
        try:
            return 1e-3 * float(do_bench(lambda: run(tile), return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            return None

    tried = tuning.candidates(_capability(device), precision, work) if candidates is None else candidates
    best, _ = tuning.fastest(tried, seconds)
    return best


def measure_all(
    device: torch.device, precision: str, features: int, dtype: torch.dtype, side: int
) -> dict[str, Tile]:  # fmt: skip
    """The same by kind of work, for usual programs and, where there are any, for persistent ones."""
    found = {work: measure(device, precision, work, features, dtype, side) for work in WORKS}
    for work in WORKS:
        if persistent := tuning.persistent_candidates(_capability(device), precision, work):
            name = tuning.persistently(work)
            found[name] = measure(device, precision, work, features, dtype, side, persistent)
    return found


def forget_tiles() -> None:
    """What was chosen by measured tiles is chosen anew."""
    for remembered in (tile_of, persistent_of, _scratch_floats):
        remembered.cache_clear()
