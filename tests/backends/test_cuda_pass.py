"""What is CUDA's own in the C++ pass, run on the CPU by tests/cuda_emulator: every loss, threads, launches, errors.

The panels themselves are in test_panel_pass.py.
"""

from __future__ import annotations

import os

import defaults
import emulated
import pytest
import torch
from exact import EQUAL, assert_exact, equal
from keeping import small_bands
from labelled import LABELLED
from panels import CASES, Case, make_panel, start_states
from problems import ALL, BY_NAME, PROBLEMS, engine_options, make_inputs, run
from thorough import every, one_of
from tolerance import assert_outcome

import contrastive_kernels as ck
from contrastive_kernels import backends
from contrastive_kernels.backends import cuda
from contrastive_kernels.engine.matrix import Positives, ScoreMatrix
from contrastive_kernels.engine.workspace import Workspace
from contrastive_kernels.panels.pairs import Pairs
from contrastive_kernels.panels.panel import Side, in_pieces
from contrastive_kernels.panels.size import Size
from contrastive_kernels.panels.terms import EXPONENTIAL, SIGMOID


@pytest.fixture
def kernels(monkeypatch):
    """The emulated extension in the backend's hands, which serves the CPU's tensors; the emulator's controls."""
    monkeypatch.setattr(cuda, "_C", emulated.extension())
    monkeypatch.setattr(cuda.CudaBackend, "why_not", lambda self, device, dtype: None)
    yield emulated.controls()
    emulated.controls().emulator_set_order(0)


BACKEND = backends.get("cuda")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
#: "K/N": part K of N; a sanitizer takes its time.
PART = [*map(int, os.environ.get("EMULATED_PART", "0/1").split("/"))]
PAIRS = [(problem, loss) for k, problem in enumerate(PROBLEMS) for loss in one_of(k, problem.losses)]
PAIRS += [
    (BY_NAME[name], loss)
    for k, name in enumerate(("base", "panels", "nearly-solved", "ids-panels", "common-100"))
    for loss in [*LABELLED][k % every(3) :: every(3)]
]
PAIRS = PAIRS[PART[0] :: PART[1]]


def dtype_in_turn(number, problem):
    """The dtypes in turn; every pair in every dtype would take minutes."""
    dtype = DTYPES[number % len(DTYPES)]
    return dtype if problem.float16 or dtype != torch.float16 else torch.float32


@pytest.mark.parametrize(
    "problem, loss, dtype",
    [
        pytest.param(problem, loss, dtype_in_turn(k, problem), id=f"{problem.name}-{loss}")
        for k, (problem, loss) in enumerate(PAIRS)
    ],
)
def test_every_problem(kernels, problem, loss, dtype):
    inputs = make_inputs(problem, dtype)
    outcome = run(ck, inputs, loss, dtype, **engine_options(inputs, loss, "cuda"))
    assert_outcome(inputs, loss, "mean", outcome)


@pytest.mark.parametrize("n", [8, 130])
@pytest.mark.parametrize("name", EQUAL)
def test_equal_logits(kernels, name, n):
    """A loss of log N and its gradients keep float64's digits, by panels of one dtype and of the other."""
    for k, loss in enumerate(ALL):
        dtype = DTYPES[k % (3 if n == 8 else 2)]  # sums of 130 features are past the end of float16
        inputs = make_inputs(equal(name, n), dtype)
        outcome = run(ck, inputs, loss, dtype, **engine_options(inputs, loss, "cuda"))
        assert_exact(inputs, loss, "mean", outcome)


def test_nothing_depends_on_defaults(kernels):
    """The C++ side is told addresses and counts: memory of another dtype would be written past its end."""
    assert defaults.depending("cuda", ["n3", "panels"]) == []


def everything(case):
    """What both operations give for one panel: weights, dparams and states."""
    neutral, _ = start_states(case)
    sides = [
        Side(state.clone(), normalizer, gain) if used else Side()
        for state, normalizer, gain, used in zip(neutral, case.normalizers, case.gains, case.use)
    ]
    reduced = [Side(None if side.state is None else side.state.clone()) for side in sides]
    arguments = (case.params, case.pairs)
    weights, dparams = torch.empty_like(case.scores), torch.zeros(2, dtype=torch.float64)
    BACKEND.reduce_panel(EXPONENTIAL, make_panel(case.scores.clone(), *arguments, row=reduced[0], col=reduced[1]))
    BACKEND.weight_panel(EXPONENTIAL, make_panel(case.scores.clone(), *arguments, weights, *sides, dparams))
    return [weights, dparams] + [side.state for side in (*sides, *reduced) if side.state is not None]


@pytest.mark.parametrize("name", ["tiles", "tiles-far-apart", "two-chunks", "rows", "cols"])
def test_the_order_of_threads_and_blocks_does_not_show(kernels, name):
    """Bitwise. A barrier too few would show where threads run backwards or by lot."""
    case = CASES[name]()
    one = everything(case)
    for order in (1, 2, 3):
        kernels.emulator_set_order(order)
        for a, b in zip(everything(case), one):
            assert torch.equal(a, b)


def sides_of(case, **replaced):
    row = {"state": start_states(case)[0][0], "normalizer": case.normalizers[0], "gain": case.gains[0]}
    return Side(**(row | replaced))


def test_launches(kernels):
    """One launch for the tiles and one to merge what is to be summed."""
    case = Case(130, 140)

    def count(operation, term, panel):
        before = kernels.emulator_launches()
        operation(term, panel)
        return kernels.emulator_launches() - before

    both = [Side(state) for state in start_states(case)[0]]
    assert count(BACKEND.reduce_panel, EXPONENTIAL, make_panel(case.scores, case.params, row=both[0], col=both[1])) == 2
    weights_alone = make_panel(case.scores.clone(), case.params, row=sides_of(case, state=None))
    assert count(BACKEND.weight_panel, EXPONENTIAL, weights_alone) == 1
    with_sums = make_panel(case.scores.clone(), case.params, row=sides_of(case))
    assert count(BACKEND.weight_panel, EXPONENTIAL, with_sums) == 2
    sums = make_panel(case.scores, case.params, row=Side(torch.zeros(1, 130)))
    assert count(BACKEND.reduce_panel, SIGMOID, sums) == 2


def test_a_failed_launch_is_a_runtime_error(kernels):
    """With the CUDA API's own words; the current device is what it was, and the next call works."""
    case = Case(5, 7)
    panel = make_panel(case.scores, case.params, row=Side(start_states(case)[0][0]))
    kernels.emulator_fail_next(98)
    with pytest.raises(RuntimeError, match="panel_pass_kernel: emulated failure"):
        BACKEND.reduce_panel(EXPONENTIAL, panel)
    assert kernels.emulator_device() == 0
    BACKEND.reduce_panel(EXPONENTIAL, panel)
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        memory = cuda._memory(panel)
        cuda._C.cuda_reduce_panel(**cuda._fields(EXPONENTIAL, panel, memory), device=7)


def test_the_device_is_chosen_and_put_back(kernels):
    case = Case(5, 7)
    panel = make_panel(case.scores, case.params, row=Side(start_states(case)[0][0]))
    memory = cuda._memory(panel)
    fields = cuda._fields(EXPONENTIAL, panel, memory)
    cuda._C.cuda_reduce_panel(**fields, device=1)
    assert kernels.emulator_device() == 0


def test_why_not_asks_the_device(kernels):
    assert cuda._C.cuda_why_not(0) == ""
    kernels.emulator_fail_next(98)
    assert cuda._C.cuda_why_not(0).endswith("cudaFuncGetAttributes: emulated failure")
    assert "invalid device ordinal" in cuda._C.cuda_why_not(5)
    assert kernels.emulator_device() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scratch_bytes": 8}, "the scratch is too small"),
        ({"scores": 0}, "scores, or x and y, must not be null"),
        ({"row_shift": 0}, "a sum needs its shift"),
        ({"row_sum": 0, "row_shift": 0}, "at least one side must be wanted"),
        ({"stride": 3}, "stride must be at least cols"),
        ({"params": 0}, "params must not be null"),
        ({"term": 7}, "the sigmoid term has no column side"),
        ({"weights": 64}, "weights and dparams must be null"),
        ({"columns_count": 1}, "columns must not be null"),
        ({"row_ids": 64}, "ids of rows need ids of columns"),
    ],
)
def test_wrong_calls_are_refused(kernels, change, message):
    case = Case(5, 7)
    panel = make_panel(case.scores, case.params, row=Side(start_states(case)[0][0]))
    panel.col = Side(start_states(case)[0][1])
    memory = cuda._memory(panel)
    fields = cuda._fields(EXPONENTIAL, panel, memory)
    if "row_sum" in change:
        fields = {name: value for name, value in fields.items() if not name.startswith("col")}
    with pytest.raises(ValueError, match=message):
        cuda._C.cuda_reduce_panel(**(fields | change))
    with pytest.raises(TypeError, match="no member colour"):
        cuda._C.cuda_reduce_panel(**fields, colour=1)


# ---- the product on the tensor cores ----


class Product:
    """Operands of a panel, whose product is made by the kernel or by float64."""

    def __init__(self, rows, cols, depth, dtype, padding=0):
        g = torch.Generator().manual_seed(rows * 1009 + cols * 31 + depth)
        wide = [torch.randn(n, depth + padding, generator=g).to(dtype)[:, :depth] for n in (rows, cols)]
        self.x, self.y = wide
        self.scores = (self.x.double() @ self.y.double().T).float()
        self.depth = depth
        self.size = (self.x.double().norm(dim=1)[:, None] * self.y.double().norm(dim=1)).float()

    def panel(self, ready, *arguments, **vectors):
        """A panel whose scores are there, or one that holds the operands."""
        panel = make_panel(self.scores.clone(), *arguments, **vectors)
        if not ready:
            panel.x, panel.y, panel.scores, panel.scores_ready = self.x, self.y, torch.empty(0), False
        return panel


PRODUCTS = {
    "one-piece": lambda dtype: Product(3, 5, 8, dtype),
    "one-stage": lambda dtype: Product(128, 128, 32, dtype),
    "ragged": lambda dtype: Product(130, 137, 40, dtype, padding=8),
    "all-stages": lambda dtype: Product(65, 129, 96, dtype),
    "stages-come-round": lambda dtype: Product(129, 64, 136, dtype, padding=16),
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_on_the_tensor_cores(kernels, name, dtype, order):
    """The kernel that multiplies against the pass over scores that float64 multiplied: sums, weights, parameters."""
    kernels.emulator_set_order(order)
    product = PRODUCTS[name](dtype)
    rows, cols = product.scores.shape
    pairs = Pairs(columns=(torch.arange(rows) * 3 % cols)[:, None])
    results = []
    for ready in (True, False):
        states = [torch.stack([torch.full((n,), -torch.inf), torch.zeros(n)]) for n in (rows, cols)]
        normalizers = [torch.stack([torch.linspace(-1, 2, n), torch.linspace(1, 0, n)]) for n in (rows, cols)]
        gains = [torch.linspace(-1, 1, n) for n in (rows, cols)]
        weights, dparams = torch.empty(rows, cols), torch.zeros(2, dtype=torch.float64)
        sides = [Side(*vectors) for vectors in zip(states, normalizers, gains)]
        panel = product.panel(ready, (0.1, 0.3, 2.0), pairs, weights, *sides, dparams)
        assert cuda._on_tensor_cores(panel) != ready
        BACKEND.weight_panel(EXPONENTIAL, panel)
        results.append([weights, dparams, *(state[0].double() + state[1].double().log() for state in states)])
    # float32 sums in the order of the depth: a few roundings of the terms' size, which the exponential passes on
    allowed = 0.1 * product.size.max() * (product.depth + 8) * torch.finfo(torch.float32).eps
    (w, dparams, *sums), (ours, our_dparams, *our_sums) = results
    size = (torch.linspace(-1, 1, rows).abs()[:, None] + torch.linspace(-1, 1, cols).abs()) * torch.exp(
        0.1 * product.scores + 0.3
    )
    assert ((ours - w).abs() <= (allowed + 4e-7) * size).all()
    assert ((our_dparams - dparams).abs() <= (allowed + 4e-7) * (size * (1 + product.size)).sum().double()).all()
    for a, b in zip(our_sums, sums):
        assert torch.equal(a.isinf(), b.isinf())
        assert ((a - b).abs()[b.isfinite()] <= allowed + 4e-7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 36}, "multiple of 8"),
        ({"operands": 0}, "have 16 bits"),
        ({"x_stride": 44}, "aligned to 16 bytes"),
        ({"y": 0}, "must not be null"),
    ],
)
def test_wrong_operands_are_refused(kernels, change, message):
    panel = Product(5, 7, 40, torch.bfloat16).panel(False, (1.0, 0.0), row=Side(torch.zeros(2, 5)))
    memory = cuda._memory(panel)
    fields = cuda._fields(EXPONENTIAL, panel, memory)
    with pytest.raises(ValueError, match=message):
        cuda._C.cuda_reduce_panel(**(fields | change))


@pytest.mark.parametrize(
    ("depth", "dtype", "offset"),
    [(7, torch.bfloat16, 0), (16, torch.bfloat16, 1), (16, torch.float32, 0), (12, torch.float16, 0)],
)
def test_other_operands_take_the_portable_route(kernels, depth, dtype, offset):
    """Odd widths, addresses that are not aligned, float32: scores in memory, whose room is in the scratch."""
    g = torch.Generator().manual_seed(depth)
    x, y = (torch.randn(n, depth + offset, generator=g).to(dtype)[:, offset:] for n in (65, 70))
    x = x.contiguous() if not offset else x
    results = []
    size = Size(65, 70, depth, dtype, x.device, False, 0, 1, in_pieces(x) and in_pieces(y))
    for room in (0, BACKEND.scratch(65, 70, size)):
        row = Side(torch.stack([torch.full((65,), -torch.inf), torch.zeros(65)]))
        panel = make_panel(torch.empty(0), (0.5, 0.0), row=row)
        panel.x, panel.y, panel.scores_ready, panel.scratch = x, y, False, torch.empty(room)
        assert not cuda._on_tensor_cores(panel)
        BACKEND.reduce_panel(EXPONENTIAL, panel)
        results.append(row.state[0].double() + row.state[1].double().log())
    assert torch.equal(*results)
    exact = torch.logsumexp(0.5 * x.double() @ y.double().T, 1)
    assert ((results[0] - exact).abs() <= 1e-5 * (1 + exact.abs())).all()


def test_a_factor_takes_the_scales_place(kernels):
    case = Case(33, 40)
    for factor, wanted in ((None, 1.3), (2.0**14, 2.0**14)):
        weights = torch.empty(33, 40)
        panel = make_panel(case.scores.clone(), case.params, weights=weights, row=sides_of(case, state=None))
        panel.factor = None if factor is None else torch.tensor([factor])
        BACKEND.weight_panel(EXPONENTIAL, panel)
        unit = case.gains[0].double()[:, None] * torch.exp(case.logits() - case.normalizers[0].double().sum(0)[:, None])
        assert ((weights - wanted * unit).abs() <= 1e-5 * wanted * unit.abs() + 1e-30).all()


@pytest.mark.parametrize(
    ("name", "loss", "dtype", "room", "bands"),
    [
        ("base", "clip_loss", torch.float32, None, 1),
        ("offset-panels", "info_nce", torch.float32, 2**18, 3),
        ("index-panels", "info_nce", torch.float32, 2**17, 5),
        ("d7", "info_nce", torch.bfloat16, None, 1),
        ("base", "clip_loss", torch.bfloat16, None, 0),  # on the tensor cores no score is in memory
        ("d7", "info_nce", torch.float16, None, 0),
    ],
)
def test_the_portable_route_keeps_the_scores_of_a_band(kernels, monkeypatch, name, loss, dtype, room, bands):
    """One product of scores, which statistics and weights have in common; launches as planned."""
    products, product = [], cuda._product
    monkeypatch.setattr(cuda, "_product", lambda *given: products.append(given) or product(*given))
    inputs, options = make_inputs(BY_NAME[name], dtype), {"backend": "cuda", "workspace_bytes": room}
    with small_bands():
        before = kernels.emulator_launches()
        outcome = run(ck, inputs, loss, dtype, reduction="mean", **options)
        launches = kernels.emulator_launches() - before
        plan = ck.plan(len(inputs.x), len(inputs.y), inputs.x.shape[1], dtype, loss=loss, **options)
    assert_outcome(inputs, loss, "mean", outcome)
    assert (plan.band is not None) == (bands > 0)
    if bands:
        assert len(products) == bands == -(-len(inputs.x) // plan.band)
        assert sum(each.launches for each in plan.passes) == launches + 3 * bands, "of torch: three products"


# ---- how the matrix is cut for either route ----


def operands(n, d, dtype, offsets):
    """x and y [n, d] contiguous, that many elements behind an address that is aligned."""
    return [torch.zeros(n * d + 8, dtype=dtype)[offset:][: n * d].view(n, d) for offset in offsets]


@pytest.mark.parametrize("weighs", [False, True], ids=["reduce", "weigh"])
@pytest.mark.parametrize(
    ("d", "dtype", "offsets", "route"),
    [
        (64, torch.bfloat16, (0, 0), cuda.TENSOR_CORES),
        (64, torch.float16, (8, 0), cuda.TENSOR_CORES),
        (60, torch.bfloat16, (0, 0), cuda.PORTABLE),
        (64, torch.bfloat16, (1, 0), cuda.PORTABLE),
        (64, torch.bfloat16, (0, 1), cuda.PORTABLE),
        (64, torch.float32, (0, 0), cuda.PORTABLE),
    ],
)
def test_panels_are_as_large_as_their_route_allows(kernels, d, dtype, offsets, route, weighs):
    """Room for scores where they are in memory, and nowhere else; what a panel wants is in the workspace, all of it."""
    n, room = 5000, 2**22
    x, y = operands(n, d, dtype, offsets)
    matrix = ScoreMatrix(EXPONENTIAL, x, y, torch.ones(3), Positives(0), BACKEND, room)
    workspace = Workspace(matrix, weighs=weighs, gains=(torch.ones(n), None))
    i = next(workspace.row_blocks())
    panel = workspace.panel(i, next(workspace.col_blocks(i)))
    assert cuda._on_tensor_cores(panel) == (route is cuda.TENSOR_CORES)
    assert cuda._memory(panel) is workspace.scratch
    assert workspace.scratch.nbytes + workspace.weights.nbytes <= room
    scores = 0 if route is cuda.TENSOR_CORES else 4
    weights = dtype.itemsize if weighs else 0
    per_score = (workspace.scratch.nbytes + workspace.weights.nbytes) / (workspace.rows * workspace.cols)
    assert scores + weights < per_score < scores + weights + 0.2
    bound = room / (scores + weights + 0.2)
    assert workspace.rows * workspace.cols > 0.6 * min(bound, n * n), "most of the workspace is used"


@pytest.mark.parametrize(("d", "dtype"), [(16, torch.bfloat16), (7, torch.float16), (16, torch.float32)])
def test_launches_are_those_of_the_plan(kernels, d, dtype, monkeypatch):
    """Kernels and products of value and gradients, counted, by either route."""
    counted = 0

    def counting(function):
        def run(*arguments):
            nonlocal counted
            counted += 1
            return function(*arguments)

        return run

    monkeypatch.setattr(cuda, "_product", counting(cuda._product))
    monkeypatch.setattr(Workspace, "accumulate", counting(Workspace.accumulate))
    for loss, n in (("clip_loss", 130), ("nt_xent", 70), ("sigmoid", 65)):
        x, y = (torch.randn(n, d).to(dtype).requires_grad_() for _ in range(2))
        scale = torch.ones((), requires_grad=True)
        more = (-1.0,) if loss == "sigmoid" else ()
        counted, before = 0, kernels.emulator_launches()
        getattr(ck, loss)(x, y, scale, *more, backend="cuda", workspace_bytes=2**16).backward()
        counted += kernels.emulator_launches() - before
        plan = ck.plan(n, d=d, dtype=dtype, loss=loss, backend="cuda", workspace_bytes=2**16)
        assert sum(each.launches for each in plan.passes) == counted > 0, loss
