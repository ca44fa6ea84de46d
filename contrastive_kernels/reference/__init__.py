"""The definition of every loss: dense, differentiable by plain autograd, in whatever precision comes in."""

from ..draws.gamma import draw_log_weights
from . import composed, search, structure
from .global_contrastive import global_contrastive
from .labels import multi_positive_nce, sup_con
from .losses import clip_loss, decomposable, info_nce, log_sum_exp, nt_xent, sigmoid
from .ranking import multiple_negatives_ranking

__all__ = [
    "clip_loss",
    "composed",
    "decomposable",
    "draw_log_weights",
    "global_contrastive",
    "info_nce",
    "log_sum_exp",
    "multi_positive_nce",
    "multiple_negatives_ranking",
    "nt_xent",
    "search",
    "sigmoid",
    "structure",
    "sup_con",
]
