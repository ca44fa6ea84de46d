"""One function per loss: checks, the part of size O(N D), and one call of a streaming primitive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._autograd import Options, PairSums, log_sum, pair_sum, sigmoid_rows
from ._checks import (
    check_features,
    check_number,
    check_pair,
    check_positives,
    check_reduction,
    check_vector,
    check_workspace,
    make_params,
    require_equal_lengths,
)
from .reference import draw_log_weights, expected_excess, log_or_minus_infinity
from .streaming import score_dtype

__all__ = ["DEFAULT_WORKSPACE_BYTES", "clip_loss", "decomposable", "info_nce", "nt_xent", "sigmoid"]

#: Bound of the memory that holds panels of scores.
DEFAULT_WORKSPACE_BYTES = 64 * 2**20

_PAIR_NAMES = ("image_features", "text_features")


def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: int | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """InfoNCE in one direction: each row of ``x`` finds its positive among the rows of ``y``.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. A 0-d tensor may require a gradient
        and is never read by the host.
    positives : int or Tensor, optional
        Where row i's positive lies in ``y``: at ``i + positives`` (an int; 0 by default), or at ``positives[i]``
        (int64 [N]).
    weight : Tensor, optional
        Weights of the rows [N], not differentiated.
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights. The mean of no rows is 0.
    normalize : bool
        Divide rows by their Euclidean norm first; otherwise inputs are used as they come.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int
        Bound of the memory that holds panels of scores; 64 MiB by default.

    Returns
    -------
    Tensor
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    4 products of 2 N M D flop for value and all gradients (3 where ``y`` needs none), O((N + M) D) memory. The positive
    is left out of the streamed sum and added in float32, so that a nearly solved batch keeps its digits.

    References
    ----------
    A. van den Oord, Y. Li, O. Vinyals, "Representation learning with contrastive predictive coding", 2018.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> queries, documents = torch.eye(3), torch.eye(5)[:, :3]
    >>> round(ck.info_nce(queries, documents, 10.0).item(), 6)
    0.000182
    """
    check_reduction(reduction)
    x, y = check_features(x, y, ("x", "y"), normalize)
    index, offset = check_positives(positives, x, y)
    params = make_params(x, logit_scale)
    options = Options(backend or "", check_workspace(workspace_bytes), offset)
    row, _, dots = log_sum(x, y, params, index, True, False, options)
    return _reduce(_softmax_loss(row, params[0] * dots), _weight(weight, len(x), x), reduction)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """CLIP's symmetric loss: the mean of InfoNCE from images to texts and from texts to images.

    Parameters
    ----------
    image_features, text_features : Tensor
        Matching rows [N, D] of one dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm.
    weight : Tensor, optional
        Weights of the pairs [N], not differentiated.
    reduction : {"mean", "sum", "none"}
        "none" gives every pair's mean of both directions. The mean of no pairs is 0.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    One pass gives the normalisers of rows and columns, a second one the gradients: 4 products, O(N D) memory.

    References
    ----------
    A. Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> features = torch.eye(4, requires_grad=True)
    >>> loss = ck.clip_loss(features, torch.eye(4), 5.0)
    >>> loss.backward()
    >>> round(loss.item(), 5), tuple(features.grad.shape)
    (0.02001, (4, 4))
    """
    check_reduction(reduction)
    x, y = check_features(image_features, text_features, _PAIR_NAMES, normalize)
    require_equal_lengths(x, y, _PAIR_NAMES)
    params = make_params(x, logit_scale)
    options = Options(backend or "", check_workspace(workspace_bytes), 0)
    row, col, dots = log_sum(x, y, params, None, True, True, options)
    z_pos = params[0] * dots
    losses = (_softmax_loss(row, z_pos) + _softmax_loss(col, z_pos)) / 2
    return _reduce(losses, _weight(weight, len(x), x), reduction)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    logit_scale: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """NT-Xent, SimCLR's loss: two views of every sample against all 2N views, each left out of its own denominator.

    Parameters
    ----------
    z1, z2 : Tensor
        Two views of the same samples [N, D] of one dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm.
    weight : Tensor, optional
        Weights of the samples [N], not differentiated; each serves both views.
    reduction : {"mean", "sum", "none"}
        "none" gives [2N], the views of ``z1`` first. The mean of no views is 0.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        A scalar, or [2N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    The matrix of all views is symmetric, so a panel above the diagonal serves its mirror image too: half of the
    products of InfoNCE on the same 2N rows.

    References
    ----------
    T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning of visual
    representations", ICML 2020.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> round(ck.nt_xent(torch.eye(3), torch.eye(3), 2.0).item(), 4)
    0.4328
    """
    check_reduction(reduction)
    z1, z2 = check_features(z1, z2, ("z1", "z2"), normalize)
    require_equal_lengths(z1, z2, ("z1", "z2"))
    n = z1.shape[0]
    views = torch.cat([z1, z2])
    params = make_params(views, logit_scale)
    index = torch.arange(2 * n, device=views.device).roll(n)
    options = Options(backend or "", check_workspace(workspace_bytes), symmetric=True)
    row, _, dots = log_sum(views, views, params, index, True, False, options)
    both = None if weight is None else _weight(weight, n, views).repeat(2)
    return _reduce(_softmax_loss(row, params[0] * dots), both, reduction)


def sigmoid(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """SigLIP's loss: every pair is a binary decision, softplus(-z) for matching pairs and softplus(z) for others.

    Parameters
    ----------
    image_features, text_features : Tensor
        Matching rows [N, D] of one dtype and device.
    logit_scale, logit_bias : float or Tensor
        z = logit_scale * <x, y> + logit_bias; both may be tensors of one element that require gradients.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated.
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum over all pairs by N, "none" gives the row sums [N]. The mean of no pairs is 0.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    One pass gives value and gradients: 3 products ("none": 4, for its gradients depend on what comes from upstream).

    References
    ----------
    X. Zhai, B. Mustafa, A. Kolesnikov, L. Beyer, "Sigmoid loss for language image pre-training", ICCV 2023.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> round(ck.sigmoid(torch.eye(4), torch.eye(4), 10.0, -10.0).item(), 5)
    0.69328
    """
    check_reduction(reduction)
    x, y = check_features(image_features, text_features, _PAIR_NAMES, normalize)
    require_equal_lengths(x, y, _PAIR_NAMES)
    params = make_params(x, logit_scale, logit_bias)
    weight = _weight(weight, len(x), x)
    options = Options(backend or "", check_workspace(workspace_bytes), 0)
    if reduction == "none":
        rows = sigmoid_rows(x, y, params, options)
        return rows if weight is None else rows * weight
    gain = _row_gains(weight, reduction, x)
    return pair_sum(x, y, params, None, "sigmoid", PairSums(None, gain), options)[0]


def decomposable(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    log_normalizer: Tensor | Sequence[Tensor],
    *,
    shape: float | None = None,
    positive_constant: float = 1.0,
    negative_scale: float = 1.0,
    positive_logits: Tensor | Sequence[Tensor] | None = None,
    positives: int | Tensor | None = None,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_log_normalizer: bool = False,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """The decomposable contrastive loss: InfoNCE as a sum of weighted sub-losses over pairs.

    With h_ij = z_ij - z_i,p(i) and Z_i = c + k sum_{j != p(i)} exp(h_ij), the loss of row i is
    ``u_i Z_i - log u_i - 1``: an upper bound of the InfoNCE value log Z_i, with equality at u_i = 1 / Z_i. Given u it is
    a sum over pairs, so any partition of the columns into blocks gives the same gradient.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm.
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
        negative then, but for the ones that ``positives`` names.
    positives : int or Tensor, optional
        As in :func:`info_nce`, for one direction. With ``positive_logits``, indices [N] with -1 for a row whose positive is
        not among the columns.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated.
    generator : torch.Generator, optional
        Source of the draws of u. Activation checkpointing runs the forward again and restores only the default generators:
        draw u outside of it, or leave this None.
    return_log_normalizer : bool
        Also return the batch's own log Z_i, in the form of ``log_normalizer``, not differentiable.
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights. The mean of no rows is 0.
    normalize, backend, workspace_bytes
        As in :func:`info_nce`.

    Returns
    -------
    Tensor or (Tensor, Tensor or pair of Tensor)
        The loss, a scalar or [N] in float32 (float64 for float64 inputs), and the batch's own log Z where asked for.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    One pass gives value and gradients: 3 products (``reduction="none"``: 4). exp(log Z_i - log Zbar_i) is unbounded
    where the stored normaliser is stale; it saturates at the largest number instead of overflowing in the weights.

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
    check_reduction(reduction)
    x, y = check_features(x, y, ("x", "y"), normalize)
    sides = _decomposable_sides(x, y, log_normalizer, positive_logits, positives)
    index, offset = (None, None)
    if positive_logits is None or positives is not None:
        index, offset = check_positives(positives, x, y)
    shape = None if shape is None else check_number(shape, "shape", positive=True)
    c = check_number(positive_constant, "positive_constant", positive=False)
    log_k = log_or_minus_infinity(check_number(negative_scale, "negative_scale", positive=False))
    params = make_params(x, logit_scale)
    weight = _weight(weight, len(x), x)
    options = Options(backend or "", check_workspace(workspace_bytes), offset)

    log_weights = [draw_log_weights(log_z, shape, generator) for log_z, _ in sides]  # log(u Zbar)
    # what the value holds beside the stream: u c - log u - 1, without the excess that drawing u adds
    constants = torch.zeros(len(x), dtype=params.dtype, device=x.device)
    for (log_z, _), log_weight in zip(sides, log_weights):
        log_u = log_weight - log_z
        constants = constants + (torch.exp(log_u) * c - log_u - 1 - expected_excess(shape)) / len(sides)
    # exp(z - normalizer) is u_i k exp(h_ij); the positive's logit is added by the stream unless it is given
    normalizers = [log_z - log_weight - log_k for (log_z, _), log_weight in zip(sides, log_weights)]
    relative = positive_logits is None
    if not relative:
        normalizers = [n + z_pos for n, (_, z_pos) in zip(normalizers, sides)]

    both = len(sides) == 2
    if reduction == "none":
        row, col, dots = log_sum(x, y, params, index, True, both, options)
        log_sums = [row, col] if both else [row]
        z_pos = params[0] * dots if relative else 0.0
        streamed = sum(torch.exp(s - z_pos - n) for s, n in zip(log_sums, normalizers)) / len(sides)
        loss = streamed + constants if weight is None else (streamed + constants) * weight
    else:
        gain = _row_gains(weight, reduction, x)
        share = gain / len(sides)
        sums = PairSums(normalizers[0], share, *((normalizers[1], share) if both else (None, None)), relative)
        total, row, col, dots = pair_sum(x, y, params, index, "exponential", sums, options)
        log_sums = [row, col] if both else [row]
        loss = total + (gain * constants).sum()
    if not return_log_normalizer:
        return loss
    log_zs = []
    for log_sum_, (_, z_pos) in zip(log_sums, sides):
        own = (log_sum_ - (params[0] * dots if relative else z_pos) + log_k).detach()
        log_zs.append(torch.logaddexp(own, torch.full_like(own, log_or_minus_infinity(c))))
    return loss, ((log_zs[0], log_zs[1]) if both else log_zs[0])


def _decomposable_sides(
    x: Tensor, y: Tensor, log_normalizer: object, positive_logits: object, positives: object
) -> list[tuple[Tensor, Tensor | None]]:
    """(log Zbar, the positive's logit if it is given) for the rows, and for the columns if both directions train."""
    if isinstance(log_normalizer, Tensor):
        values, logits, names = (log_normalizer,), (positive_logits,), ("log_normalizer",)
    else:
        values, names = check_pair(log_normalizer, "log_normalizer"), ("log_normalizer[0]", "log_normalizer[1]")
        logits = (None, None) if positive_logits is None else check_pair(positive_logits, "positive_logits")
        require_equal_lengths(x, y, ("x", "y"))
        if positives is not None:
            raise ValueError("positives: expected None with a pair of log_normalizer: row i matches column i")
    sides = []
    for value, logit, name in zip(values, logits, names):
        log_z = check_vector(value, name, len(x), x, differentiable=True).detach()
        z_pos = None
        if logit is not None:
            z_pos = check_vector(logit, name.replace("log_normalizer", "positive_logits"), len(x), x, True)
        sides.append((log_z, z_pos))
    return sides


def _softmax_loss(log_sum_of_negatives: Tensor, z_pos: Tensor) -> Tensor:
    """softplus(n_i - z_pos) [N]: 0 without negatives."""
    return -logsigmoid(z_pos - log_sum_of_negatives)


def _weight(weight: Tensor | None, length: int, x: Tensor) -> Tensor | None:
    """The weights [N] in the dtype of the scores."""
    return None if weight is None else check_vector(weight, "weight", length, x)


def _reduce(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The weighted mean (by the sum of weights; 0 of nothing), the weighted sum, or the weighted rows."""
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weight is None:
        return losses.sum() / max(losses.shape[0], 1)
    return losses.sum() / _nonzero_sum(weight)


def _row_gains(weight: Tensor | None, reduction: str, x: Tensor) -> Tensor:
    """dL/d(loss of row i) [N] for a mean or a sum."""
    if weight is None:
        share = 1.0 / max(x.shape[0], 1) if reduction == "mean" else 1.0
        return torch.full((x.shape[0],), share, dtype=score_dtype(x.dtype), device=x.device)
    return weight / _nonzero_sum(weight) if reduction == "mean" else weight


def _nonzero_sum(weight: Tensor) -> Tensor:
    """The sum of the weights, or 1 where it is 0: a mean of nothing is 0, not NaN."""
    total = weight.sum()
    return total.masked_fill(total == 0, 1.0)
