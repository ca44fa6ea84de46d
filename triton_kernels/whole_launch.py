"""Losses whose matrix is one panel: from tensors to value and gradients, by launches that are prepared once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .configs import PersistentTile, Tile, rest_of
from .persistent import LINE, persistent_kernel, refer_kernel
from .persistent_launch import REFERRED_ROWS, REFERRED_SAMPLE
from .score import rest_kernel, score_kernel
from .sequence import Blocks, Launch, Launches, Layout, Place, given, number
from .vector_launch import DOTS_ROWS, block_d
from .vectors import dots_kernel
from .whole import (
    ratio_kernel,
    relative_dots_kernel,
    scaled_gradients_kernel,
    sigmoid_kernel,
    softmax_kernel,
    totals_kernel,
)

__all__ = ["Form", "WholeRatio", "WholeSigmoid", "WholeSoftmax", "add_product", "product"]

#: Rows of a program that finishes gradients; numbers that the totals' program takes at a time.
_ROWS, _TOTALS = 16, 1024
_OPTIONS = {"num_warps": 4, "num_stages": 1}
#: From so many scores on, persistent programs save the GPU more than their descriptors take the host: tens of
#: microseconds.
PERSISTENT_SCORES = 2**24
_NOTHING = number(None)
#: The call's values in the forward pass; then extras, as far as there are any.
_X, _Y, _VALUE, _KEPT, _WEIGHTS, _SCALE, _BIAS, _MORE = range(1, 9)


class Form(NamedTuple):
    """All that they depend on; tensors are contiguous and begin at a multiple of 16 bytes."""

    rows: int
    cols: int
    features: int
    dtype: torch.dtype
    device: torch.device
    #: of scale and bias; None: it is a number
    dtypes: tuple[torch.dtype | None, torch.dtype | None]
    #: which of the vectors beside there are: weights of rows; or normalisers of rows and columns, and weights
    extras: tuple[bool, ...]
    #: what each row's loss is multiplied by beside
    share: float
    #: row i's positive is column i + offset; of a symmetric matrix modulo N = 2 * offset
    offset: int
    symmetric: bool
    #: columns count too
    both: bool
    #: gradients of x, y, scale, bias
    wants: tuple[bool, ...]
    #: of WholeRatio: c, log k and what comes off every value
    rule: tuple[float, ...] = ()


class _Whole:
    """The launches of one form: `forward` leaves the gradients up to the factor from upstream, `backward` has it."""

    term: str

    def __init__(self, form: Form) -> None:
        self.form = form
        self.precision = launch.precision_of(form.dtype)
        # rows of the weights keep a stride that cuBLAS likes (on the CPU, oneDNN reads the gap behind a row)
        padded = form.device.type == "cuda" and form.cols % 8
        self.stride = -(-form.cols // 64) * 64 if padded else form.cols
        self.room = Layout(_KEPT)
        self.coefficients = self.room.take(form.rows)
        self.dparams = self.room.take(2, torch.float64)
        self.dots, self.params = self.room.take(form.rows), self.room.take(3)
        self.programs = -(-form.rows // launch.MERGE_BLOCK)
        self.sums = self.room.take(3 * self.programs, torch.float64)
        more = itertools.count(_MORE)
        self.extras = [given(next(more)) if there else _NOTHING for there in form.extras]
        # of a symmetric matrix, where rows leave out their own column beside
        self.mirror = self.room.take(form.rows, torch.int64) if form.symmetric else _NOTHING
        self.launches = Launches(form.device, self._forward_launches())
        self.finish = Launches(form.device, [self._last_launch()])

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor | float,
        bias: Tensor | float,
        extras: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """The value; room with what `backward` needs, and the float32 sums of dx and dy, as far as they are wanted."""
        form, device = self.form, self.form.device
        value = torch.empty((), dtype=torch.float32, device=device)
        kept = torch.empty(self.room.bytes, dtype=torch.uint8, device=device)
        weights = torch.empty((form.rows, self.stride), dtype=form.dtype, device=device)
        self.launches([x, y, value, kept, weights, scale, bias, *[v for v in extras if v is not None]])
        if self.stride != form.cols:
            weights = weights[:, : form.cols]
        outputs = [value, kept]
        if form.wants[0]:
            dx = product(weights, y)
            if form.symmetric:
                add_product(dx, weights.t(), x)
            outputs.append(dx)
        if form.wants[1]:
            outputs.append(product(weights.t(), x))
        return tuple(outputs)

    def backward(
        self, x: Tensor, y: Tensor, scale: Tensor | float, bias: Tensor | float, kept: list[Tensor], upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dx, dy, dscale, dbias."""
        room, *sums = kept
        values = [x, y, room, upstream]
        made: list[Tensor | None] = []
        tensors: tuple[Any, ...] = x, y, scale, bias
        for want, tensor in zip(self.form.wants, tensors):
            if not want:
                made.append(None)
                continue
            out = torch.empty_like(tensor)
            if len(made) < 2:
                values.append(sums.pop(0))
            values.append(out)
            made.append(out)
        self.finish(values)
        return tuple(made)

    def copies(self, kept: list[Tensor]) -> Sequence[Tensor | None]:
        """What the kernels have copied of the extras: nothing."""
        return ()

    def _forward_launches(self) -> list[Launch]:
        raise NotImplementedError

    def _dots(self, row_gain: Place, centered: bool) -> Launch:
        """The positives' dot products, and parameters."""
        form = self.form
        n, d = form.rows, form.features
        return Launch(
            dots_kernel, -(-n // DOTS_ROWS),
            (
                given(_X), given(_Y), _NOTHING, self.mirror, given(_SCALE), given(_BIAS), self.dots, self.params,
                _NOTHING if row_gain is _NOTHING else self.extras[0], row_gain,
                *map(number, (n, form.offset, d, d, d, form.share)),
            ),
            SCALE_IS_TENSOR=form.dtypes[0] is not None, BIAS_IS_TENSOR=form.dtypes[1] is not None, CENTERED=centered,
            BLOCK=DOTS_ROWS, BLOCK_D=block_d(d), **_OPTIONS,
        )  # fmt: skip

    def _side_kernel(self, kernel: Any, *places: Place) -> Launch:
        """A kernel that has partial results of rows, and perhaps of columns."""
        return Launch(
            kernel, self.programs, places,
            TERM=launch.TERMS[self.term], BLOCK=launch.MERGE_BLOCK, PARTS=launch.MERGE_PARTS, **_OPTIONS,
        )  # fmt: skip

    def _totals(self, panel: _Panel) -> Launch:
        """The value, and dL/d(scale, bias)."""
        return Launch(
            totals_kernel, 1,
            (
                self.sums, panel.params_partials, given(_VALUE), self.dparams,
                number(self.programs), number(panel.blocks),
            ),
            BLOCK=_TOTALS, **_OPTIONS,
        )  # fmt: skip

    def _last_launch(self) -> Launch:
        """Of x, y, kept, upstream; (sums, out) of dx and of dy, dscale, dbias, as far as they are wanted."""
        form = self.form
        n, m, d = form.rows, form.cols, form.features
        more = iter(range(5, 11))
        places = [
            given(next(more)) if want else _NOTHING for each, want in zip((2, 2, 1, 1), form.wants) for _ in range(each)
        ]
        programs = sum(-(-rows // _ROWS) for rows, want in zip((n, m), form.wants) if want)
        return Launch(
            scaled_gradients_kernel, max(programs, 1),
            (
                given(1), given(2), self.coefficients._replace(source=3), self.dparams._replace(source=3), given(4),
                *places, *map(number, (n, m, form.offset, d)),
            ),
            SYMMETRIC=form.symmetric, BLOCK=_ROWS, BLOCK_D=block_d(d), **_OPTIONS,
        )  # fmt: skip


class WholeSoftmax(_Whole):
    """Of :func:`contrastive_kernels.operators.softmax_loss.softmax_loss`: statistics, then weights."""

    term = "exponential"

    def _forward_launches(self) -> list[Launch]:
        form, take = self.form, self.room.take
        row = take(2 * form.rows), take(form.rows)
        col = (take(2 * form.cols), take(form.cols)) if form.both else (_NOTHING, _NOTHING)
        reduce = _Panel(self, "reduce")
        weigh = _Panel(self, "both" if form.both else "weights")
        return [
            self._dots(_NOTHING, centered=True),
            *reduce.launches((_NOTHING,) * 4),
            self._side_kernel(
                softmax_kernel, reduce.row_partials, reduce.col_partials, self.dots, self.params, self.extras[0],
                *row, *col, self.coefficients, self.sums,
                *map(number, (form.rows, reduce.row_blocks, reduce.col_blocks, form.share)),
            ),
            *weigh.launches((*row, *col)),
            self._totals(weigh),
        ]  # fmt: skip


class WholeSigmoid(_Whole):
    """Of :func:`contrastive_kernels.operators.sigmoid_loss.sigmoid_loss`: statistics and weights at once."""

    term = "sigmoid"

    def _forward_launches(self) -> list[Launch]:
        row_gain = self.room.take(self.form.rows)
        panel = _Panel(self, "fused")
        return [
            self._dots(row_gain, centered=False),
            *panel.launches((_NOTHING, row_gain, _NOTHING, _NOTHING)),
            self._side_kernel(
                sigmoid_kernel, panel.row_partials, self.dots, self.params, row_gain, self.coefficients, self.sums,
                number(self.form.rows), number(panel.col_blocks),
            ),
            self._totals(panel),
        ]  # fmt: skip


class WholeRatio(_Whole):
    """Of :func:`contrastive_kernels.operators.weighted_sum.exponential_sums`: statistics and weights at once."""

    term = "exponential"

    def _forward_launches(self) -> list[Launch]:
        form, take = self.form, self.room.take
        row = take(2 * form.rows), take(form.rows)
        col = (take(2 * form.cols), take(form.cols)) if form.both else (_NOTHING, _NOTHING)
        panel, (c, log_k, excess) = _Panel(self, "fused"), form.rule
        self.copied = [take(form.rows) if there else _NOTHING for there in form.extras[:2]]
        n, d = form.rows, form.features
        return [
            Launch(
                relative_dots_kernel, -(-n // DOTS_ROWS),
                (
                    given(_X), given(_Y), given(_SCALE), given(_BIAS), self.dots, self.params, *self.extras[:3],
                    *self.copied, *row, *col, *map(number, (n, form.offset, d, form.share, log_k)),
                ),
                SCALE_IS_TENSOR=form.dtypes[0] is not None, BIAS_IS_TENSOR=form.dtypes[1] is not None,
                BLOCK=DOTS_ROWS, BLOCK_D=block_d(d), **_OPTIONS,
            ),
            *panel.launches((*row, *col)),
            self._side_kernel(
                ratio_kernel, panel.row_partials, panel.col_partials, self.dots, self.params, *self.extras[:2],
                *row, *col, self.coefficients, self.sums,
                *map(number, (n, panel.row_blocks, panel.col_blocks, c, excess)),
            ),
            self._totals(panel),
        ]  # fmt: skip

    def copies(self, kept: list[Tensor]) -> Sequence[Tensor | None]:
        """-log u of rows and of columns."""
        values = [kept[0]] * _KEPT
        return [None if each is _NOTHING else each.value(values)[: self.form.rows] for each in self.copied]


class _Panel:
    """The launches of the one panel, for one of configs.WORKS; see launch.run_panel."""

    def __init__(self, whole: _Whole, work: str) -> None:
        form, take = whole.form, whole.room.take
        self.whole, self.weighs = whole, work != "reduce"
        self.persistent = persistent_tile_of(form, whole.precision, work, whole.term, whole.stride)
        tile = launch.tile_of(form.device, whole.precision, work, form.features)
        self.tile = tile = tile if self.persistent is None else self.persistent.part
        self.row_blocks, self.col_blocks = -(-form.rows // tile.block_m), -(-form.cols // tile.block_n)
        self.blocks = self.row_blocks * self.col_blocks
        sizes = launch.Scratch.of(tile, form.rows, form.cols)
        self.row_partials = self.col_partials = self.params_partials = _NOTHING
        if work in ("reduce", "fused"):
            self.row_partials = take(sizes.rows)
            self.col_partials = take(sizes.cols) if form.both else _NOTHING
        if self.weighs and (form.wants[2] or form.wants[3]):
            self.params_partials = take(sizes.params)
        self.unusual = take(sizes.unusual)
        self.line = self.row_referred = self.col_referred = _NOTHING
        if self.persistent is not None and self.weighs:
            self.line, self.row_referred = take(LINE), take(form.rows)
            self.col_referred = take(form.cols) if form.both else _NOTHING

    def launches(self, sides: tuple[Place, ...]) -> list[Launch]:
        """Usual tiles, and the rest; with normaliser and gain of both sides."""
        whole, form, tile = self.whole, self.whole.form, self.tile
        n, m, d = form.rows, form.cols, form.features
        pairs = (
            number(0 if form.symmetric else form.offset), whole.mirror, number(0),
            *(_NOTHING,) * 3, *(_NOTHING, number(0)) * 2, *(_NOTHING,) * 6, *(number(0),) * 3,
        )  # fmt: skip
        outputs = self.row_partials, self.col_partials, self.params_partials, _NOTHING, _NOTHING, self.unusual
        places = (
            given(_X), given(_Y), whole.params, *pairs, *sides,
            *((given(_WEIGHTS), whole.params) if self.weighs else (_NOTHING, _NOTHING)), *outputs,
            *map(number, (n, m, d, d, d, whole.stride if self.weighs else 0)),
            *(number(0 if side is _NOTHING else length) for side, length in zip(sides[::2], (n, m))),
        )  # fmt: skip
        constants: dict[str, Any] = {
            "TERM": launch.TERMS[whole.term], "ROW": True, "COL": form.both, "COLUMNS": int(form.symmetric),
            "EQUAL_IDS": 0, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "GROUP": tile.group,
            "INPUT_PRECISION": "ieee" if whole.precision == "ieee" else "tf32",
            "UPCAST": launch.INTERPRETED and form.dtype == torch.bfloat16,
        }  # fmt: skip
        constants |= launch.guide_constants(None, tile)
        rest = rest_of(tile)
        first = [Launch(score_kernel, self.blocks, places, **constants, **_of_tile(tile, d))]
        if self.persistent is not None:
            first = self._persistent_launches(self.persistent, sides, pairs, outputs, constants)
        return [
            *first,
            Launch(
                rest_kernel, launch.rest_programs(self.blocks), places, **constants, **_of_tile(rest, d),
                PIECE=rest.block_n, TILES=launch.REST_TILES,
            ),
        ]  # fmt: skip

    def _persistent_launches(
        self, tile: PersistentTile, sides: tuple[Place, ...], pairs: tuple[Place, ...], outputs: tuple[Place, ...],
        constants: dict[str, Any],
    ) -> list[Launch]:  # fmt: skip
        """Gains referred to one shift, where there are any, and persistent programs instead of one for each tile."""
        whole, form = self.whole, self.whole.form
        n, m, d = form.rows, form.cols, form.features
        sided = {name: constants[name] for name in ("TERM", "ROW", "COL")}
        lengths = [number(0 if side is _NOTHING else length) for side, length in zip(sides[::2], (n, m))]
        refer = Launch(
            refer_kernel, sum(-(-k // REFERRED_ROWS) for k in ((n, m) if form.both else (n,))),
            (
                whole.params, whole.params, *sides, self.line, self.row_referred, self.col_referred,
                number(n), number(m), *lengths,
            ),
            **sided, BLOCK=REFERRED_ROWS, SAMPLE=REFERRED_SAMPLE, num_warps=4,
        )  # fmt: skip
        weights = Blocks((n, m), whole.stride, (tile.block_m, tile.part.block_n))
        programs = 2 if launch.INTERPRETED else tile.programs * launch.multiprocessors(form.device)
        persistent = Launch(
            persistent_kernel, min(-(-n // tile.block_m) * -(-m // tile.block_n), programs),
            (
                Place(_X, 0, form.dtype, Blocks((n, d), d, (tile.block_m, tile.block_k))),
                Place(_Y, 0, form.dtype, Blocks((m, d), d, (tile.block_n, tile.block_k))),
                Place(_WEIGHTS, 0, form.dtype, weights) if self.weighs else _NOTHING,
                whole.params, *pairs, self.line, self.row_referred, self.col_referred,
                whole.params if self.weighs else _NOTHING, *outputs, number(n), number(m), number(d),
            ),
            **sided, COLUMNS=constants["COLUMNS"], EQUAL_IDS=0,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=tile.group, PARTS=tile.parts,
            UPCAST=constants["UPCAST"], num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return [refer, persistent] if self.weighs else [persistent]


def persistent_tile_of(
    form: Form, precision: str, work: str, term: str, weights_stride: int
) -> PersistentTile | None:  # fmt: skip
    """The tile of persistent_kernel for a large matrix that the TMA unit can copy."""
    size = form.dtype.itemsize
    if launch.INTERPRETED or form.rows * form.cols < PERSISTENT_SCORES or form.features * size % 16:
        return None
    tile = launch.persistent_of(form.device, precision, work, term, form.features)
    if tile is None or weights_stride * size % 16:
        return None
    return tile if tile.fills(form.rows, form.cols, launch.multiprocessors(form.device)) else None


def _of_tile(tile: Tile, features: int) -> dict[str, Any]:
    return {
        "BLOCK_K": tile.block_k, "EVEN_K": features % tile.block_k == 0,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def product(weights: Tensor, block: Tensor) -> Tensor:
    """weights @ block in float32, added up in float32."""
    if weights.dtype == torch.float32:
        return torch.mm(weights, block)
    if weights.is_cuda:
        return torch.mm(weights, block, out_dtype=torch.float32)
    return torch.mm(weights.float(), block.float())


def add_product(sums: Tensor, weights: Tensor, block: Tensor) -> None:
    """sums += weights @ block, in float32."""
    if weights.dtype == torch.float32:
        torch.addmm(sums, weights, block, out=sums)
    elif weights.is_cuda:
        torch.addmm(sums, weights, block, out_dtype=torch.float32, out=sums)
    else:
        torch.addmm(sums, weights.float(), block.float(), out=sums)
