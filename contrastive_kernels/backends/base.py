"""What a backend is: two operations on a panel, one for searches, and what it asks of the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..panels.pairs import Pairs
from ..panels.panel import Panel, Route, SearchPanel, Side
from ..panels.size import Size
from ..panels.terms import EXPONENTIAL, SIGMOID, PairTerm

__all__ = ["Backend", "Entries", "Prepared", "SoftmaxGains", "WholeMatrix"]


class Prepared(Protocol):
    """A loss of one form, its launches prepared: gradients come with the value, up to the factor from upstream."""

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor | float,
        bias: Tensor | float,
        extras: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """The value, and what `backward` needs."""
        ...

    def backward(
        self, x: Tensor, y: Tensor, scale: Tensor | float, bias: Tensor | float, kept: list[Tensor], upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dx, dy, dscale, dbias, as far as they are wanted."""
        ...

    def copies(self, kept: list[Tensor]) -> Sequence[Tensor | None]:
        """Of a "ratio", what the kernels have copied of -log u of rows and of columns."""
        ...


class Entries(NamedTuple):
    """A sparse matrix that is added to a product's x [R, K] and not rounded: an entry a row, or `turned` a column."""

    #: float32 [R], turned [K]
    values: Tensor
    #: int64, the column (turned: the row) of entry e; None: e + offset. Those that lie outside of x do not count
    places: Tensor | None = None
    offset: int = 0
    turned: bool = False


class WholeMatrix(Protocol):
    """What is said of a small matrix beside its scores; see :class:`contrastive_kernels.engine.matrix.Problem`."""

    @property
    def scale(self) -> Tensor | float: ...
    @property
    def bias(self) -> Tensor | float: ...
    @property
    def offset(self) -> int | None: ...
    @property
    def index(self) -> Tensor | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def pairs(self) -> Pairs: ...


class SoftmaxGains(NamedTuple):
    """What a gradient pass of the softmax losses is told."""

    #: [3] scale, 0 and a center of the scores
    params: Tensor
    #: [N], [N] gain * softmax of rows and of columns
    row: Tensor
    col: Tensor | None
    #: [N] dL/d<x_i, y_p(i)>
    coefficients: Tensor
    #: float64 [2] the positives' part of dL/d(scale, bias)
    dparams: Tensor


class Backend:
    """The operations on a panel, the terms that they know, and why they cannot serve a device and dtype.

    A subclass per file; the registry holds one object of each.
    """

    name: ClassVar[str]
    #: the pair terms that it knows
    terms: ClassVar[tuple[PairTerm, ...]] = (EXPONENTIAL, SIGMOID)
    #: it wants room for a panel's scores [R, C]; without it no scores are kept between the passes
    score_tile: ClassVar[bool] = True
    #: it takes operands in their own dtype, not in that of the scores
    native_operands: ClassVar[bool] = False
    #: it wants room for a panel's scores of a guide [R, C], and makes them there
    guide_tile: ClassVar[bool] = True
    #: score-sized temporaries that its operations allocate beside the workspace's own, and those of a search
    temporaries: ClassVar[int] = 0
    search_temporaries: ClassVar[int] = 0

    #: it wants memory beside: `scratch` says how much
    wants_scratch: ClassVar[bool] = False
    #: its panels' rows and columns may have scales of their own: one score, two logits
    scales_by_row: ClassVar[bool] = False
    #: it computes a small matrix, whose scores are there, in one call
    whole_matrix: ClassVar[bool] = False
    #: it has the operations around a pass too, from `positive_dots` to `finish_gradients`, and knows fresh states
    vectors: ClassVar[bool] = False

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why it cannot serve, or None."""
        raise NotImplementedError

    def why_not_capability(self, capability: int, dtype: torch.dtype) -> str | None:
        """The same for a GPU that is not there, by its compute capability (90 for 9.0)."""
        return self.why_not(torch.device("cuda"), dtype)

    def route(self, size: Size) -> Route:
        """How it would compute what it can serve."""
        raise NotImplementedError

    def launches(self, size: Size, rows: int, cols: int) -> tuple[int, int] | None:
        """Kernels that a panel of R x C scores starts, (reduce, weight with sums for params); None: not counted."""
        return self.route(size).launches

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype of its weights for operands of this dtype; one with float16 weights honours panel.factor."""
        raise NotImplementedError

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether it has a product of its own for features of this dtype, faster than torch's or more exact."""
        return False

    def multiply(self, x: Tensor, y: Tensor, out: Tensor, add: bool = False, entries: Entries | None = None) -> None:
        """out [R, C] (+)= x [R, K] y [K, C], of 16-bit operands, or ones that it rounds to 16 bits; sums in float32.

        out is float32, or bfloat16 unless it is added to. With entries, which are x's too, y has 16 bits.
        """
        raise NotImplementedError

    def keeps(self, dtype: torch.dtype, features: int) -> bool:
        """Whether `reduce_panel` can leave behind what `weight_panel` wants, so that scores are not made twice."""
        return False

    def scratch(self, rows: int, cols: int, size: Size) -> int:
        """float32 that it wants beside for a panel of R rows and C columns; its route has a bound."""
        return 0

    def reduce_panel(self, term: PairTerm, panel: Panel) -> None:
        """Folds the panel into row.state and col.state; where it keeps, it may write to weights and scratch."""
        raise NotImplementedError

    def weight_panel(self, term: PairTerm, panel: Panel) -> None:
        """Leaves factor * dL/dz in panel.weights, its sums in panel.dparams; folds into the states there are.

        Of a panel that keeps, they are made of what `reduce_panel` has left there and in the scratch.
        """
        raise NotImplementedError

    def search_panel(self, term: PairTerm, panel: SearchPanel) -> None:
        """Folds the panel into the rows' best score and its column, or into their counts."""
        raise NotImplementedError

    def softmax_matrix(
        self,
        scores: Tensor,
        problem: WholeMatrix,
        gain: Tensor | None,
        share: float,
        both: bool,
        include: bool,
        unscaled: bool = False,
        lift: tuple[Tensor, Tensor] | None = None,
        guide: Tensor | None = None,
        positive_weights: Tensor | None = None,
    ) -> tuple[Tensor, float, float]:
        """sum_i gain_i softplus(n_i - z_i,p(i)), of rows and with `both` of columns; its dL/dscale and dL/dbias.

        Without `include`, whose denominator has no positive, gain_i (n_i - z_i,p(i)), and 0 for a row of no negatives.
        The scores [N, M] become scale * dL/dz, that of the positives included; positive_weights [N], if they are there,
        receive those instead (0 in a row without one), and their places become 0. Of a symmetric matrix they are the
        sum of both triangles'; `unscaled`, dL/dz. Without gains, all are `share`. A lift [N] is added to the positives'
        logits in the losses, of rows alone; its gradient [N], the second, is written. guide: its scores [N, M], with
        thresholds.
        """
        raise NotImplementedError

    def label_matrix(
        self, scores: Tensor, problem: WholeMatrix, gain: Tensor, share: Tensor, positive_weights: Tensor | None = None
    ) -> tuple[Tensor, float, float]:
        """sum_i gain_i (log-sum_i - mean_p z_ip), p the columns of the row's id; and the rest as above.

        share [N] is 1 over the number of a row's positives, 0 without. The index of a row with one is its column, which
        is left out of the log-sum: gain_i softplus(n_i - z_ip).
        """
        raise NotImplementedError

    def sigmoid_matrix(
        self,
        scores: Tensor,
        problem: WholeMatrix,
        gain: Tensor | None,
        share: float,
        positive_weights: Tensor | None = None,
    ) -> tuple[Tensor, float, float]:
        """sum_i gain_i (sum_j softplus(z_ij) over negatives + softplus(-z_i,p(i))), and the rest as above."""
        raise NotImplementedError

    def weighted_matrix(
        self,
        scores: Tensor,
        problem: WholeMatrix,
        row: Side,
        col: Side,
        share: float,
        relative: bool,
        positive_weights: Tensor | None = None,
    ) -> tuple[Tensor, float, float, list[Tensor], Tensor]:
        """sum_i gain_i sum_j exp(z_ij - a_i) over negatives with given normalisers, perhaps of columns too; its
        dL/dscale and dL/dbias, the normalisers found in rows (and columns) [2, n], and the positives' dot products [N].

        Relative normalisers are what is added to the positive's logit [n]; +inf says that a row has no negatives.
        """
        raise NotImplementedError

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
        """A sum of losses, prepared, whose matrix is one panel; None: there is none.

        Its kind is "softmax" or "sigmoid", with weights of the rows, if any, as its extras; or "ratio", with -log u of
        rows and of columns, and weights, and with c, log k and the excess as its rule. It serves tensors of this form
        that are contiguous and aligned to 16 bytes. In a symmetric matrix the positive of row i is i + offset modulo N.
        """
        return None

    def operand(self, x: Tensor) -> Tensor:
        """x [N, D], contiguous, as its products take it; a copy where they would cut digits off instead of rounding."""
        return x

    def positive_dots(
        self, x: Tensor, y: Tensor, index: Tensor | None, offset: int | None, problem: WholeMatrix, centered: bool
    ) -> tuple[Tensor, Tensor]:
        """<x_i, y_p(i)> [N], 0 where a row has no positive; and params [3], with a center of these or 0. N > 0."""
        raise NotImplementedError

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
        """share * gain_i * softplus(n_i - z_i,p(i)) [N], and that of the columns, or the sum of all.

        The states (shift, sum) [2, N] become normalisers (shift, rest), as `softmax_gains` and panels take them.
        """
        raise NotImplementedError

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
        """What the gradient pass of the same losses is told; upstream [] or [N]."""
        raise NotImplementedError

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
        """out = sums * rescale + the positives' part of (sums, out) of dx, its rows from `first` on, and of dy.

        The index is that of dx's rows; where there is one, dy has its part already.
        """
        raise NotImplementedError

    def refusal(self, device: torch.device, dtype: torch.dtype, term: PairTerm = EXPONENTIAL) -> str | None:
        """Why it cannot serve a term on this device and in this dtype, or None: it can."""
        reason = self.why_not(device, dtype)
        if reason is None and term not in self.terms:
            return f"it has no {term.name} term"
        return reason
