"""Streaming contrastive losses for PyTorch: loss and gradients without the N x N matrix of logits."""

from __future__ import annotations

from . import reference
from ._explain import explain, list_backends, why_not
from .em import DecomposableContrastiveLoss, NormalizerMemory, NormalizerStatistics
from .functional import clip_loss, decomposable, info_nce, nt_xent, sigmoid
from .losses import ClipLoss, DecomposableLoss, InfoNCELoss, NTXentLoss, SigmoidLoss

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "DecomposableContrastiveLoss",
    "DecomposableLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "NormalizerMemory",
    "NormalizerStatistics",
    "SigmoidLoss",
    "__version__",
    "clip_loss",
    "decomposable",
    "explain",
    "info_nce",
    "list_backends",
    "nt_xent",
    "reference",
    "sigmoid",
    "why_not",
]
