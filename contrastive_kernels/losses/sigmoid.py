"""The sigmoid loss: the function and its module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import (
    check_engine,
    check_features,
    check_flag,
    check_reduction,
    check_scale,
    is_shared,
)
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import pairs_of, require_alone, without_padding
from ..arguments.reduction import gains_or_weights
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of, tell
from ..distributed.losses import over_ranks
from ..distributed.rules import Sigmoid
from ..engine.matrix import Problem
from ..operators.sigmoid_loss import sigmoid_loss
from ..panels.pairs import EVERY_PAIR
from .module import PAIR_NAMES, Loss

__all__ = ["SigmoidLoss", "sigmoid"]


def sigmoid(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    candidate_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
) -> Tensor:
    """SigLIP's loss: every pair is a binary decision, softplus(-z) for matching pairs and softplus(z) for others.

    Parameters
    ----------
    image_features, text_features : Tensor
        Matching rows [N, D] of one dtype and device; with ``ids`` any rows [N, D] and [M, D].
    logit_scale, logit_bias : float or Tensor
        z = logit_scale * <x, y> + logit_bias; both may be tensors of one element that require gradients.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    ids : Tensor or pair of Tensor, optional
        Ids (integers) of the images [N] and of the texts [M], one tensor for both where N == M: the matching pairs are
        those of equal ids, several of a row or none. Without ids, image i matches text i.
    candidate_bias : Tensor, optional
        Added to the logits of the texts [M], matching or not. It may require a gradient. A text of -inf is padding: its
        features are not used, not even if they are NaN; without ids, so is its image, which is left out of the mean.
    weight : Tensor, optional
        Weights of the rows [N], not differentiated; of either sign.
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum over all pairs by N, "none" gives the row sums [N]. The mean of no pairs is 0.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
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

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

    References
    ----------
    X. Zhai, B. Mustafa, A. Kolesnikov, L. Beyer, "Sigmoid loss for language image pre-training", ICCV 2023.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> round(ck.sigmoid(torch.eye(4), torch.eye(4), 10.0, -10.0).item(), 5)
    0.69328
    """
    if temperature is not None:
        logit_scale = scale_of(image_features, logit_scale, temperature)
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    try:
        if candidate_bias is not None:
            require_alone(ranks, candidate_bias)
        check_reduction(reduction)
        padded = candidate_bias is not None
        x, y = check_features(image_features, text_features, PAIR_NAMES, normalize, matching=ids is None, padded=padded)
        scale, bias = check_scale(x, logit_scale), check_scale(x, logit_bias, "logit_bias")
        offset, pairs = (0, EVERY_PAIR) if ids is None else (None, pairs_of(ids, None, x, y))
        if candidate_bias is not None:  # positives in the stream, which leaves out
            of_pairs = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
            pairs = pairs_of(of_pairs if ids is None else ids, candidate_bias, x, y)
            x, y, weight = without_padding(x, y, pairs, offset, None, weight)
            offset = None
        problem = Problem(x, y, scale, bias, offset=offset, pairs=pairs, engine=check_engine(backend, workspace_bytes))
        gains = None if weight is None else gains_or_weights(weight, x.shape[0], x, reduction, ranks)
    except (TypeError, ValueError, NotImplementedError) as error:
        tell(ranks, error, image_features)
        raise
    if ranks is not None:
        return over_ranks(Sigmoid(), ranks, "sigmoid", problem, gains, reduction, (("normalize", normalize),))
    return sigmoid_loss(problem, gains, reduction)


class SigmoidLoss(Loss):
    """SigLIP's loss, called as open_clip calls its own; see :func:`contrastive_kernels.sigmoid`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the row sums [N].
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
    >>> loss = ck.SigmoidLoss()
    >>> out = loss(image_features=torch.eye(4), text_features=torch.eye(4), logit_scale=10.0, logit_bias=-10.0)
    >>> round(out.item(), 5)
    0.69328
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        weight: Tensor | None = None,
        ids: Tensor | Sequence[Tensor] | None = None,
        candidate_bias: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Matching rows [N, D]; with ids any rows [N, D] and [M, D]."""
        check_flag(output_dict, "output_dict")
        bias = 0.0 if logit_bias is None else logit_bias
        members: dict[str, Any] = {"ids": ids, "candidate_bias": candidate_bias, "weight": weight}
        members["temperature"] = temperature
        loss = sigmoid(image_features, text_features, logit_scale, bias, **members, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss
