"""Latent modality structures: one function per regulariser, the base loss that they belong to, and their modules.

All of them take unit-norm features of one dtype and give a float32 value (float64 for float64 features); the parts of
size N D are computed in that precision whatever comes in, under autocast too.
"""

from .bridge import brownian_bridge
from .geometry import geometric_consistency
from .loss import LatentStructureLoss, MultimodalContrastiveLoss, SeparationHead
from .multimodal import multimodal_contrastive
from .separation import feature_separation

__all__ = [
    "LatentStructureLoss",
    "MultimodalContrastiveLoss",
    "SeparationHead",
    "brownian_bridge",
    "feature_separation",
    "geometric_consistency",
    "multimodal_contrastive",
]
