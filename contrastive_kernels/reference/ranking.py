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
    n = len(anchor)
    own, whose, documents = _documents(positive, negatives)
    rows = torch.arange(n, dtype=torch.int64, device=anchor.device)[:, None]
    alike = whose == rows
    dots = {
        "query_to_doc": anchor @ documents.T,
        "doc_to_query": positive @ anchor.T,
        "query_to_query": anchor @ anchor.T,
        "doc_to_doc": positive @ documents.T,
    }
    diagonal = own[:, :n]
    left_out = {
        "query_to_doc": torch.zeros_like(own),
        "doc_to_query": torch.zeros_like(diagonal),
        "query_to_query": diagonal,
        "doc_to_doc": alike,
    }
    if guided is not None:
        g_anchor, g_positive = guided[:2]
        g_documents = _documents(g_positive, guided[2] if len(guided) > 2 else None)[2]
        score = (g_anchor * g_positive).sum(1)
        threshold = score - (score.abs() * guided_margin[1] if isinstance(guided_margin, tuple) else guided_margin)
        of_guide = {
            "query_to_doc": (g_anchor @ g_documents.T, own),
            "doc_to_query": (g_positive @ g_anchor.T, diagonal),
            "query_to_query": (g_anchor @ g_anchor.T, diagonal),
            "doc_to_doc": (g_positive @ g_documents.T, alike),
        }
        for name, (scores, kept) in of_guide.items():
            left_out[name] = left_out[name] | ((scores > threshold[:, None]) & ~kept)
    logits = {name: logit_scale * each for name, each in dots.items()}
    if hardness_mode is not None:
        hard = alike & ~own
        raised = {"in_batch_negatives": ~alike, "hard_negatives": hard, "all_negatives": ~own}[hardness_mode]
        added = hardness_strength * dots["query_to_doc"].detach()
        logits["query_to_doc"] = logits["query_to_doc"] + added.masked_fill(~raised, 0.0)
    z_pos = logit_scale * (anchor * positive).sum(1)
    asked = [logits[name].masked_fill(left_out[name], -torch.inf) for name in directions]
    if partition == "joint":
        losses = _logsumexp(torch.cat(asked, 1)) - z_pos
    else:
        losses = torch.stack([_logsumexp(each) for each in asked]).mean(0) - z_pos
    weight = torch.ones(n, dtype=losses.dtype, device=losses.device) if weight is None else weight
    return _reduce(losses, weight, reduction)


def _documents(positive: Tensor, negatives: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which document is a row's positive [N, M], whose each one is [M], and all of them [M, D]."""
    n = len(positive)
    rows = torch.arange(n, dtype=torch.int64, device=positive.device)
    documents, whose = positive, rows
    if negatives is not None:
        documents = torch.cat([positive, negatives.reshape(-1, negatives.shape[2])])
        whose = torch.cat([rows, rows.repeat_interleave(negatives.shape[1])])
    columns = torch.arange(len(documents), dtype=torch.int64, device=positive.device)
    return columns == rows[:, None], whose, documents
