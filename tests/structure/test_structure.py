"""Latent structures: value and gradients against the double sums, hard inputs, and what the closed form promises."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from derivatives import gradcheck
from tolerance import UNITS, assert_accurate
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels.reference import structure as reference

SCALE = 7.0

#: (function, features that it takes, further arguments)
CASES = {
    "geometry": ("geometric_consistency", 2, {}),
    "geometry-cross": ("geometric_consistency", 2, {"intra": 0.0}),
    "geometry-intra": ("geometric_consistency", 2, {"cross": 0.0}),
    "geometry-unequal": ("geometric_consistency", 4, {"cross": 0.25, "intra": 0.75, "augmented": 0.5}),
    "bridge": ("brownian_bridge", 3, {}),
    "bridge-both": ("brownian_bridge", 4, {"t": 0.6}),
    "separation": ("feature_separation", 6, {"orthogonality": 0.5, "contrast": 2.0, "uniformity": 0.3}),
    "multimodal": ("multimodal_contrastive", 4, {}),
}

#: (N, D): why
SHAPES = {
    "one": (1, 1),  # a sample alone, and products of two numbers
    "d1": (9, 1),
    "n1": (1, 24),
    "n2": (2, 7),
    "square": (64, 64),  # the closed form
    "wide": (63, 64),  # the table of N x N
    "tall": (257, 33),
    "much-wider": (5, 384),
}


def make(case, n, d, dtype=torch.float64, kind="random", seed=0):
    """Features of one case, leaves in `dtype`."""
    g = torch.Generator().manual_seed(seed + 1000 * n + d)
    count = CASES[case][1]
    common = torch.randn(1, d, generator=g, dtype=torch.float64)
    features = [torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(count)]
    match kind:
        case "random":
            features = [normalize(v, dim=1) for v in features]
        case "aligned":  # a trained model: everything close to the images
            features = [normalize(features[0] + 0.1 * v, dim=1) for v in features]
        case "identical":
            features = [normalize(common, dim=1).repeat(n, 1) for _ in features]
        case "zero":  # dead rows
            features = [normalize(v, dim=1) * (torch.arange(n)[:, None] % 2) for v in features]
        case "unnormalised":
            pass
        case _:
            raise ValueError(kind)
    return [v.to(dtype).requires_grad_() for v in features]


def call(module, case, features, **more):
    name, _, options = CASES[case]
    function, options = getattr(module, name), {**options, **more}
    if name in ("feature_separation", "multimodal_contrastive"):
        return function(*features, SCALE, **options)
    return function(*features, **options)


def run(module, case, features, dtype):
    """Value and gradients, with the features in `dtype`."""
    leaves = [v.detach().to(dtype).requires_grad_() for v in features]
    value = call(module, case, leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


@cache
def magnitudes(case, n, d, kind, dtype):
    """What errors of value and gradients are measured by: those of equal weights, where the value is a difference."""
    features = make(case, n, d, dtype, kind)
    name, _, options = CASES[case]
    leaves = [v.detach().double().requires_grad_() for v in features]
    if name == "geometric_consistency":
        top = max(options.get(weight, 1.0) for weight in ("cross", "intra", "augmented"))
        value = reference.geometric_consistency(*leaves, cross=top, intra=top, augmented=top)
    else:
        value = call(reference, case, leaves)
    largest = max(g.abs().max().item() for g in torch.autograd.grad(value, leaves)) if n else 0.0
    return abs(value.item()), largest


def assert_case(case, n, d, dtype, kind="random"):
    features = make(case, n, d, dtype, kind)
    scores = torch.float64 if dtype == torch.float64 else torch.float32
    truth, true_gradients = run(reference, case, features, torch.float64)
    plain, plain_gradients = run(reference, case, features, scores)
    value = call(ck, case, features)
    gradients = torch.autograd.grad(value, features)
    assert value.dtype == scores and value.shape == ()
    size, steepness = magnitudes(case, n, d, kind, dtype)
    floor = torch.tensor(UNITS * torch.finfo(scores).eps * (size + 1), dtype=torch.float64)
    assert_accurate("value", value, truth, (plain.double() - truth).abs(), floor)
    floor = torch.tensor(UNITS * torch.finfo(dtype).eps * (steepness + 1 / max(n, 1)), dtype=torch.float64)
    for k, (ours, want, theirs) in enumerate(zip(gradients, true_gradients, plain_gradients)):
        assert ours.dtype == dtype
        assert_accurate(f"gradient {k}", ours, want, (theirs.to(dtype).double() - want).abs(), floor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_shapes(case, shape):
    for dtype in (torch.float64, torch.float32):
        assert_case(case, *SHAPES[shape], dtype)


@pytest.mark.parametrize("kind", ["random", "aligned", "identical", "zero", "unnormalised"])
@pytest.mark.parametrize("case", CASES)
def test_hard_features(case, kind):
    for n, d in ((40, 16), (16, 40)):
        assert_case(case, n, d, torch.float32, kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_sixteen_bits(case, dtype):
    for n, d in ((65, 32), (7, 24)):
        assert_case(case, n, d, dtype, "aligned")


@pytest.mark.parametrize("case", CASES)
def test_no_rows(case):
    features = make(case, 0, 5, torch.float32)
    value = call(ck, case, features)
    assert value.item() == 0
    assert all(g.shape == (0, 5) for g in torch.autograd.grad(value, features))


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    for n, d in ((6, 3), (3, 6)):
        features = make(case, n, d, kind="aligned")
        assert gradcheck(lambda *v, case=case: call(ck, case, v), features)


@pytest.mark.parametrize("case", CASES)
def test_only_the_gradients_that_are_wanted(case):
    """Momentum features, frozen towers: the others' gradients do not change."""
    features = make(case, 12, 5)
    whole = torch.autograd.grad(call(ck, case, features), features)
    for k in range(len(features)):
        some = [v.detach().requires_grad_(i == k) for i, v in enumerate(features)]
        (alone,) = torch.autograd.grad(call(ck, case, some), [some[k]])
        torch.testing.assert_close(alone, whole[k], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_normalize(case):
    features = make(case, 12, 5, kind="unnormalised")
    ours = call(ck, case, features, normalize=True)
    want = call(reference, case, [normalize(v, dim=1) for v in features])
    torch.testing.assert_close(ours, want)
    for a, b in zip(torch.autograd.grad(ours, features), torch.autograd.grad(want, features)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- the definitions themselves ----


def test_definition_of_geometric_consistency():
    v, t, va, ta = (x.detach() for x in make("geometry-unequal", 5, 3))
    n = len(v)
    cross = sum((v[j] @ t[k] - v[k] @ t[j]) ** 2 for j in range(n) for k in range(n)) / n

    def intra(a, b):
        return sum((a[j] @ a[k] - b[j] @ b[k]) ** 2 for j in range(n) for k in range(n)) / n

    pairs = sum((v[j] @ t[j] - va[j] @ ta[j]) ** 2 for j in range(n)) / n
    want = 0.3 * cross + 0.2 * intra(v, t) + 0.7 * (intra(v, va) + intra(t, ta) + pairs)
    ours = reference.geometric_consistency(v, t, va, ta, cross=0.3, intra=0.2, augmented=0.7)
    torch.testing.assert_close(ours, want)
    # one view alone: its modality's term, and no term of pairs
    ours = reference.geometric_consistency(v, t, None, ta, cross=0.0, intra=0.0)
    torch.testing.assert_close(ours, intra(t, ta))


def test_definition_of_the_bridge():
    v, t, va, ta = (x.detach() for x in make("bridge-both", 5, 3))

    def side(own, other, view, at):
        mean = normalize(at * own + (1 - at) * other, dim=1)
        # unit vectors: 2 - 2 cos
        return (2 - 2 * (view * mean).sum(1)).mean()

    torch.testing.assert_close(reference.brownian_bridge(v, t, va), side(v, t, va, 0.25))
    torch.testing.assert_close(reference.brownian_bridge(v, t, None, ta), side(t, v, ta, 0.25))
    both = (side(v, t, va, 0.7) + side(t, v, ta, 0.7)) / 2
    torch.testing.assert_close(reference.brownian_bridge(v, t, va, ta, t=0.7), both)
    cosine = (v * t).sum(1)
    printed = 2 - 2 * (0.25 * (v * va).sum(1) + 0.75 * (t * va).sum(1)) / (0.0625 + 0.5625 + 0.375 * cosine).sqrt()
    torch.testing.assert_close(reference.brownian_bridge(v, t, va), printed.mean())


def test_definition_of_separation():
    v, t, vi, ti, via, tia = (x.detach() for x in make("separation", 5, 3))
    n = len(v)
    ortho = sum((v[j] @ vi[j]) ** 2 + (t[j] @ ti[j]) ** 2 for j in range(n)) / n
    labels = torch.arange(n)
    contrast = sum(
        torch.nn.functional.cross_entropy(SCALE * own @ view.T, labels) for own, view in ((vi, via), (ti, tia))
    )
    gauss = sum(torch.exp(-2 * (u[j] - u[k]).square().sum()) for u in (vi, ti) for j in range(n) for k in range(n))
    want = 0.5 * ortho + 2 * contrast + 0.3 * (gauss / n).log()
    torch.testing.assert_close(call(reference, "separation", (v, t, vi, ti, via, tia)), want)


def test_definition_of_the_base_loss():
    v, t, va, ta = (x.detach() for x in make("multimodal", 5, 3))
    labels = torch.arange(5)
    pairs = ((v, t), (t, v), (v, va), (t, ta))
    losses = [torch.nn.functional.cross_entropy(SCALE * a @ b.T, labels) for a, b in pairs]
    torch.testing.assert_close(reference.multimodal_contrastive(v, t, va, ta, SCALE), sum(losses) / 4)
    torch.testing.assert_close(reference.multimodal_contrastive(v, t, va, None, SCALE), sum(losses[:3]) / 3)
    torch.testing.assert_close(ck.multimodal_contrastive(v, t, va, None, SCALE), sum(losses[:3]) / 3)
    torch.testing.assert_close(ck.multimodal_contrastive(v, t, None, None, SCALE), sum(losses[:2]) / 2)


# ---- geometric consistency ----


@pytest.mark.parametrize("n, d", [(512, 64), (64, 512)])
def test_close_towers_keep_their_digits(n, d):
    """V and T 1e-5 apart, equal weights: 1e-5 relative in float32, where the textbook form has no digit left."""
    g = torch.Generator().manual_seed(0)
    v = normalize(torch.randn(n, d, generator=g), dim=1)
    t = normalize(v + 1e-5 * torch.randn(n, d, generator=g) / math.sqrt(d), dim=1)
    leaves = [x.clone().requires_grad_() for x in (v, t)]
    wide = [x.double().requires_grad_() for x in (v, t)]
    value, truth = ck.geometric_consistency(*leaves), reference.geometric_consistency(*wide)
    assert 0 < truth < 1e-6
    assert abs(value.item() / truth.item() - 1) < 1e-5
    for ours, want in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(truth, wide)):
        assert (ours.double() - want).norm() < 1e-5 * want.norm()
    textbook = 2 * ((v.T @ v).square().sum() + (t.T @ t).square().sum() - 2 * (v.T @ t).square().sum()) / n
    assert abs(textbook.item() / truth.item() - 1) > 0.9


def test_one_sum_alone_is_never_below_zero():
    """A true zero, as a difference of two large sums; and its gradient is that zero's."""
    g = torch.Generator().manual_seed(0)
    for seed in range(8):
        v = normalize(torch.randn(300, 20, generator=g.manual_seed(seed)), dim=1)
        turned = torch.linalg.qr(torch.randn(20, 20, generator=g))[0]
        t = (v.double() @ turned.double()).float().requires_grad_()  # the same table of similarities
        value = ck.geometric_consistency(v, t, cross=0.0)
        both = ck.geometric_consistency(v, t).item()
        assert 0 <= value.item() < 1e-5 * both
        (gradient,) = torch.autograd.grad(value, t)
        assert gradient.abs().max() < 1e-4
        symmetric = torch.randn(20, 20, generator=g)
        t = v @ (symmetric + symmetric.T)  # <V_j, T_k> is symmetric
        assert 0 <= ck.geometric_consistency(v, t, intra=0.0).item() < 1e-5 * ck.geometric_consistency(v, t).item()


def test_geometry_does_not_see_a_common_rotation():
    v, t = (x.detach() for x in make("geometry", 40, 8))
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    torch.testing.assert_close(ck.geometric_consistency(v @ turned, t @ turned), ck.geometric_consistency(v, t))


def test_second_derivatives_are_refused():
    v, t = make("geometry", 8, 4)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(ck.geometric_consistency(v, t), v, create_graph=True)


# ---- the bridge ----


def test_antipodal_and_parallel_ends_stay_finite():
    for dtype in (torch.float32, torch.bfloat16):
        v = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1).to(dtype)
        for t in (v.clone(), -v):
            for at in (0.0, 0.25, 0.5, 1.0, "sampled"):
                leaves = [x.clone().requires_grad_() for x in (v, t, v, t)]
                value = ck.brownian_bridge(*leaves, t=at)
                gradients = torch.autograd.grad(value, leaves)
                assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    leaves = [v.clone().requires_grad_(), v.clone().requires_grad_()]
    assert ck.brownian_bridge(*leaves, v).item() < 1e-4, "a bridge of no length"


def test_sampled_t_is_the_likelihood_under_beta():
    """In expectation 1 / (2 t (1 - t)) |view - mu_t|^2 under t ~ Beta(2, 2), here by quadrature."""
    v, u, va, ua = (x.detach() for x in make("bridge-both", 3, 4))
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    density = 6 * grid * (1 - grid)
    weighted = [density[k] / (2 * grid[k] * (1 - grid[k])) for k in range(0, len(grid), 100)]
    at = grid[::100]
    want = sum(w * reference.brownian_bridge(v, u, va, ua, t=a.item()) for w, a in zip(weighted, at)) / len(at)
    many = 40_000
    repeated = [x.repeat(many, 1) for x in (v, u, va, ua)]
    ours = ck.brownian_bridge(*repeated, t="sampled", generator=torch.Generator().manual_seed(0))
    assert ours.item() == pytest.approx(want.item(), rel=5e-3)


def test_draws_of_t_are_reproducible_and_differ_by_sample_and_side():
    v, u, va, ua = (x.detach() for x in make("bridge-both", 4, 4))
    draws = [
        ck.brownian_bridge(v, u, va, ua, t="sampled", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(3)
    first = ck.brownian_bridge(v, u, va, t="sampled")
    torch.manual_seed(3)
    assert first == ck.brownian_bridge(v, u, va, t="sampled")
    same = v[:1].repeat(50, 1), u[:1].repeat(50, 1), va[:1].repeat(50, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(ck.brownian_bridge(*same, t="sampled"), same[2])
    assert len(gradient[:, 0].unique()) > 40


# ---- separation ----


def test_uniformity_streams_panels_of_both_backends():
    """More rows than a panel holds, at the smallest workspace."""
    features = make("separation", 300, 24, torch.float32)
    want, wanted = run(reference, "separation", features, torch.float64)
    for backend in ("cpu", "torch"):
        if ck.why_not(backend, features[0]) is not None:
            continue
        value = call(ck, "separation", features, backend=backend, workspace_bytes=2**17)
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
        for ours, gradient in zip(torch.autograd.grad(value, features), wanted):
            torch.testing.assert_close(ours.double(), gradient, rtol=1e-4, atol=1e-7)


def test_terms_are_returned_and_left_out():
    features = make("separation", 9, 4)
    value, terms = call(ck, "separation", features, return_terms=True)
    weights = CASES["separation"][2]
    torch.testing.assert_close(value.detach(), sum(weights[name] * term for name, term in terms.items()))
    assert not any(term.requires_grad for term in terms.values())
    for name in weights:
        _, some = call(ck, "separation", features, return_terms=True, **{name: 0.0})
        assert set(some) == set(terms) - {name}
    _, some = ck.feature_separation(*features[:4], None, None, SCALE, return_terms=True)
    assert set(some) == {"orthogonality", "uniformity"}
    _, one = ck.feature_separation(*features[:5], None, SCALE, return_terms=True)
    torch.testing.assert_close(one["contrast"], ck.info_nce(features[2], features[4], SCALE).detach())


# ---- autocast ----


@pytest.mark.parametrize("case", CASES)
def test_autocast(case):
    """What is of size N D stays in float32; what streams is rounded as every loss is."""
    features = make(case, 20, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(ck, case, features)
    gradients = torch.autograd.grad(value, features)
    assert value.dtype == torch.float32
    want, wanted = run(ck, case, features, torch.float32)
    exact = CASES[case][0] in ("geometric_consistency", "brownian_bridge")
    slack = 0.0 if exact else 0.02
    torch.testing.assert_close(value.detach(), want, rtol=slack, atol=slack)
    for ours, gradient in zip(gradients, wanted):
        torch.testing.assert_close(ours, gradient, rtol=slack, atol=slack)
