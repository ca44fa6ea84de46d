"""The operators and the losses under torch.compile: no graph breaks, no recompilation for another batch size."""

from __future__ import annotations

import pytest
import torch
from problems import ALL, call

import contrastive_kernels as ck

# opcheck's own
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture
def poison():
    """Off here: the compiler would trace it."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(loss, n, d=16, m=None, dtype=torch.float32):
    """x, y, scale (and bias): leaves; and the normaliser of a decomposable loss."""
    g = torch.Generator().manual_seed(n)
    features = (torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=1) for k in (n, m or n))
    leaves = [*(v.to(dtype) for v in features), torch.tensor(2.0)]
    if loss == "sigmoid":
        leaves.append(torch.tensor(-1.0))
    rows, cols = (torch.randn(k, generator=g) for k in (n, m or n))
    rest = {"decomposable": (rows,), "decomposable_pair": ((rows, cols),)}.get(loss, ())
    return [leaf.requires_grad_() for leaf in leaves], rest


# The last one is beyond the size up to which scores are kept for the backward pass.
SIZES = (33, 5, 130, 1100)


@pytest.mark.parametrize(
    "loss, reduction",
    [*((loss, "mean") for loss in ALL), *((loss, "none") for loss in ("clip_loss", "sigmoid", "decomposable"))],
)
def test_one_graph_for_every_batch_size(loss, reduction):
    """fullgraph, forward and backward; at most one recompilation, where scores are no longer kept."""

    def training(leaves, rest, weight):
        scale = leaves[2].exp()
        return call(loss, *leaves[:2], scale, *leaves[3:], *rest, weight=weight, reduction=reduction)

    compiled = torch.compile(training, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in SIZES:
        leaves, rest = make(loss, n)
        arguments = leaves, rest, torch.linspace(0, 1, n)
        upstream = torch.linspace(-1, 1, n) if reduction == "none" else torch.tensor(3.0)
        want = training(*arguments)
        with torch._dynamo.config.patch(error_on_recompile=n != SIZES[-1]):
            ours = compiled(*arguments)
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)
        wanted = torch.autograd.grad(want, leaves, upstream)
        for a, b in zip(torch.autograd.grad(ours, leaves, upstream), wanted):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_options_of_the_rectangular_losses():
    """Offsets, indices, given logits, drawn u and the returned normaliser: one graph each."""

    def info_nce(x, y, scale, rest):
        return ck.info_nce(x, y, scale, positives=x.shape[0] // 2)

    def indexed(x, y, scale, rest):
        return ck.info_nce(x, y, scale, positives=rest["index"], normalize=True)

    def block(x, y, scale, rest):
        logits = scale * rest["rows"]
        loss, log_z = ck.decomposable(
            x, y, scale, rest["rows"], positive_logits=logits, positives=rest["index"] - 1, return_log_normalizer=True
        )
        return loss + log_z.sum()

    def drawn(x, y, scale, rest):
        return ck.decomposable(x, y, scale, rest["rows"], shape=1.0)

    for function in (info_nce, indexed, block, drawn):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (20, 34):
            leaves, (rows,) = make("decomposable", n, m=3 * n)
            rest = {"rows": rows, "index": torch.arange(n) % 7}
            results = []
            for run in (function, compiled):
                torch.manual_seed(0)
                with torch._dynamo.config.patch(error_on_recompile=True):
                    value = run(*leaves, rest)
                results.append((value, *torch.autograd.grad(value, leaves)))
            for a, b in zip(*results):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_compiled_by_inductor_trains():
    """Two towers, a logarithmic temperature and autocast, through the default compiler."""
    torch.manual_seed(0)
    image, text = torch.nn.Linear(12, 8), torch.nn.Linear(12, 8)
    log_scale = torch.nn.Parameter(torch.tensor(1.5))
    loss = ck.ClipLoss(normalize=True)

    def training(a, b):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(image_features=image(a), text_features=text(b), logit_scale=log_scale.exp())

    parameters = [*image.parameters(), *text.parameters(), log_scale]
    compiled = torch.compile(training, fullgraph=True, dynamic=True)
    for n in (12, 40):
        a = torch.randn(n, 12)
        want, ours = training(a, a), compiled(a, a)
        torch.testing.assert_close(ours, want, rtol=1e-2, atol=1e-3)  # inductor fuses bfloat16 roundings away
        for p, q in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(want, parameters)):
            torch.testing.assert_close(p, q, rtol=5e-2, atol=2e-3)


def test_the_compiler_meets_nothing_that_older_ones_cannot_trace(monkeypatch):
    """torch 2.6 breaks the graph where it is asked whether a device has autocast."""
    untraceable = torch._dynamo.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    (x, y, scale), _ = make("clip_loss", 20)
    compiled = torch.compile(lambda: ck.clip_loss(x, y, scale), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), ck.clip_loss(x, y, scale))


def test_no_grad_compiles_without_gradient_work():
    (x, y, scale), _ = make("clip_loss", 20)
    compiled = torch.compile(lambda: ck.clip_loss(x, y, scale), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(), ck.clip_loss(x, y, scale))


# ---- the operators themselves ----

OPERATORS = torch.ops.contrastive_kernels
BYTES = 2**20


def vectors(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def operands(layout, dtype=torch.float32, n=7, m=9, d=5):
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(k, d, generator=g).to(dtype) for k in (n, m))
    if layout == "permuted":
        x, y = (v.T.contiguous().T for v in (x, y))
    return x, y, torch.tensor([1.5, 0.0])


OPERANDS = pytest.mark.parametrize(
    "layout, dtype", [("contiguous", torch.float32), ("permuted", torch.bfloat16)], ids=["contiguous", "permuted"]
)


@OPERANDS
def test_opcheck_of_log_sum(layout, dtype):
    x, y, params = operands(layout, dtype)
    index = torch.tensor([0, 8, 3, 3, -1, 2, 1])
    for positives, rows, cols, keep in (
        ((None, 1), True, True, True), ((index, None), True, False, False), ((None, None), False, True, False)
    ):  # fmt: skip
        arguments = (x, y, params, *positives, rows, cols, False, keep, "", BYTES)
        torch.library.opcheck(OPERATORS.log_sum.default, arguments)
    views = torch.cat([x, y])[:12]
    symmetric = (views, views, params, torch.arange(12).roll(6), None, True, False, True, True, "", BYTES)
    torch.library.opcheck(OPERATORS.log_sum.default, symmetric)


@OPERANDS
def test_opcheck_of_log_sum_backward(layout, dtype):
    x, y, params = operands(layout, dtype)
    row, col, _, scores = OPERATORS.log_sum(x, y, params, None, 1, True, True, False, True, "", BYTES)
    upstream = vectors(7), vectors(9), vectors(7, 1)
    for needs, gradients in (
        ((True, True, True), upstream),
        ((True, False, False), (upstream[0], None, None)),
        ((False, True, True), (None, upstream[1], None)),
    ):
        arguments = (x, y, params, None, 1, False, row, col, scores, *gradients, *needs, "", BYTES)
        torch.library.opcheck(OPERATORS.log_sum_backward.default, arguments)


@OPERANDS
def test_opcheck_of_loss_sum(layout, dtype):
    x, y, params = operands(layout, dtype)
    index, gain = torch.tensor([0, 8, 3, 3, 7, 2, 1]), vectors(7)
    for positives, columns, cols, needs in (
        ((index, None), 9, False, (True, True, True)), ((None, 1), 9, False, (False, True, False)),
        ((None, 0), 7, True, (True, False, True)), ((None, 0), 7, True, (False,) * 3),
    ):  # fmt: skip
        arguments = (x, y[:columns], params, *positives, gain, cols, False, *needs, "", BYTES)
        torch.library.opcheck(OPERATORS.loss_sum.default, arguments)
    views = torch.cat([x, y])[:12]
    symmetric = (views, views, params, torch.arange(12).roll(6), None, vectors(12), False, True, True, False, True)
    torch.library.opcheck(OPERATORS.loss_sum.default, (*symmetric, "", BYTES))


@OPERANDS
def test_opcheck_of_pair_sum(layout, dtype):
    x, y, params = operands(layout, dtype)
    rows, cols = (vectors(7), vectors(7, 1)), (vectors(7, 2), vectors(7, 3))
    for needs in ((True, True, True), (True, False, False), (False,) * 3):
        for sides, columns, offset in (((*rows, *cols), 7, 0), ((*rows, None, None), 9, 1)):
            arguments = (x, y[:columns], params, None, offset, "exponential", *sides, True, *needs, "", BYTES)
            torch.library.opcheck(OPERATORS.pair_sum.default, arguments)
        arguments = (x, y[:7], params, None, 0, "sigmoid", None, rows[1], None, None, False, *needs, "", BYTES)
        torch.library.opcheck(OPERATORS.pair_sum.default, arguments)


def test_opcheck_of_checked_index():
    for dtype, lowest in ((torch.int64, 0), (torch.int32, -1)):
        index = torch.arange(lowest, 8, dtype=dtype)
        torch.library.opcheck(OPERATORS.checked_index.default, (index, 9, lowest < 0))


def test_rows_without_a_positive():
    """An index of -1: every column is a negative, the dot product is 0, and its gradient goes nowhere."""
    x, y, params = operands("contiguous")
    index = torch.tensor([0, 8, 3, 3, -1, 2, 1])
    x, y = x.requires_grad_(), y.requires_grad_()
    scores = x @ y.T
    held = torch.arange(9) == index[:, None]
    z = (1.5 * scores).masked_fill(held, -torch.inf)
    want = z.logsumexp(1), z.logsumexp(0), (scores * held).sum(1)
    upstream = vectors(7), vectors(9), vectors(7, 1)
    gradients = torch.autograd.grad(sum((a * g).sum() for a, g in zip(want, upstream)), (x, y))
    with torch.no_grad():
        row, col, dots, kept = OPERATORS.log_sum(x, y, params, index, None, True, True, False, True, "", BYTES)
        arguments = (x, y, params, index, None, False, row, col, kept, *upstream, True, True, True, "", BYTES)
        dx, dy, _ = OPERATORS.log_sum_backward(*arguments)
    for a, b in zip((row, col, dots, dx, dy), (*want, *gradients)):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
