"""What each loss costs, in one table that benchmarks, tests and `explain` read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments.checks import shown
from ..panels.terms import EXPONENTIAL, GUMBEL_MAX, MAXIMUM, RANK, SIGMOID, PairTerm

__all__ = ["ALL_RANKS", "LOSSES", "ONE_WAY", "SEARCH_SPECS", "LossSpec", "checked_members"]


@dataclass(frozen=True)
class LossSpec:
    """What one loss asks of the stream.

    Parameters
    ----------
    name : str
        The function's name in the public interface.
    term : PairTerm
        Its pair term.
    passes : int
        Passes over the scores for value and all gradients.
    products : float
        Products of 2 N M D flop for value and all gradients. ``nt_xent`` counts products of its 2N x 2N matrix.
    forward_products : float
        Products for the value alone.
    frozen_products : float
        Products for value and gradients where ``y`` needs none.
    by_rows : bool
        A row's normaliser asks for that row's scores alone, so that a band of rows can be finished before the next one.

    Notes
    -----
    Products are those of passes over the whole matrix. Where the scores of a band are made once for both passes, or of
    the whole matrix, ``forward_products`` are saved.
    """

    name: str
    term: PairTerm
    passes: int
    products: float
    forward_products: float
    frozen_products: float
    by_rows: bool = False


#: Every loss by name.
LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("info_nce", EXPONENTIAL, 2, 4, 1, 3, by_rows=True),
        LossSpec("clip_loss", EXPONENTIAL, 2, 4, 1, 3),
        LossSpec("nt_xent", EXPONENTIAL, 2, 2, 0.5, 2),
        LossSpec("sigmoid", SIGMOID, 1, 3, 1, 2),
        LossSpec("decomposable", EXPONENTIAL, 1, 3, 1, 2),
    )
}


#: Every function that searches, by name. They have no gradients: one product each.
SEARCH_SPECS: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("sample_negatives", GUMBEL_MAX, 1, 1, 1, 1),
        LossSpec("hardest_negatives", MAXIMUM, 1, 1, 1, 1),
        LossSpec("retrieval_metrics", RANK, 1, 1, 1, 1),
    )
}

#: What a loss may be given beside, by the argument's name.
_MEMBERS = {
    **dict.fromkeys(
        ("info_nce", "clip_loss", "nt_xent"),
        ("ids", "candidate_bias", "margin", "guided", "label_smoothing", "include_positive", "logit_scale"),
    ),
    "sigmoid": ("ids", "candidate_bias"),
    "decomposable": ("ids", "candidate_bias", "margin", "logit_scale"),
}
#: Those that make rows and columns differ: each direction is a pass of its own, and no matrix symmetric.
ONE_WAY = frozenset({"candidate_bias", "logit_scale"})
#: Those that are there over the ranks of a group.
ALL_RANKS = frozenset({"ids", "include_positive"})


def checked_members(members: Sequence[str], loss: str) -> frozenset[str]:
    """What this loss is given beside."""
    found: Any = members
    if isinstance(found, str) or not isinstance(found, (tuple, list, set, frozenset)):
        raise TypeError(f"members: expected a sequence of names of arguments; got {shown(found)}")
    known = _MEMBERS[loss]
    for name in found:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"members: expected some of {', '.join(known)} for {loss}; got {shown(name)}")
    return frozenset(found)
