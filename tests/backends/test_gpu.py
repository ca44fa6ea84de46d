"""On an NVIDIA GPU: the same problems by the same rule, and what only a GPU has: streams, graphs, huge sizes.

torch.empty gives NaN here too (tests/conftest.py). ``python tests/rehearsal.py`` runs what needs nothing of CUDA.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from device import DEVICE, features_near, named, on_cpu, on_gpu, product, require, tensor_cores
from keeping import small_bands
from problems import ALL, BY_NAME, PROBLEMS, engine_options, make_inputs, run
from tolerance import assert_outcome, rms

import contrastive_kernels as ck
from contrastive_kernels.arguments.options import Engine
from contrastive_kernels.backends import get
from contrastive_kernels.engine.driver import gradient_pass
from contrastive_kernels.engine.gradients import Wanted
from contrastive_kernels.engine.matrix import Positives, Problem, ScoreMatrix
from contrastive_kernels.operators.logsumexp import normalizers
from contrastive_kernels.panels.panel import Side
from contrastive_kernels.panels.terms import EXPONENTIAL

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

MIB = 2**20
BACKENDS = [name for name in ck.list_backends() if name != "cpu"]
FUSED = [name for name in BACKENDS if name != "torch"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CASES = [
    pytest.param(problem, loss, dtype, backend, id=f"{problem.name}-{loss}-{named(dtype)}-{backend}")
    for problem in PROBLEMS
    for dtype in DTYPES
    for loss in problem.losses
    for backend in BACKENDS
    if (problem.float16 or dtype != torch.float16)
    and (dtype != torch.float64 or backend == "torch")
    and not problem.name.startswith("drawn")  # a GPU's generator draws other numbers than the truth's
]


@pytest.mark.parametrize("problem, loss, dtype, backend", CASES)
def test_value_and_gradients(problem, loss, dtype, backend):
    require(backend, dtype)
    inputs = make_inputs(problem, dtype)
    there = on_gpu(inputs)
    options = engine_options(there, loss, backend)
    for reduction in ("mean", "none"):
        outcome = run(ck, there, loss, dtype, reduction=reduction, **options)
        assert_outcome(inputs, loss, reduction, on_cpu(outcome), tensor_cores(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ALL)
def test_memory_that_nobody_wrote_is_nowhere_read(loss, backend):
    """All that torch's allocator hands on is NaN, also where torch.empty is not asked; in panels, and in kept bands."""
    require(backend, torch.bfloat16)
    inputs = make_inputs(BY_NAME["panels"], torch.bfloat16)
    there = on_gpu(inputs)
    sizes = [2**17] * 64 + [2**24] * 8  # floats: of the allocator's small blocks and of its large ones
    used = [torch.full((size,), torch.nan, device=DEVICE) for size in sizes]
    del used
    for within, room in ((nullcontext(), engine_options(there, loss, backend)), (small_bands(), {"backend": backend})):
        with within:
            assert_outcome(inputs, loss, "mean", on_cpu(run(ck, there, loss, torch.bfloat16, **room)), product)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [("x",), ("y",), ("scale",), ("x", "scale"), ()], ids="-".join)
@pytest.mark.parametrize("loss", ["clip_loss", "sigmoid", "decomposable"])
def test_gradients_of_some(loss, needs, backend):
    """A frozen tower, a fixed temperature, an evaluation: what is wanted is right, and the rest is not there."""
    require(backend, torch.bfloat16)
    inputs = make_inputs(BY_NAME["panels"], torch.bfloat16)
    there = on_gpu(inputs)
    outcome = run(ck, there, loss, torch.bfloat16, needs, **engine_options(there, loss, backend))
    assert {name for name, gradient in outcome.gradients.items() if gradient is not None} == set(needs)
    assert_outcome(inputs, loss, "mean", on_cpu(outcome), product)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent", "sigmoid", "decomposable"])
def test_autocast_is_a_cast_of_the_features(loss, dtype, backend):
    """The value is float32 and equals that of features cast by hand; so do the gradients."""
    require(backend, dtype)
    x, y = features(700, 96, torch.float32)
    scale = torch.full((), 10.0, device=DEVICE, requires_grad=True)
    more = extra(loss, 700)
    with torch.autocast(DEVICE.type, dtype):
        value = getattr(ck, loss)(x, y, scale, *more, backend=backend)
    cast = [x.detach().to(dtype).requires_grad_(), y.detach().to(dtype).requires_grad_()]
    wanted = getattr(ck, loss)(*cast, scale, *more, backend=backend)
    assert value.dtype == torch.float32 and torch.equal(value, wanted)
    ours = torch.autograd.grad(value, (x, y, scale))
    for a, b in zip(ours, torch.autograd.grad(wanted, (*cast, scale))):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_two_runs_are_bitwise_equal(loss, dtype, backend):
    require(backend, dtype)
    there = on_gpu(make_inputs(BY_NAME["panels"], dtype))
    options = engine_options(there, loss, backend)
    first, second = (run(ck, there, loss, dtype, **options) for _ in range(2))
    for name in ("value", "x", "y", "scale"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("loss", ALL)
def test_nan_is_not_lost(loss, backend):
    require(backend, torch.bfloat16)
    there = on_gpu(make_inputs(BY_NAME["panels"], torch.bfloat16))
    x = there.x.clone()
    x[-1, 3] = torch.nan
    x.requires_grad_()
    value = there.call(ck, loss, x, there.y, there.scale, there.bias, backend=backend)
    value.backward()
    assert value.isnan() and x.grad[-1].isnan().all()


def features(n, d, dtype, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    make = (torch.randn(n, d, generator=generator, device=DEVICE) for _ in range(2))
    return [torch.nn.functional.normalize(v, dim=1).to(dtype).requires_grad_() for v in make]


def extra(loss, n):
    """What a loss takes behind the scale, on the GPU."""
    bias = torch.full((), -5.0, device=DEVICE)
    return {"sigmoid": (bias,), "decomposable": (torch.full((n,), 7.0, device=DEVICE),)}.get(loss, ())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_once(backend):
    """Calls on several streams share nothing: together they give what each gives alone."""
    require(backend, torch.bfloat16)
    pairs = [features(2000, 128, torch.bfloat16, seed) for seed in range(3)]

    def step(x, y):
        return torch.autograd.grad(ck.clip_loss(x, y, 14.0, backend=backend), (x, y))

    alone = [step(*pair) for pair in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pairs]
    together = []
    for stream, pair in zip(streams, pairs):
        with torch.cuda.stream(stream):
            together.append(step(*pair))
    torch.cuda.synchronize()
    for ours, wanted in zip(together, alone):
        assert all(map(torch.equal, ours, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_another_stream(backend):
    """Work goes to the current stream: inputs that a side stream is still making are waited for, by it alone."""
    require(backend, torch.bfloat16)
    x, y = features(3000, 256, torch.bfloat16)
    ck.clip_loss(x, y, 14.0, backend=backend).backward()
    wanted, x.grad, y.grad = (x.grad, y.grad), None, None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late_x, late_y = (v.detach().clone().requires_grad_() for v in (x, y))
        ck.clip_loss(late_x, late_y, 14.0, backend=backend).backward()
    side.synchronize()
    assert torch.equal(late_x.grad, wanted[0]) and torch.equal(late_y.grad, wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "sigmoid", "nt_xent", "decomposable"])
def test_captured_in_a_graph(loss, backend):
    """A captured step, replayed on other data, gives what an eager step gives."""
    require(backend, torch.bfloat16)
    x, y = features(1500, 128, torch.bfloat16)
    scale = torch.full((), 10.0, device=DEVICE, requires_grad=True)
    more = extra(loss, 1500)
    leaves = (x, y, scale)

    def step():
        for leaf in leaves:
            leaf.grad = None
        value = getattr(ck, loss)(x, y, scale, *more, backend=backend)
        value.backward()
        return value

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for leaf in leaves:
        leaf.grad = None
    with torch.cuda.graph(graph):
        captured = getattr(ck, loss)(x, y, scale, *more, backend=backend)
        captured.backward()
    captured_gradients = [leaf.grad for leaf in leaves]
    with torch.no_grad():
        for leaf, fresh in zip((x, y), features(1500, 128, torch.bfloat16, seed=1)):
            leaf.copy_(fresh)
        scale.fill_(20.0)
    graph.replay()
    replayed = [captured.clone(), *(g.clone() for g in captured_gradients)]
    eager = step()
    for ours, wanted in zip(replayed, [eager, *(leaf.grad for leaf in leaves)]):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["clip_loss", "sigmoid", "nt_xent", "decomposable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nothing_synchronises(dtype, loss, backend):
    require(backend, dtype)
    x, y = features(1000, 64, dtype)
    scale = torch.full((), 10.0, device=DEVICE, requires_grad=True)
    more = {"sigmoid": (-5.0,), "decomposable": (torch.full((1000,), 7.0, device=DEVICE),)}.get(loss, ())
    getattr(ck, loss)(x, y, scale, *more, backend=backend).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(ck, loss)(x, y, scale, *more, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", FUSED)
def test_sizes_beyond_int32(backend):
    """70,000 x 70,000 scores: their number passes 2^31. Values of all rows, gradients of some, against float64."""
    require(backend, torch.bfloat16)
    n, scale = 70_000, 20.0
    x, y = features(n, 64, torch.bfloat16)
    losses = ck.info_nce(x, y, scale, reduction="none", backend=backend)
    losses.sum().backward()
    for start in (0, 35_000, n - 64):
        rows = slice(start, start + 64)
        exact = x[rows].detach().double().requires_grad_()
        z = scale * exact @ y.detach().double().T
        wanted = z.logsumexp(1) - z[torch.arange(64), torch.arange(start, start + 64)]
        wanted.sum().backward()
        torch.testing.assert_close(losses[rows].double(), wanted, rtol=1e-5, atol=1e-5)
        error = (x.grad[rows].double() - exact.grad).norm() / exact.grad.norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, error
    total = torch.zeros(64, 64, dtype=torch.float64, device=DEVICE)
    last = slice(n - 64, n)
    for start in range(0, n, 10_000):
        z = scale * x[start : start + 10_000].detach().double() @ y.detach().double().T
        p = z.softmax(1)[:, last]
        total += scale * p.T @ x[start : start + 10_000].detach().double()
    total -= scale * x[last].detach().double()
    error = (y.grad[last].double() - total).norm() / total.norm()
    assert error < 4 * torch.finfo(torch.bfloat16).eps, error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["clip_loss", "sigmoid", "nt_xent", "decomposable"])
def test_memory_stays_within_its_bound(loss, backend):
    require(backend, torch.bfloat16)
    n, d, workspace = 12_000, 256, 32 * MIB
    x, y = features(n, d, torch.bfloat16)
    more = {"sigmoid": (-5.0,), "decomposable": (torch.full((n,), 9.0, device=DEVICE),)}.get(loss, ())

    def step():
        x.grad = y.grad = None
        getattr(ck, loss)(x, y, 10.0, *more, backend=backend, workspace_bytes=workspace).backward()

    step()
    x.grad = y.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    used = torch.cuda.max_memory_allocated() - before
    matrices = n * d * (4 * 2 + 2 * 4)  # float32 sums of both, and both gradients with room for a copy
    assert used <= workspace + matrices * (2 if loss == "nt_xent" else 1) + 24 * MIB, used / MIB


def test_float32_products_follow_torchs_setting():
    """TF32 where torch has it, and not where it has not; by the root mean square of the rows' errors."""
    require("triton", torch.float32)
    x, y = features(2000, 512, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    truth = ck.clip_loss(x.double(), y.double(), 100.0, backend="torch", reduction="none")
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            losses = ck.clip_loss(x, y, 100.0, backend="triton", reduction="none")
            errors[allowed] = (losses.double() - truth).square().mean().sqrt()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    # in float64, of operands rounded to TF32: 1.4e-3; in float32 on a CPU: 2e-6
    assert errors[False] < 2e-5 and 3e-4 < errors[True] < 6e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=named)
@pytest.mark.parametrize("d", [64, 128, 256, 384, 512, 768, 1000, 1024])
def test_bias_of_the_scores(d, dtype, backend):
    """Scores near 0.45, against float64: they have the tensor cores' bias, and no more of it than torch's product has.

    A row that has one negative has its logit for a normaliser. The decomposable loss counts scores from a center, the
    positives' mean: "centered" are sums that start at -0.45 and end near 0, "far" are those that stay near -0.45.
    """
    require(backend, dtype)
    common, far, x, y = features_near(1024, d, dtype)
    as_torch = product(x.cpu(), y.T.cpu()).to(DEVICE)
    scale, bias = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    rows, _ = normalizers(Problem(x, common[None], scale, bias, engine=Engine(backend)))
    errors = {
        "torch": as_torch.double() - x.double() @ y.double().T,
        "ours": rows.double().sum(0) - x.double() @ common.double(),
    }
    for name, negative in (("centered", common), ("far", far)):
        _, log_z = ck.decomposable(
            x, torch.stack([negative, y[0]]), 1.0, torch.zeros(len(x), device=DEVICE), positive_constant=0.0,
            positives=torch.ones(len(x), dtype=torch.int64, device=DEVICE), return_log_normalizer=True, backend=backend,
        )  # fmt: skip
        errors[name] = log_z.double() - x.double() @ (negative.double() - y[0].double())
    found = {name: (error.mean().item(), rms(error)) for name, error in errors.items()}
    print(f"D = {d:4}, {named(dtype)}:", *(f"{name} {b:+.2e} (rms {r:.2e})" for name, (b, r) in found.items()))
    unit = torch.finfo(torch.float32).eps
    for name in ("ours", "centered", "far"):
        for ours, torchs in zip(found[name], found["torch"]):
            assert abs(ours) <= 2 * abs(torchs) + unit, (name, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["clip_loss", "nt_xent", "sigmoid", "decomposable"])
@pytest.mark.parametrize("name", ["base", "d768"])
def test_tf32_by_the_same_rule(name, loss, backend):
    """... of what torch does where it may use TF32."""
    require(backend, torch.float32)
    inputs = make_inputs(BY_NAME[name], torch.float32)
    there = on_gpu(inputs)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        outcome = run(ck, there, loss, torch.float32, **engine_options(there, loss, backend))
        assert_outcome(inputs, loss, "mean", on_cpu(outcome), tensor_cores(torch.float32))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["clip_loss", "sigmoid", "nt_xent", "decomposable"])
def test_compiled_in_one_graph(loss, backend):
    """A logarithmic temperature and autocast, by the default compiler, for two sizes."""
    require(backend, torch.bfloat16)

    def step(x, y, log_scale, *more):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return getattr(ck, loss)(2 * x, y, log_scale.exp(), *more, backend=backend)

    torch._dynamo.reset()  # the limit of recompilations is one of the code, which all these functions share
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    log_scale = torch.full((), 1.5, device=DEVICE, requires_grad=True)
    for n, seed in ((1000, 0), (1200, 1)):
        x, y = features(n, 128, torch.float32, seed)
        leaves, more = (x, y, log_scale), extra(loss, n)
        eager = step(*leaves, *more)
        ours = compiled(*leaves, *more)
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves)):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("backend", FUSED)
def test_overlap_changes_nothing(backend):
    """Panels in turn on two streams: the same sums, and in two runs bitwise so."""
    require(backend, torch.bfloat16)
    x, y = (v.detach() for v in features(6000, 256, torch.bfloat16))
    params = torch.tensor([10.0, 0.0, 0.0], device=DEVICE)
    normalizer = torch.tensor([[9.0], [0.0]], device=DEVICE).repeat(1, 6000)
    side = Side(None, normalizer, torch.ones(6000, device=DEVICE))
    results = []
    for overlap in (False, True, True):
        # twice the room for two buffers; the shapes of panels may still differ
        workspace = (2 if overlap else 1) * 8 * MIB
        matrix = ScoreMatrix(EXPONENTIAL, x, y, params, Positives(0), get(backend), workspace, overlap=overlap)
        results.append(gradient_pass(matrix, side, side, Wanted(True, True, True)))
    for name in ("dx", "dy", "dparams"):
        for other in results[1:]:
            torch.testing.assert_close(getattr(other, name), getattr(results[0], name), rtol=1e-2, atol=1e-3)
        assert torch.equal(getattr(results[1], name), getattr(results[2], name))


def test_a_gpu_is_served_by_its_own_kernels():
    require("triton", torch.bfloat16)
    plan = ck.plan(8192, d=512, dtype=torch.bfloat16, device="cuda")
    assert plan.backend == "triton"


def test_searches_find_on_a_gpu_what_they_find_on_a_cpu():
    """Hardest negatives, drawn negatives (one noise everywhere) and ranks; but for candidates within rounding."""
    x, y = features(900, 64, torch.float32)
    x, y = x.detach(), y.detach()
    pairs = [
        [ck.hardest_negatives(a, b) for a, b in ((x, y), (x.cpu(), y.cpu()))],
        [
            ck.sample_negatives(a, b, 10.0, generator=torch.Generator().manual_seed(3))
            for a, b in ((x, y), (x.cpu(), y.cpu()))
        ],
        [ck.retrieval_metrics(a, b).ranks for a, b in ((x, y), (x.cpu(), y.cpu()))],
    ]
    for there, here in pairs:
        assert (there.cpu() == here.cpu()).double().mean() > 0.995


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_memory_of_normalisers_lives_on_a_gpu(backend):
    """Steps of stochastic EM: values and what is remembered are those of a CPU."""
    require(backend, torch.float32)
    x, y = features(600, 64, torch.float32)
    results = []
    for device, name in ((DEVICE, backend), (torch.device("cpu"), "torch")):
        loss = ck.DecomposableContrastiveLoss(num_samples=1000, device=device, backend=name)
        a, b = (v.detach().to(device).requires_grad_() for v in (x, y))
        index = torch.arange(600, device=device)
        values = [loss(a, b, index, 10.0) for _ in range(3)]
        sum(values).backward()
        state = [v for v in loss.state_dict().values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        results.append([*map(torch.Tensor.detach, values), a.grad, b.grad, *state])
    for there, here in zip(*results):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


def test_structures_on_a_gpu():
    """The regularisers of latent structure, against a CPU."""
    x, y = (v.detach() for v in features(500, 64, torch.float32))
    more = [v.detach() for v in features(500, 64, torch.float32, seed=1)]
    for there, here in (
        (ck.geometric_consistency(x, y, *more), ck.geometric_consistency(*(v.cpu() for v in (x, y, *more)))),
        (ck.brownian_bridge(x, y, more[0]), ck.brownian_bridge(*(v.cpu() for v in (x, y, more[0])))),
        (
            ck.multimodal_contrastive(x, y, *more, 10.0),
            ck.multimodal_contrastive(*(v.cpu() for v in (x, y, *more)), 10.0),
        ),
    ):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)
