"""The definition of the searches: dense, by sorting whole rows of scores.

References
----------
.. [1] K. Järvelin, J. Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hardest_negatives", "retrieval_figures"]


def hardest_negatives(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    positives: Tensor,
    skip: int = 0,
    margin: float | tuple[str, float] | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The columns of the k largest <x_i, y_j> of every row after the first `skip`, among those that may be negatives.

    Parameters
    ----------
    x, y : Tensor
        Anchors [N, D] and candidates [M, D].
    k, skip : int
        How many, and after how many.
    positives : Tensor
        The column of row i's positive [N], which is none of its negatives; -1 for none.
    margin : float or ("relative", float), optional
        Columns of a score above the positive's plus the margin, or times 1 plus the margin, are left out.
    exclude : pair of Tensor, optional
        Ids of rows and columns; equal ones are left out.

    Returns
    -------
    Tensor
        [N, k] int64, in falling order; -1 at the end.
    """
    scores = x @ y.T
    columns = torch.arange(len(y), dtype=torch.int64, device=y.device)
    out = (columns == positives[:, None]) | scores.isnan()
    if exclude is not None:
        out = out | (exclude[0][:, None] == exclude[1])
    if margin is not None:
        own = scores.gather(1, positives.clamp(min=0)[:, None])
        bound = own * (1 + margin[1]) if isinstance(margin, tuple) else own + margin
        out = out | ((scores > bound) & (positives >= 0)[:, None])
    falling = scores.masked_fill(out, -torch.inf).sort(dim=1, descending=True, stable=True)
    found = falling.indices.masked_fill(falling.values == -torch.inf, -1)
    padding = found.new_full((len(x), k + skip), -1)
    return torch.cat([found, padding], 1)[:, skip : skip + k]


def retrieval_figures(x: Tensor, y: Tensor, relevance: Tensor, k: int) -> dict[str, Tensor]:
    """Average precision, precision at k and nDCG at k [1]_ of every query, its documents sorted by <x_i, y_j>.

    Parameters
    ----------
    x, y : Tensor
        Queries [N, D] and documents [M, D].
    relevance : Tensor
        How relevant each document is [N, M]: above 0 a positive, 0 another document, -1 one that does not count.
    k : int
        The cut-off.

    Returns
    -------
    dict of str to Tensor
        "average_precision", "precision" and "ndcg" [N]; NaN for a query without positives.
    """
    scores = (x @ y.T).masked_fill(relevance < 0, -torch.inf)
    # of equal scores the least relevant first
    order = relevance.sort(dim=1, stable=True).indices
    order = order.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    gains = relevance.gather(1, order).clamp(min=0)
    positive = (gains > 0).to(gains.dtype)
    place = torch.arange(1, len(y) + 1, dtype=gains.dtype, device=y.device)
    discounts = 1 / torch.log2(place + 1)
    best = gains.sort(dim=1, descending=True).values
    return {
        "average_precision": (positive * positive.cumsum(1) / place).sum(1) / positive.sum(1),
        "precision": positive[:, :k].sum(1) / k,
        "ndcg": (gains * discounts)[:, :k].sum(1) / (best * discounts)[:, :k].sum(1),
    }
