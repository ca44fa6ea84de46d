"""NVIDIA GPUs by Triton: tile product and pair term in one kernel; no score leaves the chip."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..panels.pairs import EVERY_PAIR
from ..panels.panel import Panel, Route, Side, present
from ..panels.size import Size
from ..panels.terms import PairTerm
from .base import Backend, Prepared, SoftmaxGains, WholeMatrix
from .products import ADDS_IN_FLOAT32

__all__ = ["SCRATCH_PER_ROW", "SCRATCH_PER_SCORE", "TritonBackend"]

#: The smallest tile of the table, which leaves the most partial results: 8 bytes per row and per column of a tile, and
#: 12 per tile; and 4 per row and column for gains that are referred to a shift.
_SMALLEST_TILE = 64
SCRATCH_PER_SCORE = 16 / _SMALLEST_TILE + 12 / _SMALLEST_TILE**2
SCRATCH_PER_ROW = 20.0
#: ... and 4 per row and per column of a tile whose exponentials are kept.
KEPT_PER_SCORE = 8 / _SMALLEST_TILE

#: The kernels of usual tiles and of the rest, and the one that merges, for a reduce panel and for a weight panel with
#: sums for params.
LAUNCHES = (3, 3)

#: How float32 operands are multiplied, or those of 16 bits.
_ROUTES = {"16-bit": "tensor cores", "tf32": "tensor cores, in TF32", "ieee": "float32 without tensor cores"}


class TritonBackend(Backend):
    """Serves CUDA tensors of 16 and 32 bits; in Triton's interpreter those on the CPU."""

    name = "triton"
    score_tile = False
    native_operands = True
    guide_tile = False
    wants_scratch = True
    vectors = True

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
            return f"it serves CUDA tensors, not those on {device.type}"
        if device.type != "cuda":
            return self.why_not_capability(80, dtype)
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "this torch sees no NVIDIA GPU"
        return self.why_not_capability(_capability(device), dtype)

    def why_not_capability(self, capability: int, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "its scores are float32; float64 is the torch backend's"
        if capability < 80:
            return f"it needs compute capability 8.0; this GPU has {capability / 10:.1f}"
        return _missing() or _miscompiles(capability)

    def route(self, size: Size) -> Route:
        """By the dtype of the operands and, of float32, torch's setting."""
        name = _ROUTES[_kernels().precision_of(size.dtype)]
        return Route(name, LAUNCHES, SCRATCH_PER_SCORE + size.band * KEPT_PER_SCORE, SCRATCH_PER_ROW)

    def launches(self, size: Size, rows: int, cols: int) -> tuple[int, int] | None:
        """In a large panel, another kernel refers the gains of rows and columns to one shift; not to those of tiles."""
        if size.band:
            return LAUNCHES
        capability = size.capability
        if capability is None:
            capability = _capability(size.device) if size.device.type == "cuda" else 0
        tiles = _kernels().persistent_tiles(capability, _kernels().precision_of(size.dtype))
        large = any(tile.fills(rows, cols, size.multiprocessors) for tile in tiles)
        return (LAUNCHES[0], LAUNCHES[1] + (size.pieces and large))

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """Weights are multiplied with the operands, in their dtype."""
        return dtype

    def scratch(self, rows: int, cols: int, size: Size) -> int:
        """float32 that a panel's partial results take."""
        of_panel = size.device, size.dtype, size.features
        limits = {"capped": size.capped, "guided": size.guide > 0}
        return int(_kernels().scratch_floats(rows, cols, *of_panel, kept=size.band, **limits))

    def keeps(self, dtype: torch.dtype, features: int) -> bool:
        """Exponentials, in the weights' dtype; float16 has too few exponents."""
        return dtype in (torch.bfloat16, torch.float32)

    def reduce_panel(self, term: PairTerm, panel: Panel) -> None:
        _run(term, panel, panel.weights if panel.keeps else None)

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        _run(term, panel, panel.weights, present(panel.factor), panel.dparams)

    def prepare(
        self,
        kind: str,
        problem: WholeMatrix,
        size: Size,
        extras: tuple[bool, ...],
        share: float,
        both: bool,
        wants: tuple[bool, ...],
        rule: tuple[float, ...] = (),
    ) -> Prepared | None:
        """float16 is left out, whose weights want a factor of their own, and TF32, which wants rounded operands."""
        if size.dtype == torch.float16 or _kernels().precision_of(size.dtype) == "tf32" or problem.offset is None:
            return None
        if problem.index is not None or problem.pairs is not EVERY_PAIR:
            return None
        if size.dtype != torch.float32 and size.device.type == "cuda" and not ADDS_IN_FLOAT32:
            return None
        from .._triton import whole_launch

        scale, bias = (v.dtype if isinstance(v, Tensor) else None for v in (problem.scale, problem.bias))
        form = whole_launch.Form(
            size.rows, size.cols, size.features, size.dtype, size.device, (scale, bias), extras, share,
            problem.offset, size.symmetric, both, wants, rule,
        )  # fmt: skip
        kinds = {
            "softmax": whole_launch.WholeSoftmax, "sigmoid": whole_launch.WholeSigmoid, "ratio": whole_launch.WholeRatio
        }  # fmt: skip
        return _OnDevice(kinds[kind](form), size.device)

    def operand(self, x: Tensor) -> Tensor:
        with _on(x.device):
            rounded: Tensor = _vector_kernels().tensor_core_operand(x)
        return rounded

    def positive_dots(
        self, x: Tensor, y: Tensor, index: Tensor | None, offset: int | None, problem: WholeMatrix, centered: bool
    ) -> tuple[Tensor, Tensor]:
        with _on(x.device):
            dots, params = _vector_kernels().positive_dots(x, y, index, offset, problem.scale, problem.bias, centered)
        return dots, params

    def softmax_losses(
        self,
        row: Tensor,
        col: Tensor | None,
        dots: Tensor,
        params: Tensor,
        gain: Tensor | None,
        share: float,
        summed: bool,
    ) -> Tensor:
        with _on(dots.device):
            losses: Tensor = _vector_kernels().losses(row, col, dots, params, gain, share, summed)
        return losses

    def softmax_gains(
        self,
        row: Tensor,
        col: Tensor | None,
        dots: Tensor,
        problem: WholeMatrix,
        gain: Tensor | None,
        share: float,
        upstream: Tensor,
    ) -> SoftmaxGains:
        with _on(dots.device):
            return SoftmaxGains(
                *_vector_kernels().gains(row, col, dots, problem.scale, gain, share, upstream.contiguous())
            )

    def finish_gradients(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor | None,
        offset: int | None,
        coefficients: Tensor | None,
        rescale: Tensor | None,
        dx: tuple[Tensor, Tensor] | None,
        dy: tuple[Tensor, Tensor] | None,
        first: int = 0,
    ) -> None:
        with _on(x.device):
            _vector_kernels().gradients(x, y, index, offset, coefficients, rescale, dx, dy, first)


class _OnDevice:
    """What is prepared for a GPU, which is the current one while it runs."""

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        self.prepared, self.device = prepared, device

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        if _is_current(self.device):  # entering a context takes longer than a look
            return self.prepared.forward(*arguments)
        with torch.cuda.device(self.device):
            return self.prepared.forward(*arguments)

    def backward(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        if _is_current(self.device):
            return self.prepared.backward(*arguments)
        with torch.cuda.device(self.device):
            return self.prepared.backward(*arguments)

    def copies(self, kept: list[Tensor]) -> Sequence[Tensor | None]:
        return self.prepared.copies(kept)


@cache
def _kernels() -> Any:
    """The module that launches the kernels; imported where it is first needed."""
    from .._triton import launch

    return launch


@cache
def _vector_kernels() -> Any:
    """The module that launches those around the panels."""
    from .._triton import vector_launch

    return vector_launch


@cache
def _missing() -> str | None:
    """The reason why the kernels cannot be imported, or None."""
    try:
        _kernels()
    except ImportError as error:
        return f"Triton is not installed ({error})"
    except Exception as error:  # whatever a Triton of another version raises, it is the reason
        return f"Triton cannot be used ({type(error).__name__}: {error})"
    return None


def _miscompiles(capability: int) -> str | None:
    """The reason why the Triton that is here cannot compile the kernels for a GPU.

    Triton 3.6 and 3.7 stop in their pass OptimizeTMemLayouts at a maximum of maxima on data-centre Blackwell.
    """
    if not 100 <= capability < 120 or _kernels().TRITON_VERSION >= (3, 8):
        return None
    return "Triton 3.8 is the first that compiles these kernels for compute capability 10 and 11"


def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which takes CPU tensors."""
    return "triton" in sys.modules and _missing() is None and _kernels().INTERPRETED


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _run(term: PairTerm, panel: Panel, *outputs: Tensor | None) -> None:
    with _on(panel.x.device):
        _kernels().run_panel(
            term.name, panel.x, panel.y, panel.params, _kernels().Pairs.of(panel.pairs),
            _vectors(panel.row), _vectors(panel.col), present(panel.scratch), *outputs, kept=panel.keeps,
        )  # fmt: skip


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it a GPU is the current one, which it nearly always is."""
    return _NOTHING_TO_DO if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()


_NOTHING_TO_DO = contextlib.nullcontext()


def _vectors(side: Side) -> Any:
    return _kernels().Vectors(side.state, side.normalizer, side.gain, side.target, side.fresh)
