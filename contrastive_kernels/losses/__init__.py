"""The losses: each function stands beside its module."""

from .clip import ClipLoss, clip_loss
from .composed import von_mises_fisher_weights
from .decomposable import DecomposableLoss, decomposable
from .labels import MultiPositiveNCELoss, SupConLoss, multi_positive_nce, sup_con
from .log_sum_exp import log_sum_exp
from .matryoshka import MatryoshkaLoss, matryoshka
from .metrics import LossMetrics
from .nt_xent import NTXentLoss, nt_xent
from .queue import FeatureQueue
from .ranking import MultipleNegativesRankingLoss, multiple_negatives_ranking
from .sigmoid import SigmoidLoss, sigmoid
from .softmax import InfoNCELoss, info_nce

__all__ = [
    "ClipLoss",
    "DecomposableLoss",
    "FeatureQueue",
    "InfoNCELoss",
    "LossMetrics",
    "MatryoshkaLoss",
    "MultiPositiveNCELoss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "SigmoidLoss",
    "SupConLoss",
    "clip_loss",
    "decomposable",
    "info_nce",
    "log_sum_exp",
    "matryoshka",
    "multi_positive_nce",
    "multiple_negatives_ranking",
    "nt_xent",
    "sigmoid",
    "sup_con",
    "von_mises_fisher_weights",
]
