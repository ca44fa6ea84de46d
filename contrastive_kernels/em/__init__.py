"""The decomposable loss over a data set: stochastic EM with remembered normalisers."""

from .global_contrastive import SogCLRLoss
from .individual import ISogCLRLoss
from .loss import DatasetContrastiveLoss, DecomposableContrastiveLoss
from .memory import NormalizerMemory, NormalizerStatistics

__all__ = [
    "DatasetContrastiveLoss",
    "DecomposableContrastiveLoss",
    "ISogCLRLoss",
    "NormalizerMemory",
    "NormalizerStatistics",
    "SogCLRLoss",
]
