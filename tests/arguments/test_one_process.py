"""In a process group of more than one, no module computes with its own rows alone unless it is told to."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import contrastive_kernels as ck
from contrastive_kernels.distributed import group as groups

FEATURES = torch.eye(4, 3)

#: Of one sample each, or a queue, or calls of another loss: there is nothing of other processes to leave out.
LOCAL = {"SeparationHead", "FeatureQueue", "MatryoshkaLoss"}
MAKE = {
    "DatasetContrastiveLoss": lambda **over: ck.DatasetContrastiveLoss(10, **over),
    "ISogCLRLoss": lambda **over: ck.ISogCLRLoss(10, **over),
    "SogCLRLoss": lambda **over: ck.SogCLRLoss(10, **over),
    "DecomposableContrastiveLoss": lambda **over: ck.DecomposableContrastiveLoss(10, **over),
}
VALUES = {
    "index": torch.arange(4),
    "labels": torch.arange(4) // 2,
    "log_normalizer": torch.zeros(4),
    "logit_scale": 5.0,
}
MODULES = sorted(
    name
    for name in ck.__all__
    if isinstance(getattr(ck, name), type) and issubclass(getattr(ck, name), nn.Module) and name not in LOCAL
)


class Asked(Exception):
    """The group was asked for."""


def call(name, **over):
    module = MAKE.get(name, getattr(ck, name))(**over)
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    parameters = inspect.signature(module.forward).parameters
    wanted = ["logit_scale"] * ("temperature" in parameters) + ["log_normalizer"] * ("log_normalizer" in parameters)
    return module(*[VALUES.get(p.name, FEATURES) for p in required], **{name: VALUES[name] for name in wanted})


@pytest.mark.parametrize("name", [name for name in MODULES if name != "NormalizerMemory"])
def test_modules_ask_the_default_group(name, monkeypatch):
    def ask(*arguments):
        raise Asked

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(groups, "_default", ask)
    with pytest.raises(Asked):
        call(name)
    call(name, group=False)


def test_functions_serve_the_rows_that_they_are_given(monkeypatch):
    """What a gather of the user's own gives, with positives of this process."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert ck.info_nce(FEATURES[:2], FEATURES, 5.0, positives=2).isfinite()
    assert ck.clip_loss(FEATURES, FEATURES, 5.0).isfinite()
