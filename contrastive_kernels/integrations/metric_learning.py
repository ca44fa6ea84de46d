"""pytorch-metric-learning's ``NTXentLoss`` and ``SupConLoss`` without a matrix of pairs, with labels and its reducers.

``CrossBatchMemory`` around the first is one that needs no list of all pairs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..losses import log_sum_exp, sup_con
from .common import leave, missing, replace, replaced

try:
    from pytorch_metric_learning import distances as _distances
    from pytorch_metric_learning import losses as _theirs
except ImportError as _error:
    raise missing(__name__, "pytorch-metric-learning", _error) from _error

__all__ = ["CrossBatchMemory", "NTXentLoss", "SupConLoss", "install", "patched"]

#: Entries of the matrix of equal labels that are looked at together.
_BLOCK = 2**24


@dataclass(frozen=True)
class _AllPairs:
    """In the place of a list of pairs: all, but for every row's own column among the references."""

    own: Tensor | None


class _Streamed:
    """What both losses have in common; mixed into a loss of the library."""

    distance: Any
    temperature: float

    def _reason(self, labels: Any, indices_tuple: Any) -> str | None:
        """What is not computed here."""
        kind = type(self.distance)
        if indices_tuple is not None or labels is None:
            return "a loss of mined pairs"
        if kind not in (_distances.CosineSimilarity, _distances.DotProductSimilarity):
            return f"distance={kind.__name__}"
        if self.distance.power != 1:
            return f"a distance with power={self.distance.power}"
        if labels.is_floating_point() or labels.dim() != 1:
            return "a loss of labels that are no integers"
        return None

    def _features(self, embeddings: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """As the distance takes them, with its statistics."""
        self.distance.reset_stats()
        self.distance.check_shapes(embeddings, references)
        x = self.distance.maybe_normalize(embeddings)
        y = x if references is embeddings else self.distance.maybe_normalize(references)
        self.distance.set_default_stats(embeddings, references, x, y)
        return x, y


class NTXentLoss(_Streamed, _theirs.NTXentLoss):
    """pytorch-metric-learning's ``NTXentLoss``: of every pair with equal labels, against the anchor's other labels.

    Parameters
    ----------
    temperature
        As in pytorch-metric-learning.
    **kwargs
        The same: ``distance``, ``reducer``, ``embedding_regularizer`` and others.

    Notes
    -----
    ``SelfSupervisedLoss`` wraps it as any, :class:`CrossBatchMemory` without a list of all pairs. O(N D) memory and a
    vector [D] for each pair of equal labels. Left to pytorch-metric-learning, with a warning once: mined pairs, and
    distances but ``CosineSimilarity`` and ``DotProductSimilarity`` with ``power=1``. There a pair's loss ends at the
    logarithm of the dtype's least number, some 87 in float32; here it does not.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """Embeddings [N, D] against references [M, D]; losses of the pairs for the reducer."""
        own = None
        if isinstance(indices_tuple, _AllPairs):
            own, indices_tuple = indices_tuple.own, None
        reason = self._reason(labels, indices_tuple)
        if reason is not None:
            leave("pytorch_metric_learning.NTXentLoss", reason)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        anchors, positives, negatives = _pairs(labels, ref_labels, own)
        if len(anchors) == 0 or negatives == 0 or (len(anchors) <= 1 and negatives <= 1):
            return self.zero_losses()
        x, y = self._features(embeddings, ref_emb)
        scale = 1.0 / self.temperature
        # the negatives of an anchor: pairs of equal labels are left out
        others = log_sum_exp(x, y, scale, ids=(_ids(labels), _ids(ref_labels)))
        z_pos = scale * (x[anchors].to(others.dtype) * y[positives].to(others.dtype)).sum(1)
        losses = softplus(others[anchors] - z_pos)
        return {"loss": {"losses": losses, "indices": (anchors, positives), "reduction_type": "pos_pair"}}


class SupConLoss(_Streamed, _theirs.SupConLoss):
    """pytorch-metric-learning's ``SupConLoss``: the mean over an anchor's positives, outside of the logarithm.

    Parameters
    ----------
    temperature
        As in pytorch-metric-learning.
    **kwargs
        The same: ``distance``, ``reducer``, ``embedding_regularizer`` and others.

    Notes
    -----
    O(N D) memory. Left to pytorch-metric-learning, with a warning once: mined pairs, those of ``CrossBatchMemory``
    among them, and distances but ``CosineSimilarity`` and ``DotProductSimilarity`` with ``power=1``.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """Embeddings [N, D] against references [M, D]; losses of the anchors for the reducer."""
        reason = self._reason(labels, indices_tuple)
        if reason is not None:
            leave("pytorch_metric_learning.SupConLoss", reason)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        one_set = ref_labels is labels
        positives, negatives = _counts(labels, ref_labels, one_set)
        if positives == 0 or negatives == 0 or (positives <= 1 and negatives <= 1):
            return self.zero_losses()
        x, y = self._features(embeddings, ref_emb)
        others = (None, None) if one_set else (y, _ids(ref_labels))
        scale = 1.0 / self.temperature
        losses = sup_con(x, _ids(labels), scale, y=others[0], y_labels=others[1], reduction="none")
        indices = torch.arange(len(x), dtype=torch.int64, device=x.device)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


class CrossBatchMemory(_theirs.CrossBatchMemory):
    """pytorch-metric-learning's ``CrossBatchMemory``, which lists no pairs for a loss that streams them.

    Parameters
    ----------
    *args, **kwargs
        As in pytorch-metric-learning.

    Notes
    -----
    With a miner, given pairs or another loss than this module's :class:`NTXentLoss` it is pytorch-metric-learning's.
    """

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:
        """What the loss takes for the pairs of these embeddings with the memory."""
        mined = self.miner is not None or input_indices_tuple is not None
        if mined or not isinstance(self.loss, NTXentLoss) or self.loss._reason(labels, None) is not None:
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return _AllPairs(self.curr_batch_idx if do_remove_self_comparisons else None)


def _ids(labels: Tensor) -> Tensor:
    return labels.to(torch.int64)


def _counts(labels: Tensor, ref_labels: Tensor, one_set: bool) -> tuple[int, int]:
    """How many pairs have equal labels, a sample's own left out, and how many others."""
    classes, counts = torch.unique(_ids(ref_labels), return_counts=True)
    if not len(classes):
        return 0, 0
    place = torch.searchsorted(classes, _ids(labels)).clamp_(max=len(classes) - 1)
    equal = int(counts[place].masked_fill(classes[place] != labels, 0).sum())
    return equal - len(labels) * one_set, len(labels) * len(ref_labels) - equal


def _pairs(labels: Tensor, ref_labels: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Pairs of equal labels, row by row, without a sample's own; and how many pairs of others there are."""
    rows, equal = max(1, _BLOCK // max(len(ref_labels), 1)), 0
    found = []
    for start in range(0, len(labels), rows):
        same = labels[start : start + rows, None] == ref_labels[None]
        equal += int(same.sum())
        if ref_labels is labels:
            same.diagonal(start).fill_(False)
        if own is not None:
            same.scatter_(1, own[start : start + rows, None], False)
        anchors, positives = torch.where(same)
        found.append((anchors + start, positives))
    anchors, positives = (torch.cat(parts) for parts in zip(*found)) if found else (labels[:0], labels[:0])
    return anchors, positives, len(labels) * len(ref_labels) - equal


_CLASSES = {
    _theirs.NTXentLoss: NTXentLoss,
    _theirs.SupConLoss: SupConLoss,
    _theirs.CrossBatchMemory: CrossBatchMemory,
}


def install() -> None:
    """Puts these classes into the place of pytorch-metric-learning's own.

    Call it before names are imported from pytorch_metric_learning one by one.
    """
    replace("pytorch_metric_learning", _CLASSES)


def patched() -> AbstractContextManager[None]:
    """The same until the end of a ``with`` block.

    Returns
    -------
    context manager
        Losses that are made within it stay these.
    """
    return replaced("pytorch_metric_learning", _CLASSES)
