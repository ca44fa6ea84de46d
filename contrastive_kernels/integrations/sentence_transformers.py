"""sentence-transformers' ranking losses: ``MultipleNegativesRankingLoss`` with its symmetric and cached forms, GIST."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..losses import clip_loss, info_nce, log_sum_exp, multiple_negatives_ranking
from ..losses.ranking import gist
from .common import leave, missing, replace, replaced

try:
    from sentence_transformers import util as _util
    from sentence_transformers.base.losses.merged_forward import embed_columns as _embed_columns
    from sentence_transformers.sentence_transformer import losses as _theirs
    from sentence_transformers.util import batch_to_device as _batch_to_device
    from sentence_transformers.util.distributed import get_world_size as _get_world_size
except ImportError as _error:
    raise missing(__name__, "sentence-transformers", _error) from _error

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
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
    Columns of hard negatives, all directions, both partition modes and hardness weighting are computed here; a joint
    softmax over several directions is a pass for each. Left to sentence-transformers, with a warning once: similarities
    but ``cos_sim`` and ``dot_score``, hardness weighting over several devices, sparse embeddings.
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
    raised = loss.hardness_mode is not None and loss.hardness_strength > 0.0
    if raised and loss.gather_across_devices and _get_world_size() > 1:
        return f"hardness_mode={loss.hardness_mode!r} over several devices"
    if len(embeddings) < 2 or any(each.layout != torch.strided for each in embeddings):
        return "a loss of sparse embeddings" if len(embeddings) > 1 else "a loss of one column"
    return None


def _widened(embeddings: list[Tensor], unit: bool) -> list[Tensor]:
    """As their similarities: 16 bits are widened first, and cosines are those of unit vectors."""
    embeddings = [each.float() if torch.finfo(each.dtype).bits < 32 else each for each in embeddings]
    return [_util.normalize_embeddings(each) for each in embeddings] if unit else embeddings


def _hard(negatives: list[Tensor]) -> Tensor | None:
    """Columns of hard negatives as [n, K, D]."""
    return torch.stack(negatives, 1) if negatives else None


def _ranking(loss: Any, embeddings: list[Tensor]) -> Tensor:
    """The mean over this rank's queries."""
    queries, positives, *negatives = _widened(embeddings, loss.similarity_fct is _util.cos_sim)
    ways, scale = set(loss.directions), loss.scale
    if not (loss.gather_across_devices and _get_world_size() > 1):
        raised = loss.hardness_mode is not None and loss.hardness_strength > 0.0
        hardness = {"hardness_mode": loss.hardness_mode, "hardness_strength": loss.hardness_strength} if raised else {}
        options = {"directions": tuple(dict.fromkeys(loss.directions)), "partition": loss.partition_mode, **hardness}
        return multiple_negatives_ranking(queries, positives, scale, negatives=_hard(negatives), **options)
    over: dict[str, Any] = {"reduction": "none", "group": "auto"}
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
    """One softmax over the candidates of several directions, of all devices."""
    n, scale, ways = len(queries), loss.scale, loss.directions
    every = [_util.all_gather_with_grad(each) for each in (queries, positives, *negatives)]
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


class GISTEmbedLoss(_theirs.GISTEmbedLoss):
    """sentence-transformers' ``GISTEmbedLoss`` without matrices of similarities.

    Parameters
    ----------
    model, guide, temperature, margin_strategy, margin, contrast_anchors, contrast_positives, gather_across_devices
        As in sentence-transformers.

    Notes
    -----
    A text is never its own negative, even where the guide finds anchor and positive as much alike as a text and itself.
    Left to sentence-transformers, with a warning once: packed sequences, and several devices that gather.
    """

    def forward(self, sentence_features: Any, labels: Tensor) -> Any:
        """Columns of tokens: anchors, positives, and perhaps negatives; a scalar."""
        columns = list(sentence_features)
        reason = _unguided(self)
        if any("cu_seq_lens_q" in column for column in columns):
            reason = "a loss of packed sequences"
        if reason is not None or not 2 <= len(columns) <= 3:
            if reason is not None:
                leave("sentence_transformers.GISTEmbedLoss", reason)
            return super().forward(columns, labels)
        # (models write into what they are given)
        for_guide = [self._for_guide(column) if self.must_retokenize else dict(column) for column in columns]
        embeddings = _embed_columns(self.model, columns)
        with torch.no_grad():
            of_guide = _embed_columns(self.guide, for_guide)
        return _gist(self, embeddings, of_guide)

    def _for_guide(self, column: dict[str, Tensor]) -> Any:
        """A column in the guide's own tokens."""
        texts = self.tokenizer.batch_decode(column["input_ids"], skip_special_tokens=True)
        return _batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(_theirs.CachedGISTEmbedLoss):
    """sentence-transformers' ``CachedGISTEmbedLoss`` whose loss is one step.

    Parameters
    ----------
    model, guide, temperature, mini_batch_size, mini_batch_num_tokens, show_progress_bar, margin_strategy, margin
        As in sentence-transformers, which embeds the mini-batches.
    contrast_anchors, contrast_positives, gather_across_devices
        The same.

    Notes
    -----
    As :class:`GISTEmbedLoss`, with any number of columns of negatives.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Any:
        """Columns of mini-batches of embeddings, and the guide's; with ``with_backward`` their gradients are made."""
        reason = _unguided(self)
        if reason is not None or len(reps) != len(reps_guided):
            if reason is not None:
                leave("sentence_transformers.CachedGISTEmbedLoss", reason)
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        loss = _gist(self, [torch.cat(column) for column in reps], [torch.cat(column) for column in reps_guided])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _unguided(loss: Any) -> str | None:
    """What is not computed here."""
    several = loss.gather_across_devices and _get_world_size() > 1
    return "a guided loss over several devices" if several else None


def _gist(loss: Any, embeddings: list[Tensor], of_guide: list[Tensor]) -> Tensor:
    """The mean over queries."""
    margin = ("relative", loss.margin) if loss.margin_strategy == "relative" else loss.margin
    columns, guided = _widened(embeddings, unit=True), _widened(of_guide, unit=True)
    return gist(columns, guided, 1.0 / loss.temperature, margin, loss.contrast_anchors, loss.contrast_positives)


_CLASSES = {
    _theirs.GISTEmbedLoss: GISTEmbedLoss,
    _theirs.CachedGISTEmbedLoss: CachedGISTEmbedLoss,
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
