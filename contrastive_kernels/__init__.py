"""Streaming contrastive losses for PyTorch: loss and gradients without the N x N matrix of logits."""

from __future__ import annotations

from . import integrations, reference, reference_structure
from .backends.native import require_fresh as _require_fresh
from .em import (
    DatasetContrastiveLoss,
    DecomposableContrastiveLoss,
    ISogCLRLoss,
    NormalizerMemory,
    NormalizerStatistics,
    SogCLRLoss,
)
from .losses import (
    ClipLoss,
    DecomposableLoss,
    FeatureQueue,
    InfoNCELoss,
    LossMetrics,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    MultiPositiveNCELoss,
    NTXentLoss,
    SigmoidLoss,
    SupConLoss,
    clip_loss,
    decomposable,
    info_nce,
    log_sum_exp,
    matryoshka,
    multi_positive_nce,
    multiple_negatives_ranking,
    nt_xent,
    sigmoid,
    sup_con,
    von_mises_fisher_weights,
)
from .planning.explain import explain, list_backends, why_not
from .planning.plan import plan
from .planning.tuning import autotune
from .search import RetrievalMetrics, hardest_negatives, retrieval_metrics, sample_negatives
from .structure import (
    LatentStructureLoss,
    MultimodalContrastiveLoss,
    SeparationHead,
    brownian_bridge,
    feature_separation,
    geometric_consistency,
    multimodal_contrastive,
)
from .training import cached_loss, cached_step

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "DatasetContrastiveLoss",
    "DecomposableContrastiveLoss",
    "DecomposableLoss",
    "FeatureQueue",
    "ISogCLRLoss",
    "InfoNCELoss",
    "LatentStructureLoss",
    "LossMetrics",
    "MatryoshkaLoss",
    "MultiPositiveNCELoss",
    "MultimodalContrastiveLoss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "NormalizerMemory",
    "NormalizerStatistics",
    "RetrievalMetrics",
    "SeparationHead",
    "SigmoidLoss",
    "SogCLRLoss",
    "SupConLoss",
    "__version__",
    "autotune",
    "brownian_bridge",
    "cached_loss",
    "cached_step",
    "clip_loss",
    "decomposable",
    "explain",
    "feature_separation",
    "geometric_consistency",
    "hardest_negatives",
    "info_nce",
    "integrations",
    "list_backends",
    "log_sum_exp",
    "matryoshka",
    "multi_positive_nce",
    "multimodal_contrastive",
    "multiple_negatives_ranking",
    "nt_xent",
    "plan",
    "reference",
    "reference_structure",
    "retrieval_metrics",
    "sample_negatives",
    "sigmoid",
    "sup_con",
    "von_mises_fisher_weights",
    "why_not",
]

_require_fresh(__version__)
