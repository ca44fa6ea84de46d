"""Negatives chosen inside the stream: drawn in proportion to the softmax, or the hardest ones of every row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..arguments.checks import (
    check_count,
    check_engine,
    check_features,
    check_generator,
    check_positives,
    scale_tensor,
)
from ..arguments.margin import Margin, check_margin, scores_of, upper_bounds
from ..arguments.options import DEFAULT_WORKSPACE_BYTES, Engine
from ..arguments.pairs import check_ids
from ..distributed.group import Ranks, Sizes, ranks_of, told
from ..distributed.search import best_of_all_ranks, largest_of_all_ranks
from ..engine.search import Search, panel_side
from ..operators.search import best_column, best_columns
from ..panels.pairs import Pairs
from ..panels.size import workspace_for
from ..panels.terms import GUMBEL_MAX, MAXIMUM, PairTerm

__all__ = ["hardest_negatives", "sample_negatives"]


def sample_negatives(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    positives: int | Tensor | None = None,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    uneven: bool = False,
) -> Tensor:
    """For every row of ``x`` a row of ``y`` drawn in proportion to exp(logit_scale * <x_i, y_j>), never its positive.

    What image-text matching needs: negatives that the contrastive softmax itself finds hard.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    logit_scale : float or Tensor
        Multiplies the dot products: the inverse temperature. 0 draws uniformly.
    positives : int or Tensor, optional
        Where row i's positive lies in ``y``: at ``i + positives`` (an int; 0 by default), or at ``positives[i]``
        (int64 [N]; -1: nowhere).
    exclude : Tensor or pair of Tensor, optional
        Ids (integers) of the rows [N] and of the candidates [M], one tensor for both where N == M: a candidate whose id
        equals the row's is not drawn either. Labels, captions that occur twice, patients, documents.
    generator : torch.Generator, optional
        Source of the seed; the default generator without one. Equal seeds draw equal negatives.
    normalize : bool
        Divide rows by their Euclidean norm first.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        Bound of the memory that holds panels of scores; by default 64 MiB, and on a GPU 512 MiB or 1/64 of its memory,
        whichever is less.
    group, uneven
        As in :func:`contrastive_kernels.info_nce`. Equal seeds on rank 0 draw what one process would.

    Returns
    -------
    Tensor
        Rows of ``y``, with a `group` of the ranks' ones one below the other, int64 [N]; -1 where no candidate is left.
        A score of NaN is never drawn.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    The largest of z_ij + Gumbel noise is a draw from the softmax of z_i (the Gumbel-max trick), and a maximum streams:
    one product of 2 N M D flop, memory O(N) beside the inputs and the workspace. The noise is a function of the seed, i
    and j alone (Philox4x32-10, see docs/structures.md), so that it depends neither on the panels nor on the backend:
    two backends differ only where rounding decides between two candidates. No gradient.

    With a `group` the candidates are those of all ranks, in their order; ``positives`` still count among the rank's own
    ``y``. Candidates travel from rank to rank: no rank holds more than two ranks' ones.

    References
    ----------
    J. Li et al., "Align before fuse: Vision and language representation learning with momentum distillation", NeurIPS
    2021 (the use). J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (the generator).

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> features = torch.eye(4)
    >>> index = ck.sample_negatives(features, features, 5.0, generator=torch.Generator().manual_seed(0))
    >>> bool((index != torch.arange(4)).all()), index.shape
    (True, torch.Size([4]))
    """
    ranks = _ranks(group, uneven)
    with told(ranks, x):
        check_generator(generator)
        x, y, excluded, ids = _checked(x, y, positives, exclude, normalize)
        params, engine = _params(scale_tensor(x, logit_scale)), check_engine(backend, workspace_bytes)
    device = x.device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, dtype=torch.int64, device=device).to(x.device)
    if ranks is not None:
        return _over_ranks(ranks, "sample_negatives", x, y, params, excluded, ids, seed, engine, normalize)
    return best_column(x, y, params, excluded, *ids, seed, *engine)


def _params(scale: Tensor) -> Tensor:
    """(scale, bias, center) [3] of a search."""
    return torch.nn.functional.pad(scale.detach().reshape(1), (0, 2))


def hardest_negatives(
    x: Tensor,
    y: Tensor,
    *,
    k: int | None = None,
    skip: int = 0,
    margin: Margin | None = None,
    positives: int | Tensor | None = None,
    exclude: Tensor | tuple[Tensor, Tensor] | None = None,
    normalize: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    group: Any | None = None,
    uneven: bool = False,
) -> Tensor:
    """For every row of ``x`` the row of ``y`` with the largest <x_i, y_j> that is not its positive, or the k largest.

    Parameters
    ----------
    x : Tensor
        Anchors [N, D]; float16, bfloat16, float32 or float64.
    y : Tensor
        Candidates [M, D] of the same dtype and device.
    k : int, optional
        How many of every row. None: one.
    skip : int
        So many of the hardest are passed over first, for the hardest of all are often positives that nobody labelled.
    margin : float or ("relative", float), optional
        Candidates of a score above the positive's plus the margin are passed over; with a relative one, above the
        positive's times 1 plus the margin. It may be negative: ("relative", -0.05) leaves candidates of at most 95% of
        the positive's cosine. A row without a positive has no such bound. Scores are compared as float32 rounds them.
    positives, exclude, normalize, backend, workspace_bytes, group, uneven
        As in :func:`sample_negatives`. With ``k``, ``skip`` or ``margin``, the backend is "torch".

    Returns
    -------
    Tensor
        Rows of ``y``, with a `group` of the ranks' ones one below the other, int64 [N]; with ``k`` [N, k], the hardest
        first. Of equal scores the first; -1 where no candidate is left. A score of NaN is passed over.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    One product of 2 N M D flop, memory O(N (k + skip)) beside the inputs and the workspace. No gradient.

    With a `group` the candidates are those of all ranks, in their order; ``positives`` still count among the rank's own
    ``y``. Candidates travel from rank to rank: no rank holds more than two ranks' ones.

    References
    ----------
    F. Faghri, D. J. Fleet, J. R. Kiros, S. Fidler, "VSE++: Improving visual-semantic embeddings with hard negatives",
    BMVC 2018.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> ck.hardest_negatives(x, x)
    tensor([1, 0, 1])
    >>> ck.hardest_negatives(x, x, exclude=torch.tensor([7, 7, 5]))
    tensor([2, 2, 1])
    >>> ck.hardest_negatives(x, x, k=2)
    tensor([[1, 2],
            [0, 2],
            [1, 0]])
    """
    ranks = _ranks(group, uneven)
    with told(ranks, x):
        if k is not None:
            check_count(k, "k")
        check_count(skip, "skip", 0)
        check_margin(margin)
        x, y, excluded, ids = _checked(x, y, positives, exclude, normalize)
        params, engine = _params(scale_tensor(x, 1.0)), check_engine(backend, workspace_bytes)
        many = k is not None or skip > 0 or margin is not None
        if many and engine.backend not in ("", "torch"):
            raise ValueError(
                f"backend: expected None or 'torch' with k, skip or margin, which others cannot serve; got {backend!r}"
            )
    if many:
        taken = _many(ranks, x, y, params, excluded, ids, skip + (k or 1), margin, engine, normalize)[:, skip:]
        return taken[:, 0] if k is None else taken.contiguous()
    if ranks is not None:
        return _over_ranks(ranks, "hardest_negatives", x, y, params, excluded, ids, None, engine, normalize)
    return best_column(x, y, params, excluded, *ids, None, *engine)


def _ranks(group: Any, uneven: Any) -> Ranks | None:
    return ranks_of(group, "sum", "ring", uneven)


def _over_ranks(
    ranks: Ranks,
    call: str,
    x: Tensor,
    y: Tensor,
    params: Tensor,
    excluded: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    seed: Tensor | None,
    engine: Engine,
    normalize: bool,
) -> Tensor:
    """The same among the candidates of all ranks."""
    term = MAXIMUM if seed is None else GUMBEL_MAX
    search, sizes = _agreed(ranks, call, term, x, y, params, excluded, ids, engine, (("normalize", normalize),))
    return best_of_all_ranks(ranks, call, sizes, replace(search, seed=seed))


def _many(
    ranks: Ranks | None,
    x: Tensor,
    y: Tensor,
    params: Tensor,
    excluded: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    most: int,
    margin: Margin | None,
    engine: Engine,
    normalize: bool,
) -> Tensor:
    """The columns of the largest scores within the margin [N, most], of which there may be less."""
    engine = Engine("torch", engine.workspace_bytes)
    workspace = workspace_for(x.device, engine.workspace_bytes)
    upper = None
    if margin is not None:
        own = scores_of(x, y, excluded, params.dtype, workspace)[:, 0]
        upper = upper_bounds(own, margin).masked_fill(excluded[:, 0] < 0, torch.inf)
    if ranks is None:
        return best_columns(x, y, params, excluded, *ids, upper, most, *engine)
    call, about = "hardest_negatives", (("normalize", normalize), ("most", most), ("margin", margin))
    search, sizes = _agreed(ranks, call, MAXIMUM, x, y, params, excluded, ids, engine, about)
    return largest_of_all_ranks(ranks, call, sizes, search, most, upper)


def _agreed(
    ranks: Ranks,
    call: str,
    term: PairTerm,
    x: Tensor,
    y: Tensor,
    params: Tensor,
    excluded: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    engine: Engine,
    more: tuple[tuple[str, Any], ...],
) -> tuple[Search, Sizes]:
    """The search of this rank's rows among its own columns, once all ranks are about to search the same."""
    try:
        backend = backends.choose(engine.backend or None, x.device, x.dtype, term)
        workspace = workspace_for(x.device, engine.workspace_bytes)
        panel_side(x, y, params.dtype, backend, workspace)
    except ValueError as error:
        ranks.fail(error, x)
        raise
    excludes = "given" if ids[0] is not None else None
    about = (("features", x.shape[1]), ("dtype", x.dtype), ("exclude", excludes), *more)
    sizes = ranks.agree(call, about, x, len(x), len(y))
    pairs = Pairs(None, excluded.contiguous(), row_ids=ids[0], col_ids=ids[1])
    return Search(term, x.contiguous(), y.contiguous(), params, pairs, backend, workspace), sizes


def _checked(
    x: Any, y: Any, positives: Any, exclude: Any, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """The features without gradient, the positives' columns [N, 1], and the ids of rows and columns."""
    x, y = check_features(x, y, ("x", "y"), normalize)
    index, offset = check_positives(positives, x, y, allow_missing=True)
    if index is None:
        index = torch.arange(x.shape[0], dtype=torch.int64, device=x.device) + (offset or 0)
    return x.detach(), y.detach(), index[:, None], check_ids(exclude, "exclude", x, y)
