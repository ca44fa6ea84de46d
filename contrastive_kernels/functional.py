"""The losses as functions, in one place: ``from contrastive_kernels import functional as ckf``."""

from .arguments.reduction import DEFAULT_WORKSPACE_BYTES
from .losses import clip_loss, decomposable, info_nce, log_sum_exp, multi_positive_nce, nt_xent, sigmoid, sup_con

__all__ = [
    "DEFAULT_WORKSPACE_BYTES",
    "clip_loss",
    "decomposable",
    "info_nce",
    "log_sum_exp",
    "multi_positive_nce",
    "nt_xent",
    "sigmoid",
    "sup_con",
]
