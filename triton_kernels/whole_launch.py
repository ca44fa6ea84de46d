"""A softmax loss whose matrix is one panel: from tensors to value and gradients, by launches that are planned once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .configs import Tile, rest_of, work_of
from .plans import Launches, Layout, Place, Planned, given, number
from .score import rest_kernel, score_kernel
from .vector_launch import DOTS_ROWS, block_d
from .vectors import dots_kernel
from .whole import scaled_gradients_kernel, softmax_kernel, totals_kernel

__all__ = ["SoftmaxForm", "SoftmaxPlan", "add_product", "product"]

#: Rows of a program that finishes gradients; numbers that the totals' program takes at a time.
_ROWS, _TOTALS = 16, 1024
_OPTIONS = {"num_warps": 4, "num_stages": 1}
_NOTHING = number(None)


class SoftmaxForm(NamedTuple):
    """All that a plan depends on; tensors are contiguous and begin at a multiple of 16 bytes."""

    rows: int
    cols: int
    features: int
    dtype: torch.dtype
    device: torch.device
    #: of its tensor; None: the scale is a number
    scale_dtype: torch.dtype | None
    #: rows have weights of their own
    weighted: bool
    #: what each row's loss is multiplied by beside
    share: float
    #: row i's positive is column i + offset; of a symmetric matrix modulo N = 2 * offset, and there is an index of them
    offset: int
    symmetric: bool
    #: columns count too
    both: bool
    #: gradients of x, y, scale
    wants: tuple[bool, bool, bool]


class SoftmaxPlan:
    """The launches of one form: `forward` leaves the gradients up to the factor from upstream, `backward` has it."""

    def __init__(self, form: SoftmaxForm) -> None:
        self.form = form
        self.precision = launch.precision_of(form.dtype)
        # rows of the weights keep a stride that cuBLAS likes (on the CPU, oneDNN reads the gap behind a row)
        padded = form.device.type == "cuda" and form.cols % 8
        self.stride = -(-form.cols // 64) * 64 if padded else form.cols
        self.row_blocks = self.col_blocks = 0
        self._plan_forward()
        self._plan_backward()

    # ---- the call's values: x, y, value, kept, weights; scale, weights of rows, index, as far as there are any ----

    def _plan_forward(self) -> None:
        form = self.form
        n, m, d = form.rows, form.cols, form.features
        x, y, value = given(1), given(2), given(3)
        weights, more = given(5), iter((6, 7, 8))
        scale = given(next(more))
        gain = given(next(more)) if form.weighted else _NOTHING
        index = given(next(more)) if form.symmetric else _NOTHING
        room = Layout(4)
        self.coefficients, self.dparams = room.take(n), room.take(2, torch.float64)
        dots, params = room.take(n), room.take(3)
        row_normalizer, row_gain = room.take(2 * n), room.take(n)
        col_normalizer, col_gain = (room.take(2 * m), room.take(m)) if form.both else (_NOTHING, _NOTHING)
        programs = -(-n // launch.MERGE_BLOCK)
        sums = room.take(3 * programs, torch.float64)
        reduce = _Panel(form, room, self.precision, weighs=False)
        weigh = _Panel(form, room, self.precision, weighs=True)
        col_partials = reduce.col_partials if form.both else _NOTHING
        params_partials = weigh.params_partials if form.wants[2] else _NOTHING
        none = (_NOTHING,) * 4
        launches = [
            Planned(
                dots_kernel, -(-n // DOTS_ROWS),
                (x, y, index, scale, number(0.0), dots, params, *map(number, (n, form.offset, d, d, d))),
                SCALE_IS_TENSOR=form.scale_dtype is not None, BIAS_IS_TENSOR=False, CENTERED=True,
                BLOCK=DOTS_ROWS, BLOCK_D=block_d(d), **_OPTIONS,
            ),
            *reduce.launches(
                x, y, params, index, none, (_NOTHING, _NOTHING), (reduce.row_partials, col_partials, _NOTHING), 0
            ),
            Planned(
                softmax_kernel, programs,
                (
                    reduce.row_partials, col_partials, dots, params, gain, row_normalizer, row_gain,
                    col_normalizer, col_gain, self.coefficients, sums,
                    *map(number, (n, reduce.row_blocks, reduce.col_blocks, form.share)),
                ),
                TERM=launch.TERMS["exponential"], BLOCK=launch.MERGE_BLOCK, PARTS=launch.MERGE_PARTS, **_OPTIONS,
            ),
            *weigh.launches(
                x, y, params, index, (row_normalizer, row_gain, col_normalizer, col_gain), (weights, params),
                (_NOTHING, _NOTHING, params_partials), self.stride,
            ),
            Planned(
                totals_kernel, 1,
                (sums, params_partials, value, self.dparams, number(programs), number(weigh.blocks)),
                BLOCK=_TOTALS, **_OPTIONS,
            ),
        ]  # fmt: skip
        self.bytes, self.launches = room.bytes, Launches(form.device, launches)

    def forward(
        self, x: Tensor, y: Tensor, scale: Tensor | float, gain: Tensor | None, index: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The value; room with what `backward` needs, and the float32 sums of dx and dy, as far as they are wanted."""
        form = self.form
        device, (want_x, want_y, _) = form.device, form.wants
        value = torch.empty((), dtype=torch.float32, device=device)
        kept = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        weights = torch.empty((form.rows, self.stride), dtype=form.dtype, device=device)
        values = [x, y, value, kept, weights, scale]
        if gain is not None:
            values.append(gain)
        if form.symmetric:
            values.append(index)
        self.launches(values)
        if self.stride != form.cols:
            weights = weights[:, : form.cols]
        sums = []
        if want_x:
            sums.append(product(weights, y))
            if form.symmetric:
                add_product(sums[0], weights.t(), x)
        if want_y:
            sums.append(product(weights.t(), x))
        return value, kept, *sums

    # ---- the call's values: x, y, kept, upstream; (sums, out) of dx and of dy, dscale, as far as they are wanted ----

    def _plan_backward(self) -> None:
        form = self.form
        n, m, d = form.rows, form.cols, form.features
        more = iter(range(5, 10))
        dx, dy = ((given(next(more)), given(next(more))) if want else (_NOTHING,) * 2 for want in form.wants[:2])
        dscale = given(next(more)) if form.wants[2] else _NOTHING
        programs = sum(-(-rows // _ROWS) for rows, want in zip((n, m), form.wants) if want)
        finish = [
            Planned(
                scaled_gradients_kernel, max(programs, 1),
                (
                    given(1), given(2), self._kept(self.coefficients), self._kept(self.dparams), given(4),
                    *dx, *dy, dscale, _NOTHING, *map(number, (n, m, form.offset, d)),
                ),
                SYMMETRIC=form.symmetric, BLOCK=_ROWS, BLOCK_D=block_d(d), **_OPTIONS,
            )
        ]  # fmt: skip
        self.finish = Launches(form.device, finish)

    @staticmethod
    def _kept(place: Place) -> Place:
        return place._replace(source=3)

    def backward(
        self, x: Tensor, y: Tensor, scale: Tensor | float, kept: tuple[Tensor, ...], upstream: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx, dy, dscale."""
        want_x, want_y, want_scale = self.form.wants
        room, *sums = kept
        values = [x, y, room, upstream]
        dx = dy = dscale = None
        if want_x:
            dx = torch.empty_like(x)
            values += sums[0], dx
        if want_y:
            dy = torch.empty_like(y)
            values += sums[-1], dy
        if want_scale:
            dscale = torch.empty_like(scale)
            values.append(dscale)
        self.finish(values)
        return dx, dy, dscale


class _Panel:
    """The launches of the one panel: its statistics, or its weights. Partial results lie in the same room."""

    def __init__(self, form: SoftmaxForm, room: Layout, precision: str, *, weighs: bool) -> None:
        self.form, self.precision, self.weighs = form, precision, weighs
        work = work_of(weighs, not weighs, form.both)
        self.tile = tile = launch.tile_of(form.device, precision, work, form.features)
        self.row_blocks, self.col_blocks = -(-form.rows // tile.block_m), -(-form.cols // tile.block_n)
        self.blocks = self.row_blocks * self.col_blocks
        sizes = launch.Scratch.of(tile, form.rows, form.cols)
        if weighs:
            self.params_partials = room.take(sizes.params)
        else:
            self.row_partials, self.col_partials = room.take(sizes.rows), room.take(sizes.cols if form.both else 0)
        self.unusual = room.take(sizes.unusual)

    def launches(
        self,
        x: Place,
        y: Place,
        params: Place,
        index: Place,
        sides: tuple[Place, ...],
        weights: tuple[Place, Place],
        partials: tuple[Place, Place, Place],
        stride: int,
    ) -> list[Planned]:
        """Usual tiles, and the rest; see launch.run_panel."""
        form, tile = self.form, self.tile
        n, m, d = form.rows, form.cols, form.features
        places = (
            x, y, params, number(0 if form.symmetric else form.offset), index, number(0), _NOTHING,
            *sides, *weights, *partials, self.unusual,
            *map(number, (n, m, d, d, d, stride, n if self.weighs else 0, m if self.weighs and form.both else 0)),
        )  # fmt: skip
        constants: dict[str, Any] = {
            "TERM": launch.TERMS["exponential"], "ROW": True, "COL": form.both, "COLUMNS": int(form.symmetric),
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "GROUP": tile.group,
            "INPUT_PRECISION": "ieee" if self.precision == "ieee" else "tf32",
            "UPCAST": launch.INTERPRETED and form.dtype == torch.bfloat16,
        }  # fmt: skip
        rest = rest_of(tile)
        return [
            Planned(score_kernel, self.blocks, places, **constants, **_of_tile(tile, d)),
            Planned(
                rest_kernel, launch.rest_programs(self.blocks), places, **constants, **_of_tile(rest, d),
                PIECE=rest.block_n, TILES=launch.REST_TILES,
            ),
        ]  # fmt: skip


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
