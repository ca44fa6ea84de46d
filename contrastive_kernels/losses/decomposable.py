"""The decomposable loss: a sum of weighted sub-losses over pairs, streamed in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import constant_in_graphs
from ..arguments.checks import (
    check_engine,
    check_features,
    check_flag,
    check_generator,
    check_number,
    check_pair,
    check_positives,
    check_reduction,
    check_scale,
    check_vector,
    is_shared,
    require_equal_lengths,
)
from ..arguments.margin import Margin, check_margin
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import pairs_of, require_alone, require_one_rank, without_padding
from ..arguments.reduction import gains_or_weights
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of, tell
from ..distributed.losses import over_ranks
from ..distributed.rules import Ratio
from ..draws.gamma import draw_log_weights, expected_excess, log_or_minus_infinity
from ..engine.matrix import Problem
from ..operators.weighted_sum import constants_of, exponential_sums, rests_of
from ..panels.pairs import EVERY_PAIR
from .ceilings import with_margin
from .module import Loss
from .ratios import without_infinity
from .scales import check_scales, is_by_row

__all__ = ["DecomposableLoss", "decomposable"]


def decomposable(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor | None = None,
    log_normalizer: Tensor | Sequence[Tensor] | None = None,
    *,
    temperature: float | Tensor | None = None,
    shape: float | None = None,
    positive_constant: float = 1.0,
    negative_scale: float = 1.0,
    positive_logits: Tensor | Sequence[Tensor] | None = None,
    positives: int | Tensor | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    candidate_bias: Tensor | None = None,
    margin: Margin | None = None,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_log_normalizer: bool = False,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """The decomposable contrastive loss: InfoNCE as a sum of weighted sub-losses over pairs.

    With h_ij = z_ij - z_i,p(i) and Z_i = c + k sum_{j != p(i)} exp(h_ij), the loss of row i is
    ``u_i Z_i - log u_i - 1``: an upper bound of the InfoNCE value log Z_i, with equality at u_i = 1 / Z_i. Given u it
    is a sum over pairs, so any partition of the columns into blocks gives the same gradient.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. One of [N], for one direction, is every
        row's own, as in :func:`info_nce`.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    log_normalizer : Tensor or pair of Tensor
        log Zbar_i [N], known before this batch was seen; a pair ([N], [M]) trains both directions from the one pass
        (N == M) and gives their mean. Not differentiated.
    shape : float, optional
        None: u_i = 1 / Zbar_i, the mean. A number a: u_i is drawn from Gamma(a, rate = a * Zbar_i) (1 is the exact
        conditional distribution), and the expected excess log a - digamma(a) is subtracted from the value.
    positive_constant : float
        c: 1 for InfoNCE, 0 where the denominator has no positive (DCL).
    negative_scale : float
        k = K / B, the notional number of negatives over the number in the batch.
    positive_logits : Tensor or pair of Tensor, optional
        z_i,p(i) [N], differentiable, for a block of columns that does not hold row i's positive. Every column is a
        negative then, but for the ones that ``positives`` names. -inf has no gradient.
    positives : int or Tensor, optional
        As in :func:`info_nce`, for one direction. With ``positive_logits``, indices [N] with -1 for a row whose
        positive is not among the columns.
    ids : Tensor or pair of Tensor, optional
        As in :func:`info_nce`; with two directions they are left out of both.
    candidate_bias : Tensor, optional
        As in :func:`info_nce`, for one direction.
    margin : float or ("relative", float), optional
        As in :func:`info_nce`; with two directions, in each by its own positive.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated; of either sign.
    generator : torch.Generator, optional
        Source of the draws of u. Activation checkpointing runs the forward again and restores only the default
        generators: leave this None there, or backward raises.
    return_log_normalizer : bool
        Also return the batch's own log Z_i, in the form of ``log_normalizer``, not differentiable.
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights. The mean of no rows is 0.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
        As in :func:`info_nce`; with a `group`, ``log_normalizer`` and ``positive_logits`` are of this rank's rows, and
        ``positives`` count among its own columns.

    Returns
    -------
    Tensor or (Tensor, Tensor or pair of Tensor)
        The loss, a scalar or [N] in float32 (float64 for float64 inputs), and the batch's own log Z where asked for.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.
    NotImplementedError
        Over the ranks of a group, for biases and a margin.

    Notes
    -----
    One pass gives value and gradients: 3 products (``reduction="none"``: 4). The weights exp(log Z_i - log Zbar_i) of a
    stale normaliser are unbounded: from some 88 nats on, value and gradients of that row overflow.

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

    References
    ----------
    After C. Chen et al., "Why do we need large batch sizes in contrastive learning? A gradient-bias perspective",
    NeurIPS 2022; derivation in docs/mathematics.md.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> x, y = torch.eye(4), torch.eye(4)
    >>> _, log_z = ck.decomposable(x, y, 5.0, torch.zeros(4), return_log_normalizer=True)
    >>> torch.allclose(ck.decomposable(x, y, 5.0, log_z), ck.info_nce(x, y, 5.0))
    True
    """
    if temperature is not None:
        logit_scale = scale_of(x, logit_scale, temperature)
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    try:
        if candidate_bias is not None:
            require_alone(ranks, candidate_bias)
        if margin is not None:
            check_margin(margin)
            require_one_rank(ranks, "margin")
        check_reduction(reduction)
        x, y = check_features(x, y, ("x", "y"), normalize, padded=candidate_bias is not None)
        sides = _decomposable_sides(x, y, log_normalizer, positive_logits, positives)
        index, offset = (None, None)
        if positive_logits is None or positives is not None:
            index, offset = check_positives(positives, x, y, allow_missing=positive_logits is not None)
        shape, c, k = _check_rule(shape, positive_constant, negative_scale)
        log_k = log_or_minus_infinity(k)
        by_row = len(sides) == 1 and is_by_row(logit_scale)
        if by_row:
            x, y, logit_scale = check_scales(x, y, logit_scale, candidate_bias is not None)
        scale, engine = check_scale(x, logit_scale), check_engine(backend, workspace_bytes)
        pairs = EVERY_PAIR if ids is None and candidate_bias is None else pairs_of(ids, candidate_bias, x, y)
        if pairs.adds:
            if len(sides) == 2:
                raise ValueError(
                    "candidate_bias: expected None with a pair of log_normalizer, which trains both directions"
                )
            x, y, weight = without_padding(x, y, pairs, offset, index, weight)
        problem = Problem(x, y, scale, offset=offset, index=index, pairs=pairs, engine=engine)
        if margin is not None:
            given = [logit for _, logit in sides]
            problem = with_margin(problem, margin, both=len(sides) == 2, logits=given)
        gain = None if weight is None else gains_or_weights(weight, x.shape[0], x, reduction, ranks)
        check_generator(generator, x.device)
        check_flag(return_log_normalizer, "return_log_normalizer")
    except (TypeError, ValueError, NotImplementedError) as error:
        tell(ranks, error, x)
        raise

    # -log u of rows, and of columns; u_i k sum exp(h_ij) is a sum over exp(z - z_pos - rest)
    minus_log_us = [log_z if shape is None else log_z - draw_log_weights(log_z, shape, generator) for log_z, _ in sides]
    excess = _excess(shape)
    logits = [without_infinity(logit) for _, logit in sides if logit is not None] or None
    if ranks is not None:
        of_sides = [constants_of(each, c, excess, gain) for each in minus_log_us]
        constant = of_sides[0] if len(sides) == 1 else (of_sides[0] + of_sides[1]) / 2
        rule = Ratio([rests_of(each, log_k, gain) for each in minus_log_us], logits, constant)
        about = (
            ("directions", len(sides)), ("positive_logits given", logits is not None), ("normalize", normalize),
            ("shape", shape), ("positive_constant", c), ("negative_scale", k), ("scales by row", by_row),
        )  # fmt: skip
        loss = over_ranks(rule, ranks, "decomposable", problem, gain, reduction, about)
        normalizers, dots = rule.normalizers, rule.dots
    else:
        numbers, alone = (c, log_k, excess), not return_log_normalizer
        sums = exponential_sums(problem, minus_log_us, logits, gain, reduction, numbers, values_alone=alone)
        loss, normalizers, dots = sums.values, sums.normalizers, sums.dots
    if not return_log_normalizer:
        return loss
    return loss, _own_log_normalizers(normalizers, problem, dots, sides, log_k, c)


@constant_in_graphs
def _excess(shape: float | None) -> float:
    """What comes off u Z - log u: 1, and what drawing u adds to it."""
    return 1.0 + float(expected_excess(shape))


def _check_rule(shape: Any, positive_constant: Any, negative_scale: Any) -> tuple[float | None, float, float]:
    """Gamma's shape, c and k."""
    return (
        None if shape is None else check_number(shape, "shape", positive=True),
        check_number(positive_constant, "positive_constant", positive=False),
        check_number(negative_scale, "negative_scale", positive=False),
    )


def _own_log_normalizers(
    normalizers: list[Tensor],
    problem: Problem,
    dots: Tensor,
    sides: list[tuple[Tensor, Tensor | None]],
    log_k: float,
    c: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """The batch's own log Z of rows, or a pair with that of columns."""
    found = zip(normalizers, sides)
    own = [_own_log_normalizer(normalizer, problem, dots, given, log_k, c) for normalizer, (_, given) in found]
    return (own[0], own[1]) if len(own) == 2 else own[0]


def _own_log_normalizer(
    normalizer: Tensor, problem: Problem, dots: Tensor, given: Tensor | None, log_k: float, c: float
) -> Tensor:
    """log(c + k sum_j exp(h_ij)) [N] of the batch itself, from the log-sum-exp that it found."""
    shift, rest = normalizer.detach()
    z_pos = given
    if z_pos is None:
        z_pos = problem.pairs.add_to_positives(problem.scale * dots, problem.positives.columns(len(dots)))
    log_z = ((shift - z_pos) + rest + log_k).detach()
    return torch.logaddexp(log_z, torch.full_like(log_z, log_or_minus_infinity(c)))


def _decomposable_sides(
    x: Tensor, y: Tensor, log_normalizer: object, positive_logits: object, positives: object
) -> list[tuple[Tensor, Tensor | None]]:
    """(log Zbar, the positive's logit if it is given) for the rows, and for the columns if both directions train."""
    logits: list[object]
    if isinstance(log_normalizer, Tensor):
        values, logits, numbers = [log_normalizer], [positive_logits], [""]
    else:
        values, numbers = list(check_pair(log_normalizer, "log_normalizer")), ["[0]", "[1]"]
        logits = [None, None] if positive_logits is None else list(check_pair(positive_logits, "positive_logits"))
        require_equal_lengths(x, y, ("x", "y"))
        if positives is not None:
            raise ValueError(
                "positives: expected None with a pair of log_normalizer, where row i matches column i; "
                f"got {type(positives).__name__}"
            )
    sides = []
    for value, logit, number in zip(values, logits, numbers):
        log_z = check_vector(value, f"log_normalizer{number}", len(x), x, differentiable=True)
        if log_z.requires_grad:
            log_z = log_z.detach()
        z_pos = None
        if logit is not None:
            z_pos = check_vector(logit, f"positive_logits{number}", len(x), x, differentiable=True)
        sides.append((log_z, z_pos))
    return sides


class DecomposableLoss(Loss):
    """The decomposable loss from a given log-normaliser; see :func:`contrastive_kernels.decomposable`.

    Parameters
    ----------
    shape : float, optional
        None: u is its mean; a number: the shape of the gamma distribution that u is drawn from.
    positive_constant, negative_scale : float
        c and k of Z_i = c + k * sum over negatives.
    return_log_normalizer : bool
        Also return the batch's own log Z.
    margin : float or ("relative", float), optional
        As in :func:`contrastive_kernels.info_nce`.
    reduction : {"mean", "sum", "none"}
        "none" gives the rows' losses [N].
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.DecomposableLoss(shape=1.0)
    >>> loss(torch.randn(4, 8), torch.randn(4, 8), 1.0, (torch.zeros(4), torch.zeros(4))).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        shape: float | None = None,
        positive_constant: float = 1.0,
        negative_scale: float = 1.0,
        return_log_normalizer: bool = False,
        margin: Margin | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        shape, positive_constant, negative_scale = _check_rule(shape, positive_constant, negative_scale)
        check_margin(margin)
        self.options.update(
            shape=shape,
            positive_constant=positive_constant,
            negative_scale=negative_scale,
            return_log_normalizer=check_flag(return_log_normalizer, "return_log_normalizer"),
            margin=margin,
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: float | Tensor | None = None,
        log_normalizer: Tensor | Sequence[Tensor] | None = None,
        positive_logits: Tensor | Sequence[Tensor] | None = None,
        positives: int | Tensor | None = None,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | Sequence[Tensor] | None = None,
        candidate_bias: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Anchors [N, D], candidates [M, D], log Zbar [N] or a pair ([N], [M])."""
        return decomposable(
            x,
            y,
            logit_scale,
            log_normalizer,
            temperature=temperature,
            positive_logits=positive_logits,
            positives=positives,
            ids=ids,
            candidate_bias=candidate_bias,
            weight=weight,
            generator=generator,
            **self.options,
        )
