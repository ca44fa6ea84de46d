"""The features of both modalities and of their views, checked together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments.checks import (
    check_features,
    require_equal_lengths,
)
from ..panels.size import score_dtype

__all__ = ["matching"]


def matching(
    features: dict[str, Tensor], views: dict[str, Tensor | None], normalize: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Features and the views that there are, in the precision of the scores, all of the first one's shape and dtype.

    Autocast does not round them: what is of size N D gains nothing from 16 bits.
    """
    first_name, first = next(iter(features.items()))

    def checked(name: str, feature: Tensor) -> Tensor:
        x, y = check_features(first, feature, (first_name, name), normalize)
        require_equal_lengths(x, y, (first_name, name))
        return y.to(score_dtype(y.dtype))

    device = first.device.type if isinstance(first, Tensor) and not first.is_meta else "cpu"
    with torch.autocast(device, enabled=False):
        return (
            [checked(name, feature) for name, feature in features.items()],
            [None if view is None else checked(name, view) for name, view in views.items()],
        )
