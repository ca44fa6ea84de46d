"""InfoNCE with several positives, positives that are no candidates, a queue, and corrections of its sums."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from composing import MEMBERS, Given
from derivatives import gradcheck, gradgradcheck
from problems import BY_NAME, make_inputs, score_dtype, smallest_workspace
from thorough import every
from tolerance import assert_accurate
from torch.nn.functional import cross_entropy, normalize

import contrastive_kernels as ck
from contrastive_kernels.reference import composed as definitions

NAMES = ("base", "wide-panels", "n1", "t0.005", "nearly-solved", "common-100", "d123", "huge")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


#: float64 is the torch backend's, and some problems are beyond float16.
CASES = [
    (name, dtype, backend)
    for name in NAMES
    for dtype in DTYPES
    for backend in ("cpu", "torch")
    if (dtype, backend) != ("float64", "cpu") and (dtype != "float16" or BY_NAME[name].float16)
]


#: Logits of 1e4 that differ by one: rounding decides which lie above a margin.
PAIRS = [(*case, member) for case in CASES for member in MEMBERS if case[0] != "common-100" or "margin" not in member]


@pytest.mark.parametrize("name, dtype, backend, member", PAIRS, indirect=["backend"])
def test_value_and_gradients(name, member, dtype, backend):
    dtype = DTYPES[dtype]
    inputs = make_inputs(BY_NAME[name], dtype)
    given = Given(member, inputs)
    truth, torch_found = (given.found(definitions, d) for d in (torch.float64, torch.float32))
    ratio = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype == torch.float64 else 1.0
    options = {"backend": backend}
    if inputs.problem.small_panels:
        options["workspace_bytes"] = smallest_workspace(
            lambda size: given.found(ck, dtype, backend=backend, workspace_bytes=size)
        )
    ours, floors = given.found(ck, dtype, **options), given.floors(dtype, truth)
    assert set(ours) == set(truth)
    for key, want in truth.items():
        of_features = key in ("x", "y", "features")
        rounded = torch_found[key].to(dtype) if of_features and dtype != torch.float64 else torch_found[key]
        assert ours[key].dtype == (dtype if of_features else score_dtype(dtype))
        error = (rounded.double() - want).abs() * ratio
        assert_accurate(key, ours[key], want, error.nan_to_num(0.0), floors[key])


# ---- definitions, by hand and by the packages people know ----

A = torch.tensor([[4.0, 2, 7], [3, -7, 6], [-5, -1, 4], [-1, -6, 6]], dtype=torch.float64)
B = torch.tensor([[-9.0, -5, -2], [-4, -5, 5], [-4, -5, -8], [-6, 7, 7]], dtype=torch.float64)


def test_lightly():
    """DCLLoss(temperature=0.2) and DCLWLoss(temperature=0.2, sigma=0.5) of lightly 1.6.0, run on these views."""
    a = A.clone().requires_grad_()
    views = [normalize(v, dim=1) for v in (a, B)]
    assert ck.nt_xent(*views, 5.0, include_positive=False).item() == pytest.approx(4.532325675153737)
    loss = ck.nt_xent(*views, 5.0, include_positive=False, weight_fn=ck.von_mises_fisher_weights)
    assert loss.item() == pytest.approx(6.592382839931187)
    loss.backward()
    want = [0.11173125570102196, 0.05085161181861979, -0.07837546377733248]
    torch.testing.assert_close(a.grad[0], torch.tensor(want, dtype=torch.float64))
    assert ck.NTXentLoss(include_positive=False, weight_fn=ck.von_mises_fisher_weights)(*views, 5.0) == loss


@pytest.mark.parametrize(
    "said, want",
    [
        ({"debiased": 0.1}, 2.75280348701164),
        ({"debiased": 0.4}, 2.8809087764529835),  # where the bound from below holds
        ({"debiased": 0.1, "hardness_beta": 1.0}, 3.1440190670762123),
    ],
)
def test_published_code(said, want):
    """Figures of the two papers' estimators, written out densely apart from this package (temperature 0.5)."""
    views = normalize(torch.cat([A, B]), dim=1)
    partner, samples = torch.arange(8).roll(4), torch.arange(4).repeat(2)
    for module in (ck, definitions):
        found = module.info_nce(views, views, 2.0, positives=partner, ids=samples, **said)
        assert found.item() == pytest.approx(want)


def test_several_by_hand():
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    z = 1.5 * x @ y.T
    lists, positives = ([1, 4], [2], []), torch.tensor([[4, 1, 4], [-1, 2, 2], [-1, -1, -1]])
    want = [z[i].logsumexp(0) - z[i, p].mean() if p else z.new_zeros(()) for i, p in enumerate(lists)]
    found = ck.info_nce(x, y, 1.5, positives=positives, reduction="none")
    torch.testing.assert_close(found, torch.stack(want))
    torch.testing.assert_close(ck.info_nce(x, y, 1.5, positives=positives), (want[0] + want[1]) / 2)
    one = torch.tensor([5, 0, 2])
    assert torch.equal(ck.info_nce(x, y, 1.5, positives=one[:, None]), ck.info_nce(x, y, 1.5, positives=one))


@pytest.mark.parametrize(
    "said", [{}, {"margin": 0.5}, {"hardness_beta": 1.0}, {"debiased": 0.1}, {"queue": True}], ids=str
)
def test_a_positive_of_no_logit_at_all(said):
    """An infinite loss whose gradients are finite, and none of it in a row that does not count."""
    x, y = (normalize(torch.randn(n, 8), dim=1).requires_grad_() for n in (5, 7))
    logits = torch.tensor([0.3, -0.2, -torch.inf, 1.0, 0.5], requires_grad=True)
    if "queue" in said:
        said = {"queue": ck.FeatureQueue(4, 8)}
        said["queue"].enqueue(normalize(torch.randn(4, 8), dim=1))
    losses = ck.info_nce(x, y, 3.0, positive_logits=logits, reduction="none", **said)
    others = ck.info_nce(x, y, 3.0, positive_logits=logits.detach().nan_to_num(neginf=0.0), reduction="none", **said)
    assert losses.isinf().tolist() == [False, False, True, False, False]
    assert torch.equal(losses[[0, 1, 3, 4]], others[[0, 1, 3, 4]])
    gradients = torch.autograd.grad(losses.sum(), (x, y, logits))
    assert all(g.isfinite().all() for g in gradients) and gradients[2][2] == 0 and gradients[2][0] != 0
    weight = torch.tensor([1.0, 1, 0, 1, 1])
    for loss in (
        ck.info_nce(x, y, 3.0, positive_logits=logits, weight=weight, **said),
        ck.decomposable(x, y, 3.0, torch.zeros(5), positive_logits=logits, weight=weight),
    ):
        assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y, logits)))
    assert ck.decomposable(x, y, 3.0, torch.zeros(5), positive_logits=logits).item() == math.inf


@pytest.mark.parametrize(
    "said",
    [{}, {"debiased": 0.1}, {"hardness_beta": 0.3}, {"margin": -0.5}],
    ids=str,
)
def test_a_row_without_negatives_whose_positive_has_no_logit(said):
    """0, as for every row without negatives."""
    x, logits = torch.eye(3), torch.tensor([0.0, 1.0, -torch.inf])
    given = {"positive_logits": logits, "ids": (torch.arange(3), torch.full((3,), 2)), "reduction": "none"}
    given |= {"include_positive": False} if "debiased" not in said and "hardness_beta" not in said else {}
    losses = ck.info_nce(x, x, 2.0, **given, **said)
    torch.testing.assert_close(losses, definitions.info_nce(x, x, 2.0, **given, **said))
    assert losses[2] == 0


def test_momentum_contrast():
    """As MoCo has it: the keys' own logits before those of the queue, of class 0."""
    q, k, old = (normalize(torch.randn(n, 8, dtype=torch.float64), dim=1) for n in (5, 5, 20))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ old.T], 1) / 0.07
    want = cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    queue = ck.FeatureQueue(20, 8, dtype=torch.float64)
    queue.enqueue(old)
    torch.testing.assert_close(ck.info_nce(q, k[:0], 1 / 0.07, positive_features=k, queue=queue), want)
    torch.testing.assert_close(ck.info_nce(q, old, 1 / 0.07, positive_features=k), want)
    torch.testing.assert_close(ck.info_nce(q, old, 1 / 0.07, positive_logits=logits[:, 0]), want)


def test_positives_stay_out_of_the_stream():
    """A solved batch in bfloat16, two positives of a row: their softmax nears 1/2, from which 1/2 comes off."""
    g = torch.Generator().manual_seed(0)
    x = normalize(torch.randn(64, 256, generator=g), dim=1)
    y = normalize(torch.cat([x, x]) + 0.02 * torch.randn(128, 256, generator=g), dim=1)
    x, y = x.bfloat16().requires_grad_(), y.bfloat16()
    positives = torch.stack([torch.arange(64), torch.arange(64) + 64], 1)
    (dx,) = torch.autograd.grad(ck.info_nce(x, y, 20.0, positives=positives), x)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(definitions.info_nce(wide, y.double(), 20.0, positives=positives), wide)
    assert (dx.double() - want).norm() < 0.01 * want.norm()


def test_large_equal_logits(backend):
    """All logits are 2^20, where float32 counts by eighths: a log-sum-exp of one number would lose log 8."""
    x, y = 256 * torch.ones(4, 16), 256 * torch.ones(8, 16)
    queue = ck.FeatureQueue(8, 16)
    queue.enqueue(y)
    for said, terms in (
        ({"positive_features": x}, 9), ({"positive_features": x, "queue": queue}, 17), ({"queue": queue}, 16),
        ({"positive_logits": torch.full((4,), 2.0**20), "include_positive": False}, 8),
        ({"positives": torch.tensor([[0, 1, 5]] * 4), "queue": queue}, 16), ({"debiased": 0.1}, 8),
        ({"hardness_beta": 1.0}, 8),
    ):  # fmt: skip
        assert ck.info_nce(x, y, 1.0, backend=backend, **said).item() == pytest.approx(math.log(terms), abs=2e-6), said


# ---- what holds for all ----


@pytest.mark.parametrize("member", MEMBERS)
def test_derivatives(member):
    inputs = make_inputs(BY_NAME["n3"], torch.float64)
    given = Given(member, inputs)
    given.several = torch.tensor([[0, 1, -1], [1, 1, 2], [-1, -1, -1]])
    queue = ck.FeatureQueue(QUEUE, inputs.x.shape[1], ids=True, dtype=torch.float64)
    queue.enqueue(given.queue[0][:QUEUE], given.queue[1][:QUEUE])
    names = [*given.leaves, "scale"]
    kept = {name: v[:, :2] if v.dim() == 2 else v for name, v in given.leaves.items()}
    queue.features = queue.features[:, :2].contiguous()
    leaves = [v.detach().double().clone().requires_grad_() for v in (*kept.values(), inputs.scale / 5)]

    def function(*leaves):
        *rest, scale = leaves
        return given.call(ck, dict(zip(names, rest)), scale, queue, lambda x, y: given.row_weights)

    for check in (gradcheck, gradgradcheck):
        assert check(function, leaves)


QUEUE = 4


@pytest.mark.parametrize(
    "member", ["several and queue", "queue and features", "hard and debiased", "weights"][:: every(4)]
)
def test_one_graph(member):
    kinds, options = MEMBERS[member]
    queue = ck.FeatureQueue(6, 8, ids=True)
    queue.enqueue(torch.randn(5, 8), torch.arange(5))

    def loss(x, y, several, ids):
        said = dict(options)
        if "several" in kinds:
            said["positives"] = several
        if "features" in kinds:
            said["positive_features"] = y.flip(0)
        if "queue" in kinds:
            said |= {"queue": queue, "ids": ids}
        if "weights" in kinds:
            said["weight_fn"] = ck.von_mises_fisher_weights
        return ck.info_nce(x, y, 3.0, **said)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 33):
        x, y = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8, requires_grad=True)
        rest = torch.stack([torch.arange(n), torch.arange(n).flip(0)], 1), torch.arange(n) % 4
        found, want = compiled(x, y, *rest), loss(x, y, *rest)
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(*[torch.autograd.grad(v, (x, y)) for v in (found, want)])


def test_one_graph_of_one_set():
    """Dynamo takes no tensor twice."""
    x, positives = torch.randn(5, 8, requires_grad=True), torch.tensor([[1, 2], [0, -1], [3, 4], [2, 2], [0, 1]])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ck.info_nce(x, x, 3.0, positives=positives), fullgraph=True, backend="aot_eager")
    found, want = compiled(x), ck.info_nce(x, x, 3.0, positives=positives)
    torch.testing.assert_close(*[(v, *torch.autograd.grad(v, x)) for v in (found, want)])


def test_nothing_at_all():
    nothing = torch.randn(0, 4, requires_grad=True)
    loss = ck.info_nce(nothing, nothing, 2.0, positives=torch.zeros(0, 2, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and nothing.grad is not None and nothing.grad.shape == (0, 4)


@pytest.mark.parametrize("members", [{"positives": torch.tensor([[0, 1], [1, 4], [3, -1]])}, {"debiased": 0.1}])
def test_transforms(members):
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    loss = functools.partial(ck.info_nce, y=y, logit_scale=2.0, **members)
    torch.testing.assert_close(torch.vmap(loss)(x), torch.stack([loss(v) for v in x]))
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), torch.autograd.grad(loss(leaf), leaf)[0])


def test_modules_and_normalize():
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    queue = ck.FeatureQueue(9, 8)
    queue.enqueue(torch.randn(7, 8))
    unit = ck.FeatureQueue(9, 8)
    unit.enqueue(normalize(queue.filled()[0], dim=1))
    units = [normalize(v, dim=1) for v in (x, y)]
    want = ck.info_nce(*units, 5.0, positive_features=units[1].flip(0), queue=unit, debiased=0.1)
    found = ck.InfoNCELoss(debiased=0.1, normalize=True)(x, y, 5.0, positive_features=y.flip(0), queue=queue)
    torch.testing.assert_close(found, want)
    hard = ck.InfoNCELoss(hardness_beta=0.5, weight_fn=None)(x, y, 5.0)
    assert torch.equal(hard, ck.info_nce(x, y, 5.0, hardness_beta=0.5))
    plain = ck.info_nce(*units, 5.0)
    torch.testing.assert_close(ck.info_nce(*units, 5.0, hardness_beta=0.0), plain)
    torch.testing.assert_close(ck.info_nce(*units, 5.0, debiased=0.0), plain)


def test_rows_without_negatives():
    x = torch.randn(3, 4, requires_grad=True)
    same = torch.zeros(3, dtype=torch.int64)
    weighted = {"include_positive": False, "weight_fn": lambda x, y: x[:, 0]}
    for said in ({"debiased": 0.1}, {"hardness_beta": 1.0}, weighted, {"positive_features": x.detach()}):
        loss = ck.info_nce(x, x.detach(), 2.0, ids=same, **said)
        (dx,) = torch.autograd.grad(loss, x)
        assert loss == 0 and (dx == 0).all()


X = torch.eye(4, 3)
SEVERAL = torch.tensor([[0, 1]] * 4)


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("positives", "shape [4, P]", {"positives": torch.zeros(3, 2, dtype=torch.int64)}),
        ("positives", "shape [4, P]", {"positives": torch.zeros(4, 0, dtype=torch.int64)}),
        ("positives", "int64 indices", {"positives": torch.zeros(4, 2)}),
        ("positives", "indices in [-1, 4)", {"positives": SEVERAL + 3}),
        ("include_positive", "positives of shape [N, P]", {"positives": SEVERAL, "include_positive": False}),
        ("debiased", "positives of shape [N, P]", {"positives": SEVERAL, "debiased": 0.1}),
        ("positive_logits", "positives of shape [N, P]", {"positives": SEVERAL, "positive_logits": torch.ones(4)}),
        ("positive_features", "None where positive_logits", {"positive_features": X, "positive_logits": torch.ones(4)}),
        ("positive_features", "same number of rows", {"positive_features": X[:2]}),
        ("weight_fn", "include_positive=True", {"weight_fn": ck.von_mises_fisher_weights}),
        ("weight_fn", "None with debiased",
         {"weight_fn": ck.von_mises_fisher_weights, "include_positive": False, "debiased": 0.1}),
        ("weight_fn", "shape [4]", {"weight_fn": lambda x, y: x, "include_positive": False}),
        ("candidate_bias", "None with debiased", {"candidate_bias": torch.ones(4), "debiased": 0.1}),
        ("candidate_bias", "None with queue", {"candidate_bias": torch.ones(4), "queue": ck.FeatureQueue(2, 3)}),
        ("debiased", "[0, 1)", {"debiased": 1.0}),
        ("queue", "one with ids", {"queue": ck.FeatureQueue(2, 3), "ids": torch.arange(4)}),
        ("queue", "one of 3 features", {"queue": ck.FeatureQueue(2, 4)}),
    ],
)  # fmt: skip
def test_refusals(name, words, said):
    with pytest.raises((TypeError, ValueError)) as caught:
        ck.info_nce(X, X, 2.0, **said)
    assert str(caught.value).partition(":")[0].endswith(name) and words in str(caught.value)


def test_views_refuse():
    weighted = functools.partial(ck.nt_xent, X, X, 2.0, weight_fn=ck.von_mises_fisher_weights)
    with pytest.raises(ValueError, match="weight_fn: expected None with include_positive=True"):
        weighted()
    with pytest.raises(ValueError, match="weight_fn: expected None with candidate_bias"):
        weighted(include_positive=False, candidate_bias=torch.ones(4))


@pytest.mark.parametrize("include_positive", [True, False])
def test_infinite_logits(include_positive, backend):
    """As torch's cross-entropy has it: an infinite loss of that row alone, and gradients of the features."""
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    logits = torch.zeros(6)
    for value, want in ((-torch.inf, torch.inf), (torch.inf, 0.0 if include_positive else -torch.inf)):
        given = logits.index_fill(0, torch.tensor(2), value).requires_grad_()
        options = {"include_positive": include_positive, "reduction": "none", "backend": backend}
        found = ck.info_nce(x, y, 2.0, positive_logits=given, **options)
        plain = ck.info_nce(x, y, 2.0, positive_logits=logits, **options)
        assert found[2] == want or (value > 0 and found[2] == 0)
        others = torch.arange(6) != 2
        assert torch.equal(found[others], plain[others])
        gradients = torch.autograd.grad(found.sum(), (x, y, given))
        assert all(g.isfinite().all() for g in gradients) and gradients[2][2] == 0
    log_z = torch.zeros(6)
    for reduction in ("mean", "none"):
        given = logits.index_fill(0, torch.tensor(2), -torch.inf)
        value = ck.decomposable(x, y, 2.0, log_z, positive_logits=given, reduction=reduction, backend=backend)
        assert value.isinf().sum() == 1 and not value.isnan().any()
