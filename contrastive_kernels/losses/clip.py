"""CLIP's symmetric loss: the function, and its module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..arguments.checks import (
    check_engine,
    check_features,
    check_flag,
    check_reduction,
    check_scale,
    is_shared,
)
from ..arguments.margin import Margin, check_margin_of_loss
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import check_smoothing, pairs_of
from ..arguments.reduction import gains_or_weights
from ..arguments.temperature import scale_of
from ..distributed.group import ranks_of, tell
from ..distributed.losses import over_ranks
from ..distributed.rules import Softmax
from ..engine.matrix import Problem
from ..operators.softmax_loss import softmax_loss
from ..panels.pairs import EVERY_PAIR
from .biased import pairs_with_biases
from .ceilings import with_margin
from .gathered import gathered_loss, wants_all
from .guide import check_guide, check_guided_margin, require_no_guide, with_guide
from .keywords import ClipKeywords
from .metrics import LossMetrics, check_metrics, with_metrics, with_metrics_over_ranks
from .module import PAIR_NAMES, SoftmaxLoss
from .scales import check_scales_of_both, is_by_row, pairs_with_scales, pairs_with_scales_over_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ClipLoss", "clip_loss"]


@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | Sequence[Tensor] | None = None,
    *,
    return_metrics: Literal[False] = False,
    **rest: Unpack[ClipKeywords],
) -> Tensor: ...
@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | Sequence[Tensor] | None = None,
    *,
    return_metrics: Literal[True],
    **rest: Unpack[ClipKeywords],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | Sequence[Tensor] | None = None,
    *,
    return_metrics: bool,
    **rest: Unpack[ClipKeywords],
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | Sequence[Tensor] | None = None,
    *,
    temperature: float | Tensor | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    candidate_bias: Tensor | Sequence[Tensor] | None = None,
    margin: Margin | None = None,
    guided: Sequence[Tensor] | None = None,
    guided_margin: Margin = 0.0,
    include_positive: bool = True,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    gradients: str = "average",
    strategy: str = "auto",
    uneven: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """CLIP's symmetric loss: the mean of InfoNCE from images to texts and from texts to images.

    Parameters
    ----------
    image_features, text_features : Tensor
        Matching rows [N, D] of one dtype and device.
    logit_scale : float, Tensor or pair of Tensor
        Multiplies the dot products: the inverse temperature, not its logarithm. A pair of [N], or one [N] for both, is
        every image's own and every text's, as in iSogCLR: of image i among the texts, and of text j among the images.
        16-bit features are multiplied in float32 then; a GPU's kernels, which know one scale, and the ranks of a group
        make two passes of it.
    temperature : float or Tensor, optional
        1 / logit_scale, in its place: above 0.
    ids : Tensor or pair of Tensor, optional
        Ids (integers) of the images [N] and of the texts [N], or one tensor of both: where an image's and a text's are
        equal, neither is a negative of the other. A pair's own image and text match whatever their ids.
    candidate_bias : Tensor or pair of Tensor, optional
        As in :func:`info_nce`, of the images [N] as candidates of a text and of the texts [N] as those of an image, or
        one tensor of both. The directions are two passes then: twice the products.
    margin : float or ("relative", float), optional
        As in :func:`info_nce`, in each direction by its own positive: a text may be too close to an image to be its
        negative, while the image is one of the text's.
    guided, guided_margin
        As in :func:`info_nce`: a guide's features of the images and of the texts [N, E]. Each direction leaves out its
        own, by the one score of the pair.
    include_positive, label_smoothing
        As in :func:`info_nce`.
    weight : Tensor, optional
        Weights of the pairs [N], not differentiated; of either sign.
    reduction : {"mean", "sum", "none"}
        "none" gives every pair's mean of both directions. The mean of no pairs is 0.
    normalize, backend, workspace_bytes, group, gradients, strategy, uneven
        As in :func:`info_nce`.
    return_metrics : bool
        As in :func:`info_nce`, of both directions; not with ``candidate_bias``.

    Returns
    -------
    Tensor, or (Tensor, LossMetrics)
        A scalar, or [N]; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.
    NotImplementedError
        Over the ranks of a group in a grid or a ring, for biases, a margin, a guide and smoothing.

    Notes
    -----
    One pass gives the normalisers of rows and columns, a second one the gradients: 4 products, O(N D) memory. Where all
    scores fit a quarter of the workspace they are made once for a mean or a sum: 3 products.

    With a `group` every rank returns the value of the concatenated batch; see docs/distributed.md.

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
    if temperature is not None:
        logit_scale = scale_of(image_features, logit_scale, temperature)
    shared = is_shared(group, gradients, strategy, uneven)
    ranks = ranks_of(group, gradients, strategy, uneven) if shared else None
    if return_metrics is not False:
        check_metrics(return_metrics, ranks, image_features, candidate_bias=candidate_bias)
    if ranks is not None and (because := wants_all(label_smoothing, candidate_bias, margin, guided)):
        rows: dict[str, Any] = {"ids": ids, "candidate_bias": candidate_bias, "weight": weight, "guided": guided}
        given: dict[str, Any] = {"include_positive": include_positive, "label_smoothing": label_smoothing}
        given.update(margin=margin, guided_margin=guided_margin, reduction=reduction, normalize=normalize)
        given.update(backend=backend, workspace_bytes=workspace_bytes, return_metrics=return_metrics)
        sides = (image_features, text_features)
        return gathered_loss(ranks, clip_loss, sides, logit_scale, rows, given, because, matching=True)
    try:
        check_reduction(reduction), check_flag(include_positive, "include_positive")
        if type(label_smoothing) is not float or label_smoothing != 0.0:
            check_smoothing(label_smoothing, include_positive)
        if margin is not None:
            check_margin_of_loss(margin, label_smoothing)
        if type(guided_margin) is not float or guided_margin != 0.0:
            check_guided_margin(guided_margin, used=guided is not None)
        padded = candidate_bias is not None
        x, y = check_features(image_features, text_features, PAIR_NAMES, normalize, matching=True, padded=padded)
        by_row = isinstance(logit_scale, (tuple, list))
        if by_row or (isinstance(logit_scale, Tensor) and logit_scale.ndim == 1):
            by_row = by_row or is_by_row(logit_scale)
        scale, engine = 1.0 if by_row else check_scale(x, logit_scale), check_engine(backend, workspace_bytes)
        pairs = EVERY_PAIR if ids is None else pairs_of(ids, None, x, y)
        problem = Problem(x, y, scale, offset=0, pairs=pairs, engine=engine)
        if guided is not None:
            require_no_guide(guided, label_smoothing=label_smoothing or None)
            problem = with_guide(problem, check_guide(guided, x, y, normalize), guided_margin, both=True)
        if by_row and ranks is None:
            options: dict[str, Any] = {"include_positive": include_positive, "smoothing": label_smoothing}
            options["return_metrics"] = return_metrics
            return pairs_with_scales(problem, logit_scale, candidate_bias, margin, weight, reduction, **options)
        scales = check_scales_of_both(x, logit_scale) if by_row else None
        if margin is not None:
            problem = with_margin(problem, margin, both=True)
        gains = None if weight is None else gains_or_weights(weight, x.shape[0], x, reduction, ranks)
    except (TypeError, ValueError, NotImplementedError) as error:
        tell(ranks, error, image_features)
        raise
    if candidate_bias is not None:
        options = {"include_positive": include_positive, "smoothing": label_smoothing}
        return pairs_with_biases(problem, candidate_bias, weight, reduction, **options)
    if ranks is not None:
        about: tuple[tuple[str, Any], ...] = (("normalize", normalize), ("return_metrics", return_metrics))
        about = (*about, ("scales by row", by_row))
        if scales is not None:
            options = {"include_positive": include_positive, "return_metrics": return_metrics}
            return pairs_with_scales_over_ranks(problem, scales, gains, reduction, ranks, about, **options)
        rule = Softmax(both_ways=True, include_positive=include_positive)
        about = (*rule.about, *about)
        loss = over_ranks(rule, ranks, "clip_loss", problem, gains, reduction, about)
        if not return_metrics:
            return loss
        return with_metrics_over_ranks(loss, problem, gains, reduction, ranks, "clip_loss", both=True)
    options = {"both": True, "include_positive": include_positive, "smoothing": label_smoothing}
    loss = softmax_loss(problem, gains, reduction, **options)
    return with_metrics(loss, problem, weight, reduction, **options) if return_metrics else loss


class ClipLoss(SoftmaxLoss):
    """CLIP's symmetric loss, called as open_clip calls its own; see :func:`contrastive_kernels.clip_loss`.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        "none" gives the pairs' losses [N].
    include_positive, label_smoothing, margin, guided_margin, normalize, backend, workspace_bytes, return_metrics
        As in :func:`contrastive_kernels.info_nce`.
    group, gradients, strategy, uneven
        The same; by default all ranks of the default process group, if there is one.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.ClipLoss()
    >>> out = loss(image_features=torch.eye(4), text_features=torch.eye(4), logit_scale=5.0, output_dict=True)
    >>> round(out["contrastive_loss"].item(), 5)
    0.02001
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | Sequence[Tensor] | None = None,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        weight: Tensor | None = None,
        ids: Tensor | Sequence[Tensor] | None = None,
        candidate_bias: Tensor | Sequence[Tensor] | None = None,
        guided: Sequence[Tensor] | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossMetrics] | dict[str, Tensor]:
        """Matching rows [N, D]. A bias shifts all logits alike, so that it changes neither loss nor gradients."""
        bias = None
        try:
            if check_flag(output_dict, "output_dict") and self.options["return_metrics"]:
                raise ValueError("output_dict: expected False with return_metrics, for its values are losses; got True")
            if logit_bias is not None and isinstance(image_features, Tensor):
                bias = check_scale(image_features, logit_bias, "logit_bias")
        except (TypeError, ValueError) as error:
            self._tell(error, image_features)
            raise
        members: dict[str, Any] = {"ids": ids, "candidate_bias": candidate_bias, "weight": weight}
        if temperature is not None:
            members["temperature"] = temperature
        if guided is not None:
            members["guided"] = guided
        loss = clip_loss(image_features, text_features, logit_scale, **members, **self.options)
        metrics: Any = None
        if self.options["return_metrics"]:
            loss, metrics = loss
        if isinstance(bias, Tensor):  # a gradient of zero: data parallelism wants every parameter used
            loss = loss + 0.0 * bias.reshape(()).to(loss.dtype)
        if metrics is not None:
            return loss, metrics
        return {"contrastive_loss": loss} if output_dict else loss
