"""Multiple negatives ranking: directions, hard negatives, hardness and a guide, against the definition in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from derivatives import gradgradcheck
from tolerance import LOGIT_UNITS, UNITS, assert_accurate
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.reference.ranking import _documents, dots_of, ranking_of_dots

WAYS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
JOINT = [(WAYS[0], *more) for size in range(4) for more in itertools.combinations(WAYS[1:], size)]
CASES: list[dict[str, Any]] = [{"directions": ways} for ways in JOINT]
CASES += [{"directions": ways, "partition": "per_direction"} for ways in (WAYS[:1], WAYS[:2])]
MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
HARD = [{"directions": ways, "hardness_mode": m, "hardness_strength": 5.0} for ways in (WAYS[:1], WAYS) for m in MODES]
MARGINS = (0.0, 0.1, ("relative", -0.3))
GUIDED = [{**case, "guided": True, "guided_margin": m} for m, case in itertools.product(MARGINS, CASES)]
N, D, SCALE = 37, 16, 7.0
#: Of a hardness that is its opposite.
SCALE_BELOW = -3.0


def made(k: int, guided: bool, seed: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Anchors, positives and hard negatives, and a guide's of them; unit vectors in float64."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)

    def triple(d: int) -> list[Tensor]:
        anchor = drawn(N, d)
        return [anchor, normalize(anchor + drawn(N, d), dim=1), *([drawn(N, k, d)] if k else [])]

    return triple(D), triple(8) if guided else []


def found(
    module: Any, k: int, dtype: torch.dtype, case: dict[str, Any], wide: Any = None, scale: Any = SCALE, **more: Any
) -> list[Tensor]:
    """Rows' losses, and the gradients of a random combination of them; of the reference, in a dtype of its own."""
    options = {name: v for name, v in case.items() if name != "guided"}
    leaves, guide = made(k, "guided" in case)
    leaves = [v.to(dtype) for v in leaves]  # rounded once
    wide = (wide or torch.float64) if module is reference else dtype
    leaves = [v.to(wide).requires_grad_() for v in leaves]
    scale = torch.tensor(scale, dtype=torch.float32 if wide in (torch.bfloat16, torch.float16) else wide)
    scale.requires_grad_()
    if guide:  # in one dtype for all: thresholds are its own
        options["guided"] = guide
    options |= more
    hard = leaves[2] if k else None
    losses = module.multiple_negatives_ranking(*leaves[:2], scale, negatives=hard, reduction="none", **options)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64).to(losses)
    return [losses.detach(), *torch.autograd.grad(losses, [*leaves, scale], upstream)]


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("case", [*CASES, *HARD, *GUIDED], ids=str)
def test_float64(case, k):
    truth = found(reference, k, torch.float64, case)
    for ours, want in zip(found(ck, k, torch.float64, case, backend="torch"), truth):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("case", [*CASES, *HARD, *GUIDED[::3]], ids=str)
def test_in_fewer_digits(case, k, dtype):
    """By the one rule."""
    truth = found(reference, k, dtype, case)
    dense = found(reference, k, dtype, case, wide=torch.float32)
    ours = found(ck, k, dtype, case, workspace_bytes=200_000)
    names = ["value", "anchor", "positive", *["negatives"] * bool(k), "scale"]
    for name, mine, want, plain, floor in zip(names, ours, truth, dense, floors(case, k, dtype), strict=True):
        wanted = dtype if name in ("anchor", "positive", "negatives") else torch.float32
        assert mine.dtype == wanted
        assert_accurate(name, mine, want, (plain.to(wanted).double() - want).abs(), floor)


def floors(case: dict[str, Any], k: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the value and of the gradients: roundings of the largest contribution, and of the logits of unit vectors."""
    leaves, guide = made(k, "guided" in case)
    leaves = [v.to(dtype).double() for v in leaves]
    eps, score_eps = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    logit = LOGIT_UNITS * score_eps * (SCALE + case.get("hardness_strength", 0.0))
    dots = {name: v.requires_grad_() for name, v in dots_of(*leaves[:2], _documents(*leaves[1:])).items()}
    of_guide = dots_of(*guide[:2], _documents(*guide[1:])) if guide else None
    usual = {"partition": "joint", "hardness_mode": None, "hardness_strength": 0.0, "guided_margin": 0.0}
    options = {name: case.get(name, value) for name, value in {"directions": None, **usual}.items()}
    value = ranking_of_dots(dots, SCALE, of_guide, **options, weight=None, reduction="none")

    def weights(upstream: Tensor) -> dict[str, Tensor]:
        """|dL/d dot| of every direction; 0 of one that takes no part."""
        gradients = torch.autograd.grad(value, [*dots.values()], upstream, retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(v) if g is None else g.abs() for (n, v), g in zip(dots.items(), gradients)}

    once, w = weights(torch.ones_like(value)), weights(torch.linspace(-1, 2, N, dtype=torch.float64))
    to_doc, to_query, queries, docs = w.values()
    by_document = to_doc.sum(0) + docs.sum(0)
    by = [to_doc.sum(1) + queries.sum(1) + queries.sum(0) + to_query.sum(0),
          by_document[:N] + to_query.sum(1) + docs.sum(1), by_document[N:]]  # fmt: skip
    largest = max(v.abs().max() for v in leaves)
    of_features = [largest * (UNITS * eps + logit) * each for each in by]
    shapes = [(N, 1), (N, 1), (N, k, 1)][: 2 + bool(k)]
    # a row's roundings are those of its own logits, in every direction
    of_value = sum(each.sum(1) for each in once.values()) / SCALE * logit + UNITS * score_eps * value.detach().abs()
    of_scale = sum((w[name] * dots[name].detach().abs()).sum() for name in w) / SCALE * (UNITS * score_eps + logit)
    return [of_value, *[v.view(shape) for v, shape in zip(of_features, shapes)], of_scale]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_hardness_that_takes_the_scale_away(mode, dtype):
    """Where the raised logits are 0 for all, their gradient is that of the scale still."""
    case = {"directions": WAYS, "hardness_mode": mode, "hardness_strength": -SCALE_BELOW}
    truth, ours = (found(m, 2, dtype, case, scale=SCALE_BELOW) for m in (reference, ck))
    units = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3}[dtype]
    for mine, want in zip(ours, truth):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), want, rtol=units, atol=units * want.abs().max().item())


def test_by_hand():
    anchor, positive = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    hard = 0.5 * torch.eye(2, dtype=torch.float64)[:, None]
    loss = ck.multiple_negatives_ranking(anchor, positive, 2.0, negatives=hard)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 1 + math.e + 1) - 2)
    # without gradient, exp(1 + 3 * 0.5) instead of exp(1)
    options = {"hardness_mode": "hard_negatives", "hardness_strength": 3.0}
    loss = ck.multiple_negatives_ranking(anchor, positive, 2.0, negatives=hard, **options)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 1 + math.exp(2.5) + 1) - 2)
    loss = ck.multiple_negatives_ranking(anchor, positive, 2.0, directions=WAYS)
    assert loss.item() == pytest.approx(math.log(2 * (math.exp(2) + 1) + 2) - 2)


def test_a_guide_leaves_out_what_it_knows():
    """A duplicate of another row's document is a false negative, which the guide sees."""
    anchor, positive = torch.eye(3), torch.eye(3)[[0, 1, 1]]
    guide = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0.9, 0], [0, 1.0, 0.5]])
    loss = ck.multiple_negatives_ranking(anchor, positive, 1.0, guided=guide, reduction="none")
    assert loss[1].item() == pytest.approx(math.log(math.e + 1) - 1)


@pytest.mark.parametrize("k", [0, 1])
def test_one_row_and_none(k):
    for n in (0, 1):
        x = torch.randn(n, D, requires_grad=True)
        hard = torch.randn(n, k, D) if k else None
        for more in ({}, {"guided": [v for v in (x, x, hard) if v is not None]}):
            loss = ck.multiple_negatives_ranking(x, x.detach() + 0.1, 2.0, negatives=hard, directions=WAYS, **more)
            (gradient,) = torch.autograd.grad(loss, x)
            assert loss.isfinite() and gradient.isfinite().all()


def test_nan_in_gives_nan_out():
    """In the loss and the gradient of its row, with a guide as without."""
    x = torch.eye(4)
    x[3] = torch.nan
    x.requires_grad_()
    for more in ({}, {"guided": (torch.eye(4), torch.eye(4))}):
        losses = ck.multiple_negatives_ranking(x, torch.eye(4), 2.0, reduction="none", **more)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        assert losses.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, False, False, True]


def test_a_nearly_solved_batch_keeps_its_digits():
    x = torch.eye(4, 8, dtype=torch.float64) * 6
    for more in ({"directions": WAYS[:1]}, {"directions": (WAYS[0], *WAYS[2:])}):
        want = reference.multiple_negatives_ranking(x, x, 1.0, **more)
        ours = ck.multiple_negatives_ranking(x.float(), x.float(), 1.0, **more)
        assert ours.item() == pytest.approx(want.item(), rel=1e-4) and want < 1e-12


def test_weights_and_reductions():
    leaves, _ = made(2, False)
    weight = torch.arange(N) % 3 / 2
    for reduction in ("mean", "sum", "none"):
        for ways in (WAYS[:1], WAYS):
            given = {"negatives": leaves[2], "weight": weight, "reduction": reduction, "directions": ways}
            ours, want = (m.multiple_negatives_ranking(*leaves[:2], SCALE, **given) for m in (ck, reference))
            torch.testing.assert_close(ours, want)


def test_a_module_is_the_function_of_its_options():
    leaves, guide = made(2, True)
    options: dict[str, Any] = {"directions": WAYS, "guided_margin": 0.1, "reduction": "sum"}
    module = ck.MultipleNegativesRankingLoss(**options, group=None)
    want = ck.multiple_negatives_ranking(*leaves[:2], SCALE, negatives=leaves[2], guided=guide, **options)
    assert torch.equal(module(*leaves[:2], SCALE, leaves[2], guide), want)


def test_second_derivatives_are_right_or_refused():
    leaves, guide = made(1, True)
    leaves = [v[:5].requires_grad_() for v in leaves]
    guide = [v[:5] for v in guide]

    def loss(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return ck.multiple_negatives_ranking(x, y, 2.0, negatives=z, guided=guide, directions=WAYS)

    assert gradgradcheck(loss, leaves)
    options = {"hardness_mode": "all_negatives", "hardness_strength": 1.0}
    value = ck.multiple_negatives_ranking(*leaves[:2], 2.0, negatives=leaves[2], **options)
    (gradient,) = torch.autograd.grad(value, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_guide_compiles_and_autocast_serves():
    leaves, guide = made(0, True)
    x, y = (v.float().requires_grad_() for v in leaves)
    loss = ck.MultipleNegativesRankingLoss(directions=WAYS)
    compiled = torch.compile(lambda a, b: loss(a, b, SCALE, None, guide), backend="aot_eager", fullgraph=True)
    want, ours = loss(x, y, SCALE, None, guide), compiled(x, y)
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(want, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(x, y, SCALE, None, guide)
    torch.testing.assert_close(cast, loss(x.bfloat16(), y.bfloat16(), SCALE, None, [v.bfloat16() for v in guide]))
