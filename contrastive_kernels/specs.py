"""The former place of :mod:`contrastive_kernels.panels.terms` and :mod:`contrastive_kernels.planning.costs`."""

from .panels.terms import EXPONENTIAL, GUMBEL_MAX, MAXIMUM, RANK, SEARCHES, SIGMOID, PairTerm
from .planning.costs import LOSSES, SEARCH_SPECS, LossSpec

__all__ = [
    "EXPONENTIAL",
    "GUMBEL_MAX",
    "LOSSES",
    "MAXIMUM",
    "RANK",
    "SEARCHES",
    "SEARCH_SPECS",
    "SIGMOID",
    "LossSpec",
    "PairTerm",
]
