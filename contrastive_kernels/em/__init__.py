"""The decomposable loss over a data set: stochastic EM with remembered normalisers."""

from .loss import DatasetContrastiveLoss, DecomposableContrastiveLoss
from .memory import NormalizerMemory, NormalizerStatistics

__all__ = ["DatasetContrastiveLoss", "DecomposableContrastiveLoss", "NormalizerMemory", "NormalizerStatistics"]
