"""The keywords of the losses that may return metrics, as their overloads name them.

A loss has its value alone without ``return_metrics``, and a pair with it; everything else that it takes is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor

from ..arguments.margin import Margin
from .composed import WeightFunction
from .queue import FeatureQueue

__all__ = ["ClipKeywords", "InfoNCEKeywords", "NTXentKeywords", "SupConKeywords"]


class _Keywords(TypedDict, total=False):
    temperature: float | Tensor | None
    weight: Tensor | None
    reduction: str
    normalize: bool
    backend: str | None
    workspace_bytes: int | None
    group: Any | None
    gradients: str
    uneven: bool


class _SoftmaxKeywords(_Keywords, total=False):
    strategy: str
    margin: Margin | None
    guided: Sequence[Tensor] | None
    guided_margin: Margin
    include_positive: bool
    label_smoothing: float


class InfoNCEKeywords(_SoftmaxKeywords, total=False):
    """Of :func:`.info_nce`."""

    positives: int | Tensor | None
    positive_logits: Tensor | None
    positive_features: Tensor | None
    queue: FeatureQueue | None
    ids: Tensor | Sequence[Tensor] | None
    candidate_bias: Tensor | None
    weight_fn: WeightFunction | None
    debiased: float | None
    hardness_beta: float | None


class ClipKeywords(_SoftmaxKeywords, total=False):
    """Of :func:`.clip_loss`."""

    ids: Tensor | Sequence[Tensor] | None
    candidate_bias: Tensor | Sequence[Tensor] | None


class NTXentKeywords(_SoftmaxKeywords, total=False):
    """Of :func:`.nt_xent`."""

    ids: Tensor | None
    candidate_bias: Tensor | None
    weight_fn: WeightFunction | None


class SupConKeywords(_Keywords, total=False):
    """Of :func:`.sup_con`."""

    y: Tensor | None
    y_labels: Tensor | None
    variant: str
