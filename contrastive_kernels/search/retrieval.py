"""Retrieval metrics of a whole corpus by streaming rank counts: no N x M matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import (
    check_backend,
    check_count,
    check_features,
    check_flag,
    check_workspace,
)
from ..arguments.margin import scores_of
from ..arguments.reduction import DEFAULT_WORKSPACE_BYTES
from ..backends import registry
from ..distributed.group import ranks_of, told
from ..distributed.search import Corpus
from ..engine.rounding import lengths as row_lengths
from ..engine.rounding import score_rounding
from ..engine.search import panel_side
from ..operators.search import count_ranks
from ..panels.size import score_dtype, workspace_for
from ..panels.terms import RANK
from .positives import check_relevance, figures_of, in_order, positive_columns, without_self

__all__ = ["RetrievalMetrics", "retrieval_metrics"]


@dataclass(frozen=True)
class RetrievalMetrics:
    """What :func:`retrieval_metrics` finds.

    Parameters
    ----------
    recall : dict of int to float
        By k: the part of the queries with a positive among the first k documents.
    median_rank : float
        Median over queries of the rank of the best positive, counted from 1.
    mean_reciprocal_rank : float
        Mean of 1 / rank.
    ranks : Tensor
        How many documents stand before each query's best positive, counted from 0 [N] int64; -1 for a query without
        positives, which the figures leave out.
    positive_ranks : Tensor
        The same of every positive, its query's other positives included [N, P] int64; -1 for one that is not there, is
        there for the second time, or has relevance 0.
    mean_average_precision : float
        MAP: the mean over queries of the mean over positives of the precision at the positive's rank.
    precision : dict of int to float
        By k: the mean over queries of the part of the first k documents that are positives.
    ndcg : dict of int to float
        By k: the mean over queries of the discounted gain sum relevance / log2(rank + 1) of the first k documents, over
        that of the best order.
    """

    recall: dict[int, float]
    median_rank: float
    mean_reciprocal_rank: float
    ranks: Tensor
    positive_ranks: Tensor
    mean_average_precision: float
    precision: dict[int, float]
    ndcg: dict[int, float]


@torch.no_grad()
def retrieval_metrics(
    x: Tensor,
    y: Tensor,
    k: Sequence[int] = (1, 5, 10),
    *,
    positives: int | Tensor | None = None,
    relevance: Tensor | None = None,
    exclude_self: bool = False,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    uneven: bool = False,
) -> RetrievalMetrics:
    """Ranks of queries' positives among documents in the order of <x_i, y_j>: recall@k, MRR, MAP, nDCG@k, precision@k.

    Parameters
    ----------
    x : Tensor
        Queries [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Documents [M, D] of the same dtype and device.
    k : sequence of int
        The cut-offs of recall, precision and nDCG, each at least 1.
    positives : int or Tensor, optional
        Query i's positives in ``y``: document ``i + positives`` (an int; 0 by default), or the documents
        ``positives[i]`` (int64 [N], or [N, P] for several; -1 fills up where there are fewer).
    relevance : Tensor, optional
        How relevant each positive is [N, P] ([N, 1] of one), the gain that nDCG discounts: numbers of at least 0. Pass
        ``2**grade - 1`` for the exponential gain. One of 0 is no positive. By default all are 1.
    exclude_self : bool
        Row i of ``y`` is query i itself, and no document to be found: where a data set is searched for its own rows.
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores; by default 64 MiB, and on a GPU 512 MiB or 1/64 of its memory,
        whichever is less.
    group, uneven
        As in :func:`contrastive_kernels.info_nce`.

    Returns
    -------
    RetrievalMetrics
        Numbers of the host, so the device is waited for. NaN where no query has a positive.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    The rank of a query is that of its best positive. **Ties count against the query**, and so does NaN: a document
    stands behind the positive only if its score is lower; of a query's positives of equal scores, the least relevant
    comes first.

    A score in float32 depends in its last digits on how the product was cut up. So whatever lies within rounding of the
    positive's score is decided in float64, for those queries alone; ranks therefore do not depend on the workspace or
    the backend, and equal documents are ties wherever they lie. One product of 2 N M D flop, whose scores are counted P
    times, O(N P) memory beside the inputs and the workspace, and a copy of the queries that are counted again.

    With a `group` queries and documents are those of all ranks, ``positives`` count among a rank's own documents, and
    ``ranks`` are those of its own queries. Documents travel from rank to rank: none holds more than two ranks' ones.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> queries, documents = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    >>> found = ck.retrieval_metrics(queries, documents, k=(1, 3))
    >>> found.recall, found.median_rank, found.ranks.tolist()
    ({1: 0.3333333333333333, 3: 1.0}, 3.0, [0, 2, 2])

    Rows of one data set, which find those of their class:

    >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    >>> others = torch.tensor([[1, 2], [0, 2], [0, 1], [-1, -1]])
    >>> found = ck.retrieval_metrics(x, x, k=(2,), positives=others, exclude_self=True)
    >>> found.positive_ranks.tolist(), round(found.mean_average_precision, 4)
    ([[0, 2], [1, 2], [2, 1], [-1, -1]], 0.6667)
    """
    processes = ranks_of(group, "sum", "ring", uneven)
    with told(processes, x):
        cuts = _cut_offs(k)
        x, y = check_features(x, y, ("x", "y"), normalize)
        options = check_backend(backend), workspace_for(x.device, check_workspace(workspace_bytes))
        index = positive_columns(positives, x, y)
        apart = without_self(index, y) if check_flag(exclude_self, "exclude_self") else index[:, :0]
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        grades, index = check_relevance(relevance, index, wide)
        first = registry.choose(options[0] or None, x.device, x.dtype, RANK)
        panel_side(x, y, score_dtype(x.dtype), first, options[1])
        panel_side(x, y, wide, registry.choose(None, x.device, wide, RANK), options[1])  # before it may be needed
    corpus = None
    if processes is not None:
        about = (("features", x.shape[1]), ("dtype", x.dtype), ("normalize", normalize), ("k", list(cuts)),
                 ("exclude_self", exclude_self))  # fmt: skip
        sizes = processes.agree("retrieval_metrics", about, x, len(x), len(y))
        corpus = Corpus(processes, "retrieval_metrics", sizes, y)
    own = scores_of(x, y, index, wide, options[1])
    ranks, uncertain = _ranks(x, y, index, apart, own, score_dtype(x.dtype), *options, corpus)
    again = uncertain.any() if corpus is None else corpus.largest(uncertain.sum())
    if score_dtype(x.dtype) != wide and bool(again):
        rows = uncertain.nonzero()[:, 0]
        ranks[rows] = _ranks(x[rows], y, index[rows], apart[rows], own[rows], wide, "", options[1], corpus)[0]
    behind = ranks + in_order(own, index, grades)  # the other positives that stand before it
    best = behind.masked_fill(index < 0, torch.iinfo(torch.int64).max).amin(1)
    best = best.masked_fill(~(index >= 0).any(1), -1)
    behind = behind.masked_fill(index < 0, -1)
    figures = figures_of(behind, grades, cuts)
    every, figures = (best, figures) if corpus is None else (corpus.joined(best), corpus.joined(figures))
    places = every[every >= 0].double().cpu() + 1
    mean = figures[every >= 0].mean(0).tolist()
    return RetrievalMetrics(
        recall={cut: (places <= cut).double().mean().item() for cut in cuts},
        median_rank=places.quantile(0.5).item() if 0 < len(places) < 2**24 else places.median().item(),
        mean_reciprocal_rank=(1 / places).mean().item(),
        ranks=best,
        positive_ranks=behind,
        mean_average_precision=mean[0],
        precision=dict(zip(cuts, mean[1:])),
        ndcg=dict(zip(cuts, mean[1 + len(cuts) :])),
    )


def _ranks(
    x: Tensor,
    y: Tensor,
    index: Tensor,
    apart: Tensor,
    own: Tensor,
    dtype: torch.dtype,
    backend: str,
    workspace_bytes: int,
    corpus: Corpus | None,
) -> tuple[Tensor, Tensor]:
    """How many documents that are no positives stand before each positive [N, P], by scores in `dtype`.

    `apart` [N, .] are left out, `own` [N, P] the positives' scores. And the queries with a document too close to a
    positive to tell [N].
    """
    lengths = row_lengths(y)
    # a document of NaN or infinity is its own trouble, not every query's
    longest = lengths.masked_fill(~lengths.isfinite(), 0.0).amax() if len(y) else lengths.new_ones(())
    size = row_lengths(x) * (longest if corpus is None else corpus.largest(longest))
    slack = score_rounding(x, dtype) * size.to(dtype)
    scores, left_out = own.T.to(dtype), torch.cat([index, apart], 1)
    bounds = (scores - slack).contiguous(), (scores + slack).contiguous()
    if corpus is None:
        below, above = count_ranks(x, y, left_out, *bounds, backend, workspace_bytes)
    else:
        below, above = corpus.count(x, left_out, *bounds, backend, workspace_bytes)
    others = (y.shape[0] if corpus is None else corpus.size) - (left_out >= 0).sum(1)
    before = others - below
    return before.T.contiguous(), ((before > above) & (index >= 0).T).any(0)


def _cut_offs(k: Any) -> tuple[int, ...]:
    """The cut-offs as a tuple."""
    if isinstance(k, (str, Tensor)) or not isinstance(k, Sequence):
        raise TypeError(f"k: expected a sequence of ints; got {type(k).__name__}")
    for cut in k:
        if isinstance(cut, bool) or not isinstance(cut, int):
            raise TypeError(f"k: expected a sequence of ints; got {type(cut).__name__} in it")
        check_count(cut, "k", what="cut-offs of at least 1")
    return tuple(k)
