"""Candidates that a guide finds more alike than the positive are left out: against the definition, and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import CPU_BACKENDS
from tolerance import LOGIT_UNITS, UNITS, assert_accurate
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.engine.matrix import Problem
from contrastive_kernels.losses.guide import with_guide
from contrastive_kernels.operators.logsumexp import normalizers
from contrastive_kernels.operators.parts import bounded_ceilings

N, M, D, SCALE = 70, 81, 16, 7.0
LOSSES = ("info_nce", "clip_loss", "nt_xent")
WEIGHT, IDS = torch.arange(N) % 3 / 2, torch.arange(N) // 2
CASES: list[dict[str, Any]] = [
    {},
    {"guided_margin": 0.2},
    {"guided_margin": ("relative", 0.5), "weight": WEIGHT},
    {"guided_margin": -0.3, "include_positive": False},
    {"ids": IDS, "margin": 0.5},
    {"ids": IDS, "margin": ("relative", 0.3), "include_positive": False, "weight": WEIGHT},
    {"guided_margin": 0.1, "candidate_bias": torch.linspace(-1, 1, N, dtype=torch.float64), "weight": WEIGHT},
]


def made(m: int = N, seed: int = 0) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Unit features of rows and columns in float64, and a guide's, of a width of its own."""
    g = torch.Generator().manual_seed(seed)

    def pair(d: int) -> list[Tensor]:
        x, y = (normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for n in (N, m))
        y[:N] = normalize(y[:N] + x, dim=1)
        return [x, y]

    return pair(D), tuple(pair(5))


def found(module: Any, loss: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Rows' losses, and the gradients of a random combination of them."""
    leaves = [v.detach().requires_grad_() for v in leaves]
    scale = torch.tensor(SCALE, dtype=torch.promote_types(leaves[0].dtype, torch.float32)).requires_grad_()
    losses = getattr(module, loss)(*leaves, scale, reduction="none", **options)
    upstream = torch.linspace(-1, 2, len(losses), dtype=torch.float64).to(losses)
    return [losses.detach(), *torch.autograd.grad(losses, [*leaves, scale], upstream)]


@pytest.mark.parametrize("workspace", [None, 170_000], ids=["whole", "panels"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_float64(loss, case, workspace):
    leaves, guide = made()
    options = {"guided": guide, **case}
    ours, truth = (
        found(ck, loss, leaves, workspace_bytes=workspace, **options),
        found(reference, loss, leaves, **options),
    )
    for mine, want in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-12)
    plain = found(reference, loss, leaves, **{name: v for name, v in options.items() if "guided" not in name})
    assert (plain[0] - truth[0]).abs().max() > 1e-3  # the guide leaves something out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss"])
def test_in_fewer_digits(loss, case, dtype):
    """By the one rule; the guide is in a dtype of its own, so that thresholds are the same."""
    leaves, guide = made()
    leaves = [v.to(dtype) for v in leaves]
    options = {"guided": guide, **case}
    ours = found(ck, loss, leaves, **options)
    truth = found(reference, loss, [v.double() for v in leaves], **options)
    plain = found(reference, loss, [v.float() for v in leaves], **options)
    z = SCALE * leaves[0].double() @ leaves[1].double().T
    z.requires_grad_()
    losses = getattr(reference, loss)(z, torch.eye(N, dtype=torch.float64), 1.0, reduction="none", **options)
    once, w = (torch.autograd.grad(losses, z, u, retain_graph=True)[0].abs()
               for u in (torch.ones_like(losses), torch.linspace(-1, 2, N, dtype=torch.float64)))  # fmt: skip
    eps, largest = torch.finfo(dtype).eps, max(float(v.double().abs().max()) for v in leaves)
    logit = LOGIT_UNITS * torch.finfo(torch.float32).eps * SCALE
    rows = [SCALE * largest * (UNITS * eps + logit) * w.sum(d)[:, None] for d in (1, 0)]
    of_scale = (w * z.detach().abs()).sum() / SCALE * (UNITS * torch.finfo(torch.float32).eps + logit)
    units = UNITS * torch.finfo(torch.float32).eps
    floors = [once.sum(1) * logit + units * truth[0].abs(), *rows, of_scale]
    for name, mine, want, dense, floor in zip(("value", "x", "y", "scale"), ours, truth, plain, floors, strict=True):
        wanted = dtype if name in "xy" else torch.float32
        assert mine.dtype == wanted
        assert_accurate(name, mine, want, (dense.to(wanted).double() - want).abs(), floor)


def test_more_candidates_than_rows_and_scales_by_row():
    leaves, guide = made(M)
    places = torch.arange(N).flip(0)
    options: dict[str, Any] = {"guided": guide, "positives": places, "guided_margin": -0.1}
    for mine, want in zip(*(found(m, "info_nce", leaves, **options) for m in (ck, reference)), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-12)
    scales = torch.linspace(1, 9, N, dtype=torch.float64)
    options["guided"] = tuple(3 * v for v in guide)
    ours = ck.info_nce(*(2 * v for v in leaves), scales, normalize=True, reduction="none", **options)
    one = reference.info_nce(
        scales[:, None] * leaves[0], leaves[1], 1.0, reduction="none", **{**options, "guided": guide}
    )
    torch.testing.assert_close(ours, one, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("margin", [None, 0.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_scales_by_row(loss, margin, reduction):
    """Those of rows, and of columns; beside a margin, which goes by logits."""
    leaves, guide = made()
    scales = [torch.linspace(1, 9, N, dtype=torch.float64).roll(k).requires_grad_() for k in (0, 5)]
    options: dict[str, Any] = {"guided": guide, "guided_margin": 0.1, "margin": margin, "reduction": "none"}
    (x, y), given = leaves, tuple(scales) if loss == "clip_loss" else scales[0]
    if loss == "clip_loss":
        turned = {**options, "guided": guide[::-1]}
        want = reference.info_nce(scales[0][:, None] * x, y, 1.0, **options)
        want = (want + reference.info_nce(scales[1][:, None] * y, x, 1.0, **turned)) / 2
    elif loss == "info_nce":
        want = reference.info_nce(scales[0][:, None] * x, y, 1.0, **options)
    else:  # of views, by ids that leave out each one's own column
        views, of_views, own = torch.cat([x, y]), torch.cat(guide), torch.arange(2 * N)
        want = reference.info_nce(
            scales[0].repeat(2)[:, None] * views, views, 1.0, **{**options, "guided": (of_views, of_views)},
            positives=own.roll(N), ids=own,
        )  # fmt: skip
    want = want.mean() if reduction == "mean" else want
    ours = getattr(ck, loss)(x, y, given, **{**options, "reduction": reduction})
    torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)
    asked = scales if loss == "clip_loss" else scales[:1]
    upstream = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    for mine, theirs in zip(*(torch.autograd.grad(v, asked, upstream) for v in (ours, want)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_by_row_in_float32(dtype, backend):
    """One walk with two logits of a score, by every backend; a guide of 16 bits is exact in whole numbers."""
    leaves, _ = made()
    g = torch.Generator().manual_seed(4)
    guide = tuple(torch.randint(-2, 3, (N, 6), generator=g).to(dtype) for _ in range(2))
    x, y = (v.to(dtype) for v in leaves)
    scales = tuple(torch.linspace(1, 9, N).roll(k) for k in (0, 5))
    options: dict[str, Any] = {"guided": guide, "guided_margin": 1.5}
    for n in (N, 30):  # a walk, and one call for each direction
        (a, b), few = (v[:n] for v in (x, y)), {**options, "guided": tuple(v[:n] for v in guide)}
        ours = ck.clip_loss(a, b, tuple(s[:n] for s in scales), backend=backend, **few)
        there = reference.info_nce(scales[0][:n, None] * a.double(), b.double(), 1.0, **few)
        few["guided"] = few["guided"][::-1]
        back = reference.info_nce(scales[1][:n, None] * b.double(), a.double(), 1.0, **few)
        torch.testing.assert_close(ours.double(), (there + back) / 2, rtol=2e-6, atol=1e-6)


def test_by_hand():
    """Text 2 is what text 1 says, and the guide knows."""
    images, texts = torch.eye(3), torch.eye(3)[[0, 1, 1]]
    guide = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0.9, 0], [0, 1.0, 0.5]])
    rows = ck.info_nce(images, texts, 1.0, guided=guide, reduction="none")
    assert rows.tolist() == pytest.approx([math.log(math.e + 2) - 1, math.log(math.e + 1) - 1, math.log(1 + 1 + 1)])
    # of the texts, the third finds image 1 more alike than its own
    back = [math.log(math.e + 2) - 1, math.log(math.e + 2) - 1, math.log(1 + 1)]
    both = ck.clip_loss(images, texts, 1.0, guided=guide, reduction="none")
    assert both.tolist() == pytest.approx([(a + b) / 2 for a, b in zip(rows.tolist(), back)])
    alone = ck.info_nce(images, texts, 1.0, guided=guide, guided_margin=1.5, include_positive=False, reduction="none")
    assert alone.tolist() == [0.0, 0.0, 0.0]  # no negative is left


@pytest.mark.parametrize("loss", LOSSES)
def test_modules_metrics_and_reductions(loss):
    leaves, guide = made()
    module = {"info_nce": ck.InfoNCELoss, "clip_loss": ck.ClipLoss, "nt_xent": ck.NTXentLoss}[loss]
    for reduction in ("mean", "sum", "none"):
        options: dict[str, Any] = {"guided_margin": 0.1, "reduction": reduction}
        given = {"guided": guide, "weight": WEIGHT}
        value, told = module(**options, return_metrics=True, group=None)(*leaves, SCALE, **given)
        torch.testing.assert_close(value, getattr(reference, loss)(*leaves, SCALE, **given, **options))
        mean = getattr(reference, loss)(*leaves, SCALE, **given, guided_margin=0.1)
        torch.testing.assert_close(told.log_sum_exp - told.positive_logit, mean)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_guide_does_not_go_with(loss):
    leaves, guide = made()
    vector, call = torch.zeros(N, dtype=torch.float64), getattr(ck, loss)
    with pytest.raises(ValueError, match="guided: expected None with label_smoothing"):
        call(*leaves, SCALE, guided=guide, label_smoothing=0.1)
    with pytest.raises(ValueError, match="guided_margin: expected 0 without guided"):
        call(*leaves, SCALE, guided_margin=0.1)
    with pytest.raises(ValueError, match="guided: expected 70 and 70 rows; got 70 and 69"):
        call(*leaves, SCALE, guided=(guide[0], guide[1][1:]))
    others: dict[str, dict[str, Any]] = {
        "info_nce": {"positive_logits": vector, "debiased": 0.1, "queue": ck.FeatureQueue(4, D, dtype=torch.float64)},
        "clip_loss": {},
        "nt_xent": {"weight_fn": ck.von_mises_fisher_weights, "include_positive": False},
    }
    for name, value in others[loss].items():
        options: dict[str, Any] = {"logit_scale": SCALE, "guided": guide, name: value}
        if name == "include_positive":
            continue
        more = {"include_positive": False} if name == "weight_fn" else {}
        with pytest.raises(ValueError, match="guided: expected None with"):
            call(*leaves, **options, **more)


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives(loss):
    leaves, guide = made()
    few = [v[:4].clone().requires_grad_() for v in leaves]
    options: dict[str, Any] = {"guided": [v[:4] for v in guide], "guided_margin": 0.1}
    assert torch.autograd.gradgradcheck(lambda x, y: getattr(ck, loss)(x, y, 2.0, **options), few, fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_derivatives_beside_others(loss):
    """With biases of the candidates, ids and a margin; and of the biases."""
    leaves, guide = made()
    few = [v[:5].clone().requires_grad_() for v in leaves]
    bias = torch.tensor([0.3, -0.7, 1.1, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "guided": [v[:5] for v in guide],
        "guided_margin": 0.1,
        "ids": torch.tensor([3, 1, 3, 4, 5]),
    }
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(
            lambda *a: getattr(ck, loss)(*a[:2], 2.0, candidate_bias=a[2], **options), (*few, bias), fast_mode=True
        )
        assert check(lambda *a: getattr(ck, loss)(*a, 2.0, margin=-0.4, **options), few, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_torch_func_and_compile(loss, reduction):
    (x, y), guide = made()
    x, y, guide = x[:9], y[:9], tuple(v[:9] for v in guide)

    def scalar(x, guide):
        return getattr(ck, loss)(x, y, SCALE, guided=guide, guided_margin=0.1, reduction=reduction).sum()

    def plain(x):
        return torch.autograd.functional.jacobian(lambda v: scalar(v, guide), x)

    torch.testing.assert_close(torch.func.grad(scalar)(x, guide), plain(x))
    batch = torch.stack([x, 2 * x])
    want = torch.stack([plain(v) for v in batch])
    torch.testing.assert_close(torch.vmap(torch.func.grad(scalar), (0, None))(batch, guide), want)
    compiled = torch.compile(scalar, fullgraph=True, backend="aot_eager", dynamic=True)
    leaf = x.clone().requires_grad_()
    compiled(leaf, guide).backward()
    torch.testing.assert_close(leaf.grad, plain(x))


def test_a_pass_that_rounds_otherwise_gives_bounded_weights():
    """Without the positive a pair that was left out of the sums might weigh e^100 where it counts after all."""
    x, y = torch.eye(2), torch.tensor([[1.0, 0.0], [0.99, -2.0]])
    guide = torch.eye(2), torch.ones(2, 2)
    problem = with_guide(Problem(x, y, 100.0, offset=0), guide, 0.5)
    row, _ = normalizers(problem)
    assert (row.sum(0) == -torch.inf).all()  # its scores are all alike
    found = bounded_ceilings(problem, row, None).pairs
    assert (found.row_ceiling == -torch.inf).all() and found.col_ceiling is None


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("workspace", [2**17, 2**26])
def test_a_candidate_like_the_positive_stays(backend, workspace):
    """A caption that is there twice, at a margin of 0: no rounding decides about it."""
    generator = torch.Generator().manual_seed(0)
    of_rows, captions = (torch.randn(k, 384, generator=generator) for k in (130, 65))
    of_cols = captions.repeat_interleave(2, 0) + 0.1
    x, y = (torch.randn(130, 16, generator=generator) for _ in range(2))
    given = {"guided": (of_rows, of_cols), "reduction": "none"}
    found = ck.info_nce(x, y, 1.0, **given, backend=backend, workspace_bytes=workspace)
    left_out = (of_rows.double() @ of_cols.double().T) > (of_rows.double() * of_cols.double()).sum(1, True) + 1e-9
    z = (x.double() @ y.double().T).masked_fill(left_out, -torch.inf)
    torch.testing.assert_close(found.double(), z.logsumexp(1) - z.diagonal(), rtol=1e-5, atol=1e-5)
