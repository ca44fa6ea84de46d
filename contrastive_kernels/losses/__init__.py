"""The losses: each function stands beside its module."""

from .decomposable import DecomposableLoss, decomposable
from .labels import MultiPositiveNCELoss, SupConLoss, multi_positive_nce, sup_con
from .log_sum_exp import log_sum_exp
from .nt_xent import NTXentLoss, nt_xent
from .sigmoid import SigmoidLoss, sigmoid
from .softmax import ClipLoss, InfoNCELoss, clip_loss, info_nce

__all__ = [
    "ClipLoss",
    "DecomposableLoss",
    "InfoNCELoss",
    "MultiPositiveNCELoss",
    "NTXentLoss",
    "SigmoidLoss",
    "SupConLoss",
    "clip_loss",
    "decomposable",
    "info_nce",
    "log_sum_exp",
    "multi_positive_nce",
    "nt_xent",
    "sigmoid",
    "sup_con",
]
