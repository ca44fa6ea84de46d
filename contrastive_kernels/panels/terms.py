"""The pair terms: what happens to one score."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXPONENTIAL", "GUMBEL_MAX", "MAXIMUM", "RANK", "SEARCHES", "SIGMOID", "PairTerm"]


@dataclass(frozen=True, eq=False)
class PairTerm:
    """What happens to one score.

    Parameters
    ----------
    name : str
        Its name in every language.
    code : int
        Its number in ``csrc/include/api.h``.
    state_rows : int
        Vectors of running state per side: (shift, sum) for sums of exponentials, (sum) for plain sums.
    """

    name: str
    code: int
    state_rows: int

    @property
    def has_shift(self) -> bool:
        """Whether sums count from a running maximum."""
        return self.state_rows == 2


#: w_ij = r_i exp(z_ij - a_i) + c_j exp(z_ij - b_j); state: the log-sum-exp of rows and columns as (shift, sum).
EXPONENTIAL = PairTerm("exponential", 0, 2)
#: w_ij = r_i sigmoid(z_ij); state: the row's sum of softplus(z_ij).
SIGMOID = PairTerm("sigmoid", 1, 1)
#: No weights; state: the row's largest z_ij and its column, the first of equal ones.
MAXIMUM = PairTerm("maximum", 2, 2)
#: No weights; state: the row's largest z_ij + Gumbel noise and its column: a draw in proportion to exp(z_ij).
GUMBEL_MAX = PairTerm("gumbel_max", 3, 2)
#: No weights; state: how many scores lie below one bound of the row, and how many above another.
RANK = PairTerm("rank", 4, 2)
#: The terms of ``search_panel``.
SEARCHES = (MAXIMUM, GUMBEL_MAX, RANK)
