"""The decomposable loss over a data set: stochastic EM with remembered normalisers."""

from .loss import DecomposableContrastiveLoss
from .memory import NormalizerMemory, NormalizerStatistics

__all__ = ["DecomposableContrastiveLoss", "NormalizerMemory", "NormalizerStatistics"]
