"""In a process group of more than one, modules refuse to leave out the other processes' rows without a word."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import contrastive_kernels as ck

FEATURES = torch.eye(4, 3)

#: Of one sample each: nothing of other processes is left out.
LOCAL = {"SeparationHead"}
#: Their rows are those of all ranks (tests/distributed).
SHARED = {"ClipLoss", "DecomposableLoss", "InfoNCELoss", "NTXentLoss", "SigmoidLoss"}
MAKE = {
    "DatasetContrastiveLoss": lambda: ck.DatasetContrastiveLoss(10),
    "DecomposableContrastiveLoss": lambda: ck.DecomposableContrastiveLoss(10),
    # a base of the user's own is not asked either
    "LatentStructureLoss": lambda: ck.LatentStructureLoss(lambda *features: pytest.fail("the base was called")),
}
VALUES = {"index": torch.arange(4), "log_normalizer": torch.zeros(4), "logit_scale": 5.0}
MODULES = [
    name
    for name in ck.__all__
    if isinstance(getattr(ck, name), type) and issubclass(getattr(ck, name), nn.Module) and name not in LOCAL
]


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"NormalizerMemory"} - SHARED))
def test_modules_refuse(name, two_processes):
    module = MAKE.get(name, getattr(ck, name))()
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    with pytest.raises(NotImplementedError, match=rf"{type(module).__name__}: expected a single process; got .* of 2"):
        module(*[VALUES.get(p.name, FEATURES) for p in required])


def test_functions_serve_the_rows_that_they_are_given(two_processes):
    """What a gather gives, with positives of this process."""
    assert ck.info_nce(FEATURES[:2], FEATURES, 5.0, positives=2).isfinite()
    assert ck.clip_loss(FEATURES, FEATURES, 5.0).isfinite()
