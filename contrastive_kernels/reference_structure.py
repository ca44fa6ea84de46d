"""The former place of :mod:`contrastive_kernels.reference.structure`."""

from .reference.structure import *  # noqa: F403
from .reference.structure import __all__ as __all__
