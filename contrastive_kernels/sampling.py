"""The former place of :mod:`contrastive_kernels.search.negatives`."""

from .search.negatives import *  # noqa: F403
from .search.negatives import __all__ as __all__
