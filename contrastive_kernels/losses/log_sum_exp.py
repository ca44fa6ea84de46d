"""The logarithm of a row's sum of exponentials, for losses of one's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..arguments.checks import check_engine, check_features, check_positives
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import pairs_of, without_padding
from ..arguments.temperature import scale_of
from ..engine.matrix import Problem
from ..operators.logsumexp import logsumexp
from ..panels.pairs import EVERY_PAIR
from .scales import check_scales

__all__ = ["log_sum_exp"]


def log_sum_exp(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    positives: int | Tensor | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    candidate_bias: Tensor | None = None,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """Log of sum_j exp(logit_scale * <x_i, y_j>) of every row, differentiable: what losses of one's own are made of.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. One of [N] is every row's own, as in
        :func:`info_nce`.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    positives : int or Tensor, optional
        A candidate that each row leaves out: that at ``i + positives`` (an int), or at ``positives[i]`` (int64 [N]; -1:
        none). Without it every candidate counts.
    ids : Tensor or pair of Tensor, optional
        Ids (integers) of the rows [N] and of the candidates [M], one tensor for both where N == M: pairs of equal ids
        are left out.
    candidate_bias : Tensor, optional
        Added to the logits of the candidates [M]. It may require a gradient. A candidate of -inf is padding: its
        features are not used, not even if they are NaN.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        [N]; float32 (float64 for float64 inputs). A row of which nothing counts has -inf, and no gradient.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    4 products of 2 N M D flop for value and all gradients, O((N + M) D) memory. It is one number, so that where logits
    are large their rounding is that of the result: a difference to the positive's logit, which the losses of this
    package take first, is less exact made of it.

    Rows of this process alone count, in a process group too: gather features before, with their gradients.

    Examples
    --------
    DCL, whose denominator has no positive:

    >>> import torch, contrastive_kernels as ck
    >>> x, y = torch.eye(3), torch.eye(3)
    >>> z_pos = 2.0 * (x * y).sum(1)
    >>> (ck.log_sum_exp(x, y, 2.0, positives=0) - z_pos).mean()
    tensor(-1.3069)
    """
    if temperature is not None:
        logit_scale = scale_of(x, logit_scale, temperature)
    x, y = check_features(x, y, ("x", "y"), normalize, padded=candidate_bias is not None)
    index, offset = (None, None) if positives is None else check_positives(positives, x, y, allow_missing=True)
    x, y, scale = check_scales(x, y, logit_scale, padded=candidate_bias is not None)
    engine = check_engine(backend, workspace_bytes)
    pairs = EVERY_PAIR if ids is None and candidate_bias is None else pairs_of(ids, candidate_bias, x, y)
    if pairs.adds:
        x, y, _ = without_padding(x, y, pairs, None, None, None)
    return logsumexp(Problem(x, y, scale, offset=offset, index=index, pairs=pairs, engine=engine))
