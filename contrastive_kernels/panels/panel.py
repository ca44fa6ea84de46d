"""One panel, a block of the score matrix: what the driver hands to a backend's two operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .pairs import Pairs

__all__ = ["Panel", "Route", "SearchPanel", "Side", "in_pieces", "present"]


@dataclass(frozen=True)
class Route:
    """How a backend computes panels of some size, dtype and device, and what that takes beside operands and weights."""

    name: str
    #: kernels that a panel starts, (reduce, weight with sums for params), without the driver's products; None: not
    #: counted
    launches: tuple[int, int] | None = None
    #: a bound of the scratch: bytes per score, and per row and column
    scratch_per_score: float = 0.0
    scratch_per_row: float = 0.0
    #: the scratch holds the panel's scores, in float32
    scores_in_scratch: bool = False


@dataclass(slots=True)
class Side:
    """The vectors that go with a panel's rows (or columns); None where this side takes no part."""

    #: [state_rows, n] running state, updated in place: (shift, sum), the sum of exp(z - shift), or (sum)
    state: Tensor | None = None
    #: [2, n] log-normalisers a_i (rows) or b_j (columns) as two numbers, (shift, rest): one rounded number would lose
    #: the rest where the shift is large. A rest of +inf says that there are no negatives
    normalizer: Tensor | None = None
    #: [n] r_i (rows) or c_j (columns)
    gain: Tensor | None = None
    #: [2, n] what is subtracted from the weights of pairs that count: of those of other ids, and of equal ids; where
    #: exponentials are softmaxes times the gain, the gain times the probabilities that they are to have
    target: Tensor | None = None
    #: nobody has written the state yet: this panel is the first, for a backend that knows it
    fresh: bool = False
    #: [n] += sum of this side's part of w * (score - center), where rows and columns have scales
    dscale: Tensor | None = None


@dataclass(slots=True)
class Panel:
    """A block of R rows and C columns of the score matrix."""

    #: [R, D], [C, D] blocks of the operands, in the dtype of the scores or, if the backend says so, in their own
    x: Tensor
    y: Tensor
    #: [R, C] workspace for the dot products, in float32 or float64; empty where the backend wants none
    scores: Tensor
    #: [R, C] where a weight panel leaves factor * dL/dz; it may be `scores` itself
    weights: Tensor
    #: [3] scale, bias and center, on the device
    params: Tensor
    #: which pairs count
    pairs: Pairs = field(default_factory=Pairs)
    #: the scores, and the guide's, were kept from an earlier pass
    scores_ready: bool = False
    #: the statistics may leave behind, where the weights will be and in the scratch, what weights are made of
    keeps: bool = False
    #: the operands hold bfloat16 values
    bfloat16_values: bool = False
    row: Side = field(default_factory=Side)
    col: Side = field(default_factory=Side)
    #: [2] += sum of w * (score - center), sum of w (float64); where a row's weights sum to 0 the center may be any
    #: score, and one near them keeps the digits
    dparams: Tensor | None = None
    #: [1] what the weights are multiplied by: the scale, except where weights are float16; None: the scale
    factor: Tensor | None = None
    #: float32 for partial results, as many as the backend asked for
    scratch: Tensor | None = None
    #: [R, C] workspace for a guide's dot products, as `scores` is for theirs; None without one
    guide: Tensor | None = None


@dataclass(slots=True)
class SearchPanel(Panel):
    """A block of the score matrix of which only each row's best column, or a count, is wanted."""

    #: [1] int64, the key of the noise
    seed: Tensor | None = None
    #: [R] the best score so far, in the dtype of the scores, and [R] int64 its column; updated in place
    best: Tensor | None = None
    best_column: Tensor | None = None
    #: [R], [R] bounds, in the dtype of the scores
    low: Tensor | None = None
    high: Tensor | None = None
    #: [R], [R] int64 += number of scores below `low`, above `high`
    below: Tensor | None = None
    above: Tensor | None = None


def present(vector: Tensor | None) -> Tensor:
    """A side's vector without which the pair term has no weights."""
    if vector is None:
        raise RuntimeError("contrastive_kernels: a panel came without a vector that its pair term needs")
    return vector


def in_pieces(operand: Tensor) -> bool:
    """Whether rows can be copied in pieces of 16 bytes."""
    wide = operand.stride(1) == 1 and operand.shape[1] > 0
    lengths = (operand.shape[1], operand.stride(0))
    return wide and operand.data_ptr() % 16 == 0 and not any(n * operand.element_size() % 16 for n in lengths)
