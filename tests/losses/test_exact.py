"""What all logits have in common changes no loss, however large it is: on no path, and through no memory."""

from __future__ import annotations

import pytest
import torch
from exact import EQUAL, TOLERANCE, assert_exact, equal
from paths import PATHS, path_options, walked
from problems import ALL, BY_NAME, CPU_BACKENDS, Outcome, make_inputs, run, upstream_like
from tolerance import assert_outcome

import contrastive_kernels as ck

#: (At logits of 1e8 the gradients of float64 are no better known than to 1e-8: it is the truth of the others.)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(backend):
    if ck.why_not(backend, torch.zeros(1, 1)) is not None:
        pytest.skip(f"{backend} is not installed")


@pytest.mark.parametrize("n", [8, 130])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", EQUAL)
def test_equal_logits(name, backend, n):
    """On every path: a band holds the scores of a mean, and those of rows are kept; 130 rows are several panels."""
    require(backend)
    for dtype in DTYPES if n == 8 else DTYPES[:2]:  # sums of 130 features are past the end of float16
        inputs = make_inputs(equal(name, n), dtype)
        for path in PATHS:
            with walked(path):
                for loss in ALL:
                    options = path_options(inputs, loss, backend, path)
                    for reduction in ("mean", "none") if options else ():
                        outcome = run(ck, inputs, loss, dtype, reduction=reduction, **options)
                        assert_exact(inputs, loss, reduction, outcome)


def visited(inputs, loss):
    """A visit of the whole data set."""
    leaves = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in ("x", "y", "scale")}
    value = loss(leaves["x"], leaves["y"], torch.arange(len(inputs.x)), leaves["scale"])
    value.backward(upstream_like(value, inputs.problem.seed).to(value))
    return Outcome(value.detach(), {name: leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("panels", [False, True], ids=["one call", "panels"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", EQUAL)
def test_equal_logits_of_a_data_set(name, backend, panels):
    """All of it in one batch is InfoNCE: with the batch's own normalisers, and with those that the memory keeps."""
    require(backend)
    inputs = make_inputs(equal(name, 8), torch.float32)
    loss = ck.DatasetContrastiveLoss(8, backend=backend)
    with walked("small" if panels else "usual"):
        for _ in range(3):
            assert_exact(inputs, "clip_loss", "mean", visited(inputs, loss))
    found, visits = loss.memory.read(torch.arange(8))
    assert (visits == 3).all()
    # the logarithm of a mean of equal numbers
    torch.testing.assert_close(found, torch.full_like(found, inputs.problem.length**2), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["common-100", "common-256", "common-100-panels"])
def test_a_common_part_of_a_data_set(name, backend):
    """Its features differ by little; dL/dscale is the small difference of large sums."""
    require(backend)
    for dtype in DTYPES:
        inputs = make_inputs(BY_NAME[name], dtype)
        loss = ck.DatasetContrastiveLoss(len(inputs.x), backend=backend)
        for _ in range(2):
            assert_outcome(inputs, "clip_loss", "mean", visited(inputs, loss))
