"""The passes over one panel against plain formulas in float64: the CPU's with every instruction set that the machine
has, CUDA's kernels, run on the CPU by tests/cuda_emulator, and torch's."""

from __future__ import annotations

import emulated
import panels
import pytest
import torch
from panels import (
    CASES,
    EPS,
    Case,
    assert_log_sums,
    log_sums,
    make_panel,
    params_in_float64,
    relative,
    start_states,
    weights_in_float64,
)

from contrastive_kernels import backends
from contrastive_kernels.backends import cuda
from contrastive_kernels.panels.pairs import Pairs
from contrastive_kernels.panels.panel import Side
from contrastive_kernels.panels.terms import EXPONENTIAL, SIGMOID

_C = pytest.importorskip("contrastive_kernels._C", reason="the extension is not built")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=[*panels.instruction_sets(), "cuda", "torch"])
def backend(request, monkeypatch):
    """A backend; what it calls is the instruction set, or the kernels, under test."""
    name = request.param
    if name in ("cuda", "torch"):
        if name == "cuda":
            monkeypatch.setattr(cuda, "_C", emulated.extension())
        yield backends.get(name)
    else:
        _C.set_instruction_set(name)
        yield backends.get("cpu")
        _C.set_instruction_set("auto")


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_reduce_panel(backend, case):
    for states in start_states(case):
        row, col = (Side(state.clone()) if used else Side() for state, used in zip(states, case.use))
        backend.reduce_panel(EXPONENTIAL, make_panel(
            case.scores.clone(), case.params, case.pairs, row=row, col=col
        ))  # fmt: skip
        for side, before, dim in ((row, states[0], 1), (col, states[1], 0)):
            if side.state is not None:
                assert_log_sums(side.state, before, case.logits(dim), dim, case)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("with_states", [False, True], ids=["weights", "weights-and-sums"])
def test_weight_panel(backend, case, dtype, with_states):
    (rows, cols), scale = case.scores.shape, case.params[0]
    # scores and weights are parts of larger arrays, whose other entries are left alone
    scores = torch.full((rows, cols + 3), 7.0)[:, :cols]
    scores.copy_(case.scores)
    whole = torch.full((rows + 1, cols + (5 if cols % 8 else 8)), 7.0, dtype=dtype)  # aligned for vectors, and not
    dparams = torch.tensor([10.0, -20.0], dtype=torch.float64)
    neutral, _ = start_states(case)
    row, col = case.sides([state.clone() for state in neutral] if with_states else (None, None))
    panel = make_panel(scores, case.params, case.pairs, whole[:rows, :cols], row, col, dparams)
    if dtype == torch.float16 and backend.name == "cpu":
        with pytest.raises(ValueError, match="no float16 weights"):
            backend.weight_panel(EXPONENTIAL, panel)
        return
    if with_states and case.targets[0] is not None and backend.name in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="no targets with sums"):
            backend.weight_panel(EXPONENTIAL, panel)
        return
    backend.weight_panel(EXPONENTIAL, panel)
    want, size = weights_in_float64(case)
    info = torch.finfo(dtype)
    allowed = abs(scale) * size * (relative(case) + (0.51 * info.eps if dtype != torch.float32 else 0))
    allowed += abs(scale) * case.vanishing + info.smallest_normal * info.eps
    fits = (scale * want).abs() < 0.99 * info.max
    assert ((whole[:rows, :cols].double() - scale * want).abs() <= allowed)[fits].all()
    assert (whole[rows:] == 7).all() and (whole[:, cols:] == 7).all(), "written beyond the panel"
    assert torch.equal(scores, case.scores), "the scores are kept"
    sums = params_in_float64(case, want) + torch.tensor([10.0, -20.0])
    slack = torch.stack([(size * (case.scores.double() - case.params[2]).abs()).sum(), size.sum()]) + 20
    assert ((dparams - sums).abs() <= relative(case) * slack).all()
    for side, before, dim in ((row, neutral[0], 1), (col, neutral[1], 0)):
        if side.state is not None:
            assert_log_sums(side.state, before, case.logits(dim), dim, case)


def test_weights_in_place_and_without_parameter_sums(backend, case):
    """The weights may take the scores' place; what is not wanted is not needed for the rest."""
    results = []
    for in_place in (False, True):
        scores = case.scores.clone()
        weights = scores if in_place else torch.empty_like(scores)
        row, col = case.sides()
        dparams = None if in_place else torch.zeros(2, dtype=torch.float64)
        backend.weight_panel(EXPONENTIAL, make_panel(
            scores, case.params, case.pairs, weights, row, col, dparams
        ))  # fmt: skip
        results.append(weights)
    assert torch.equal(*results)


def test_sigmoid_panels(backend, case):
    z = case.logits(signed=True)
    before = torch.linspace(0, 1, len(z))[None]
    want = before[0].double() + torch.nn.functional.softplus(z, threshold=1e9).sum(1)
    reduced, folded = Side(before.clone()), Side(before.clone(), None, case.gains[0])
    limits = ("row_ceiling", "col_ceiling", "row_guide", "col_guide", "row_threshold", "col_threshold")
    arguments = (case.params, case.pairs._replace(**dict.fromkeys(limits)))  # which this term has not
    backend.reduce_panel(SIGMOID, make_panel(case.scores.clone(), *arguments, row=reduced))
    scores, weights = case.scores.clone(), torch.empty_like(case.scores)
    dparams = torch.zeros(2, dtype=torch.float64)
    backend.weight_panel(SIGMOID, make_panel(scores, *arguments, weights, row=folded, dparams=dparams))
    for side in (reduced, folded):
        assert ((side.state[0].double() - want).abs() <= relative(case) * (1 + want)).all()
    w = case.gains[0].double()[:, None] * torch.sigmoid(z)
    w = torch.where(case.alike(), -w, w)
    error = (weights.double() - case.params[0] * w).abs()
    assert (error <= relative(case) * abs(case.params[0]) * w.abs() + 1e-37).all()
    sums = params_in_float64(case, w)
    slack = torch.stack([(w * (case.scores.double() - case.params[2])).abs().sum(), w.abs().sum()]) + 1e-30
    assert ((dparams - sums).abs() <= relative(case) * slack).all()


def test_softplus_and_sigmoid_keep_their_digits(backend):
    """Relative errors of one pair's loss and weight, also where the loss is e^-80."""
    z = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([0.0, -1e-30, 1e-30, -87.0, 500.0, 1e30])])[:, None]
    row = Side(torch.zeros(1, len(z)), None, torch.ones(len(z)))
    weights = torch.empty_like(z)
    backend.weight_panel(SIGMOID, make_panel(z.clone(), (1.0, 0.0), weights=weights, row=row))
    exact = torch.nn.functional.softplus(z.double(), threshold=1e9)[:, 0], torch.sigmoid(z.double())[:, 0]
    for ours, truth, allowed in zip((row.state[0], weights[:, 0]), exact, (1e-6, 4 * EPS)):
        assert ((ours.double() - truth).abs() <= allowed * truth).all()


@pytest.mark.parametrize("spread", [1.0, 90.0])
def test_a_nan_reaches_its_row_and_its_column_alone(backend, spread):
    for i, j in ((0, 0), (31, 17), (32, 69), (64, 33)):
        case = Case(65, 70, spread=spread)
        case.scores[i, j] = torch.nan
        (row, col), _ = (tuple(Side(s) for s in states) for states in start_states(Case(65, 70, spread=spread)))
        backend.reduce_panel(EXPONENTIAL, make_panel(case.scores.clone(), case.params, row=row, col=col))
        assert log_sums(row.state).isnan().nonzero().flatten().tolist() == [i]
        assert log_sums(col.state).isnan().nonzero().flatten().tolist() == [j]
        clean = Case(65, 70, spread=spread)
        sides = [Side(None, *vectors) for vectors in zip(clean.normalizers, clean.gains)]
        weights = torch.empty_like(case.scores)
        backend.weight_panel(
            EXPONENTIAL, make_panel(case.scores, case.params, weights=weights, row=sides[0], col=sides[1])
        )
        assert weights.isnan().nonzero().tolist() == [[i, j]]


def test_rows_without_negatives_weigh_nothing(backend):
    """A rest of +inf (the log-sum of nothing) and a gain of 0 give weights of 0, never 0 * inf."""
    for spread in (1.0, 90.0):
        case = Case(40, 50, spread=spread)
        rows, cols = (v.clone() for v in case.normalizers)
        rows[1, 3], cols[1, 7] = torch.inf, torch.inf
        gains = case.gains[0].clone(), case.gains[1].clone()
        gains[0][5], rows[0, 5] = 0.0, -200.0  # an overflow that does not count
        weights, dparams = torch.empty_like(case.scores), torch.zeros(2, dtype=torch.float64)
        backend.weight_panel(EXPONENTIAL, make_panel(
            case.scores.clone(), case.params, weights=weights, row=Side(None, rows, gains[0]),
            col=Side(None, cols, torch.zeros_like(gains[1])), dparams=dparams,
        ))  # fmt: skip
        assert (weights[3] == 0).all() and (weights[5] == 0).all()
        assert weights.isfinite().all() and dparams.isfinite().all()
        others = case.logits() - case.normalizers[0].double().sum(0)[:, None]
        assert (weights[0].double() - 1.3 * gains[0][0] * others[0].exp()).abs().max() < 1e-3


@pytest.mark.parametrize("rows, cols", [(1, 1), (2, 1), (1, 2), (40, 40)])
def test_rows_of_nothing_beside_small_normalizers(backend, rows, cols):
    """A row and a column without a pair: their gains against a shift of 0 would be infinite, and that times 0 NaN."""
    scores = torch.full((rows, cols), -100.0)
    columns = torch.full((rows, cols), -1)  # row 0 leaves all columns out, and column 0 has row 0 alone
    columns[0], columns[1:, 0] = torch.arange(cols), 0
    normalizers = [torch.stack([torch.full((n,), -100.0), torch.full((n,), 0.5)]) for n in (rows, cols)]
    sides = [Side(torch.stack([torch.full((n,), -torch.inf), torch.zeros(n)]), v, torch.full((n,), 8.0))
             for n, v in zip((rows, cols), normalizers)]  # fmt: skip
    weights, dparams = torch.empty_like(scores), torch.zeros(2, dtype=torch.float64)
    backend.weight_panel(EXPONENTIAL, make_panel(
        scores, (1.0, 0.0), Pairs(None, columns, None, None, None, 0, 0), weights, *sides, dparams
    ))  # fmt: skip
    want = torch.full((rows, cols), 16.0).double() * torch.tensor(-0.5).exp()
    want[0], want[:, 0] = 0.0, 0.0
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(dparams, torch.stack([-100 * want.sum(), want.sum()]), rtol=1e-5, atol=0.0)
