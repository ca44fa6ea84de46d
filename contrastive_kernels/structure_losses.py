"""The former place of :mod:`contrastive_kernels.structure.loss`."""

from .structure.loss import *  # noqa: F403
from .structure.loss import __all__ as __all__
