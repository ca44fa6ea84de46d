"""The losses whose positives are those of a label: by hand, by the one rule on every problem, and their edges."""

from __future__ import annotations

import math

import labelled
import pytest
import torch
from derivatives import gradcheck, gradgradcheck
from labelled import LABELLED
from paths import PATHS, path_options, walked
from problems import BY_NAME, CPU_BACKENDS, PROBLEMS, SOFTMAX, engine_options, make_inputs, run
from thorough import one_of
from tolerance import assert_outcome

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.engine.class_sums import ClassSums

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: (ids-kept takes the path of kept-panels, with labels of its own)
PAIRS = [(p, loss) for p in PROBLEMS for loss in LABELLED if labelled.fits(p, loss) and p.name != "ids-kept"]
#: A row alone in its class, negative labels, and two that 32 bits would take for equal.
LABELS = torch.tensor([3, -1, 3, 2**32 + 3, 8, -1, 3])
OTHERS = torch.tensor([3, 3, -1, 2**32 + 3, 7])


def make(n=7, m=5, d=4, dtype=torch.float64):
    """x, y and the scale: leaves."""
    g = torch.Generator().manual_seed(n)
    features = (
        torch.nn.functional.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=1) for k in (n, m)
    )
    return [v.to(dtype).requires_grad_() for v in (*features, torch.tensor(3.0))]


def candidates(y, wide):
    return {"y": y, "y_labels": OTHERS} if wide else {}


def by_hand(loss, x, y, scale, wide):
    """The rows' losses [N] and the number of their positives, pair by pair."""
    rows, cols = LABELS.tolist(), (OTHERS if wide else LABELS).tolist()
    others = y if wide else x
    losses, counts = [], []
    for i in range(len(x)):
        z = {j: float(scale * (x[i] @ others[j])) for j in range(len(cols)) if wide or j != i}
        positives = [j for j in z if cols[j] == rows[i]]
        total, negative = (sum(math.exp(v) for j, v in z.items() if some(j)) for some in
                           (lambda j: True, lambda j, i=i: cols[j] != rows[i]))  # fmt: skip
        counts.append(len(positives))
        if loss == "multi_positive_nce":
            losses.append(sum(math.log1p(negative * math.exp(-z[p])) for p in positives))
        elif not positives:
            losses.append(0.0)
        elif loss == "outside":
            losses.append(sum(math.log(total) - z[p] for p in positives) / len(positives))
        else:
            losses.append(-math.log(sum(math.exp(z[p]) for p in positives) / total / len(positives)))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(counts)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("variant", ["outside", "inside"])
def test_sup_con_by_hand(variant, wide):
    """The reference, and the loss in float64; rows without positives are left out of the mean."""
    x, y, scale = (v.detach() for v in make())
    want, counts = by_hand(variant, x, y, scale, wide)
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    there = counts > 0
    assert not there.all() and (want[there] > 0).all()
    for module in (reference, ck):

        def loss(module=module, **options):
            return module.sup_con(x, LABELS, scale, variant=variant, **candidates(y, wide), **options)

        torch.testing.assert_close(loss(reduction="none"), want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(loss(reduction="sum"), want.sum())
        torch.testing.assert_close(loss(), want[there].mean())
        torch.testing.assert_close(loss(weight=weight), (weight * want).sum() / weight[there].sum())
        torch.testing.assert_close(loss(weight=weight, reduction="none"), weight * want)


@pytest.mark.parametrize("wide", [False, True])
def test_multi_positive_nce_by_hand(wide):
    """The mean runs over pairs, "none" sums each row's."""
    x, y, scale = (v.detach() for v in make())
    want, counts = by_hand("multi_positive_nce", x, y, scale, wide)
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    for module in (reference, ck):

        def loss(module=module, **options):
            return module.multi_positive_nce(x, LABELS, scale, **candidates(y, wide), **options)

        torch.testing.assert_close(loss(reduction="none"), want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(loss(reduction="sum"), want.sum())
        torch.testing.assert_close(loss(), want.sum() / counts.sum())
        torch.testing.assert_close(loss(weight=weight), (weight * want).sum() / (weight * counts).sum())
        torch.testing.assert_close(loss(weight=weight, reduction="sum"), (weight * want).sum())


@pytest.mark.parametrize(
    "number, problem, loss, backend",
    [
        pytest.param(k, p, loss, backend, id=f"{p.name}-{loss}-{backend}")
        for k, (p, loss) in enumerate(PAIRS)
        for backend in one_of(k + k // len(LABELLED), CPU_BACKENDS)
    ],
)
def test_value_and_gradients(number, problem, loss, backend):
    """By the one rule; each problem meets all dtypes, backends and paths with one of the losses or another.

    In the short form each goes its own way and one other.
    """
    dtype = DTYPES[(number + number // len(LABELLED)) % len(DTYPES)]
    if (dtype == torch.float16 and not problem.float16) or (dtype == torch.float64 and backend != "torch"):
        dtype = torch.bfloat16
    inputs = make_inputs(problem, dtype)
    own, *others = PATHS
    for path in (own, *one_of(number, others)):
        with walked(path):
            options = path_options(inputs, loss, backend, path)
            if options is None:
                continue
            for reduction in ("mean", "none") if path == "own" else ("mean",):
                outcome = run(ck, inputs, loss, dtype, reduction=reduction, **options)
                assert_outcome(inputs, loss, reduction, outcome)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("loss", LABELLED)
def test_sixteen_bits_of_a_solved_batch(loss, backend):
    """Softmax and target nearly cancel: the difference is taken before it is rounded."""
    problem = next(p for p in PROBLEMS if p.name == "nearly-solved")
    inputs = make_inputs(problem, torch.bfloat16)
    outcome = run(ck, inputs, loss, torch.bfloat16, **engine_options(inputs, loss, backend))
    assert_outcome(inputs, loss, "mean", outcome)
    truth = run(reference, inputs, loss, torch.float64)
    error = (outcome["x"].double() - truth["x"]).norm() / truth["x"].norm()
    assert error < 0.01
    if loss != "sup_con":
        return
    # the value of all log-sums and the positives outside of the stream: its gradients are two large numbers
    x, y, scale = (v.detach() for v in (inputs.x, inputs.y, inputs.scale))
    both = torch.cat([x, y]).requires_grad_()
    n, labels = len(both), torch.cat(labelled.labels_of(inputs))
    sums = torch.zeros(n, both.shape[1]).index_add(0, labels - labels.min(), both.float())[labels - labels.min()]
    own = torch.arange(n)
    total = ck.log_sum_exp(both, both, scale, positives=own)
    mean = scale * (both.float() * (sums - both.float())).sum(1)
    (total - mean).mean().backward()
    beside = torch.cat([truth["x"], truth["y"]])
    assert (both.grad.double() - beside).norm() / beside.norm() > 20 * error


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("variant", ["outside", "inside", None])
def test_derivatives(variant, wide, reduction):
    """First and second, of one set and of queries against candidates."""
    x, y, scale = make()
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.5, 1.0, 3.0])

    def function(x, scale, *others):
        others = {"y": others[0], "y_labels": OTHERS} if others else {}
        others |= {"weight": weight, "reduction": reduction}
        if variant is None:
            return ck.multi_positive_nce(x, LABELS, scale, **others)
        return ck.sup_con(x, LABELS, scale, variant=variant, **others)

    leaves = (x, scale, y) if wide else (x, scale)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_only_equality_counts(backend):
    """Other names for the same classes, in another dtype, give the same bits."""
    x, _, scale = make(70, d=16, dtype=torch.float32)
    labels = torch.arange(70) % 9
    names = torch.tensor([-(2**40), 5, 2**62, 0, -1, 7, 8, 9, 2**32 + 5])[labels]
    for loss in (ck.SupConLoss(backend=backend), ck.SupConLoss(variant="inside", backend=backend),
                 ck.MultiPositiveNCELoss(backend=backend)):  # fmt: skip
        found = []
        for each in (labels, labels.int() - 300, labels.to(torch.uint8), names, names[:, None].expand(70, 2)[:, 0]):
            value = loss(x, each, scale)
            found.append((value, *torch.autograd.grad(value, (x, scale))))
        for other in found[1:]:  # (classes are added up in another order)
            for a, b in zip(found[0], other):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("variant", ["outside", "inside"])
def test_one_class_and_none(variant, wide, backend):
    """All of one class: no negatives; each of its own: nothing to learn, neither value nor gradient nor NaN."""
    x, y, scale = make(40, 30, d=16, dtype=torch.float32)

    def loss(rows, cols, **options):
        more = {"y": y, "y_labels": cols} if wide else {}
        return ck.sup_con(x, rows, scale, variant=variant, backend=backend, **more, **options)

    alone = loss(torch.arange(40), torch.arange(50, 80))
    assert alone == 0 and all((g == 0).all() for g in torch.autograd.grad(alone, (x, scale)))
    one = loss(torch.full((40,), 3), torch.full((30,), 3), reduction="none")
    want = reference.sup_con(
        x, torch.full((40,), 3), scale, variant=variant, reduction="none",
        **({"y": y, "y_labels": torch.full((30,), 3)} if wide else {}),
    )  # fmt: skip
    torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)
    if variant == "inside":  # the mean probability of all is 1 / k
        torch.testing.assert_close(one, torch.full((40,), math.log(30 if wide else 39)), rtol=1e-5, atol=1e-5)
    assert ck.sup_con(x[:0], torch.arange(0), scale, variant=variant) == 0
    assert ck.sup_con(x[:1], torch.arange(1), scale, variant=variant) == 0


def test_modules(backend):
    x, y, scale = make(dtype=torch.float32)
    loss = ck.SupConLoss(variant="inside", backend=backend)
    assert torch.equal(loss(x, LABELS, scale), ck.sup_con(x, LABELS, scale, variant="inside", backend=backend))
    want = ck.sup_con(x, LABELS, scale, y=y, y_labels=OTHERS, variant="inside", backend=backend)
    assert torch.equal(loss(x, LABELS, scale, y, OTHERS), want)
    assert "variant='inside'" in repr(loss)
    loss = ck.MultiPositiveNCELoss(backend=backend, reduction="none")
    want = ck.multi_positive_nce(x, LABELS, scale, y=y, y_labels=OTHERS, backend=backend, reduction="none")
    assert torch.equal(loss(x, LABELS, scale, y, OTHERS), want)


def test_pairs_of_one_class_and_none(backend):
    """No negatives, or no positives: 0, without a gradient."""
    x, _, scale = make(300, d=8, dtype=torch.float32)
    for labels in (torch.full((300,), -7), torch.arange(300)):
        value = ck.multi_positive_nce(x, labels, scale, backend=backend, workspace_bytes=300_000)
        assert value == 0 and all((g == 0).all() for g in torch.autograd.grad(value, (x, scale)))
    assert ck.multi_positive_nce(x[:0], torch.arange(0), scale, backend=backend) == 0


def test_errors():
    x, y, scale = make()
    for error, arguments, options, words in (
        (ValueError, (x, LABELS), {"variant": "both"}, "variant: expected 'outside' or 'inside'; got 'both'"),
        (TypeError, (x, [1, 2]), {}, "labels: expected a tensor of integer labels"),
        (TypeError, (x, LABELS.float()), {}, "labels: expected integer labels; got torch.float32"),
        (ValueError, (x, LABELS[:3]), {}, "labels: expected labels of shape"),
        (ValueError, (x, LABELS), {"y": y}, "y_labels: expected candidates with labels"),
        (ValueError, (x, LABELS), {"y_labels": OTHERS}, "y: expected candidates with labels"),
        (ValueError, (x, LABELS), {"y": y, "y_labels": LABELS}, "y_labels: expected labels of shape"),
        (ValueError, (x, LABELS), {"y": y[:, :2], "y_labels": OTHERS}, "x and y: expected the same number"),
        (ValueError, (x, LABELS), {"reduction": "max"}, "reduction"),
        (ValueError, (x, LABELS), {"weight": torch.ones(3)}, "weight"),
    ):
        with pytest.raises(error, match=words):
            ck.sup_con(*arguments, scale, **options)
    with pytest.raises(ValueError, match="variant: expected"):
        ck.SupConLoss(variant=1)
    with pytest.raises(ValueError, match="gradients: expected"):
        ck.SupConLoss(gradients="all")
    with pytest.raises(TypeError, match="strategy"):
        ck.SupConLoss(strategy="ring")


def test_label_smoothing_is_that_of_cross_entropy(backend):
    x, y, scale = make(9, 9, d=8, dtype=torch.float32)
    z, here = scale * x @ y.T, torch.arange(9)
    for share in (0.1, 1.0):
        there, back = (torch.nn.functional.cross_entropy(v, here, label_smoothing=share) for v in (z, z.T))
        found = ck.info_nce(x, y, scale, label_smoothing=share, backend=backend)
        torch.testing.assert_close(found, there, rtol=1e-5, atol=1e-5)
        found = ck.ClipLoss(label_smoothing=share, backend=backend)(x, y, scale)
        torch.testing.assert_close(found, (there + back) / 2, rtol=1e-5, atol=1e-5)
    views = torch.cat([x, y])
    z = (scale * views @ views.T).fill_diagonal_(-torch.inf)
    mean = z.masked_fill(z == -torch.inf, 0.0).sum(1) / 17
    want = (z.logsumexp(1) - 0.9 * z[torch.arange(18), torch.arange(18).roll(9)] - 0.1 * mean).mean()
    found = ck.nt_xent(x, y, scale, label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent"])
def test_derivatives_of_smoothed_losses(loss):
    leaves = make(6, 6)
    ids = torch.tensor([1, 1, 2, 3, 3, 3])

    def function(*leaves):
        return getattr(ck, loss)(*leaves, ids=ids, label_smoothing=0.2, reduction="none")

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("loss", ["sup_con", "sup_con_inside", "multi_positive_nce", "clip_loss", "nt_xent"])
def test_a_workspace_that_is_too_small_is_refused_at_once(loss, monkeypatch):
    """Before the sums of features, which one row at a time would take a minute."""

    def early(*_):
        raise AssertionError("computed before the workspace was looked at")

    monkeypatch.setattr(ClassSums, "dots", early)
    inputs = make_inputs(BY_NAME["smoothed-solved" if loss in SOFTMAX else "nearly-solved"], torch.float32)
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least [0-9]+ for the smallest panel"):
        run(ck, inputs, loss, torch.float32, workspace_bytes=1)


def test_refused_smoothing():
    x, y, scale = make(6, 6)
    for value, error in (("0.1", TypeError), (None, TypeError), (-0.1, ValueError), (1.5, ValueError)):
        for call in (ck.info_nce, ck.clip_loss, ck.nt_xent):
            with pytest.raises(error, match="label_smoothing: expected a number"):
                call(x, y, scale, label_smoothing=value)
        with pytest.raises(error, match="label_smoothing: expected a number"):
            ck.NTXentLoss(label_smoothing=value)
    with pytest.raises(ValueError, match="label_smoothing: expected 0 with include_positive=False"):
        ck.info_nce(x, y, scale, label_smoothing=0.1, include_positive=False)
