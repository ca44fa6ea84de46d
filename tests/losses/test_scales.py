"""A logit scale of every row: the losses are those of rows with temperatures of their own, and so are the gradients."""

from __future__ import annotations

import pytest
import torch
from derivatives import gradcheck, gradgradcheck
from made import few
from problems import BY_NAME, make_inputs, upstream_like
from tolerance import LOGIT_UNITS, UNITS, assert_accurate

import contrastive_kernels as ck

LABELS = torch.tensor([0, 1, 0, 2, 1])


def softmax_rows(z, out, z_pos):
    """-log of the softmax [N] of z [N, M], the positive's logit beside, pairs that are `out` left out."""
    return torch.nn.functional.softplus(z.masked_fill(out, -torch.inf).logsumexp(1) - z_pos)


def definition(loss, x, y, scales, rest=()):
    """The rows' losses [N] ([2N])."""
    n = len(x)
    if loss == "nt_xent":
        views, scales = torch.cat([x, y]), scales.repeat(2)
        z, itself = scales[:, None] * (views @ views.T), torch.eye(2 * n, dtype=torch.bool)
        own = torch.arange(2 * n).roll(n)
        return softmax_rows(z, itself | itself[own], z.gather(1, own[:, None])[:, 0])
    if loss == "clip_loss":
        of_x, of_y = scales if isinstance(scales, tuple) else (scales, scales)
        return (definition("info_nce", x, y, of_x) + definition("info_nce", y, x, of_y)) / 2
    z = scales[:, None] * (x @ y.T)
    diagonal = torch.eye(*z.shape, dtype=torch.bool)
    if loss == "log_sum_exp":
        return z.logsumexp(1)
    if loss == "decomposable":
        h = (z - z.diagonal()[:, None]).masked_fill(diagonal, -torch.inf)
        return (-rest[0]).exp() * (1 + h.exp().sum(1)) + rest[0] - 1
    if loss == "sup_con":
        same = LABELS[:, None] == LABELS
        return z.logsumexp(1) - (z * same).sum(1) / same.sum(1)
    return softmax_rows(z, diagonal, z.diagonal())


def ours(loss, x, y, scales, rest=(), **options):
    if loss == "sup_con":
        return ck.sup_con(x, LABELS, scales, y=y, y_labels=LABELS, reduction="none", **options)
    if loss == "log_sum_exp":
        return ck.log_sum_exp(x, y, scales, **options)
    return getattr(ck, loss)(x, y, scales, *rest, reduction="none", **options)


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent", "decomposable", "sup_con", "log_sum_exp"])
def test_value_and_derivatives(loss):
    """In float64; among the scales are a negative one and 0."""
    (x, y, _), rest = few(loss)
    scales = torch.tensor([1.3, 0.0, 2.0, -0.7, 5.0], dtype=torch.float64, requires_grad=True)
    leaves = (x, y, scales)
    torch.testing.assert_close(ours(loss, *leaves, rest), definition(loss, *leaves, rest), rtol=1e-12, atol=1e-12)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *leaves: ours(loss, *leaves, rest), leaves)


def test_equal_scales_are_one(backend):
    for loss in ("info_nce", "clip_loss", "nt_xent", "decomposable"):
        leaves, rest = few(loss, torch.float32, 70, d=16)
        x, y, scale = leaves
        many = scale.detach().expand(70).clone().requires_grad_()
        found, want = (ours(loss, x, y, s, rest, backend=backend) for s in (many, scale))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        of_many, of_one = (torch.autograd.grad(v.sum(), s)[0] for v, s in ((found, many), (want, scale)))
        torch.testing.assert_close(of_many.sum(), of_one, rtol=1e-4, atol=1e-4)


def test_a_pair_for_both_towers(backend):
    """As iSogCLR has it: image i among the texts by the first, text j among the images by the second."""
    (x, y, _), _ = few("clip_loss", torch.float32, 40, d=16)
    pair = tuple(torch.linspace(a, 4 - a, 40).requires_grad_() for a in (1.0, 2.5))
    ids = torch.arange(40) % 9, torch.arange(40) % 7
    options = {"ids": ids, "backend": backend, "reduction": "none", "margin": -0.5, "include_positive": False}
    turned = options | {"ids": ids[::-1]}
    there, back = ck.info_nce(x, y, pair[0], **options), ck.info_nce(y, x, pair[1], **turned)
    found = ck.clip_loss(x, y, pair, **options)
    torch.testing.assert_close(found, (there + back) / 2)
    leaves = (x, y, *pair)
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(((there + back) / 2).sum(), leaves)):
        torch.testing.assert_close(a, b)
    assert torch.equal(ck.ClipLoss(reduction="none")(x, y, pair), ck.clip_loss(x, y, pair, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["base", "nearly-solved", "t0.01", "d123", "common-100"])
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_the_one_rule(loss, name, dtype, backend):
    """16 bits lose nothing: value and gradients of features and scales, against float64 and float32 torch."""
    inputs = make_inputs(BY_NAME[name], dtype)
    n = len(inputs.x)
    scales = inputs.scale * torch.linspace(0.5, 1.5, n)

    def found(function, kind):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [
            v.detach().to(t).clone().requires_grad_() for v, t in ((inputs.x, kind), (inputs.y, kind), (scales, wide))
        ]
        value = function(loss, *leaves)
        upstream = upstream_like(value, 1).to(value)
        return value.detach(), *torch.autograd.grad(value, leaves, upstream)

    truth, torchs = found(definition, torch.float64), found(definition, torch.float32)
    got = found(lambda *a: ours(*a, backend=backend), dtype)
    x, y, s = inputs.x.double(), inputs.y.double(), scales.double()
    largest = s.max() * x.norm(dim=1).max() * y.norm(dim=1).max()
    eps, score = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    logit, w = LOGIT_UNITS * score * largest, 4.0  # of a row and its column, |w| sums to at most 4 (times upstream)
    most = float(upstream_like(truth[0], 1).abs().max())
    sizes = (1.0, s.max() * y.abs().max(), s.max() * x.abs().max(), x.norm(dim=1).max() * y.norm(dim=1).max())
    for k, (name, size) in enumerate(zip(("value", "x", "y", "scales"), sizes)):
        own = score if k in (0, 3) else eps
        floor = (UNITS * own + logit) * size * (w * most if k else 1.0) + (
            UNITS * score * truth[0].abs().max() if not k else 0
        )
        rounded = torchs[k].to(got[k].dtype)
        assert got[k].dtype == (dtype if k in (1, 2) else torch.float32)
        assert_accurate(name, got[k], truth[k], (rounded.double() - truth[k]).abs(), torch.as_tensor(floor))


def test_beside_others(backend):
    """Padding of NaN, a queue, positives that are no candidates, smoothing: each as its row's scale has it."""
    n = 30
    (x, y, _), _ = few("info_nce", torch.float32, n, d=16)
    scales = torch.linspace(0.5, 3, n).requires_grad_()
    queue = ck.FeatureQueue(20, 16)
    queue.enqueue(torch.randn(20, 16))
    padded = torch.zeros(n).index_fill_(0, torch.tensor([4, 9]), -torch.inf)
    cases = [
        {"queue": queue}, {"positive_features": y.detach()}, {"label_smoothing": 0.2}, {"candidate_bias": padded},
        {"positives": torch.arange(2 * n).view(n, 2) % n},
    ]  # fmt: skip
    for options in cases:
        own, candidates = x, y
        if "candidate_bias" in options:
            hole = (padded == -torch.inf)[:, None]
            own, candidates = x.masked_fill(hole, torch.nan), y.masked_fill(hole, torch.nan)
        folded = own.detach() * scales.detach()[:, None]
        want = ck.info_nce(folded, candidates, 1.0, reduction="none", backend=backend, **options)
        got = ck.info_nce(own, candidates, scales, reduction="none", backend=backend, **options)
        torch.testing.assert_close(got, want)
        gradients = torch.autograd.grad(got.sum(), (x, y, scales))
        assert all(g.isfinite().all() for g in gradients)
    sixteen = ck.info_nce(
        x.bfloat16(), y.bfloat16(), scales, positive_features=y.bfloat16(), queue=queue, backend=backend
    )
    assert sixteen.isfinite()


def test_what_does_not_fit():
    (x, y, _), _ = few("info_nce")
    scales = torch.ones(5, dtype=torch.float64)
    for name, options in (
        ("debiased", {"debiased": 0.1}),
        ("hardness_beta", {"hardness_beta": 1.0}),
        ("weight_fn", {"weight_fn": ck.von_mises_fisher_weights, "include_positive": False}),
    ):
        with pytest.raises(ValueError, match=rf"logit_scale: expected one number with {name}; got shape \[5\]"):
            ck.info_nce(x, y, scales, **options)
    with pytest.raises(ValueError, match=r"logit_scale: expected shape \[5\]; got \[4\]"):
        ck.info_nce(x, y, scales[:4])
    with pytest.raises(ValueError, match=r"logit_scale\[1\]: expected shape \[5\]; got \[4\]"):
        ck.clip_loss(x, y, (scales, scales[:4]))
    with pytest.raises(ValueError, match="logit_scale: expected a float or a tensor of one element"):
        ck.sup_con(x, LABELS, scales)
    with pytest.raises(ValueError, match="logit_scale: expected a float or a tensor of one element"):
        ck.sigmoid(x, y, scales, 0.0)


@pytest.mark.parametrize("unknown", [float("nan"), float("inf"), -float("inf")])
def test_padding_has_no_gradient_whatever_is_in_it(unknown):
    x, y = (torch.randn(3, 4, generator=torch.Generator().manual_seed(k)) for k in range(2))
    x[2] = unknown
    bias, scales = torch.tensor([0.0, 0.0, -torch.inf]), torch.ones(3, requires_grad=True)
    for loss in (ck.info_nce, ck.clip_loss, ck.nt_xent):
        (gradient,) = torch.autograd.grad(loss(x, y, scales, candidate_bias=bias), scales)
        assert gradient.isfinite().all() and gradient[2] == 0
