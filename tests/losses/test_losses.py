"""Every backend x loss x problem x dtype against the reference in float64, by the one rule; and hostile values."""

from __future__ import annotations

import numpy
import pytest
import torch
from paths import PATHS, path_options, walked
from problems import (
    ALL,
    BY_NAME,
    CPU_BACKENDS,
    DECOMPOSABLE,
    PROBLEMS,
    Inputs,
    Problem,
    differentiable,
    engine_options,
    make_inputs,
    run,
)
from thorough import THOROUGH, one_of
from tolerance import UNITS, assert_accurate, assert_outcome, expected, rms

import contrastive_kernels as ck

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = CPU_BACKENDS


def offered(backend: str, dtype: torch.dtype) -> bool:
    """Whether a backend offers a dtype (whether it is installed or not)."""
    return backend == "torch" or dtype != torch.float64


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require(backend: str, inputs: Inputs) -> None:
    """Skips where the backend is not installed."""
    reason = ck.why_not(backend, inputs.x, inputs.y)
    if reason is not None:
        pytest.skip(reason)


def dtypes_of(number: int, problem: Problem) -> list[torch.dtype]:
    """float32 and one of the others, in turn; all of them in the long form."""
    others = [dtype for dtype in DTYPES[1:] if problem.float16 or dtype != torch.float16]
    return [torch.float32, *one_of(number, others)]


CASES = [
    pytest.param(problem, loss, dtype, backend, id=f"{problem.name}-{loss}-{named(dtype)}-{backend}")
    for number, problem in enumerate(PROBLEMS)
    for k, loss in enumerate(problem.losses)
    for dtype in dtypes_of(number + k, problem)
    for backend in BACKENDS
    if offered(backend, dtype)
]


@pytest.mark.parametrize("problem, loss, dtype, backend", CASES)
def test_value_and_gradients(problem, loss, dtype, backend):
    """On every path: by one call of the backend, a band or one panel, the smallest panels.

    In the short form only float32 on the cpu backend does; the others go their own way and that of the smallest panels.
    """
    inputs = make_inputs(problem, dtype)
    require(backend, inputs)
    for path in PATHS if THOROUGH or (dtype, backend) == (torch.float32, "cpu") else ("own", "small"):
        with walked(path):
            options = path_options(inputs, loss, backend, path)
            if options is None:
                continue
            reductions = ("mean", "none") if path == "own" else ("mean",)
            for reduction in reductions if THOROUGH or dtype == torch.float32 else reductions[-1:]:
                outcome = run(ck, inputs, loss, dtype, reduction=reduction, **options)
                assert_outcome(inputs, loss, reduction, outcome)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("name", ["base", "panels", "many-panels", "index-panels", "d384", "t0.01", "nearly-solved"])
def test_sixteen_bits_are_lost_once(name, dtype, backend):
    """Where nothing cancels, the rule holds without a floor: only the gradients themselves are rounded."""
    inputs = make_inputs(BY_NAME[name], dtype)
    require(backend, inputs)
    for loss in inputs.problem.losses:
        outcome = run(ck, inputs, loss, dtype, reduction="none", **engine_options(inputs, loss, backend))
        truth, torch_errors = expected(inputs.problem, loss, dtype, "none")
        for side in ("x", "y"):
            error = rms(outcome[side].double() - truth[side])
            assert error <= 2 * rms(torch_errors[side]), (loss, side, error / rms(torch_errors[side]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("problem", ["base", "sparse-weights"])
def test_sum(problem, loss, backend):
    inputs = make_inputs(BY_NAME[problem], torch.float32)
    require(backend, inputs)
    assert_outcome(inputs, loss, "sum", run(ck, inputs, loss, torch.float32, reduction="sum", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", DECOMPOSABLE)
@pytest.mark.parametrize("n", [1, 65])
def test_a_panel_without_negatives_beside_small_normalizers(n, loss, backend):
    """Logits of -100, and a last panel that holds the last row's positive alone: gains above 1 must not overflow."""
    problem = Problem("lone", "", n=n, d=1, scale=-100.0, features="identical", small_panels=True, losses=(loss,))
    inputs = make_inputs(problem, torch.float32)
    require(backend, inputs)
    options = engine_options(inputs, loss, backend)
    leaves = [v.clone().requires_grad_() for v in (inputs.x, inputs.y, inputs.scale)]
    value = inputs.call(ck, loss, *leaves, 0.0, reduction="none", **options)
    value.backward(torch.full_like(value, 8.0))
    want = [v.detach().double().requires_grad_() for v in leaves]
    inputs.call(ck.reference, loss, *want, 0.0, reduction="none").backward(torch.full((n,), 8.0, dtype=torch.float64))
    for a, b in zip(leaves, want):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_of_small_losses_keeps_their_digits(backend):
    """Z = 1.001: a row's loss is the difference of u Z, log u and 1, and the sum that of the rows."""
    n, scale = 1024, torch.tensor(1e-3)
    x, y = (torch.randn(k, 3, generator=torch.Generator().manual_seed(k)) for k in (n, 1))
    require(backend, make_inputs(BY_NAME["base"], torch.float32))
    rules = {"positive_logits": torch.randn(n, generator=torch.Generator().manual_seed(0)), "negative_scale": 1e-3}
    _, log_z = ck.reference.decomposable(x, y, scale, torch.zeros(n), return_log_normalizer=True, **rules)
    truth = ck.reference.decomposable(x.double(), y.double(), scale, log_z.double(), reduction="sum", **rules)
    ours = ck.decomposable(x, y, scale, log_z, reduction="sum", backend=backend, **rules)
    rounding = torch.finfo(torch.float32).eps  # of each row's 1
    assert abs(ours.double() - truth) <= UNITS * rounding * n**0.5, (ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if set(p.losses) & set(DECOMPOSABLE)], ids=lambda p: p.name)
def test_returned_normalizers(problem, backend):
    """return_log_normalizer gives the batch's own log Z, with gradients (one pass) and without (a reduction)."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(problem, dtype)
        require(backend, inputs)
        x, y, scale = inputs.x.double(), inputs.y.double(), inputs.scale.double()
        logits = abs(problem.logit_scale) * x.norm(dim=1).max() * y.norm(dim=1).max() if len(x) else 0.0
        for loss in set(problem.losses) & set(DECOMPOSABLE):
            options = engine_options(inputs, loss, backend)
            _, truth = inputs.call(ck.reference, loss, x, y, scale, 0.0, return_log_normalizer=True)
            for needs in (True, False):
                ours_x = inputs.x.detach().requires_grad_(needs)
                _, log_z = inputs.call(
                    ck, loss, ours_x, inputs.y, inputs.scale, 0.0, return_log_normalizer=True, **options
                )
                assert isinstance(log_z, tuple) == (loss == "decomposable_pair")
                for a, b in zip(log_z, truth) if isinstance(truth, tuple) else ((log_z, truth),):
                    assert a.dtype == torch.float32 and a.shape == b.shape and not a.requires_grad
                    where = b == -torch.inf  # no negatives, and no constant
                    assert (a[where] == -torch.inf).all()
                    error = (a.double() - b).abs()[~where]
                    allowed = UNITS * torch.finfo(torch.float32).eps * (1 + logits + b.abs())[~where]
                    assert (error <= allowed).all(), (loss, needs, error.max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ALL)
def test_fp16_gradients_of_a_scaled_loss(loss, backend):
    """GradScaler's factor arrives in backward: small gradients must not have been lost before."""
    problem, factor = BY_NAME["nearly-solved"], 2.0**14
    inputs = make_inputs(problem, torch.float16)
    require(backend, inputs)
    truth, _ = expected(problem, loss, torch.float16, "mean")
    x, y = (v.detach().requires_grad_() for v in (inputs.x, inputs.y))
    value = inputs.call(ck, loss, x, y, inputs.scale, inputs.bias, backend=backend)
    (value * factor).backward()
    upstream = torch.randn((), generator=torch.Generator().manual_seed(problem.seed + 1), dtype=torch.float64).item()
    for name, leaf in (("x", x), ("y", y)):
        scaled = truth[name] / upstream * factor
        rounding = (scaled.half().double() - scaled).abs()
        size = UNITS * torch.finfo(torch.float16).eps * scaled.abs().max()
        assert rounding.max() < size / 16, "the problem's gradients do fit float16"
        assert_accurate(f"d{name}", leaf.grad, scaled, rounding, size)
        ours = leaf.grad.double()
        assert ((ours - scaled).norm() / scaled.norm()).item() < 2e-3, f"d{name}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_nan_in_gives_nan_out(loss, dtype, backend):
    """Wherever the NaN is, with several panels: nothing skips over it, in the value or in the gradients it reaches."""
    inputs = make_inputs(BY_NAME["panels"], dtype)
    require(backend, inputs)
    options = engine_options(inputs, loss, backend)
    for name in differentiable(loss):
        arguments = {"x": inputs.x, "y": inputs.y, "scale": inputs.scale, "bias": inputs.bias}
        poisoned = arguments[name].clone()
        poisoned.view(-1)[-1] = torch.nan  # in the last row
        arguments[name] = poisoned
        leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
        value = inputs.call(ck, loss, **leaves, **options)
        assert value.isnan(), name
        value.backward()
        assert leaves["x"].grad[-1].isnan().all() and leaves["y"].grad[-1].isnan().all(), name
        rows = inputs.call(ck, loss, **arguments, reduction="none", **options)
        assert rows[len(inputs.x) - 1].isnan(), name
        if name in ("scale", "bias"):
            assert rows.isnan().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_inf_in_gives_no_finite_value(loss, infinity, backend):
    inputs = make_inputs(BY_NAME["panels"], torch.float32)
    require(backend, inputs)
    options = engine_options(inputs, loss, backend)
    for name in ("x", "y"):
        features = {"x": inputs.x.clone(), "y": inputs.y.clone()}
        features[name][100, 7] = infinity
        leaves = {k: v.requires_grad_() for k, v in features.items()}
        value = inputs.call(ck, loss, **leaves, scale=inputs.scale, bias=inputs.bias, **options)
        assert not value.isfinite(), name
        value.backward()  # some gradients are finite: sigmoid(inf) = 1
        assert leaves["x"].grad.shape == inputs.x.shape and leaves["y"].grad.shape == inputs.y.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", DECOMPOSABLE)
def test_nan_in_the_normalizer(loss, backend):
    inputs = make_inputs(BY_NAME["base"], torch.float32)
    require(backend, inputs)
    rows, cols = (v.clone() for v in inputs.log_normalizer)
    rows[5] = torch.nan
    normalizer = (rows, cols) if loss == "decomposable_pair" else rows
    for needs in (True, False):
        x = inputs.x.detach().requires_grad_(needs)
        assert ck.decomposable(x, inputs.y, inputs.scale, normalizer, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", DECOMPOSABLE)
def test_rows_that_do_not_count_may_be_as_stale_as_they_like(loss, backend):
    """A weight of 0 times an overflow is 0."""
    inputs = make_inputs(BY_NAME["sparse-weights"], torch.float32)
    require(backend, inputs)
    idle = inputs.weight == 0
    assert idle.any() and not idle.all()
    fresh, leaves = [], []
    for offset in (0.0, -500.0):
        normalizers = tuple(v.masked_fill(idle, 0.0) + offset * idle for v in inputs.log_normalizer)
        x, y = (v.detach().clone().requires_grad_() for v in (inputs.x, inputs.y))
        for reduction in ("mean", "none"):
            value = ck.decomposable(
                x, y, inputs.scale, normalizers if loss == "decomposable_pair" else normalizers[0],
                weight=inputs.weight, reduction=reduction, backend=backend,
            )  # fmt: skip
            value.sum().backward()
            fresh.append(value.detach())
        leaves.append((x.grad, y.grad))
    assert torch.equal(fresh[0], fresh[2]) and torch.equal(fresh[1], fresh[3])
    for a, b in zip(*leaves):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ALL)
def test_scalars_may_come_in_any_form(loss, backend):
    """A float, a 0-d tensor, a tensor of one element, of another dtype: the same value; gradients in their shape."""
    inputs = make_inputs(BY_NAME["base"], torch.float32)
    require(backend, inputs)
    want = inputs.call(ck, loss, inputs.x, inputs.y, 4.0, -2.0, backend=backend)
    for make in (
        lambda v: torch.tensor(v),
        lambda v: torch.tensor([v]),
        lambda v: torch.tensor([[v]], dtype=torch.float64),
        lambda v: torch.tensor(v, dtype=torch.bfloat16),
        int,
        numpy.float64,
    ):
        assert torch.equal(inputs.call(ck, loss, inputs.x, inputs.y, make(4.0), make(-2.0), backend=backend), want)
    for shape, dtype in (((1,), torch.float32), ((), torch.float64)):
        scale = torch.full(shape, 4.0, dtype=dtype, requires_grad=True)
        inputs.call(ck, loss, inputs.x, inputs.y, scale, -2.0, backend=backend).backward()
        assert scale.grad.shape == shape and scale.grad.dtype == dtype


def test_numbers_may_be_numpys():
    inputs = make_inputs(BY_NAME["base"], torch.float32)
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    arguments = inputs.x, inputs.y, 4.0, inputs.log_normalizer[0]
    want = ck.decomposable(*arguments, shape=0.5, negative_scale=2.0, generator=draw[0])
    shape, k = numpy.float32(0.5), numpy.int64(2)
    assert torch.equal(ck.decomposable(*arguments, shape=shape, negative_scale=k, generator=draw[1]), want)


@pytest.mark.parametrize("loss", ALL)
def test_normalize_divides_by_the_norm(loss):
    inputs = make_inputs(BY_NAME["unnormalised"], torch.float64)
    unit = [torch.nn.functional.normalize(v, dim=1) for v in (inputs.x, inputs.y)]
    x, y = (v.detach().requires_grad_() for v in (inputs.x, inputs.y))
    value = inputs.call(ck, loss, x, y, inputs.scale, inputs.bias, normalize=True)
    torch.testing.assert_close(value, inputs.call(ck, loss, *unit, inputs.scale, inputs.bias))
    value.backward()
    radial = (x.grad * x).sum(1)
    torch.testing.assert_close(radial, torch.zeros_like(radial), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_and_weights_may_be_of_other_dtypes(backend):
    inputs = make_inputs(BY_NAME["index"], torch.float32)
    require(backend, inputs)
    mask = torch.arange(len(inputs.x)) % 3 == 0
    want = ck.info_nce(inputs.x, inputs.y, 5.0, positives=inputs.positives, weight=mask.float(), backend=backend)
    for weight in (mask, mask.double(), mask.bfloat16()):
        ours = ck.info_nce(inputs.x, inputs.y, 5.0, positives=inputs.positives.int(), weight=weight, backend=backend)
        assert torch.equal(ours, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_past_the_end_of_float32_is_infinite(backend):
    """Of finite rows, in one call too."""
    x, labels = torch.tensor([[1e19], [-1e19]]), torch.tensor([0, 0])
    assert ck.info_nce(x, -x, 1.0, reduction="none", backend=backend).isfinite().all()
    for loss in (
        ck.info_nce(x, -x, 1.0, reduction="sum", backend=backend),
        ck.sigmoid(x, -x, 1.0, 0.0, reduction="sum", backend=backend),
        ck.sup_con(x.sign(), labels, 3.0, weight=torch.full((2,), 3e38), reduction="sum", y=x.sign(), y_labels=labels),
    ):
        assert loss == torch.inf


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_remembers_normalizers_may_move_before_the_backward_pass(backend, reduction):
    x, y = (torch.randn(6, 4).requires_grad_() for _ in range(2))
    tables = torch.linspace(0.5, 2.0, 6), torch.linspace(1.5, 1.0, 6)
    found = []
    for moves in (False, True):
        loss = ck.decomposable(x, y, 2.0, tables, reduction=reduction, backend=backend).sum()
        if moves:
            for table in tables:
                table.mul_(0.9)
        found.append(torch.autograd.grad(loss, (x, y)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
