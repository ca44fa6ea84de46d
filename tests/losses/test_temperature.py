"""A temperature in the place of the scale: the same bits, its gradient, and errors that name it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import contrastive_kernels as ck

LABELS = torch.tensor([0, 0, 1, 2, 1, 2])
#: Each with the arguments between x and the scale.
LOSSES = {
    "info_nce": lambda y: (y,),
    "clip_loss": lambda y: (y,),
    "nt_xent": lambda y: (y,),
    "log_sum_exp": lambda y: (y,),
    "multiple_negatives_ranking": lambda y: (y,),
    "sup_con": lambda y: (LABELS,),
    "multi_positive_nce": lambda y: (LABELS,),
}
OF_LABELS = ("SupConLoss", "MultiPositiveNCELoss", "sup_con", "multi_positive_nce")
MODULES = ("InfoNCELoss", "ClipLoss", "NTXentLoss", "MultipleNegativesRankingLoss", *OF_LABELS[:2])


def features(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return (torch.nn.functional.normalize(torch.randn(6, 8, generator=g), dim=1).to(dtype) for _ in range(2))


@pytest.mark.parametrize("name", [*LOSSES, *MODULES])
def test_the_scale_is_its_inverse(name):
    x, y = features()
    function = getattr(ck, name)() if name[0].isupper() else getattr(ck, name)
    more = (LABELS,) if name in OF_LABELS else (y,)
    found = function(x, *more, temperature=0.07)
    assert torch.equal(found, function(x, *more, 1 / 0.07)) and not torch.equal(found, function(x, *more, 1 / 0.08))
    with pytest.raises(TypeError, match="temperature: expected None beside a logit_scale; got float"):
        function(x, *more, 2.0, temperature=0.07)
    with pytest.raises(TypeError, match="logit_scale: expected a float or a tensor of one element; got NoneType"):
        function(x, *more)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0; got 0"):
        function(x, *more, temperature=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name, dtype):
    """Through the inverse, which a 16-bit temperature has in float32."""
    x, y = features(dtype)
    more = LOSSES[name](y)
    temperature = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    scale = torch.tensor(4.0, requires_grad=True)
    of_temperature = torch.autograd.grad(getattr(ck, name)(x, *more, temperature=temperature).sum(), temperature)[0]
    of_scale = torch.autograd.grad(getattr(ck, name)(x, *more, scale).sum(), scale)[0]
    torch.testing.assert_close(
        of_temperature, (-16.0 * of_scale).to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0
    )


def test_one_of_every_row():
    x, y = features()
    temperature = torch.linspace(0.1, 0.5, 6, requires_grad=True)
    for name in ("info_nce", "clip_loss", "nt_xent", "log_sum_exp"):
        found, want = (
            getattr(ck, name)(x, y, **how) for how in ({"temperature": temperature}, {"logit_scale": 1 / temperature})
        )
        assert torch.equal(found, want)
    with pytest.raises(ValueError, match=r"temperature: expected shape \[6\]; got \[5\]"):
        ck.info_nce(x, y, temperature=temperature[:5])


#: Those whose scale is followed by other arguments.
FOLLOWED: dict[str, dict[str, Any]] = {
    "sigmoid": {"logit_bias": -2.0},
    "SigmoidLoss": {"logit_bias": -2.0},
    "decomposable": {"log_normalizer": torch.zeros(6)},
    "DecomposableLoss": {"log_normalizer": torch.zeros(6)},
    "DatasetContrastiveLoss": {"index": torch.arange(6)},
    "SogCLRLoss": {"index": torch.arange(6)},
    "multimodal_contrastive": {"image_aug": None, "text_aug": None},
    "MultimodalContrastiveLoss": {"image_aug": torch.eye(6, 8)},
    "feature_separation": {
        **dict.fromkeys(("image_independent", "text_independent", "image_independent_aug"), torch.eye(6, 8)),
        "text_independent_aug": torch.eye(6, 8).flip(0),
    },
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_of_losses_with_more_arguments(name):
    """The same bits and its gradient; a wrong one is told, and moves no memory."""
    x, y = features()
    temperature = torch.tensor(0.25, requires_grad=True)

    def made():
        if not name[0].isupper():
            return getattr(ck, name)
        return getattr(ck, name)(*[6] * ("index" in FOLLOWED[name]))

    found, want = (
        made()(x, y, **FOLLOWED[name], **how) for how in ({"temperature": temperature}, {"logit_scale": 4.0})
    )
    assert torch.equal(found, want) and torch.autograd.grad(found, temperature)[0] != 0
    loss = made()
    with pytest.raises(TypeError, match="temperature: expected None beside a logit_scale; got float"):
        loss(x, y, logit_scale=2.0, temperature=0.07, **FOLLOWED[name])
    with pytest.raises(TypeError, match="logit_scale: expected a float or a tensor of one element; got NoneType"):
        loss(x, y, **FOLLOWED[name])
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0; got -1"):
        loss(x, y, temperature=-1, **FOLLOWED[name])
    if "index" in FOLLOWED[name]:
        assert (loss.memory.visits == 0).all()


def test_what_follows_is_wanted():
    x, y = features()
    with pytest.raises(TypeError, match="logit_bias: expected a float or a tensor of one element; got NoneType"):
        ck.sigmoid(x, y, 2.0)
    with pytest.raises(TypeError, match="log_normalizer: expected a pair"):
        ck.decomposable(x, y, 2.0)


def test_of_structures():
    """All regularisers' contrasts have it; a base of the user's gets the scale, or nothing where it is wrong."""
    x, y = features()
    temperature = torch.tensor(0.25, requires_grad=True)
    got = []
    base = lambda image, text, logit_scale: got.append(logit_scale) or ck.clip_loss(image, text, logit_scale)  # noqa: E731
    for made in (lambda: ck.LatentStructureLoss(separation=1.0), lambda: ck.LatentStructureLoss(base, separation=1.0)):
        views = {"image_independent": x.roll(1, 1), "text_independent": y.roll(1, 1), "image_independent_aug": x}
        found, want = (made()(x, y, **how, **views) for how in ({"temperature": temperature}, {"logit_scale": 4.0}))
        assert all(torch.equal(value, want[name]) for name, value in found.items())
        assert torch.autograd.grad(found["loss"], temperature)[0] != 0
        for wrong, words in (({"temperature": 0}, "above 0; got 0"), ({"logit_scale": 2.0}, "expected None beside")):
            with pytest.raises((TypeError, ValueError), match=f"temperature: .*{words}"):
                made()(x, y, **{"temperature": 0.25, **wrong})
    assert len(got) == 2 and got[0] == 4.0
    own = torch.tensor(0.5, requires_grad=True)
    for how in ({"independent_temperature": own}, {"independent_temperature": 0.5}):
        found, want = (made()(x, y, 4.0, **each, **views) for each in (how, {"independent_logit_scale": 2.0}))
        assert all(torch.equal(value, want[name]) for name, value in found.items())
    assert torch.autograd.grad(made()(x, y, 4.0, independent_temperature=own, **views)["loss"], own)[0] != 0
    with pytest.raises(TypeError, match=r"^independent_temperature: expected None beside an independent_logit_scale"):
        made()(x, y, 4.0, independent_logit_scale=2.0, independent_temperature=0.5, **views)
    with pytest.raises(ValueError, match=r"separation_options: expected some of .*; got 'temperature'"):
        ck.LatentStructureLoss(separation=1.0, separation_options={"temperature": 0.1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated(dtype):
    """The same bits, and the gradient once; a wrong one moves no memory."""
    x, y = features(dtype)
    parts, found = list(torch.arange(6).split(3)), []
    temperature, scale = (torch.tensor(v, requires_grad=True) for v in (0.25, 4.0))
    for how in ({"temperature": temperature}, {"logit_scale": scale}, {"temperature": 0.25}, {"logit_scale": 4.0}):
        loss = ck.DatasetContrastiveLoss(6, weights="stored")
        torch.manual_seed(0)
        found.append((loss.accumulate(lambda i: (x[i], y[i]), parts, parts, **how), loss.memory.log_mean.clone()))
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each))
    torch.testing.assert_close(temperature.grad, -16 * scale.grad)
    for wrong, words in (
        ({"temperature": -1.0}, "temperature: expected a finite number above 0; got -1"),
        ({"temperature": 0.25, "logit_scale": 4.0}, "temperature: expected None beside a logit_scale"),
        ({}, "logit_scale: expected a float or a tensor of one element; got NoneType"),
    ):
        loss = ck.DatasetContrastiveLoss(6)
        with pytest.raises((TypeError, ValueError), match=words):
            loss.accumulate(lambda i: (x[i], y[i]), parts, parts, **wrong)
        assert (loss.memory.visits == 0).all()


def test_steps_of_a_data_set():
    """The M-step and a warm-up, whose memories are those of the scale's."""
    x, y = features()
    memories = []
    for how in ({"logit_scale": 4.0}, {"temperature": 0.25}):
        loss = ck.DatasetContrastiveLoss(6)
        loss.warm_up(x, y, torch.arange(6), **how)
        value, found = loss.m_step(
            x, y, how.get("logit_scale"), loss.e_step(torch.arange(6)), **({} if "logit_scale" in how else how)
        )
        memories.append((loss.memory.log_mean.clone(), value, found))
    assert all(torch.equal(a, b) for a, b in zip(*memories))
