"""sentence-transformers' ranking losses: ``MultipleNegativesRankingLoss``, its symmetric form and its cached ones."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..losses import clip_loss, info_nce, log_sum_exp
from .common import leave, missing, replace, replaced

try:
    from sentence_transformers import util as _util
    from sentence_transformers.sentence_transformer import losses as _theirs
except ImportError as _error:
    raise missing(__name__, "sentence-transformers", _error) from _error

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "install",
    "patched",
]


class MultipleNegativesRankingLoss(_theirs.MultipleNegativesRankingLoss):
    """sentence-transformers' ``MultipleNegativesRankingLoss`` without matrices of similarities.

    Parameters
    ----------
    model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength
        As in sentence-transformers.

    Notes
    -----
    Columns of hard negatives, all directions and both partition modes are computed here; a joint softmax over several
    directions is a pass for each. Left to sentence-transformers, with a warning once: similarities but ``cos_sim`` and
    ``dot_score``, hardness weighting, sparse embeddings.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Any:
        """Columns of embeddings [n, D]: queries, their documents, and hard negatives; a scalar."""
        reason = _reason(self, embeddings)
        if reason is not None:
            leave("sentence_transformers.MultipleNegativesRankingLoss", reason)
            return super().compute_loss_from_embeddings(embeddings, labels)
        return _ranking(self, embeddings)


class CachedMultipleNegativesRankingLoss(_theirs.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' ``CachedMultipleNegativesRankingLoss`` whose loss is one fused step.

    Parameters
    ----------
    model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, directions
        As in sentence-transformers, which embeds the mini-batches, twice.
    partition_mode, show_progress_bar, hardness_mode, hardness_strength
        The same; the bar shows embeddings alone.

    Notes
    -----
    The loss of all embeddings at once, and not a step for each mini-batch. What is left to sentence-transformers:
    :class:`MultipleNegativesRankingLoss`.
    """

    def calculate_loss(self, reps: list[list[Tensor]], labels: Tensor | None = None, **options: Any) -> Any:
        """Columns of mini-batches of embeddings; with ``with_backward`` their gradients are made."""
        reason = _reason(self, [column[0] for column in reps])
        if reason is not None or set(options) - {"with_backward"}:
            leave(
                "sentence_transformers.CachedMultipleNegativesRankingLoss", reason or f"a loss with {sorted(options)}"
            )
            return super().calculate_loss(reps, labels, **options)
        loss = _ranking(self, [torch.cat(column) for column in reps])
        if options.get("with_backward"):
            loss.backward()
            loss = loss.detach()
        return loss


with warnings.catch_warnings():  # both are deprecated, which those who make them are told, as ever
    warnings.simplefilter("ignore", DeprecationWarning)

    class MultipleNegativesSymmetricRankingLoss(
        _theirs.MultipleNegativesSymmetricRankingLoss, MultipleNegativesRankingLoss
    ):
        """sentence-transformers' ``MultipleNegativesSymmetricRankingLoss`` without matrices of similarities.

        Parameters
        ----------
        model, scale, similarity_fct, gather_across_devices
            As in sentence-transformers.
        """

    class CachedMultipleNegativesSymmetricRankingLoss(
        _theirs.CachedMultipleNegativesSymmetricRankingLoss, CachedMultipleNegativesRankingLoss
    ):
        """sentence-transformers' ``CachedMultipleNegativesSymmetricRankingLoss`` whose loss is one fused step.

        Parameters
        ----------
        model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, show_progress_bar
            As in sentence-transformers.
        """


def _reason(loss: Any, embeddings: list[Tensor]) -> str | None:
    """What is not computed here."""
    if loss.similarity_fct not in (_util.cos_sim, _util.dot_score):
        return f"similarity_fct={getattr(loss.similarity_fct, '__name__', type(loss.similarity_fct).__name__)}"
    if loss.hardness_mode is not None and loss.hardness_strength > 0.0:
        return f"hardness_mode={loss.hardness_mode!r}"
    if len(embeddings) < 2 or any(each.layout != torch.strided for each in embeddings):
        return "a loss of sparse embeddings" if len(embeddings) > 1 else "a loss of one column"
    return None


def _ranking(loss: Any, embeddings: list[Tensor]) -> Tensor:
    """The mean over this rank's queries."""
    # (as their similarities: 16 bits are widened first)
    embeddings = [each.float() if torch.finfo(each.dtype).bits < 32 else each for each in embeddings]
    if loss.similarity_fct is _util.cos_sim:
        embeddings = [_util.normalize_embeddings(each) for each in embeddings]
    queries, positives, *negatives = embeddings
    ways, scale = set(loss.directions), loss.scale
    over: dict[str, Any] = {"reduction": "none"} if loss.gather_across_devices else {}
    if over:
        over["group"] = "auto"
    documents = torch.cat([positives, *negatives])
    if ways == {"query_to_doc"}:
        return info_nce(queries, documents, scale, **over).mean()
    if loss.partition_mode == "joint":
        return _joint(loss, queries, positives, negatives)
    if not negatives:
        return clip_loss(queries, positives, scale, **over).mean()
    there, back = info_nce(queries, documents, scale, **over), info_nce(positives, queries, scale, **over)
    return (there.mean() + back.mean()) / 2


def _joint(loss: Any, queries: Tensor, positives: Tensor, negatives: list[Tensor]) -> Tensor:
    """One softmax over the candidates of several directions."""
    n, start, scale, ways = len(queries), 0, loss.scale, loss.directions
    every = [queries, positives, *negatives]
    if loss.gather_across_devices:
        every = [_util.all_gather_with_grad(each) for each in every]
        start = n * _util.get_rank()
    documents = torch.cat(every[1:])
    own = torch.arange(start, start + n, dtype=torch.int64, device=queries.device)
    # the positive is left out of the sums, so that a nearly solved row keeps its digits
    sums = [log_sum_exp(queries, documents, scale, positives=own)]
    if "query_to_query" in ways:
        sums.append(log_sum_exp(queries, every[0], scale, positives=own))
    if "doc_to_query" in ways:
        sums.append(log_sum_exp(positives, every[0], scale))
    if "doc_to_doc" in ways:  # without the documents of the same query
        whose = torch.arange(len(every[0]), dtype=torch.int64, device=queries.device).repeat(len(every) - 1)
        sums.append(log_sum_exp(positives, documents, scale, ids=(own, whose)))
    wide = sums[0].dtype
    z_pos = scale * (queries.to(wide) * positives.to(wide)).sum(1)
    return softplus(torch.logsumexp(torch.stack(sums), 0) - z_pos).mean()


_CLASSES = {
    _theirs.MultipleNegativesRankingLoss: MultipleNegativesRankingLoss,
    _theirs.MultipleNegativesSymmetricRankingLoss: MultipleNegativesSymmetricRankingLoss,
    _theirs.CachedMultipleNegativesRankingLoss: CachedMultipleNegativesRankingLoss,
    _theirs.CachedMultipleNegativesSymmetricRankingLoss: CachedMultipleNegativesSymmetricRankingLoss,
}


def install() -> None:
    """Puts these losses into the place of sentence-transformers' own; ``MatryoshkaLoss`` wraps them as any.

    Call it before names are imported from sentence-transformers one by one.
    """
    replace("sentence_transformers", _CLASSES)


def patched() -> AbstractContextManager[None]:
    """The same until the end of a ``with`` block.

    Returns
    -------
    context manager
        Losses that are made within it stay these.
    """
    return replaced("sentence_transformers", _CLASSES)
