"""The former place of :mod:`contrastive_kernels.search.retrieval`."""

from .search.retrieval import *  # noqa: F403
from .search.retrieval import __all__ as __all__
