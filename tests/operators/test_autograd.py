"""Gradients as autograd sees them: exact, only the wanted ones, at the promised cost, and under every wrapper."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from derivatives import gradcheck
from problems import ALL, BY_NAME, CPU_BACKENDS, call, differentiable, engine_options, make_inputs, run
from tolerance import assert_outcome
from torch.utils.checkpoint import checkpoint

import contrastive_kernels as ck
from contrastive_kernels.arguments import checks
from contrastive_kernels.planning.costs import LOSSES

BACKENDS = CPU_BACKENDS


def make(loss, n=4, m=None, d=3, dtype=torch.float64, seed=0):
    """x, y, scale (and bias): leaves; and the normaliser of a decomposable loss."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=g, dtype=torch.float64).to(dtype) for k in (n, m or n))
    score = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x, y, torch.tensor(1.7, dtype=score)]
    if loss == "sigmoid":
        leaves.append(torch.tensor(-0.6, dtype=score))
    rows, cols = (torch.randn(k, generator=g) for k in (n, m or n))
    rest = {"decomposable": (rows,), "decomposable_pair": ((rows, cols),)}.get(loss, ())
    return [leaf.requires_grad_() for leaf in leaves], rest


# ---- exactness ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ALL)
def test_gradcheck(loss, reduction):
    leaves, rest = make(loss)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0])
    assert gradcheck(lambda *a: call(loss, *a, *rest, weight=weight, reduction=reduction), leaves)


@pytest.mark.parametrize("positives", [2, torch.tensor([5, 0, 5, 3])], ids=["offset", "index"])
@pytest.mark.parametrize("loss", ["info_nce", "decomposable"])
def test_gradcheck_of_a_rectangle(loss, positives):
    leaves, rest = make(loss, 4, 6)
    assert gradcheck(lambda *a: call(loss, *a, *rest, positives=positives, reduction="none"), leaves)
    assert gradcheck(lambda *a: call(loss, *a, *rest, positives=positives), leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_given_positive_logits(reduction):
    (x, y, scale), ((rows, cols),) = make("decomposable_pair")
    logits = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    options = {"positive_constant": 0.3, "negative_scale": 1.4, "reduction": reduction}

    def both(x, y, scale, *logits):
        return ck.decomposable(x, y, scale, (rows, cols), positive_logits=logits, **options)

    def some(x, y, scale, logit):
        index = torch.tensor([-1, 2, -1, 0])
        return ck.decomposable(x, y, scale, rows, positive_logits=logit, positives=index, **options)

    assert gradcheck(both, (x, y, scale, *logits))
    assert gradcheck(some, (x, y, scale, logits[0]))


def test_gradients_flow_through_normalisation_and_the_scales_exponential():
    """As training loops have them: a logarithmic temperature, towers in front."""
    g = torch.Generator().manual_seed(0)
    tower, log_scale = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    x, y = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))

    def training(tower, log_scale):
        return ck.clip_loss(x @ tower, y @ tower, log_scale.exp(), normalize=True)

    assert gradcheck(training, (tower.requires_grad_(), log_scale.requires_grad_()))


def test_x_may_be_y():
    """One tensor on both sides gets the sum of both gradients."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for loss in (ck.clip_loss, ck.nt_xent, ck.info_nce):
        assert gradcheck(lambda v, loss=loss: loss(v, v, 1.3), x)


# ---- only what is wanted ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ALL)
def test_every_subset_of_gradients(loss, dtype, backend):
    """The same numbers by the one rule, whatever else is wanted; None for the others."""
    inputs = make_inputs(BY_NAME["panels"], dtype)
    options = engine_options(inputs, loss, backend)
    names = differentiable(loss)
    for reduction in ("mean", "none"):
        for size in range(len(names) + 1):
            for needs in itertools.combinations(names, size):
                outcome = run(ck, inputs, loss, dtype, needs=needs, reduction=reduction, **options)
                given = {name for name, gradient in outcome.gradients.items() if gradient is not None}
                assert given == set(needs)
                assert_outcome(inputs, loss, reduction, outcome)


class Products:
    """Counts products of matrices, in units of one N x M x D product."""

    def __init__(self, n, m, d):
        self.unit = 2 * n * m * d

    def __call__(self, work):
        with torch.autograd.profiler.profile(with_flops=True, use_kineto=False) as profile:
            work()
        matrices = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
        return sum(e.flops or 0 for e in profile.function_events if e.name in matrices) / self.unit


@pytest.mark.parametrize("loss", ALL)
def test_products_are_the_promised_ones(loss):
    """Value and all gradients; the value alone; a frozen tower; only the temperature: nothing else is computed."""
    n, d = 256, 64
    backend = next(name for name in BACKENDS if ck.why_not(name, torch.zeros(1, 1)) is None)
    spec = LOSSES[loss.removesuffix("_pair")]
    leaves, rest = make(loss, n, d=d, dtype=torch.float32)
    size = 4 * 64 * 64 * 4 if backend == "torch" else 64 * 64 * 4  # panels of 64 x 64
    matrices = 4 if loss == "nt_xent" else 1  # 2N x 2N scores
    count = Products(n, n, d)

    def products(*wanted, reduction="mean"):
        for position, leaf in enumerate(leaves):
            leaf.requires_grad_(position in wanted)
            leaf.grad = None

        def work():
            value = call(loss, *leaves, *rest, reduction=reduction, backend=backend, workspace_bytes=size)
            if value.requires_grad:
                value.sum().backward()

        return count(work) / matrices

    # a panel on the diagonal of a symmetric matrix is computed whole
    diagonal = spec.products / 8 if loss == "nt_xent" else 0.01
    x, y, scale = range(3)
    forward = products()
    assert forward == pytest.approx(spec.forward_products, abs=diagonal)
    assert products(x, y, scale) == pytest.approx(spec.products, abs=diagonal)
    if loss != "nt_xent":
        assert products(x) == pytest.approx(spec.frozen_products, abs=0.01)
        assert products(y) == pytest.approx(spec.frozen_products, abs=0.01)
        assert products(scale) == pytest.approx(spec.passes, abs=0.01)
    with torch.no_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        work = count(lambda: call(loss, *leaves, *rest, backend=backend, workspace_bytes=size))
    assert work / matrices == pytest.approx(forward, abs=1e-6), "gradient work under no_grad"


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_scores_are_made_once_where_the_workspace_holds_a_band(loss, backend):
    """The forward pass's products are saved, in whatever gradients are wanted."""
    n, d, spec = 600, 32, LOSSES[loss]
    leaves, _ = make(loss, n, d=d, dtype=torch.float32)
    # nt_xent: two blocks of views, of which the panels on the diagonal are computed whole: 3 of 4
    matrices, whole = (4, 1.5) if loss == "nt_xent" else (1, 1)

    def products(*wanted):
        for position, leaf in enumerate(leaves):
            leaf.requires_grad_(position in wanted)
        return Products(n, n, d)(lambda: call(loss, *leaves, backend=backend).backward()) / matrices

    assert products(0, 1, 2) == pytest.approx(whole * (spec.products - spec.forward_products), abs=0.01)
    if loss != "nt_xent":
        assert products(0) == products(1) == pytest.approx(spec.frozen_products - spec.forward_products, abs=0.01)
        assert products(2) == pytest.approx(1, abs=0.01)


def test_no_grad_gives_no_graph(backend):
    for loss in ALL:
        leaves, rest = make(loss, dtype=torch.float32)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                assert not call(loss, *leaves, *rest, backend=backend).requires_grad
        value = call(loss, *(leaf.detach() for leaf in leaves), *rest, backend=backend)
        assert not value.requires_grad


# ---- wrappers ----


@pytest.mark.parametrize("loss", ALL)
def test_threads_do_not_disturb_one_another(loss, backend):
    """The interpreter's lock is released in the C++ pass: calls from several threads run at once."""
    leaves, rest = make(loss, 200, d=16, dtype=torch.bfloat16)

    def work(_):
        value = call(loss, *leaves, *rest, backend=backend, workspace_bytes=200_000)
        return value, *torch.autograd.grad(value, leaves)

    want = work(0)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(12)):
            assert all(torch.equal(a, b) for a, b in zip(result, want))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ALL)
def test_a_retained_graph_runs_again(loss, reduction, backend):
    leaves, rest = make(loss, 70, d=16, dtype=torch.float32)
    value = call(loss, *leaves, *rest, reduction=reduction, backend=backend)
    upstream = torch.linspace(-1, 2, value.numel()).view(value.shape)
    runs = [torch.autograd.grad(value, leaves, upstream, retain_graph=True) for _ in range(3)]
    doubled = torch.autograd.grad(value, leaves, 2 * upstream)
    for first, *others, twice in zip(*runs, doubled):
        assert all(torch.equal(first, other) for other in others)
        torch.testing.assert_close(twice, 2 * first, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ALL)
def test_checkpointing_computes_the_same(loss, backend):
    leaves, rest = make(loss, 70, d=16, dtype=torch.float32)

    def block(*arguments):
        return call(loss, *arguments, *rest, backend=backend)

    want = torch.autograd.grad(block(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(checkpoint(block, *leaves, use_reentrant=False), leaves), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_draws_the_same_u(backend, reduction):
    """The default generator is restored for the second forward; both towers must see one u."""
    leaves, (rows,) = make("decomposable", 70, d=16, dtype=torch.float32)
    upstream = torch.ones(()) if reduction == "mean" else torch.linspace(0.5, 1.5, 70)

    def block(x, y, scale):
        return ck.decomposable(x * 2, y, scale, rows, shape=1.0, reduction=reduction, backend=backend)

    torch.manual_seed(3)
    want = torch.autograd.grad(block(*leaves), leaves, upstream)
    torch.manual_seed(3)
    value = checkpoint(block, *leaves, use_reentrant=False)
    torch.rand(7)  # other draws in between
    for a, b in zip(torch.autograd.grad(value, leaves, upstream), want):
        assert torch.equal(a, b)


def drawing(name, x, y, generator):
    """A scalar of what is drawn from a generator."""
    if name == "decomposable":
        return ck.decomposable(x, y, 3.0, torch.full((len(x),), 9.0), shape=1.0, generator=generator)
    if name == "bridge":
        return ck.brownian_bridge(x, y, x * 2, t="sampled", generator=generator)
    return (x * y[ck.sample_negatives(x, y, 3.0, generator=generator)]).sum()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["decomposable", "bridge", "sampled"])
def test_checkpointing_refuses_a_generator_that_it_does_not_restore(name, reentrant):
    """The second forward pass would draw something else, and the gradients would be those of another loss."""
    x, y = (torch.randn(9, 5, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2))
    for generator in (None, torch.default_generator):
        torch.manual_seed(3)
        want = torch.autograd.grad(drawing(name, x, y, generator), (x, y))
        torch.manual_seed(3)
        x.grad = y.grad = None
        checkpoint(drawing, name, x, y, generator, use_reentrant=reentrant).backward()
        assert all(torch.equal(v.grad, g) for v, g in zip((x, y), want))
    value = checkpoint(drawing, name, x, y, torch.Generator().manual_seed(3), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"generator: expected None under activation checkpointing"):
        value.backward()


@pytest.mark.parametrize("loss", ALL)
def test_saved_features_are_protected(loss, backend):
    """Changing x between forward and backward is an error, or has no effect: never a wrong gradient."""
    leaves, rest = make(loss, dtype=torch.float32)
    for reduction in ("mean", "none"):
        x = leaves[0] * 1.0
        value = call(loss, x, *leaves[1:], *rest, reduction=reduction, backend=backend).sum()
        (want,) = torch.autograd.grad(value, leaves[0], retain_graph=True)
        with torch.no_grad():
            x.add_(1.0)
        try:
            (got,) = torch.autograd.grad(value, leaves[0])
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("loss", ALL)
def test_autocast_is_a_cast_of_the_features(loss, dtype, backend):
    """The value is float32 and equals that of features cast by hand; so do the gradients."""
    leaves, rest = make(loss, 70, d=16, dtype=torch.float32)
    for reduction in ("mean", "none"):
        with torch.autocast("cpu", dtype):
            value = call(loss, *leaves, *rest, reduction=reduction, backend=backend)
        cast = [leaf.detach().to(dtype if leaf.dim() else leaf.dtype).requires_grad_() for leaf in leaves]
        want = call(loss, *cast, *rest, reduction=reduction, backend=backend)
        assert value.dtype == torch.float32 and torch.equal(value, want)
        for a, b in zip(torch.autograd.grad(value.sum(), leaves), torch.autograd.grad(want.sum(), cast)):
            assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_autocast_serves_towers_of_mixed_dtypes():
    x, y = torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ck.clip_loss(x, y, 3.0), ck.clip_loss(x, y.bfloat16(), 3.0))
    double = torch.randn(5, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ck.clip_loss(double, double, 3.0).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises(TypeError, match="dtype"):
        ck.clip_loss(x, y, 3.0)


@pytest.mark.parametrize("loss", ALL)
def test_the_host_reads_no_tensor(loss, monkeypatch):
    """A tensor's value read by Python is a synchronisation on a GPU: on the meta device nothing can be read.

    (On the CPU, where reading waits for nobody, the scale is read.)
    """
    monkeypatch.setattr(checks, "require_values", lambda *_: None)
    leaves, rest = make(loss, 130, d=16, dtype=torch.float32)
    place = torch.device("meta")

    def move(v):
        return tuple(map(move, v)) if isinstance(v, tuple) else v.detach().to(place).requires_grad_(v.requires_grad)

    leaves, rest, weight = [move(leaf) for leaf in leaves], move(rest), torch.ones(130, device=place)
    for workspace_bytes in (2**26, 200_000):
        for reduction in ("mean", "none"):
            options = {"weight": weight, "reduction": reduction, "workspace_bytes": workspace_bytes}
            call(loss, *leaves, *rest, **options).sum().backward()
    if loss == "decomposable":
        call(loss, *leaves, *rest, shape=0.5, return_log_normalizer=True)[0].backward()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_forward_mode_is_refused(backend):
    """A tangent would be lost in silence."""
    x, y = (torch.nn.functional.normalize(torch.randn(5, 8)) for _ in range(2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ck.clip_loss(dual, y.requires_grad_(), 5.0, backend=backend)
        assert ck.clip_loss(x, y, 5.0, backend=backend).isfinite()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_lazy_negatives_and_zeros(backend):
    """Tensors whose negation torch has put off, and zeros that have no memory."""
    x, y = (torch.nn.functional.normalize(torch.randn(5, 8)) for _ in range(2))
    results = []
    for late in (torch.neg, torch._neg_view):
        a, b = late(-x).requires_grad_(), y.clone().requires_grad_()
        loss = ck.clip_loss(a, b, late(torch.tensor(-5.0)), backend=backend)
        loss.backward(late(torch.tensor(-0.5)), retain_graph=True)
        results.append((loss, a.grad.clone(), b.grad.clone()))
        (zero,) = torch.autograd.grad(loss, b, torch._efficientzerotensor(()))
        assert not zero.any()
    for found, wanted in zip(*results):
        assert torch.equal(found, wanted)
