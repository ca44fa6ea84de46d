"""What the losses return, with metrics and without: as mypy reads the overloads (`make lint`), and as they run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import contrastive_kernels as ck
from contrastive_kernels.losses import keywords
from contrastive_kernels.losses.metrics import LossMetrics

X, Y = torch.eye(3, 4), torch.eye(3, 4)
LABELS = torch.tensor([0, 1, 0])


def test_alone_or_with_metrics() -> None:
    alone: list[Tensor] = [
        assert_type(ck.info_nce(X, Y, 2.0), Tensor),
        assert_type(ck.clip_loss(X, Y, temperature=0.5, return_metrics=False), Tensor),
        assert_type(ck.nt_xent(X, Y, 2.0, reduction="none"), Tensor),
        assert_type(ck.sup_con(X, LABELS, 2.0), Tensor),
    ]
    beside: list[tuple[Tensor, LossMetrics]] = [
        assert_type(ck.info_nce(X, Y, 2.0, return_metrics=True), tuple[Tensor, LossMetrics]),
        assert_type(ck.clip_loss(X, Y, 2.0, return_metrics=True, margin=0.5), tuple[Tensor, LossMetrics]),
        assert_type(ck.nt_xent(X, Y, temperature=0.5, return_metrics=True), tuple[Tensor, LossMetrics]),
        assert_type(ck.sup_con(X, LABELS, 2.0, return_metrics=True), tuple[Tensor, LossMetrics]),
    ]
    assert all(isinstance(loss, Tensor) for loss in alone)
    assert all(isinstance(loss, Tensor) and isinstance(found, LossMetrics) for loss, found in beside)
    for asked in (False, True):  # a flag that mypy does not know
        either = assert_type(ck.clip_loss(X, Y, 2.0, return_metrics=asked), Tensor | tuple[Tensor, LossMetrics])
        assert isinstance(either, tuple) is asked


@pytest.mark.parametrize("loss, names", [
    (ck.info_nce, keywords.InfoNCEKeywords), (ck.clip_loss, keywords.ClipKeywords),
    (ck.nt_xent, keywords.NTXentKeywords), (ck.sup_con, keywords.SupConKeywords),
])  # fmt: skip
def test_overloads_name_every_keyword(loss: Callable[..., Any], names: Any) -> None:
    given = inspect.signature(loss).parameters.values()
    own = {each.name: each.annotation for each in given if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert own.pop("return_metrics") == "bool"
    told = {name: reference.__forward_arg__ for name, reference in names.__annotations__.items()}
    assert told == own
