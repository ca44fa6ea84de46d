"""Bands of rows whose scores are made once: when they are taken, and that gradients made in forward are the same."""

from __future__ import annotations

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.backends import registry
from contrastive_kernels.planning.costs import LOSSES

MIB = 2**20
ROUNDED = registry.get("torch").weights_dtype(torch.device("cpu"), torch.bfloat16) == torch.bfloat16
SOFTMAX = ("info_nce", "clip_loss", "nt_xent")


def make(n, m, d=16, dtype=torch.float32, seed=0):
    """x, y, scale: leaves."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=1).to(dtype) for k in (n, m))
    return [v.requires_grad_() for v in (x, y, torch.tensor(9.0))]


def gradients(function, leaves, upstream=1.0, **options):
    value = function(*leaves, **options)
    return value.detach(), torch.autograd.grad(value, leaves, torch.full_like(value, upstream))


def exact(loss, leaves, upstream=1.0, **options):
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return gradients(getattr(reference, loss), doubles, upstream, **options)


def assert_near(got, want, eps):
    """Within some units in the last place of the largest number."""
    for a, b in zip((got[0], *got[1]), (want[0], *want[1])):
        assert (a.double() - b).abs().max() <= eps * b.abs().max()


@pytest.mark.parametrize(
    ("loss", "n", "m", "band"),
    [
        ("info_nce", 8192, 8192, 512),
        ("info_nce", 100, 16384, 128),  # one band
        ("info_nce", 1100, 30000, 384),  # nearly equal bands
        ("info_nce", 512, 32768, 512),  # the workspace, to the byte
        ("info_nce", 512, 32769, None),
        ("info_nce", 64, 200_000, 64),  # few rows are no reason for two passes: they have panels as thin
        ("clip_loss", 2048, 2048, 2048),  # columns need all rows
        ("clip_loss", 2049, 2049, None),
        ("nt_xent", 1024, 1024, 2048),
        ("nt_xent", 1025, 1025, None),
        ("sigmoid", 100, 100, None),  # one pass
    ],
)
def test_where_bands_are_taken(loss, n, m, band):
    if ck.why_not("cpu", torch.zeros(1, 1)) is not None:
        pytest.skip("the extension's panels take nothing beside the scores")
    plan = ck.plan(n, m, 64, loss=loss)
    assert plan.band == band
    spec = LOSSES[loss]
    assert plan.products == spec.products - (spec.forward_products if band else 0)
    assert plan.workspace_bytes <= 64 * MIB
    assert ("bands of" in str(plan)) == (band is not None)


def test_where_bands_are_not_taken():
    assert ck.plan(8192, d=64, loss="info_nce", workspace_bytes=15 * MIB).band is None
    assert ck.plan(8192, d=64, loss="info_nce", device="cuda", capability=90, backend="triton").band is None
    if ROUNDED:  # twice the rows, and room for the weights and the copies of a panel
        assert ck.plan(8192, d=64, dtype=torch.bfloat16, loss="info_nce").band == 1024
        assert ck.plan(8192, d=64, dtype=torch.bfloat16, loss="info_nce", workspace_bytes=32 * MIB).band is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("positives", ["offset", "index"])
def test_several_bands(positives, dtype, backend):
    """Rows, positives and weights of every band in their places; what a second pass would give."""
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the torch backend's")
    n, m = 1100, 1300
    leaves = make(n, m, dtype=dtype)
    leaves[2] = leaves[2].detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    g = torch.Generator().manual_seed(1)
    options = {
        "positives": 150 if positives == "offset" else torch.randint(m, (n,), generator=g),
        "weight": torch.rand(n, generator=g),
    }
    assert ck.plan(n, m, 16, dtype, loss="info_nce", backend=backend).band < n
    assert ck.plan(n, m, 16, dtype, loss="info_nce", backend=backend, workspace_bytes=MIB).band is None
    want = exact("info_nce", leaves, **options)
    eps = max(32 * torch.finfo(dtype).eps, 1e-13)
    for workspace_bytes in (64 * MIB, MIB):
        got = gradients(ck.info_nce, leaves, backend=backend, workspace_bytes=workspace_bytes, **options)
        assert [v.dtype for v in got[1]] == [v.dtype for v in leaves]
        assert_near(got, want, eps)


@pytest.mark.parametrize("loss", SOFTMAX)
@pytest.mark.parametrize(("n", "workspace_bytes"), [(300, 64 * MIB), (600, 64 * MIB), (300, 100_000)])
def test_only_the_wanted_gradients(loss, n, workspace_bytes, backend):
    """Of x, of y, of the scale alone; the same numbers, and no gradient for the others."""
    leaves = make(n, n)
    want = exact(loss, leaves)[1]
    for wanted in range(3):
        inputs = [leaf.detach().requires_grad_(k == wanted) for k, leaf in enumerate(leaves)]
        getattr(ck, loss)(*inputs, backend=backend, workspace_bytes=workspace_bytes).backward()
        assert [leaf.grad is not None for leaf in inputs] == [k == wanted for k in range(3)]
        error = (inputs[wanted].grad.double() - want[wanted]).abs().max()
        assert error <= 1e-5 * want[wanted].abs().max()


@pytest.mark.parametrize("loss", SOFTMAX)
@pytest.mark.parametrize("upstream", [0.0, -3.0, 2.0**16])
def test_upstream_factors(loss, upstream, backend):
    leaves = make(300, 300)
    assert_near(gradients(getattr(ck, loss), leaves, upstream, backend=backend), exact(loss, leaves, upstream), 1e-5)


@pytest.mark.parametrize("loss", SOFTMAX)
def test_a_loss_scale_saves_float16_gradients_from_underflow(loss, backend):
    """Unscaled, they lie below float16's smallest number."""
    leaves = make(300, 300, dtype=torch.float16)
    weight = torch.full((300,), 2.0**-30)
    options = {"weight": weight, "reduction": "sum"}
    got = gradients(getattr(ck, loss), leaves, 2.0**16, backend=backend, **options)
    want = exact(loss, leaves, 2.0**16, **options)
    largest = want[1][0].abs().max()
    assert largest / 2.0**16 < 2.0**-25, "each rounds to 0"
    assert (got[1][0].double() - want[1][0]).abs().max() <= 0.01 * largest


def test_infinity_and_nan_stay_in_sight(backend):
    leaves = make(1100, 1100)
    for poison in (torch.nan, torch.inf):
        inputs = [leaf.detach().clone() for leaf in leaves]
        inputs[0][700, 3] = poison
        value, (dx, dy, _) = gradients(ck.info_nce, [v.requires_grad_() for v in inputs], backend=backend)
        assert not value.isfinite() and not dx[700].isfinite().all() and not dy.isfinite().all()
        assert dx[:512].isfinite().all(), "rows of other bands"


def test_no_gradient_work_without_gradients(backend, monkeypatch):
    """The value alone: no weights are made."""

    def refuse(*arguments):
        raise AssertionError("weights are made")

    leaves = make(1030, 1030)  # too many for one call
    want = {loss: getattr(ck, loss)(*leaves, backend=backend).detach() for loss in SOFTMAX}
    for operation in ("weight_panel", "softmax_matrix"):
        monkeypatch.setattr(type(registry.get(backend)), operation, refuse)
    with pytest.raises(AssertionError, match="weights are made"):
        ck.info_nce(*leaves, backend=backend)
    with torch.no_grad():
        for loss in SOFTMAX:
            torch.testing.assert_close(getattr(ck, loss)(*leaves, backend=backend), want[loss], rtol=1e-6, atol=0)
