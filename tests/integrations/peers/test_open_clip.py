"""open_clip's losses and these: the same values and gradients, with every flag."""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from typing import Any

import pytest
import torch
from against import assert_no_worse, assert_same, features, value_and_gradients
from launch import run, succeeded
from open_clip import loss as theirs
from torch import Tensor
from torch import distributed as dist

from contrastive_kernels.integrations import common
from contrastive_kernels.integrations import open_clip as ours

open_clip = sys.modules["open_clip"]

SCALE = torch.tensor(14.0, requires_grad=True)
BIAS = torch.tensor(-10.0, requires_grad=True)


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("output_dict", [False, True])
def test_clip(n, bias, output_dict):
    def made(kind: Any) -> Any:
        loss = kind(cache_labels=True)
        return lambda x, y, s, b: loss(x, y, s, logit_bias=b, output_dict=output_dict)

    x, y = features(n)
    assert_same(made(ours.ClipLoss), made(theirs.ClipLoss), [x, y, SCALE, bias])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_sixteen_bits_are_no_worse(kind, dtype):
    def made(module: Any) -> Any:
        loss = getattr(module, kind)()
        return lambda x, y: loss(x, y, 14.0, -10.0 if kind == "SigLipLoss" else None)

    assert_no_worse(made(ours), made(theirs), [features(65, seed=k) for k in range(8)], dtype)


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("dist_impl", [None, "bidir", "shift", "reduce", "gather"])
@pytest.mark.parametrize("output_dict", [False, True])
def test_siglip(n, bias, dist_impl, output_dict):
    def made(kind: Any) -> Any:
        loss = kind(cache_labels=True, dist_impl=dist_impl)
        return lambda x, y, s, b: loss(x, y, s, b, output_dict)

    assert_same(made(ours.SigLipLoss), made(theirs.SigLipLoss), [*features(n), SCALE, bias])


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.0, 3.0)])
@pytest.mark.parametrize("output_dict", [False, True])
def test_coca(weights, output_dict):
    n, length, words = 9, 5, 11
    labels = torch.randint(words, (n, length))
    labels[:, -1] = 3

    def made(kind: Any) -> Any:
        loss = kind(*weights, pad_id=3)
        return lambda x, y, logits, s: loss(x, y, logits, labels, s, output_dict=output_dict)

    x, y = features(n)
    if weights[1] == 0.0:  # of the features there is no gradient then
        found, wanted = (
            value_and_gradients(made(kind), [x, y, torch.randn(n, length, words).double() * 0 + 1, SCALE.double()])
            for kind in (ours.CoCaLoss, theirs.CoCaLoss)
        )
        assert [g is None for g in found] == [g is None for g in wanted]
        torch.testing.assert_close([g for g in found if g is not None], [g for g in wanted if g is not None])
    else:
        assert_same(made(ours.CoCaLoss), made(theirs.CoCaLoss), [x, y, torch.randn(n, length, words).double(), SCALE])


# ---- several ranks ----


def by_rank(kind: str, options: dict[str, Any], n: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = (v[rank * n : (rank + 1) * n] for v in features(size * n))
    found = []
    for module in (ours, theirs):
        loss = getattr(module, kind)(rank=rank, world_size=size, **options)

        def call(x: Tensor, y: Tensor, s: Tensor, b: Tensor, loss: Any = loss) -> Any:
            return loss(x, y, s, b) if kind == "SigLipLoss" else loss(x, y, s)

        *same, scale, bias = value_and_gradients(
            call, [x, y, SCALE.double().detach().requires_grad_(), BIAS.double().detach().requires_grad_()]
        )
        means = []
        for each in (scale, bias):
            mean = torch.zeros((), dtype=torch.float64) if each is None else each.clone()
            dist.all_reduce(mean)
            means.append(mean / size)
        found.append((same, means))
    return found


FLAGS = [{"local_loss": a, "gather_with_grad": b} for a, b in itertools.product((False, True), repeat=2)]
OVER_RANKS = [("ClipLoss", flags) for flags in FLAGS]
OVER_RANKS += [("SigLipLoss", {"dist_impl": impl}) for impl in ("bidir", "shift", "reduce", "gather")]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind, options", OVER_RANKS, ids=str)
def test_over_ranks(kind, options, ranks, tmp_path):
    """Value and features' gradients on every rank; scale's and bias's as averaged over ranks."""
    for found, wanted in succeeded(run(ranks, by_rank, tmp_path, kind, options, 5)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# ---- the factory ----


def arguments(**over: Any) -> argparse.Namespace:
    base = {"distill": False, "model": "ViT-B-32", "siglip": False, "horovod": False, "rank": 1, "world_size": 4}
    base |= {"local_loss": True, "gather_with_grad": True, "loss_dist_impl": "shift"}
    base |= {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0}
    return argparse.Namespace(**{**base, **over})


@pytest.mark.parametrize(
    "over, kind", [({}, "ClipLoss"), ({"siglip": True}, "SigLipLoss"), ({"model": "coca_ViT-B-32"}, "CoCaLoss")]
)
def test_patched_makes_these_in_the_factory(over, kind):
    with ours.patched():
        made = open_clip.create_loss(arguments(**over))
    assert type(made) is getattr(ours, kind)
    assert (made.rank, made.world_size) == (1, 4)
    again = open_clip.create_loss(arguments(**over))
    assert type(again) is getattr(theirs, kind)
    assert isinstance(made, type(again))


def test_install_stays(monkeypatch):
    seen = {name: getattr(open_clip, name) for name in ("ClipLoss", "CoCaLoss")}
    try:
        ours.install()
        ours.install()
        assert type(open_clip.create_loss(arguments())) is ours.ClipLoss
        assert open_clip.ClipLoss is ours.ClipLoss
        assert type(open_clip.create_loss(arguments(distill=True))) is theirs.DistillClipLoss
    finally:
        common.replace("open_clip", {v: k for k, v in ours._CLASSES.items()})
    assert {name: getattr(open_clip, name) for name in seen} == seen


# ---- what is left to open_clip ----


class Halved(ours.ClipLoss):
    def get_logits(self, *arguments: Any, **more: Any) -> Any:
        return tuple(0.5 * each for each in super().get_logits(*arguments, **more))


def test_logits_of_ones_own_are_used_and_said_once(monkeypatch):
    monkeypatch.setattr(common, "_said", set())
    x, y = features(5)
    with pytest.warns(
        UserWarning, match="open_clip.ClipLoss: Halved with get_logits of its own is computed by the libr"
    ):
        found = Halved()(x, y, 14.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Halved()(x, y, 14.0) == found
    torch.testing.assert_close(found, theirs.ClipLoss()(x, y, 7.0))


def test_horovod_is_left_to_open_clip(monkeypatch):
    """Which says itself what it is missing."""
    monkeypatch.setattr(common, "_said", set())
    with pytest.warns(UserWarning, match="a loss over Horovod"), pytest.raises(AssertionError, match="horovod"):
        ours.ClipLoss(world_size=2, use_horovod=True)(*features(3), 1.0)
