"""The reference, which everything else is compared with, against textbook formulas written out independently."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import reference as ref
from contrastive_kernels.draws import gamma


def make(n=9, m=None, d=5, seed=0):
    """Features, float64."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=g, dtype=torch.float64) for k in (n, m or n))
    return x.requires_grad_(), y.requires_grad_()


def gradients(value, *inputs):
    return torch.autograd.grad(value, inputs, retain_graph=True)


def assert_same(ours, textbook, *inputs):
    """Value and gradients."""
    torch.testing.assert_close(ours, textbook, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for a, b in zip(gradients(ours @ upstream if ours.dim() else ours, *inputs),
                    gradients(textbook @ upstream if ours.dim() else textbook, *inputs)):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


REDUCTIONS = ("mean", "sum", "none")
SCALE = 2.7


def scale_parameter():
    return torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("positives", [None, 4, torch.tensor([3, 0, 3, 12, 7, 7, 1, 2, 5])])
def test_info_nce_is_cross_entropy(positives, reduction):
    (x, y), scale = make(9, 13), scale_parameter()
    labels = positives if torch.is_tensor(positives) else torch.arange(9) + (positives or 0)
    textbook = F.cross_entropy(scale * x @ y.T, labels, reduction=reduction)
    assert_same(ref.info_nce(x, y, scale, positives=positives, reduction=reduction), textbook, x, y, scale)


def test_weighted_mean_divides_by_the_weights():
    (x, y), scale = make(), scale_parameter()
    weight = torch.rand(9, dtype=torch.float64)
    rows = F.cross_entropy(scale * x @ y.T, torch.arange(9), reduction="none")
    for reduction, textbook in (
        ("mean", (weight * rows).sum() / weight.sum()),
        ("sum", (weight * rows).sum()),
        ("none", weight * rows),
    ):
        assert_same(ref.info_nce(x, y, scale, weight=weight, reduction=reduction), textbook, x, y, scale)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_clip_loss_is_openclips(reduction):
    (x, y), scale = make(), scale_parameter()
    per_image, labels = scale * x @ y.T, torch.arange(9)
    per_text = scale * y @ x.T
    images, texts = (F.cross_entropy(z, labels, reduction=reduction) for z in (per_image, per_text))
    assert_same(ref.clip_loss(x, y, scale, reduction=reduction), (images + texts) / 2, x, y, scale)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nt_xent_is_simclrs(reduction):
    (x, y), scale = make(), scale_parameter()
    views = torch.cat([x, y])
    z = (scale * views @ views.T).masked_fill(torch.eye(18, dtype=torch.bool), -1e9)
    labels = torch.cat([torch.arange(9, 18), torch.arange(9)])
    textbook = F.cross_entropy(z, labels, reduction=reduction)
    assert_same(ref.nt_xent(x, y, scale, reduction=reduction), textbook, x, y, scale)


def test_nt_xent_weight_serves_both_views():
    (x, y), weight = make(), torch.rand(9, dtype=torch.float64)
    rows = ref.nt_xent(x, y, SCALE, reduction="none")
    torch.testing.assert_close(ref.nt_xent(x, y, SCALE, weight=weight, reduction="none"), rows * weight.repeat(2))
    mean = (rows * weight.repeat(2)).sum() / (2 * weight.sum())
    torch.testing.assert_close(ref.nt_xent(x, y, SCALE, weight=weight), mean)


def test_sigmoid_is_siglips():
    (x, y), scale = make(), scale_parameter()
    bias = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    labels = -torch.ones(9, 9, dtype=torch.float64) + 2 * torch.eye(9, dtype=torch.float64)
    pairs = F.logsigmoid(labels * (x @ y.T * scale + bias))
    for reduction, textbook in (("mean", -pairs.sum() / 9), ("sum", -pairs.sum()), ("none", -pairs.sum(1))):
        assert_same(ref.sigmoid(x, y, scale, bias, reduction=reduction), textbook, x, y, scale, bias)


def test_a_solved_batch_keeps_its_digits():
    """At a loss of e^-40, cross entropy in float64 gives 0: the positive's weight is rounded to 1."""
    x = torch.eye(2, dtype=torch.float64, requires_grad=True)
    loss = ref.info_nce(x, torch.eye(2, dtype=torch.float64), 40.0)
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-12)
    assert F.cross_entropy(40 * x, torch.arange(2)).item() == 0
    assert gradients(loss, x)[0][0, 1].item() == pytest.approx(40 * math.exp(-40) / 2, rel=1e-12)


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent", "sigmoid", "decomposable"])
def test_nothing_costs_nothing(loss):
    x, y = make(1)
    extra = {"sigmoid": (0.0,), "decomposable": (torch.zeros(0),)}.get(loss, ())
    empty = x[:0]
    assert getattr(ref, loss)(empty, empty, 2.0, *extra).item() == 0
    assert getattr(ref, loss)(empty, empty, 2.0, *extra, reduction="sum").item() == 0
    assert getattr(ref, loss)(empty, empty, 2.0, *extra, reduction="none").shape == (0,)
    if loss in ("info_nce", "clip_loss"):
        value = getattr(ref, loss)(x, y, 2.0)
        assert value.item() == 0
        assert all((g == 0).all() for g in gradients(value, x, y))


# ---- the decomposable loss ----


def log_z(x, y, scale, c=1.0, k=1.0):
    """log Z_i = log(c + k sum over negatives of exp(z_ij - z_ii)), straight from its definition."""
    z = scale * x @ y.T
    h = (z - z.diagonal()[:, None]).exp()
    return (c + k * (h.sum(1) - 1)).log()


@pytest.mark.parametrize("c, k", [(1.0, 1.0), (0.0, 1.0), (1.0, 3.5), (0.25, 0.5)])
def test_decomposable_value_and_normaliser(c, k):
    """u Z - log u - 1 for a u given by log Zbar = -log u; at u = 1 / Z it is log Z."""
    x, y = make()
    own = log_z(x, y, SCALE, c, k)
    u = torch.rand(9, dtype=torch.float64) + 0.1
    value, returned = ref.decomposable(
        x, y, SCALE, -u.log(), positive_constant=c, negative_scale=k, return_log_normalizer=True, reduction="none"
    )
    torch.testing.assert_close(value, u * own.exp() - u.log() - 1)
    torch.testing.assert_close(returned, own.detach())
    assert not returned.requires_grad
    at_optimum = ref.decomposable(x, y, SCALE, own, positive_constant=c, negative_scale=k, reduction="none")
    torch.testing.assert_close(at_optimum, own)
    assert (value >= own).all(), "an upper bound"


def test_decomposable_at_its_own_normaliser_is_info_nce():
    """Value and gradients, the temperature's among them; and CLIP from a pair of normalisers."""
    (x, y), scale = make(), scale_parameter()
    rows, cols = log_z(x, y, scale).detach(), log_z(y, x, scale).detach()
    for reduction in REDUCTIONS:
        ours = ref.decomposable(x, y, scale, rows, reduction=reduction)
        assert_same(ours, ref.info_nce(x, y, scale, reduction=reduction), x, y, scale)
        ours = ref.decomposable(x, y, scale, (rows, cols), reduction=reduction)
        assert_same(ours, ref.clip_loss(x, y, scale, reduction=reduction), x, y, scale)


def test_decomposable_without_negatives_does_not_overflow():
    """negative_scale 0 times an infinite exp(h) is 0, in value and gradient."""
    x, y = make()
    value = ref.decomposable(1000 * x, y, SCALE, torch.zeros(9), negative_scale=0.0)
    assert value.item() == 0 and all((g == 0).all() for g in gradients(value, x, y))


@pytest.mark.parametrize("u", [1e-3, 0.7, 1e3])
def test_decomposable_similarity_gradients_sum_to_zero(u):
    """For any u, stale or drawn: what pushes the negatives away pulls the positive."""
    scores = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    value = ref.decomposable(scores, torch.eye(6, dtype=torch.float64), 3.0, torch.full((6,), -math.log(u)))
    (gradient,) = gradients(value, scores)
    assert gradient.abs().max() > 0.1 * u
    assert (gradient.sum(1).abs() <= 1e-14 * gradient.abs().sum(1)).all()


def test_decomposable_is_a_sum_over_blocks_of_columns():
    """positive_logits: any partition of the columns gives the same gradients."""
    (x, y), scale = make(8, 12), scale_parameter()
    log_zbar = torch.randn(8, dtype=torch.float64)
    whole = ref.decomposable(x, y, scale, log_zbar, reduction="sum")
    z_pos = scale * (x * y[:8]).sum(1)
    index = torch.arange(8)
    parts = 0
    for block in (slice(0, 5), slice(5, 12)):
        inside = (index >= block.start) & (index < block.stop)
        positives = torch.where(inside, index - block.start, -1)
        parts += ref.decomposable(
            x, y[block], scale, log_zbar, positive_logits=z_pos, positives=positives, positive_constant=0.0,
            reduction="sum",
        )  # fmt: skip
    constants = (torch.exp(-log_zbar) - (log_zbar - 1)).sum()  # u c, and one -log u - 1 that was counted twice
    assert_same(parts + constants, whole, x, y, scale)


def test_decomposable_both_directions_with_given_logits():
    (x, y), scale = make(), scale_parameter()
    normalizers, logits = (tuple(torch.randn(2, 9, dtype=torch.float64)) for _ in range(2))
    both = ref.decomposable(x, y, scale, normalizers, positive_logits=logits)
    rows = ref.decomposable(x, y, scale, normalizers[0], positive_logits=logits[0])
    cols = ref.decomposable(y, x, scale, normalizers[1], positive_logits=logits[1])
    assert_same(both, (rows + cols) / 2, x, y, scale)


def test_decomposable_rows_that_do_not_count_do_not_overflow():
    """A row of weight 0 whose exp(h) is infinite gives a gradient of 0, not NaN: the result is the one without it."""
    x, y = make(6)
    with torch.no_grad():
        x[2] *= 4000.0
    row, log_zbar, weight = torch.arange(6), torch.zeros(6), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.3])
    keep = weight > 0
    value = ref.decomposable(x, y, SCALE, log_zbar, weight=weight)
    assert not ref.decomposable(x, y, SCALE, log_zbar).isfinite(), "the row does overflow"
    without = ref.decomposable(x[keep], y, SCALE, log_zbar[keep], positives=row[keep], weight=weight[keep])
    assert_same(value, without, x, y)


@pytest.mark.parametrize("a", [0.5, 1.0, 3.0])
def test_gamma_identity(a):
    """1/Z^a = 1/Gamma(a) integral u^(a-1) e^(-uZ) du, with u Z as the loss reports it, by quadrature over log u."""
    x, y = make(3)
    z = log_z(x, y, SCALE).exp().detach()
    step = 0.02
    log_u = torch.arange(-60, 8, step, dtype=torch.float64)
    t = len(log_u)
    value = ref.decomposable(
        x.detach().repeat(t, 1), y.detach(), SCALE, -log_u.repeat_interleave(3), positives=torch.arange(3).repeat(t),
        reduction="none",
    ).view(t, 3)  # fmt: skip
    u_z = value + log_u[:, None] + 1
    integral = (torch.exp(a * log_u[:, None] - u_z).sum(0) * step) / math.gamma(a)
    torch.testing.assert_close(integral, z**-a, rtol=1e-6, atol=0)


def test_drawn_weights_are_gamma_distributed():
    """log(u Zbar), u ~ Gamma(a, rate a Zbar): Kolmogorov-Smirnov against the distribution function."""
    n = 20_000
    for a in (0.05, 0.3, 1.0, 4.0):
        draws = ref.draw_log_weights(torch.zeros(n, dtype=torch.float64), a, torch.Generator().manual_seed(0))
        assert draws.isfinite().all()
        cdf = torch.special.gammainc(torch.full((n,), a, dtype=torch.float64), a * draws.exp().sort().values)
        distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max().item()
        assert distance < 1.95 / math.sqrt(n), f"shape {a}"  # 0.1 % of honest samples are further away
    assert (ref.draw_log_weights(torch.ones(4), None, None) == 0).all()


def test_draws_do_not_depend_on_the_default_dtype():
    """Nor fail under one of bfloat16, as large models are built under, in which torch draws no gamma numbers."""
    log_zbar = torch.zeros(100)
    want = ref.draw_log_weights(log_zbar, 1.0, torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            ours = ref.draw_log_weights(log_zbar, 1.0, torch.Generator().manual_seed(0))
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(ours, want)


@pytest.mark.parametrize("a", [0.5, 1.0, 5.0])
def test_drawing_costs_nothing_on_average(a):
    """Drawn at log Zbar = log Z, value and gradient have InfoNCE's as their mean."""
    draws = 40_000
    x, y = make(1, 6)
    own = ref.info_nce(x, y, SCALE).detach()[None]  # log Z
    many = x.detach().expand(draws, -1).clone().requires_grad_()
    positives = torch.zeros(draws, dtype=torch.int64)
    value = ref.decomposable(
        many, y, SCALE, own.expand(draws), shape=a, positives=positives, reduction="none",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert value.mean().item() == pytest.approx(own.item(), abs=5 * value.std().item() / math.sqrt(draws))
    (drawn,) = gradients(value.sum(), many)
    (exact,) = gradients(ref.info_nce(x, y, SCALE), x)
    error, spread = drawn.mean(0) - exact[0], drawn.std(0) / math.sqrt(draws)
    assert (error.abs() < 5 * spread).all()


def test_expected_excess_is_its_formula():
    assert gamma.expected_excess(None) == 0
    assert float(gamma.expected_excess(1.0)) == pytest.approx(0.5772156649015329, rel=1e-12)
    assert float(gamma.expected_excess(1e6)) == pytest.approx(5e-7, rel=1e-3)
