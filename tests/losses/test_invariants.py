"""What must hold whatever the numbers are: symmetries, reproducibility, independence of how the work is cut up."""

from __future__ import annotations

import math

import pytest
import torch
from problems import ALL, BY_NAME, CPU_BACKENDS, PAIRED, call, differentiable, engine_options, make_inputs, run
from thorough import one_of

import contrastive_kernels as ck

BACKENDS = CPU_BACKENDS


def features(n=130, m=None, d=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=1).requires_grad_() for k in (n, m or n)
    )


def extra(loss, n):
    """Further arguments of a loss of n rows, float32."""
    noise = torch.linspace(-1, 1, n)
    return {
        "sigmoid": (torch.tensor(-2.0, requires_grad=True),),
        "decomposable": (3 + noise,),
        "decomposable_pair": ((3 + noise, 3 - noise),),
    }.get(loss, ())


def close(a, b, rounding=64):
    """Equal up to float32 rounding of the largest entry."""
    largest = max(a.abs().max().item(), b.abs().max().item())
    torch.testing.assert_close(a, b, rtol=0, atol=rounding * torch.finfo(torch.float32).eps * max(largest, 1e-30))


def value_and_gradients(loss, x, y, scale, *more, **options):
    value = call(loss, x, y, scale, *more, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), (x, y))


SMALL = 200_000  # bytes: panels of 64 or 128


@pytest.mark.parametrize("loss", ALL)
def test_permuting_the_batch_permutes_the_gradients(loss, backend):
    (x, y), more = features(), extra(loss, 130)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))

    def permuted(v):
        return tuple(map(permuted, v)) if isinstance(v, tuple) else (v[order] if v.dim() else v)

    value, dx, dy = value_and_gradients(loss, x, y, 9.0, *more, backend=backend, workspace_bytes=SMALL)
    px, py = (permuted(v).detach().requires_grad_() for v in (x, y))
    other, pdx, pdy = value_and_gradients(loss, px, py, 9.0, *permuted(more), backend=backend, workspace_bytes=SMALL)
    close(value, other)
    close(permuted(dx), pdx)
    close(permuted(dy), pdy)


@pytest.mark.parametrize("loss", PAIRED)
def test_swapping_the_sides_swaps_the_gradients(loss, backend):
    (x, y), more = features(), extra(loss, 130)
    value, dx, dy = value_and_gradients(loss, x, y, 9.0, *more, backend=backend, workspace_bytes=SMALL)
    if loss == "decomposable_pair":
        more = (more[0][::-1],)
    other, swapped_dy, swapped_dx = value_and_gradients(loss, y, x, 9.0, *more, backend=backend, workspace_bytes=SMALL)
    close(value, other)
    close(dx, swapped_dx)
    close(dy, swapped_dy)


@pytest.mark.parametrize("loss", ALL)
def test_two_runs_are_bitwise_equal(loss, backend, set_threads):
    """Also with several threads at work, repeated positives, and one draw of u by the default generator."""
    set_threads(4)
    for number, name in enumerate(("panels", "kept-panels", "index-panels")):
        problem = BY_NAME[name]
        if loss not in problem.losses:
            continue
        for dtype in one_of(number + [*ALL].index(loss), (torch.float32, torch.bfloat16)):
            inputs = make_inputs(problem, dtype)
            options = engine_options(inputs, loss, backend)
            for reduction in ("mean", "none"):
                first, second = (run(ck, inputs, loss, dtype, reduction=reduction, **options) for _ in range(2))
                assert torch.equal(first.value, second.value)
                for key in differentiable(loss):
                    assert torch.equal(first[key], second[key]), (name, dtype, reduction, key)


@pytest.mark.parametrize("loss", ALL)
def test_the_workspace_does_not_show(loss, backend):
    """One panel, a few, many: the same result up to rounding."""
    (x, y), more = features(257), extra(loss, 257)
    want = value_and_gradients(loss, x, y, 9.0, *more, backend=backend)
    for size in (100_000, 300_000, 1_000_000, 4_000_000):
        for a, b in zip(value_and_gradients(loss, x, y, 9.0, *more, backend=backend, workspace_bytes=size), want):
            close(a, b)


def test_rows_of_weight_zero_do_not_count(backend):
    """A chunk of the rows, by weights of 0 and 1, is the chunk alone with its offset."""
    (x, y), weight = features(130, 150), torch.zeros(130)
    weight[30:97] = 1.0
    value, dx, dy = value_and_gradients(
        "info_nce", x, y, 9.0, weight=weight, positives=11, backend=backend, workspace_bytes=SMALL
    )
    part = x[30:97].detach().requires_grad_()
    other, part_dx, part_dy = value_and_gradients("info_nce", part, y, 9.0, positives=41, backend=backend)
    close(value, other)
    close(dx[30:97], part_dx)
    close(dy, part_dy)
    assert (dx[:30] == 0).all() and (dx[97:] == 0).all()


def test_chunks_of_rows_add_up(backend):
    """The sum over all rows is the sum over chunks of them."""
    x, y = features(130, 150)
    whole = value_and_gradients("info_nce", x, y, 9.0, positives=11, reduction="sum", backend=backend)
    total = sum(
        call("info_nce", x[i : i + 50], y, 9.0, positives=11 + i, reduction="sum", backend=backend)
        for i in range(0, 130, 50)
    )
    for a, b in zip((total.detach(), *torch.autograd.grad(total, (x, y))), whole):
        close(a, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_decomposable_adds_up_over_blocks_of_columns(backend, reduction):
    """What InfoNCE cannot: any partition of the columns gives the whole gradient, the temperature's too."""
    (x, y), log_zbar = features(130, 200), 3 + torch.linspace(-1, 1, 130)
    scale, row = torch.tensor(9.0, requires_grad=True), torch.arange(130)
    upstream = torch.ones(()) if reduction == "sum" else torch.linspace(0.5, 1.5, 130)
    whole = ck.decomposable(x, y, scale, log_zbar, reduction=reduction, backend=backend)
    want = torch.autograd.grad(whole, (x, y, scale), upstream)
    z_pos = scale * (x * y[:130]).sum(1)
    parts = []
    for block in (slice(0, 70), slice(70, 120), slice(120, 200)):
        inside = (row >= block.start) & (row < block.stop)
        parts.append(
            ck.decomposable(
                x, y[block], scale, log_zbar, positive_logits=z_pos,
                positives=torch.where(inside, row - block.start, -1), positive_constant=0.0, reduction=reduction,
                backend=backend,
            )
        )  # fmt: skip
    constants = torch.exp(-log_zbar) - 2 * (log_zbar - 1)  # u c, and what three blocks count twice too often
    close(sum(parts) + (constants.sum() if reduction == "sum" else constants), whole)
    for a, b in zip(torch.autograd.grad(sum(parts), (x, y, scale), upstream), want):
        close(a, b)


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_scale_zero_is_the_logarithm_of_the_number_of_candidates(loss, backend):
    x, y = features(70)
    value, dx, dy = value_and_gradients(loss, x, y, torch.tensor(0.0), backend=backend)
    assert value.item() == pytest.approx(math.log(139 if loss == "nt_xent" else 70), rel=1e-6)
    assert (dx == 0).all() and (dy == 0).all()


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "sigmoid", "decomposable", "decomposable_pair"])
def test_a_negative_scale_is_a_reflection(loss, backend):
    (x, y), more = features(130), extra(loss, 130)
    value, dx, dy = value_and_gradients(loss, x, y, -9.0, *more, backend=backend)
    mirrored = (-x).detach().requires_grad_()
    other, mirrored_dx, other_dy = value_and_gradients(loss, mirrored, y, 9.0, *more, backend=backend)
    close(value, other)
    close(dx, -mirrored_dx)
    close(dy, other_dy)


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_a_common_shift_of_the_logits_changes_nothing(loss, backend):
    """Features (a, x) . (a, y) add a^2 to every dot product."""
    x, y = features(130)
    one = torch.ones(130, 1)
    value, dx, dy = value_and_gradients(loss, x, y, 9.0, backend=backend)
    for a in (3.0, 10.0):
        shifted = [torch.cat([v.detach(), a * one], 1).requires_grad_() for v in (x, y)]
        other, shifted_dx, shifted_dy = value_and_gradients(loss, *shifted, 9.0, backend=backend)
        close(value, other, 64 * 9 * a * a)
        close(dx, shifted_dx[:, :-1], 64 * 9 * a * a)
        close(dy, shifted_dy[:, :-1], 64 * 9 * a * a)


def test_softmax_losses_are_never_negative_and_zero_alone(backend):
    x, y = features(1)
    for loss in ("info_nce", "clip_loss"):
        value, dx, dy = value_and_gradients(loss, x, y, 14.0, backend=backend)
        assert value.item() == 0 and (dx == 0).all() and (dy == 0).all()
    for problem in ("nearly-solved", "huge", "t0.001"):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(BY_NAME[problem], dtype)
            for loss in ("info_nce", "clip_loss", "nt_xent"):
                rows = run(ck, inputs, loss, dtype, reduction="none", backend=backend).value
                assert (rows >= 0).all(), (problem, loss)
