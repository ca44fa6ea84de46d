"""Global contrastive losses against the published algorithms' own values over 50 steps, and by their definition."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import contrastive_kernels as ck
from contrastive_kernels import reference

FIGURES = Path(__file__).parent / "figures"
sys.path.insert(0, str(FIGURES))
from make_global_losses import ADAM, BATCH, DECAY, GAMMA, INDIVIDUAL, KEPT, SAMPLES, TAU, steps  # noqa: E402


def figures(run: str) -> dict[str, Tensor]:
    kept = json.loads((FIGURES / "global_losses.json").read_text())[run]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in kept.items()}


def schedule(run: str) -> dict[str, Any]:
    cosine = "cosine" in run or "fastclip" in run
    # (LibAUC divides views by their norm, whose gradient has a part in theirs)
    views = {"towers": 1, "normalize": True} if "views" in run else {}
    return {"gamma": GAMMA} | views | ({"gamma_schedule": "cosine", "gamma_decay_epochs": DECAY} if cosine else {})


#: What the published gradients are multiples of: LibAUC's sums over negatives, or over views, of scores, not of logits,
#: are.
FACTORS = {"sogclr": TAU * (BATCH - 1), "sogclr-cosine": TAU * (BATCH - 1), "fastclip-v1": 1.0, "fastclip-v3": 1.0,
           "sogclr-views": 2 * TAU, "sogclr-views-cosine": 2 * TAU}  # fmt: skip


@pytest.mark.parametrize("run", FACTORS)
def test_the_published_sogclr(run):
    want = figures(run)
    loss = ck.SogCLRLoss(SAMPLES, rho=6.5 if run == "fastclip-v3" else None, **schedule(run))
    for step, epoch, index, x, y in steps():
        loss.set_epoch(epoch)
        gradients = torch.autograd.grad(loss(x, y, index, 1 / TAU), (x, y))
        if step in KEPT:
            for name, gradient in zip("xy", gradients):
                torch.testing.assert_close(FACTORS[run] * gradient, want[f"d{name}{step}"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.memory.log_mean, want["log_u"], rtol=1e-9, atol=1e-12)


INDIVIDUAL_FACTORS = {"isogclr": BATCH - 1, "isogclr-cosine": BATCH - 1, "isogclr-views-cosine": 2, "fastclip-v2": 1}


@pytest.mark.parametrize("run", INDIVIDUAL_FACTORS)
def test_the_published_isogclr(run):
    want = figures(run)
    rule: dict[str, Any] = {"temperature_rate": INDIVIDUAL["eta"], "temperature_momentum": 1 - INDIVIDUAL["beta"]}
    if run == "fastclip-v2":
        rule = {"temperature_rate": ADAM["rate"], "temperature_betas": ADAM["betas"], "temperature_clip": 5.0}
    loss = ck.ISogCLRLoss(
        SAMPLES,
        rho=INDIVIDUAL["rho"],
        temperature=TAU,
        temperature_bounds=(INDIVIDUAL["tau_min"], INDIVIDUAL["tau_max"]),
        **rule,
        **schedule(run),
    )
    for step, epoch, index, x, y in steps():
        loss.set_epoch(epoch)
        gradients = torch.autograd.grad(loss(x, y, index), (x, y))
        if step in KEPT:
            for name, gradient in zip("xy", gradients):
                # (temperatures are kept in float32)
                wanted = want[f"d{name}{step}"]
                close = {"rtol": 2e-5, "atol": 2e-5 * wanted.abs().max().item()}
                torch.testing.assert_close(INDIVIDUAL_FACTORS[run] * gradient, wanted, **close)
    torch.testing.assert_close(loss.memory.log_mean, want["log_u"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(loss.temperatures.double(), want["tau"], rtol=1e-5, atol=1e-6)
    assert (loss.temperatures.unique().numel() > 30) and want["tau"].std() > 0.01


def batch(n: int = 6, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = (normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("zero", [0, 0.0, torch.zeros(()), torch.nn.Parameter(torch.zeros(1))], ids=type)
def test_a_scale_of_zero_has_no_temperature(zero, towers):
    """With rho, whose loss has the temperature for a factor, it is refused and moves no memory; else it is a scale."""
    (x, y), index = batch(), torch.arange(6)
    loss = ck.SogCLRLoss(6, towers=towers, rho=2.0)
    with pytest.raises(ValueError, match="logit_scale: expected a number other than 0 with rho"):
        loss(x, y, index, zero)
    assert (loss.memory.visits == 0).all()
    plain = ck.SogCLRLoss(6, towers=towers)(x, y, index, zero)
    torch.testing.assert_close(plain, torch.zeros_like(plain))  # log g = 0


@pytest.mark.parametrize("rho", [None, 2.0])
def test_the_definition_and_the_scales_gradient(rho):
    """With rho, tau (mean log u + rho), whose gradient in tau takes the derivative of g over u for that of log u.

    Without (FastCLIP v1), the mean of log u + g / u - 1. Over steps that the memory remembers, by autograd in float64.
    """
    loss = ck.SogCLRLoss(6, gamma=0.25, rho=rho)
    index, off = torch.arange(6), ~torch.eye(6, dtype=torch.bool)
    u = torch.full((2, 6), math.exp(0.5), dtype=torch.float64)
    loss.memory.update(index, u.log().T)
    for step in range(3):
        x, y = batch(seed=step)
        tau = torch.tensor(0.3 - 0.05 * step, dtype=torch.float64, requires_grad=True)
        scores = x @ y.T
        own = scores.diagonal()
        h = torch.stack([scores - own[:, None], scores.T - own[:, None]]) / tau
        g = (h.exp() * off).sum(2) / 5
        u = (0.75 * u + 0.25 * g).detach()
        leaves = (x, y, tau)
        found = torch.autograd.grad(loss(x, y, index, 1 / tau), leaves)
        ratio = (u.log() + g / u - 1).mean()
        if rho is not None:  # (of which the value has tau for a factor, not the gradient of tau)
            ratio = tau.detach() * ratio + tau * (u.log().mean() + rho) - (tau * u.log().mean()).detach()
        wanted = torch.autograd.grad(ratio, leaves)
        for ours, want in zip(found, wanted):
            torch.testing.assert_close(ours, want)
            assert want.abs().max() > 1e-3
        torch.testing.assert_close(loss.memory.log_mean.T, u.log())
    first = ck.SogCLRLoss(6, gamma=0.25, rho=rho)
    first.memory.update(index, torch.full((6, 2), 0.5, dtype=torch.float64))
    x, y = batch()
    g = torch.stack([v - v.diagonal()[:, None] for v in (x @ y.T, y @ x.T)]).mul(4.0).exp().mul(off).sum(2) / 5
    u = 0.75 * math.exp(0.5) + 0.25 * g
    want = (u.log() + g / u - 1).mean()
    torch.testing.assert_close(first(x, y, index, 4.0), want if rho is None else 0.25 * (want + rho))


@pytest.mark.parametrize("rho", [None, 2.0])
@pytest.mark.parametrize("kind", [ck.SogCLRLoss, ck.ISogCLRLoss])
@pytest.mark.parametrize("towers", [1, 2])
def test_steps_against_the_reference(kind, rho, towers):
    """Values, gradients, memories and temperatures; of one tower with a sample that is there twice."""
    individual = kind is ck.ISogCLRLoss
    samples, gamma, rate = 7, 0.3, 0.02
    options: dict[str, Any] = {"temperature": 0.4, "temperature_rate": rate, "temperature_momentum": 0.0}
    options = {"towers": towers, "gamma": gamma, "rho": (rho or 0.0) if individual else rho} | (
        options if individual else {}
    )
    loss, stored = kind(samples, **options), torch.full((samples, towers), math.nan, dtype=torch.float64)
    taus = torch.full((samples, towers), 0.4, dtype=torch.float64)
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        index = torch.randperm(samples, generator=g)[:5]
        index[4] = index[0] if towers == 1 else index[4]
        x, y = batch(5, seed=step)
        scale = torch.tensor(2.5 + step, dtype=torch.float64, requires_grad=True)
        leaves = (x, y) if individual else (x, y, scale)
        temperature = taus[index] if individual else 1 / scale
        said = {"towers": towers, "index": index, "rho": options["rho"]}
        want = reference.global_contrastive(x, y, temperature, stored[index], gamma, **said)
        value = loss(x, y, index, *leaves[2:])
        torch.testing.assert_close(value, want.loss, rtol=1e-6, atol=1e-6)
        found = [torch.autograd.grad(v, leaves) for v in (value, want.loss)]
        for ours, wanted in zip(*found):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
            assert wanted.abs().max() > 1e-3
        stored[index], taus[index] = want.log_u.detach(), (taus[index] - rate * want.gradient).clamp(0.005, 1.0)
        met = ~stored.isnan()
        torch.testing.assert_close(loss.memory.log_mean[met], stored[met], rtol=1e-6, atol=1e-6)
        if individual:
            torch.testing.assert_close(loss.temperatures.double(), taus, rtol=1e-5, atol=1e-6)
    if individual:
        assert taus.std() > 0.005


def test_views_by_hand():
    """Double sums over 3 samples: each of 6 views has the 4 views of others for negatives."""
    x, y = batch(3)
    loss, index = ck.SogCLRLoss(9, towers=1, gamma=0.25), torch.tensor([7, 2, 4])
    loss.memory.update(index, torch.tensor([[0.5], [1.0], [-0.2]], dtype=torch.float64))
    views, stored, total, kept = [*x.tolist(), *y.tolist()], [0.5, 1.0, -0.2], 0.0, [0.0] * 3

    def score(i: int, j: int) -> float:
        return 3.0 * sum(a * b for a, b in zip(views[i], views[j]))

    for i in range(6):
        g = sum(math.exp(score(i, j)) for j in range(6) if j % 3 != i % 3) / 4
        u = 0.75 * math.exp(stored[i % 3]) + 0.25 * g
        kept[i % 3] += u / 2
        total += math.log(u) + g / u - 1 - score(i, (i + 3) % 6)
    assert loss(x, y, index, 3.0).item() == pytest.approx(total / 6, rel=1e-12)
    assert loss.memory.log_mean[index, 0].exp().tolist() == pytest.approx(kept, rel=1e-12)
    first = ck.SogCLRLoss(9, towers=1)(x, y, index, 3.0)  # which weighs rows by the batch itself
    torch.testing.assert_close(first, ck.nt_xent(x, y, 3.0, include_positive=False) - math.log(4))
    alone = ck.SogCLRLoss(9, towers=1)(x, y, torch.full((3,), 5), 3.0)  # no sample has a negative
    assert alone.item() == 0 and all(g.abs().max() == 0 for g in torch.autograd.grad(alone, (x, y)))


KINDS = [("SogCLRLoss", 2), ("SogCLRLoss", 1), ("ISogCLRLoss", 2), ("ISogCLRLoss", 1)]


@pytest.mark.parametrize("kind, towers", [*KINDS, ("Adam", 2)])
def test_state(kind, towers):
    """A loss goes on from its state as if nothing had been; casts leave the state alone; eval does not move it."""
    given: Any = (7.0,) if kind == "SogCLRLoss" else ()
    adam = {"temperature_betas": (0.9, 0.99)} if kind == "Adam" else {}
    kind = "ISogCLRLoss" if adam else kind

    def new() -> Any:
        return getattr(ck, kind)(6, towers=towers, gamma=0.4, gamma_schedule="cosine", gamma_decay_epochs=5, **adam)

    first, index = new(), torch.tensor([4, 0, 5, 1, 2, 3])
    first.set_epoch(3)
    first(*batch(), index, *given)
    second = new().bfloat16()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.epoch == 3 and second.memory.log_mean.dtype == torch.float64
    values = [loss(*batch(seed=1), index, *given) for loss in (first, second)]
    assert torch.equal(*values)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())
               if isinstance(a, Tensor))  # fmt: skip
    before = copy.deepcopy(first.state_dict())
    first.eval()(*batch(seed=2), index, *given)
    assert all(torch.equal(v, before[n]) for n, v in first.state_dict().items() if isinstance(v, Tensor))


@pytest.mark.parametrize("kind, towers", KINDS)
def test_16_bits_and_autocast(kind, towers):
    given: Any = () if kind == "ISogCLRLoss" else (7.0,)
    x, y = (v.detach().bfloat16() for v in batch(32, 16))
    index = torch.arange(32)
    options = {"towers": towers} | ({} if given else {"temperature": 0.1})
    want = getattr(ck, kind)(32, **options)(x.double(), y.double(), index, *given)
    for autocast in (False, True):
        loss = getattr(ck, kind)(32, **options)
        a, b = ((v.float() if autocast else v).detach().requires_grad_() for v in (x, y))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(a, b, index, *given)
        value.backward()
        assert value.dtype == torch.float32 and value.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-4)
        assert a.grad.dtype == a.dtype and a.grad.isfinite().all() and a.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind, towers", KINDS)
def test_a_recomputation_does_not_move_the_memory(kind, towers, reentrant):
    """Activation checkpointing calls the loss again, which would weigh its rows by a memory that has moved."""
    given: Any = () if kind == "ISogCLRLoss" else (7.0,)
    (x, y), index, loss = batch(3), torch.arange(3), getattr(ck, kind)(3, towers=towers)
    # (the temperatures' gradients are wanted in forward already)
    with pytest.raises(RuntimeError, match=f"{kind}: called again by activation checkpointing"):
        checkpoint(lambda x: loss(x, y, index, *given), x, use_reentrant=reentrant).backward()
    assert (loss.memory.visits == 1).all()
    loss.eval()
    checkpoint(lambda x: loss(x, y, index, *given), x, use_reentrant=reentrant).backward()
    (want,) = torch.autograd.grad(loss(x, y, index, *given), x)
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("kind, towers", KINDS)
def test_no_negatives_and_low_temperatures(kind, towers):
    given: Any = () if kind == "ISogCLRLoss" else (1000.0,)
    for n in (0, 1, 3):
        x, y = batch(n)
        loss = getattr(ck, kind)(3, towers=towers)
        value = loss(x, y, torch.arange(n), *given)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all() and loss.memory.log_mean.isfinite().all()
        assert int(loss.memory.visits.sum()) == (3 * towers if n == 3 else 0)


@pytest.mark.parametrize("kind, towers", KINDS)
def test_every_row_has_a_sample_and_inference_mode_moves_all_or_nothing(kind, towers):
    x, scale = torch.nn.functional.normalize(torch.randn(5, 8), dim=1), (2.0,) if kind == "SogCLRLoss" else ()
    loss = getattr(ck, kind)(10, towers=towers)
    for n in (0, 1, 5):
        with pytest.raises(ValueError, match="index: expected one sample per row of x"):
            loss(x[:n], x[:n], torch.arange(4), *scale)
    with torch.inference_mode():
        loss(x.clone(), x.clone(), torch.arange(5), *scale)
    assert (loss.memory.visits[:5] == 1).all()
