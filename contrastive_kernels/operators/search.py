"""The searches as torch.library operators. They have no gradient; empty tensors stand for what is not given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from .._library import define
from ..engine.rounding import lengths, score_rounding
from ..engine.search import Search, count, find, find_many
from ..panels.pairs import ALIKE_ALONE, Pairs
from ..panels.size import workspace_for
from ..panels.terms import GUMBEL_MAX, MAXIMUM, RANK, PairTerm

__all__ = ["best_alike", "best_column", "best_columns", "count_lower", "count_ranks"]


def _best_column(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    exclude: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    seed: Tensor | None,
    backend: str,
    workspace_bytes: int | None,
) -> Tensor:
    """The column of each row's largest z_ij (with a seed: z_ij + noise) [N] int64, -1 where none is left."""
    term = MAXIMUM if seed is None else GUMBEL_MAX
    chosen = backends.choose(backend or None, x.device, x.dtype, term)
    pairs = Pairs(None, _columns(exclude), row_ids=row_ids, col_ids=col_ids)
    workspace = workspace_for(x.device, workspace_bytes)
    search = Search(term, x.contiguous(), y.contiguous(), params, pairs, chosen, workspace, seed)
    return find(search)[1]


def _columns(exclude: Tensor) -> Tensor | None:
    """The columns that rows leave out [N, K], if there are any."""
    return exclude.contiguous() if exclude.shape[1] else None


def _best_column_fake(x, y, params, exclude, row_ids, col_ids, seed, backend, workspace_bytes):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=torch.int64)


def _best_columns(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    exclude: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    upper: Tensor | None,
    most: int,
    backend: str,
    workspace_bytes: int | None,
) -> Tensor:
    """The columns of each row's largest z_ij of at most upper_i, in falling order [N, most] int64, -1 at the end."""
    chosen = backends.choose(backend or "torch", x.device, x.dtype, MAXIMUM)
    pairs = Pairs(None, _columns(exclude), row_ids=row_ids, col_ids=col_ids)
    workspace = workspace_for(x.device, workspace_bytes)
    return find_many(Search(MAXIMUM, x.contiguous(), y.contiguous(), params, pairs, chosen, workspace), most, upper)[1]


def _best_columns_fake(x, y, params, exclude, row_ids, col_ids, upper, most, backend, workspace_bytes):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], most), dtype=torch.int64)


def _count_ranks(
    x: Tensor,
    y: Tensor,
    exclude: Tensor,
    low: Tensor,
    high: Tensor,
    backend: str,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """How many <x_i, y_j> lie below low_i and above high_i, excluded columns left out: two int64 vectors [N].

    Or [K, N], as the bounds are.
    """
    # float64 bounds ask for float64 scores
    chosen = backends.choose(backend or None, x.device, low.dtype if low.dtype == torch.float64 else x.dtype, RANK)
    params = torch.zeros(3, dtype=low.dtype, device=low.device)
    params[0] = 1.0
    pairs, x, y = Pairs(None, _columns(exclude)), x.contiguous(), y.contiguous()
    workspace = workspace_for(x.device, workspace_bytes)
    search = Search(RANK, x, y, params, pairs, chosen, workspace, score_dtype=low.dtype)
    return count(search, low.contiguous(), high.contiguous())


def _count_ranks_fake(x, y, exclude, low, high, backend, workspace_bytes):  # type: ignore[no-untyped-def]
    return x.new_empty(low.shape, dtype=torch.int64), x.new_empty(low.shape, dtype=torch.int64)


def _best_alike(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    symmetric: bool,
    backend: str,
    workspace_bytes: int | None,
) -> Tensor:
    """The largest z_ij of row i's id [N], -inf without; of a symmetric matrix, not that of the diagonal."""
    pairs = Pairs(0 if symmetric else None, row_ids=row_ids, col_ids=col_ids, equal_ids=ALIKE_ALONE)
    chosen = _searching(backend, x, MAXIMUM)
    workspace = workspace_for(x.device, workspace_bytes)
    return find(Search(MAXIMUM, x.contiguous(), y.contiguous(), params, pairs, chosen, workspace))[0]


def _best_alike_fake(x, y, params, row_ids, col_ids, symmetric, backend, workspace_bytes):  # type: ignore[no-untyped-def]
    return params.new_empty(x.shape[0])


def _searching(backend: str, x: Tensor, term: PairTerm) -> backends.Backend:
    """A backend by name, or one that knows the term where it does not."""
    chosen = backends.choose(backend or None, x.device, x.dtype)
    return chosen if chosen.refusal(x.device, x.dtype, term) is None else backends.choose(None, x.device, x.dtype, term)


def _count_lower(
    x: Tensor,
    y: Tensor,
    params: Tensor,
    own: Tensor,
    exclude: Tensor,
    said: Sequence[Tensor | None],
    symmetric: bool,
    backend: str,
    workspace_bytes: int | None,
) -> Tensor:
    """How many z_ij that count lie below own_i, by more than rounding [N] int64; `said`: the pairs' tensors."""
    chosen = _searching(backend, x, RANK)
    pairs = Pairs.of(tuple(said)).leaving_out(0 if symmetric else None, _columns(exclude))
    search = Search(
        RANK, x.contiguous(), y.contiguous(), params, pairs, chosen, workspace_for(x.device, workspace_bytes)
    )
    longest = lengths(y)
    longest = longest.masked_fill(~longest.isfinite(), 0.0).amax() if len(y) else longest.sum()
    slack = score_rounding(x, own.dtype) * (params[0].abs() * lengths(x) * longest).to(own.dtype)
    low = own - slack - 4 * torch.finfo(own.dtype).eps * own.abs()
    return count(search, low, torch.full_like(low, torch.inf))[0]


def _count_lower_fake(x, y, params, own, exclude, said, symmetric, backend, workspace_bytes):  # type: ignore[no-untyped-def]
    return x.new_empty(own.shape, dtype=torch.int64)


best_column = define(
    "best_column(Tensor x, Tensor y, Tensor params, Tensor exclude, Tensor? row_ids, Tensor? col_ids, Tensor? seed, "
    "str backend, int? workspace_bytes) -> Tensor",
    _best_column_fake,
    _best_column,
)


best_columns = define(
    "best_columns(Tensor x, Tensor y, Tensor params, Tensor exclude, Tensor? row_ids, Tensor? col_ids, Tensor? upper, "
    "SymInt most, str backend, int? workspace_bytes) -> Tensor",
    _best_columns_fake,
    _best_columns,
)


count_ranks = define(
    "count_ranks(Tensor x, Tensor y, Tensor exclude, Tensor low, Tensor high, str backend, "
    "int? workspace_bytes) -> (Tensor, Tensor)",
    _count_ranks_fake,
    _count_ranks,
)


count_lower = define(
    "count_lower(Tensor x, Tensor y, Tensor params, Tensor own, Tensor exclude, Tensor?[] said, bool symmetric, "
    "str backend, int? workspace_bytes) -> Tensor",
    _count_lower_fake,
    _count_lower,
)


best_alike = define(
    "best_alike(Tensor x, Tensor y, Tensor params, Tensor row_ids, Tensor col_ids, bool symmetric, str backend, "
    "int? workspace_bytes) -> Tensor",
    _best_alike_fake,
    _best_alike,
)
