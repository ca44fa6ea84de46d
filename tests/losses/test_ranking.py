"""Multiple negatives ranking: directions, hard negatives, hardness and a guide, against the definition in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels import reference

WAYS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
JOINT = [(WAYS[0], *more) for size in range(4) for more in itertools.combinations(WAYS[1:], size)]
CASES: list[dict[str, Any]] = [{"directions": ways} for ways in JOINT]
CASES += [{"directions": ways, "partition": "per_direction"} for ways in (WAYS[:1], WAYS[:2])]
MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
HARD = [{"directions": ways, "hardness_mode": m, "hardness_strength": 5.0} for ways in (WAYS[:1], WAYS) for m in MODES]
MARGINS = (0.0, 0.1, ("relative", -0.3))
GUIDED = [{**case, "guided": True, "guided_margin": m} for m, case in itertools.product(MARGINS, CASES)]
N, D, SCALE = 37, 16, 7.0


def made(k: int, guided: bool, seed: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Anchors, positives and hard negatives, and a guide's of them; unit vectors in float64."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)

    def triple(d: int) -> list[Tensor]:
        anchor = drawn(N, d)
        return [anchor, normalize(anchor + drawn(N, d), dim=1), *([drawn(N, k, d)] if k else [])]

    return triple(D), triple(8) if guided else []


def found(module: Any, k: int, dtype: torch.dtype, case: dict[str, Any], **more: Any) -> list[Tensor]:
    """Rows' losses, and the gradients of a random combination of them."""
    options = {name: v for name, v in case.items() if name != "guided"}
    leaves, guide = made(k, "guided" in case)
    leaves = [v.to(dtype) for v in leaves]  # rounded once
    wide = torch.float64 if module is reference else dtype
    leaves = [v.to(wide).requires_grad_() for v in leaves]
    scale = torch.tensor(SCALE, dtype=torch.float32 if wide in (torch.bfloat16, torch.float16) else wide)
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
    truth = found(reference, k, dtype, case)
    ours = found(ck, k, dtype, case, workspace_bytes=200_000)
    eps, score_eps = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    # a row's weights sum to at most 2, of logits that carry 4 roundings each; 8 of a result
    logit = 4 * score_eps * (SCALE + case.get("hardness_strength", 0.0))
    assert ours[0].dtype == torch.float32
    assert ((ours[0] - truth[0]).abs() <= 2 * logit + 8 * score_eps * truth[0].abs()).all()
    for mine, want in zip(ours[1:-1], truth[1:-1]):
        assert mine.dtype == dtype
        error, floor = (mine.double() - want).abs(), SCALE * 2 * 2 * (8 * eps + logit) * 2
        assert error.max() <= floor, (error.max(), floor)
        assert error.max() <= 0.03 * want.abs().max()


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

    assert torch.autograd.gradgradcheck(loss, leaves)
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
