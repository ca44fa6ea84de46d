"""The operators and the losses under torch.compile: no graph breaks, no recompilation for another batch size."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._inductor.config
from problems import ALL, call
from thorough import LONG, THOROUGH, every

import contrastive_kernels as ck
from contrastive_kernels.arguments.options import Engine
from contrastive_kernels.engine.matrix import Call, Problem
from contrastive_kernels.operators.label_loss import label_losses
from contrastive_kernels.operators.logsumexp import log_sum_exps
from contrastive_kernels.operators.multi_positive import multi_positive_losses
from contrastive_kernels.operators.shared import operator_arguments, pack
from contrastive_kernels.operators.sigmoid_loss import sigmoid_losses
from contrastive_kernels.operators.softmax_loss import softmax_losses
from contrastive_kernels.operators.softmax_scaled import scaled_softmax_losses
from contrastive_kernels.operators.weighted_sum import printed, weighted_sum
from contrastive_kernels.panels.pairs import Pairs

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


GRAPHS = [*((loss, "mean") for loss in ALL), *((loss, "none") for loss in ("clip_loss", "sigmoid", "decomposable"))]


@pytest.mark.parametrize("loss, reduction", GRAPHS[:: every(4)])
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

    def with_ids(x, y, scale, rest):
        ids = torch.cat([rest["index"], rest["index"], rest["index"]])
        one = ck.info_nce(x, y, scale, ids=(rest["index"], ids)) + ck.nt_xent(x, x + 1, scale, ids=rest["index"])
        return one + ck.sigmoid(x, y, scale, -2.0, ids=(rest["index"], ids))

    def biased(x, y, scale, rest):
        bias = torch.cat([rest["rows"], rest["rows"], rest["rows"]])
        one = ck.info_nce(x, y, scale, candidate_bias=bias) + ck.nt_xent(x, x + 1, scale, candidate_bias=rest["rows"])
        two = ck.sigmoid(x, x + 1, scale, -2.0, candidate_bias=rest["rows"])
        return one + two + ck.clip_loss(x, x + 1, scale, candidate_bias=rest["rows"])

    def scaled(x, y, scale, rest):
        scales = rest["rows"].exp(), scale * torch.cat([rest["rows"], rest["rows"]])[: x.shape[0]]
        return ck.clip_loss(x, y[: x.shape[0]], scales, label_smoothing=0.1)

    for function in (indexed, info_nce, with_ids, drawn, block, biased, scaled)[:: every(2)]:
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


@pytest.mark.skipif(not THOROUGH, reason=LONG)
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
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
        # what it cached on disk does not follow a change of a fake
        with torch._inductor.config.patch(force_disable_caches=True):
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
#: One call of the backend, whose gradients have 16 bits or not; a band; panels, whose scores "none" keeps.
OPERANDS = pytest.mark.parametrize(
    "engine, layout, dtype",
    [
        (Engine("cpu"), "contiguous", torch.float32),
        (Engine("cpu"), "permuted", torch.bfloat16),
        (Engine("torch"), "permuted", torch.bfloat16),
        (Engine("torch", 100_000), "permuted", torch.float32),
    ],
    ids=["one-call", "one-call-rounded", "band", "panels"],
)


def vectors(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def problem_of(layout="contiguous", dtype=torch.float32, n=7, m=9, d=5, **members):
    """A problem whose tensors of floats are leaves."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(k, d, generator=g).to(dtype) for k in (n, m))
    if layout == "permuted":
        x, y = (v.T.contiguous().T for v in (x, y))
    if members.get("symmetric"):
        y = x
    scale, bias = torch.tensor(1.5), torch.tensor(-0.5)
    return Problem(*(v.requires_grad_() for v in (x, y, scale, bias)), **members)


CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")
numbers = itertools.count()


@pytest.fixture(autouse=True)
def from_the_first():
    """Every test counts its operators from 0."""
    global numbers
    numbers = itertools.count()


def opcheck(operator, arguments):
    """torch's own; the compiler's part, which takes most of the time, for every fourth in the short form."""
    whole = next(numbers) % every(4) == 0
    torch.library.opcheck(operator, arguments, test_utils=(*CHEAP, *["test_aot_dispatch_dynamic"] * whole))


def check(primitive, problem, extras, settings, needs=(True, True, True, True)):
    """opcheck of a primitive's operator and, where anything is differentiated, of its gradients'."""
    tensors = problem.tensors()
    wanted = (*needs, *(v is not None and v.requires_grad for v in (*tensors[4:], *extras)))
    if problem.symmetric:
        wanted = (needs[0], False, *wanted[2:])
    freed = [v.detach() if v is not None and not want else v for v, want in zip(tensors, wanted)]
    problem = Problem.of(tuple(freed), problem.offset, problem.statics())
    call = Call(problem, extras, settings, wanted)
    arguments = operator_arguments(call)
    operator = getattr(OPERATORS, primitive.name).default
    opcheck(operator, arguments)
    if True not in wanted:
        return
    outputs = operator(*arguments)
    kept = [v.detach() for v in outputs[primitive.results :]]
    upstream = [torch.randn_like(v) if v.requires_grad else None for v in outputs[: primitive.results]]
    present, mask = pack(upstream)
    detached = [v.detach() for v in arguments[0]]
    gradients = getattr(OPERATORS, f"{primitive.name}_gradients").default
    opcheck(gradients, (detached, *arguments[1:], kept, present, list(mask)))


INDEX = torch.tensor([0, 8, 3, 3, 7, 2, 1])
SOME = torch.tensor([0, 8, 3, 3, -1, 2, 1])
IDS = Pairs(row_ids=torch.arange(7) % 3, col_ids=torch.arange(9) % 4)


def biased():
    """What is said of pairs with biases of the columns, which want a gradient."""
    return IDS._replace(col_bias=vectors(9).requires_grad_())


X_ALONE, Y_ALONE, ALL_BUT_Y = (True, False, False, False), (False, True, False, False), (True, False, True, True)


@OPERANDS
def test_opcheck_of_logsumexp(engine, layout, dtype):
    for members, cols, needs in (
        ({"offset": 1}, True, (True,) * 4), ({"index": SOME}, False, X_ALONE), ({}, True, Y_ALONE),
        ({"offset": 1, "pairs": biased()}, False, (True,) * 4),
    ):  # fmt: skip
        check(log_sum_exps, problem_of(layout, dtype, **members, engine=engine), (), (cols,), needs)
    views = problem_of(layout, dtype, 12, symmetric=True, index=torch.arange(12).roll(6), engine=engine)
    check(log_sum_exps, views, (), (False,))


@OPERANDS
def test_opcheck_of_softmax_loss(engine, layout, dtype):
    for members, gain, both, reduction, needs in (
        ({"index": INDEX}, None, False, "mean", (True,) * 4), ({"offset": 1}, vectors(7), False, "none", Y_ALONE),
        ({"offset": 1, "pairs": IDS}, None, False, "mean", (True,) * 4),
        ({"offset": 1, "pairs": biased()}, vectors(7), False, "sum", ALL_BUT_Y),
        ({"index": INDEX, "pairs": biased()}, None, False, "none", (False,) * 4),
        ({"offset": 0, "m": 7}, vectors(7), True, "sum", ALL_BUT_Y),
        ({"offset": 0, "m": 7}, None, True, "none", (True,) * 4),
        ({"offset": 0, "m": 7}, None, True, "mean", (False,) * 4),
    ):  # fmt: skip
        problem = problem_of(layout, dtype, **members, engine=engine)
        check(softmax_losses, problem, (gain, None), (reduction, both, reduction != "sum", ""), needs)
        if reduction != "sum":
            check(softmax_losses, problem, (gain, None), (reduction, both, True, (0.1).hex()), needs)
    views = problem_of(layout, dtype, 12, symmetric=True, index=torch.arange(12).roll(6), engine=engine)
    check(softmax_losses, views, (vectors(12), None), ("sum", False, True, ""))
    several = problem_of(layout, dtype, index=torch.stack([INDEX, SOME.flip(0)], 1), pairs=biased(), engine=engine)
    for reduction in ("mean", "none"):
        check(softmax_losses, several, (None, vectors(7, 1).requires_grad_()), (reduction, False, True, ""))


@pytest.mark.skipif(ck.why_not("cpu", torch.zeros(1, 1)) is not None, reason="no extension")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_of_one_call_without_units_for_16_bits(dtype):
    """Gradients of products in float32 are stored as all others of their inputs' dtype."""
    from contrastive_kernels import _C

    _C.set_instruction_set("baseline")
    try:
        problem = problem_of("contiguous", dtype, index=INDEX, engine=Engine("cpu"))
        check(softmax_losses, problem, (None, None), ("mean", False, True, ""))
    finally:
        _C.set_instruction_set("auto")


@OPERANDS
def test_opcheck_of_scaled_softmax_loss(engine, layout, dtype):
    own = Pairs(row_ids=IDS.row_ids, col_ids=IDS.row_ids)
    for reduction, gain, share, needs in (("mean", None, "", True), ("none", vectors(7), (0.1).hex(), False)):
        problem = problem_of(layout, dtype, m=7, offset=0, pairs=own, engine=engine)
        problem.scale, problem.bias = torch.tensor(1.0), torch.tensor(0.0)
        scales = vectors(7, 1).requires_grad_(), vectors(7, 2).requires_grad_(needs)
        check(scaled_softmax_losses, problem, (gain, *scales), (reduction, True, share), (needs, True, False, False))


@OPERANDS
def test_opcheck_of_label_loss(engine, layout, dtype):
    own = IDS._replace(col_ids=IDS.row_ids)
    for pairs, members in ((IDS, {}), (own, {"m": 7, "symmetric": True})):
        for reduction, inside, needs in (
            ("sum", False, (True, members == {}, True, True)), ("none", False, X_ALONE), ("sum", True, X_ALONE),
            ("none", True, (False,) * 4),
        ):  # fmt: skip
            problem = problem_of(layout, dtype, pairs=pairs, **members, engine=engine)
            check(label_losses, problem, (vectors(7), vectors(7, 1).abs()), (reduction, inside), needs)
            check(multi_positive_losses, problem, (vectors(7),), (reduction,), needs)


@pytest.mark.parametrize("loss", ["sup_con", "multi_positive_nce", "label_smoothing"])
def test_one_graph_of_labels(loss):
    """fullgraph, for every batch size: labels are sorted within the graph."""

    def training(x, y, scale, rows, cols):
        if loss == "label_smoothing":
            return ck.info_nce(x, y, scale.exp(), label_smoothing=0.1, ids=(rows, cols))
        one = getattr(ck, loss)(x, rows, scale.exp())
        return one + getattr(ck, loss)(x, rows, scale.exp(), y=y, y_labels=cols, reduction="none").sum()

    compiled = torch.compile(training, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in SIZES[:3]:
        leaves, _ = make("info_nce", n, m=n + 4)
        labels = torch.arange(n) % 7 - 3, torch.arange(n + 4) % 5
        want = training(*leaves, *labels)
        ours = compiled(*leaves, *labels)
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(want, leaves)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


#: c, log k and the excess.
RULE = printed((0.5, 0.7, 1.0))


@OPERANDS
def test_opcheck_of_weighted_sum(engine, layout, dtype):
    a, b, row, col = (vectors(7, seed) for seed in range(4))
    z, w = (vectors(7, seed).requires_grad_() for seed in (4, 5))
    for needs in ((True,) * 4, X_ALONE, (False,) * 4):
        for extras, relative, reduction in (
            ((a, b, row, col, None, None), True, "sum"), ((a, b, None, None, z, w), False, "mean"),
            ((a, b, None, None, z, w), False, "none"),
        ):  # fmt: skip
            problem = problem_of(layout, dtype, m=7, offset=0, engine=engine)
            check(weighted_sum, problem, extras, (relative, reduction, False, RULE), needs)
        given = problem_of(layout, dtype, index=SOME, pairs=biased(), engine=engine)
        check(weighted_sum, given, (a, None, None, None, z, None), (False, "mean", False, RULE), needs)


@OPERANDS
def test_opcheck_of_sigmoid_loss(engine, layout, dtype):
    for gain, reduction, needs in (
        (None, "mean", (True,) * 4), (vectors(7), "none", ALL_BUT_Y), (vectors(7), "sum", Y_ALONE),
        (None, "sum", (False,) * 4),
    ):  # fmt: skip
        check(sigmoid_losses, problem_of(layout, dtype, m=7, offset=0, engine=engine), (gain,), (reduction,), needs)
        for pairs in (IDS, biased()):
            check(sigmoid_losses, problem_of(layout, dtype, pairs=pairs, engine=engine), (gain,), (reduction,), needs)


def test_opcheck_of_checked_index():
    for dtype, lowest in ((torch.int64, 0), (torch.int32, -1)):
        index = torch.arange(lowest, 8, dtype=dtype)
        torch.library.opcheck(OPERATORS.checked_index.default, (index, 9, lowest < 0))


def test_rows_without_a_positive():
    """An index of -1: every column is a negative."""
    problem = problem_of(index=SOME)
    x, y = problem.x, problem.y
    z = (1.5 * x @ y.T - 0.5).masked_fill(torch.arange(9) == SOME[:, None], -torch.inf)
    want, upstream = (z.logsumexp(1), z.logsumexp(0)), (vectors(7), vectors(9))
    row, col, *found = log_sum_exps(problem, (), (True,))
    gradients = [torch.autograd.grad(pair, (x, y), upstream) for pair in ((row, col), want)]
    torch.testing.assert_close([row, col, *(pair.sum(0) for pair in found)], [*want, *want], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
