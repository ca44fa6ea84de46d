"""What is nearly always a mistake is said once; what is not, never; and an unknown option says where it belongs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import contrastive_kernels as ck
from contrastive_kernels.arguments import hints

X = nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
LOSSES = {"clip_loss": (), "nt_xent": (), "sigmoid": (-1.0,)}


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    monkeypatch.setattr(hints, "unseen", {"lengths", "scale"})


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_features_far_from_unit_length(name, factor):
    with pytest.warns(UserWarning, match=r"(image_features|z1): rows have a length of about (0\.1|10),"):
        getattr(ck, name)(factor * X, X, 5.0, *LOSSES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(ck, name)(factor * X, X, 5.0, *LOSSES[name])


@pytest.mark.parametrize("name", LOSSES)
def test_unit_length_and_normalize_are_silent(name, silent):
    getattr(ck, name)(1.01 * X, X, 5.0, *LOSSES[name])
    hints.unseen.add("lengths")
    getattr(ck, name)(10 * X, X, 5.0, *LOSSES[name], normalize=True)
    ck.info_nce(10 * X, X, 5.0)  # dot products of any length are usual there


def test_padding_and_refused_features_are_silent(silent):
    """Rows of NaN have no length; what is no matrix is an error of its own, in the first call too."""
    padded = torch.cat([X, torch.full_like(X, torch.nan)])
    bias = torch.where(padded.isnan().any(1), -torch.inf, 0.0)
    ck.clip_loss(padded, padded, 5.0, candidate_bias=bias)
    with pytest.raises(TypeError, match="image_features"):
        ck.clip_loss((10 * X).to_sparse(), X, 5.0)


@pytest.mark.parametrize("name", [*LOSSES, "info_nce"])
def test_the_logarithm_of_the_scale(name):
    log_scale = nn.Parameter(torch.tensor(2.66))
    with pytest.warns(UserWarning, match=r"logit_scale: a parameter of 2\.66 looks like the logarithm of the scale"):
        getattr(ck, name)(X, X, log_scale, *LOSSES.get(name, ()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(ck, name)(X, X, log_scale, *LOSSES.get(name, ()))


@pytest.mark.parametrize(
    "scale",
    [
        2.0,
        torch.tensor(2.0, requires_grad=True),
        nn.Parameter(torch.tensor(14.0)),
        nn.Parameter(torch.tensor(2.66)).exp(),
        nn.Parameter(torch.tensor(2.0), requires_grad=False),
    ],
    ids=str,
)
def test_other_scales_are_silent(scale, silent):
    ck.clip_loss(X, X, scale)


@pytest.mark.parametrize(
    "kind, option, said",
    [
        (ck.ClipLoss, "local_loss", r"integrations\.open_clip takes it, as open_clip's own does"),
        (ck.SigmoidLoss, "dist_impl", r"integrations\.open_clip takes it"),
        (ck.NTXentLoss, "memory_bank_size", r"integrations\.lightly takes it"),
        (ck.InfoNCELoss, "similarity_fct", r"integrations\.sentence_transformers takes it"),
        (ck.NTXentLoss, "reducer", r"integrations\.metric_learning takes it"),
        (ck.InfoNCELoss, "temperature", r"1 / temperature, is an argument of the call"),
        (ck.DecomposableLoss, "colour", "got one that it does not have$"),
    ],
)
def test_options_of_others_say_where_they_belong(kind, option, said):
    with pytest.raises(TypeError, match=f"^{option}: expected options of {kind.__name__}, .*{said}"):
        kind(**{option: 1})


def test_a_number_is_not_read_where_there_is_none(silent):
    """Under vmap, on the meta device; the next call that has numbers is looked at."""
    torch.func.vmap(lambda x: ck.clip_loss(x, X, 5.0, backend="torch"))(torch.stack([10 * X, 10 * X]))
    for value in (X.to("meta"), X[:0], X.long(), X[0]):
        hints.look_at_lengths(value, "x")
    hints.look_at_scale(nn.Parameter(torch.tensor(2.0, device="meta")))
    assert hints.unseen == {"lengths", "scale"}
