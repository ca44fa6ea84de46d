"""The definition of multiple negatives ranking, with directions, hardness and a guide.

References
----------
.. [1] M. Henderson et al., "Efficient natural language response suggestion for smart reply", 2017.
.. [2] Z. Li et al., "Towards general text embeddings with multi-stage contrastive learning", 2023.
.. [3] Z. Lan et al., "LLaVE: large language and vision embedding models with hardness-weighted contrastive learning",
   2025.
.. [4] A. V. Solatorio, "GISTEmbed: guided in-sample selection of training negatives for text embedding fine-tuning",
   2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .parts import Scale, _logsumexp, _reduce

__all__ = ["multiple_negatives_ranking"]


def multiple_negatives_ranking(
    anchor: Tensor,
    positive: Tensor,
    logit_scale: Scale,
    *,
    negatives: Tensor | None = None,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    guided: Sequence[Tensor] | None = None,
    guided_margin: float | tuple[str, float] = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The mean over rows of log sum exp(z) - z_ip, over the pairs of one direction [1]_ or of several [2]_.

    Parameters
    ----------
    anchor, positive : Tensor
        Queries q_i and documents p_i [N, D].
    logit_scale : float or Tensor
        The inverse temperature.
    negatives : Tensor, optional
        n_ik [N, K, D].
    directions : sequence of str
        "query_to_doc": q_i with all p_j and n_jk. "doc_to_query": p_i with all q_j. "query_to_query": q_i with q_j,
        j != i. "doc_to_doc": p_i with p_j and n_jk, j != i.
    partition : {"joint", "per_direction"}
        One sum over all of them, or the mean over directions.
    hardness_mode : {"in_batch_negatives", "hard_negatives", "all_negatives"}, optional
        In "query_to_doc" hardness_strength * <q_i, d>, not differentiated, is added to the logits of p_j and n_jk,
        j != i, of n_ik, or of both [3]_.
    hardness_strength : float
        The factor.
    guided : sequence of Tensor, optional
        Another model's features of the same: pairs whose dot product there is above t_i = <g(q_i), g(p_i)> - margin do
        not count for row i, but for its positive [4]_.
    guided_margin : float or ("relative", float)
        The margin; relative: times |<g(q_i), g(p_i)>|.
    weight : Tensor, optional
        Weights of the rows [N].
    reduction : {"mean", "sum", "none"}
        A weighted mean divides by the sum of the weights.

    Returns
    -------
    Tensor
        A scalar, or [N].
    """
    documents = _documents(positive, negatives)
    of_guide = None if guided is None else dots_of(guided[0], guided[1], _documents(guided[1], *guided[2:]))
    dots = dots_of(anchor, positive, documents)
    options = (directions, partition, hardness_mode, hardness_strength, guided_margin)
    return ranking_of_dots(dots, logit_scale, of_guide, *options, weight, reduction)


def dots_of(anchor: Tensor, positive: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """The dot products of every direction: [N, N], and [N, (1 + K) N] of the documents, the rows' positives first."""
    return {
        "query_to_doc": anchor @ documents.T,
        "doc_to_query": positive @ anchor.T,
        "query_to_query": anchor @ anchor.T,
        "doc_to_doc": positive @ documents.T,
    }


def ranking_of_dots(
    dots: dict[str, Tensor],
    logit_scale: Scale,
    of_guide: dict[str, Tensor] | None,
    directions: Sequence[str],
    partition: str,
    hardness_mode: str | None,
    hardness_strength: float,
    guided_margin: float | tuple[str, float],
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The same of the dot products of every direction, and of a guide's."""
    first = dots["query_to_doc"]
    n, m = first.shape
    rows = torch.arange(n, dtype=torch.int64, device=first.device)
    columns = torch.arange(m, dtype=torch.int64, device=first.device)
    own = columns == rows[:, None]
    whose = torch.cat([rows, rows.repeat_interleave(m // n - 1)]) if n else rows
    alike, diagonal = whose == rows[:, None], own[:, :n]
    left_out = {
        "query_to_doc": torch.zeros_like(own),
        "doc_to_query": torch.zeros_like(diagonal),
        "query_to_query": diagonal,
        "doc_to_doc": alike,
    }
    if of_guide is not None:
        score = of_guide["query_to_doc"].diagonal()
        threshold = score - (score.abs() * guided_margin[1] if isinstance(guided_margin, tuple) else guided_margin)
        kept = {"query_to_doc": own, "doc_to_query": diagonal, "query_to_query": diagonal, "doc_to_doc": alike}
        for name, scores in of_guide.items():
            left_out[name] = left_out[name] | ((scores > threshold[:, None]) & ~kept[name])
    logits = {name: logit_scale * each for name, each in dots.items()}
    if hardness_mode is not None:
        hard = alike & ~own
        raised = {"in_batch_negatives": ~alike, "hard_negatives": hard, "all_negatives": ~own}[hardness_mode]
        added = hardness_strength * first.detach()
        logits["query_to_doc"] = logits["query_to_doc"] + added.masked_fill(~raised, 0.0)
    z_pos = logit_scale * first.diagonal()
    asked = [logits[name].masked_fill(left_out[name], -torch.inf) for name in directions]
    if partition == "joint":
        losses = _logsumexp(torch.cat(asked, 1)) - z_pos
    else:
        losses = torch.stack([_logsumexp(each) for each in asked]).mean(0) - z_pos
    weight = torch.ones(n, dtype=losses.dtype, device=losses.device) if weight is None else weight
    return _reduce(losses, weight, reduction)


def _documents(positive: Tensor, negatives: Tensor | None = None) -> Tensor:
    """The positives, and the negatives of all rows [(1 + K) N, D]."""
    return positive if negatives is None else torch.cat([positive, negatives.reshape(-1, negatives.shape[2])])
