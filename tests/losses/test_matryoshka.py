"""A loss of prefixes of the features: as its definition has it, of every loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.reference import composed as definitions

X, Y = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
WEIGHTS = (1.0, 0.5, 2.0)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_values_and_gradients(loss, normalized):
    leaves = [v.clone().requires_grad_() for v in (X, Y)]
    found = ck.matryoshka(getattr(ck, loss), (2, 5, 8), WEIGHTS, normalize=normalized)(*leaves, 2.0)
    want = definitions.matryoshka(
        getattr(reference, loss), *leaves, 2.0, dims=(2, 5, 8), weights=WEIGHTS, normalized=normalized
    )
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, leaves) for v in (found, want)))


def test_all_features_are_cut_and_nothing_else():
    several = torch.tensor([[0, 1]] * 6)
    found = ck.matryoshka(ck.info_nce, [3, 8])(X, y=Y, logit_scale=2.0, positive_features=Y.flip(0), reduction="none")
    want = sum(
        ck.info_nce(X[:, :d], Y[:, :d], 2.0, positive_features=Y.flip(0)[:, :d], reduction="none") for d in (3, 8)
    )
    torch.testing.assert_close(found, want)
    found = ck.matryoshka(ck.info_nce, [3])(X, Y, 2.0, positives=several)
    torch.testing.assert_close(found, ck.info_nce(X[:, :3], Y[:, :3], 2.0, positives=several))
    torch.testing.assert_close(ck.matryoshka(ck.clip_loss, (8,))(X, Y, 2.0), ck.clip_loss(X, Y, 2.0))


def test_module():
    class Triplet(nn.Module):
        def __init__(self):
            super().__init__()
            self.margin = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, a, b):
            return (self.margin + (a * b.roll(1, 0)).sum(1) - (a * b).sum(1)).relu().mean()

    module = ck.MatryoshkaLoss(Triplet(), (4, 8), (1.0, 3.0), normalize=True)
    assert [name for name, _ in module.named_parameters()] == ["loss.margin"]
    assert "dims=(4, 8), weights=(1.0, 3.0), normalize=True" in repr(module)
    torch.testing.assert_close(module(X, Y), ck.matryoshka(Triplet(), (4, 8), (1.0, 3.0), normalize=True)(X, Y))


@pytest.mark.parametrize(
    "kind, words, call",
    [
        (ValueError, "dims: expected at most 8", lambda: ck.matryoshka(ck.clip_loss, (9,))(X, Y, 1.0)),
        (ValueError, "dims: expected at least one", lambda: ck.matryoshka(ck.clip_loss, ())),
        (ValueError, "weights: expected one for each of 2", lambda: ck.matryoshka(ck.clip_loss, (1, 2), (1.0,))),
        (TypeError, "loss: expected one that returns a tensor; got dict",
         lambda: ck.MatryoshkaLoss(ck.ClipLoss(), (4,))(X, Y, 1.0, output_dict=True)),
        (ValueError, "queue: expected None",
         lambda: ck.matryoshka(ck.info_nce, (4,))(X, Y, 1.0, queue=ck.FeatureQueue(2, 8))),
    ],
)  # fmt: skip
def test_refusals(kind, words, call):
    with pytest.raises(kind, match=words):
        call()
