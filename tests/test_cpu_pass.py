"""The C++ pass over one panel, with every instruction set that the machine has, against plain formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from contrastive_kernels.backends import cpu
from contrastive_kernels.backends.panel import Panel, Side, _AmxProducts, score_product
from contrastive_kernels.specs import EXPONENTIAL, SIGMOID
from contrastive_kernels.streaming import _weights_dtype

_C = pytest.importorskip("contrastive_kernels._C", reason="the extension is not built")

EPS = torch.finfo(torch.float32).eps


def _instruction_sets():
    best, found = _C.instruction_set(), []
    for name in ("baseline", "avx2", "avx512"):
        try:
            _C.set_instruction_set(name)
        except ValueError:
            continue
        found.append(name)
    _C.set_instruction_set("auto")
    assert _C.instruction_set() == best
    return found


INSTRUCTION_SETS = _instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    _C.set_instruction_set(request.param)
    assert _C.instruction_set() == request.param
    yield request.param
    _C.set_instruction_set("auto")


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="avx512, avx2 or baseline"):
        _C.set_instruction_set("sse9")
    assert _C.instruction_set() in INSTRUCTION_SETS


# ---- the exponential ----


def exponential(x):
    out = torch.empty_like(x)
    _C.exp_array(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def test_the_exponentials_error_is_the_stated_one(instruction_set):
    """1.5 units in the last place wherever the result is a normal number: every 61st float of the range."""
    one, low, high = (torch.tensor([v]).view(torch.int32).item() for v in (2.0**-30, 87.33, 88.37))
    bits = [torch.arange(one, low, 61, dtype=torch.int32) | (-(2**31)), torch.arange(one, high, 61, dtype=torch.int32)]
    x = torch.cat(bits).view(torch.float32)
    assert len(x) > 4_000_000 and x.min() < -87 and x.max() > 88
    exact = x.double().exp()
    spacing = 2.0 ** (torch.frexp(exact).exponent - 24).double()
    error = ((exponential(x).double() - exact) / spacing).abs()
    assert error.max() <= 1.5, x[error.argmax()].item()


def test_the_exponential_of_special_values(instruction_set):
    inf, nan = torch.inf, torch.nan
    for n in (1, 15, 16, 17, 40):  # alone, and in the middle of full and partial registers
        for position in {0, n // 2, n - 1}:
            for value in (0.0, -0.0, 1e-38, -1e-45, nan, inf, -inf, 1e38, -1e38, -88.5, -200.0, 89.0):
                x = torch.ones(n)
                x[position] = value
                out = exponential(x)
                others = torch.cat([out[:position], out[position + 1 :]])
                assert ((others - torch.e).abs() < 4e-7).all()
                e = out[position].item()
                if value != value:
                    assert e != e, "NaN stays NaN"
                elif abs(value) < 1e-30:
                    assert e == 1.0
                elif value < -88:
                    assert e == 0.0, "no subnormal numbers"
                else:
                    assert e >= 2e38, "the largest results, or infinity"


# ---- panels ----


def make_panel(scores, params, exclude=None, first_column=0, weights=None, row=None, col=None, dparams=None):
    """A panel whose scores are there already."""
    empty = torch.zeros(0, 0)
    return Panel(
        x=empty,
        y=empty,
        scores=scores,
        weights=scores if weights is None else weights,
        params=torch.tensor(params),
        exclude=torch.zeros(len(scores), 0, dtype=torch.int64) if exclude is None else exclude,
        first_column=first_column,
        scores_ready=True,
        row=row or Side(),
        col=col or Side(),
        dparams=dparams,
    )


class Case:
    """One panel: scores, what is left out, and vectors for both sides."""

    def __init__(
        self, rows, cols, *, spread=1.0, excluded=0, first_column=0, params=(1.3, 0.0), sides="both", deep=False,
        stale=0.0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(rows * 10_007 + cols)

        def normal(*shape):
            return torch.randn(*shape, generator=g)

        # rows and columns of different levels, as far apart as `spread`
        self.levels = spread * torch.linspace(-1, 1, max(rows, 2))[:rows, None], spread * normal(cols).clamp(-1, 1)
        self.scores = 3 * normal(rows, cols) + self.levels[0] + self.levels[1]
        if deep:  # pairs that vanish against the common reference of rows and columns
            self.scores -= 100.0 * (torch.rand(rows, cols, generator=g) < 0.5)
        self.params, self.first_column = params, first_column
        self.use = {"both": (True, True), "rows": (True, False), "cols": (False, True)}[sides]
        # excluded columns of the whole matrix: some lie outside of this panel
        self.exclude = torch.randint(-2, cols + 2, (rows, excluded), generator=g) + first_column
        self.gains = normal(rows), normal(cols)
        z = self.logits()
        # near the log-sums, as they are in use
        self.normalizers = tuple(
            (torch.logsumexp(z, dim).float() + 0.5 * normal(n) - stale).nan_to_num(posinf=0.0, neginf=0.0)
            for dim, n in ((1, rows), (0, cols))
        )
        self.magnitude = stale + (z[z.isfinite()].abs().max().item() if z.isfinite().any() else 0.0)
        # a reference common to all rows and columns lies within 40 of each: what vanishes is below e^(40 - 87)
        self.vanishing = math.exp(stale - 47) * (self.gains[0].abs()[:, None] + self.gains[1].abs()).double()

    def logits(self):
        """z in float64, excluded pairs at -inf."""
        z = self.scores.double() * self.params[0] + self.params[1]
        columns = torch.arange(z.shape[1]) + self.first_column
        excluded = (columns[None, :, None] == self.exclude[:, None, :]).any(-1)
        return z.masked_fill(excluded, -torch.inf)


CASES = {
    "one": lambda: Case(1, 1),
    "one-excluded": lambda: Case(1, 1, excluded=3),
    "column": lambda: Case(70, 1, excluded=1),
    "row": lambda: Case(1, 70, excluded=1),
    "ragged": lambda: Case(33, 37, excluded=1),
    "register": lambda: Case(32, 64, excluded=2, first_column=1000),
    "less-than-a-register": lambda: Case(5, 7),
    "two-stripes": lambda: Case(65, 129, excluded=1, first_column=-40),
    "two-chunks": lambda: Case(66, 2051, excluded=2),
    "three-chunks": lambda: Case(3, 4099, excluded=1, spread=60.0),
    "far-apart": lambda: Case(65, 131, spread=90.0, excluded=1),
    "very-far-apart": lambda: Case(40, 70, spread=3000.0),
    "rows": lambda: Case(65, 70, excluded=1, sides="rows"),
    "rows-far-apart": lambda: Case(65, 70, spread=90.0, sides="rows"),
    "cols": lambda: Case(65, 70, excluded=1, sides="cols"),
    "cols-far-apart": lambda: Case(65, 70, spread=90.0, sides="cols"),
    "stale": lambda: Case(65, 131, stale=70.0, excluded=1),
    "stale-and-far-apart": lambda: Case(65, 131, stale=60.0, spread=90.0),
    "bias": lambda: Case(33, 37, excluded=1, params=(-0.7, 11.0)),
    "deep": lambda: Case(65, 131, spread=12.0, excluded=1, deep=True),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def relative(case):
    """Allowed relative error of an exponential: its own, and the rounding of its argument."""
    return 8 * EPS * (2 + case.magnitude)


def start_states(case):
    """Neutral states; states of earlier panels, some higher and some lower than this one's."""
    rows, cols = case.scores.shape
    neutral, earlier = [], []
    for n, z, dim in ((rows, case.logits(), 1), (cols, case.logits(), 0)):
        reference = torch.full((n,), -torch.inf)
        neutral.append(torch.stack([reference, torch.zeros(n)]))
        level = torch.logsumexp(z, dim).float().nan_to_num(neginf=0.0) + 4 * torch.linspace(-1, 1, n)
        earlier.append(torch.stack([level, torch.linspace(0.5, 2, n)]))
    return neutral, earlier


def log_sums(state):
    return state[0].double() + state[1].double().log()


def assert_log_sums(state, before, z, dim, case):
    want = torch.logaddexp(log_sums(before), torch.logsumexp(z, dim))
    got = log_sums(state)
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    finite = want.isfinite()
    assert ((got - want).abs()[finite] <= relative(case)).all()


def test_reduce_panel(instruction_set, case):
    z = case.logits()
    for states in start_states(case):
        row, col = (Side(state.clone()) if used else Side() for state, used in zip(states, case.use))
        cpu.reduce_panel(EXPONENTIAL, make_panel(
            case.scores.clone(), case.params, case.exclude, case.first_column, row=row, col=col
        ))  # fmt: skip
        for side, before, dim in ((row, states[0], 1), (col, states[1], 0)):
            if side.state is not None:
                assert_log_sums(side.state, before, z, dim, case)


def weights_in_float64(case):
    z = case.logits()
    row = case.gains[0].double()[:, None] * torch.exp(z - case.normalizers[0].double()[:, None])
    col = case.gains[1].double() * torch.exp(z - case.normalizers[1].double())
    size = row.abs() * case.use[0] + col.abs() * case.use[1]
    return row * case.use[0] + col * case.use[1], size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("with_states", [False, True], ids=["weights", "weights-and-sums"])
def test_weight_panel(instruction_set, case, dtype, with_states):
    (rows, cols), scale = case.scores.shape, case.params[0]
    # scores and weights are parts of larger arrays, whose other entries are left alone
    scores = torch.full((rows, cols + 3), 7.0)[:, :cols]
    scores.copy_(case.scores)
    whole = torch.full((rows + 1, cols + 5), 7.0, dtype=dtype)
    dparams = torch.tensor([10.0, -20.0], dtype=torch.float64)
    neutral, _ = start_states(case)
    row, col = (
        Side(state.clone() if with_states else None, normalizer, gain) if used else Side()
        for state, normalizer, gain, used in zip(neutral, case.normalizers, case.gains, case.use)
    )
    cpu.weight_panel(EXPONENTIAL, make_panel(
        scores, case.params, case.exclude, case.first_column, whole[:rows, :cols], row, col, dparams
    ))  # fmt: skip
    want, size = weights_in_float64(case)
    allowed = abs(scale) * size * (relative(case) + (0.51 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0))
    allowed += abs(scale) * case.vanishing
    assert ((whole[:rows, :cols].double() - scale * want).abs() <= allowed).all()
    assert (whole[rows:] == 7).all() and (whole[:, cols:] == 7).all(), "written beyond the panel"
    assert torch.equal(scores, case.scores), "the scores are kept"
    sums = torch.stack([(want * case.scores.double()).sum(), want.sum()]) + torch.tensor([10.0, -20.0])
    slack = torch.stack([(size * case.scores.double().abs()).sum(), size.sum()]) + 20
    assert ((dparams - sums).abs() <= relative(case) * slack).all()
    for side, before, dim in ((row, neutral[0], 1), (col, neutral[1], 0)):
        if side.state is not None:
            assert_log_sums(side.state, before, case.logits(), dim, case)


def test_weights_in_place_and_without_parameter_sums(instruction_set, case):
    """The weights may take the scores' place; what is not wanted is not needed for the rest."""
    results = []
    for in_place in (False, True):
        scores = case.scores.clone()
        weights = scores if in_place else torch.empty_like(scores)
        row, col = (
            Side(None, normalizer, gain) if used else Side()
            for normalizer, gain, used in zip(case.normalizers, case.gains, case.use)
        )
        dparams = None if in_place else torch.zeros(2, dtype=torch.float64)
        cpu.weight_panel(EXPONENTIAL, make_panel(
            scores, case.params, case.exclude, case.first_column, weights, row, col, dparams
        ))  # fmt: skip
        results.append(weights)
    assert torch.equal(*results)


def test_sigmoid_panels(instruction_set, case):
    z = case.logits()
    before = torch.linspace(0, 1, len(z))[None]
    want = before[0].double() + torch.nn.functional.softplus(z, threshold=1e9).sum(1)
    reduced, folded = Side(before.clone()), Side(before.clone(), None, case.gains[0])
    arguments = (case.params, case.exclude, case.first_column)
    cpu.reduce_panel(SIGMOID, make_panel(case.scores.clone(), *arguments, row=reduced))
    scores, weights = case.scores.clone(), torch.empty_like(case.scores)
    dparams = torch.zeros(2, dtype=torch.float64)
    cpu.weight_panel(SIGMOID, make_panel(scores, *arguments, weights, row=folded, dparams=dparams))
    for side in (reduced, folded):
        assert ((side.state[0].double() - want).abs() <= relative(case) * (1 + want)).all()
    w = case.gains[0].double()[:, None] * torch.sigmoid(z)
    error = (weights.double() - case.params[0] * w).abs()
    assert (error <= relative(case) * abs(case.params[0]) * w.abs() + 1e-37).all()
    sums = torch.stack([(w * case.scores.double()).sum(), w.sum()])
    slack = torch.stack([(w * case.scores.double()).abs().sum(), w.abs().sum()]) + 1e-30
    assert ((dparams - sums).abs() <= relative(case) * slack).all()


def test_softplus_and_sigmoid_keep_their_digits(instruction_set):
    """Relative errors of one pair's loss and weight, also where the loss is e^-80."""
    z = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([0.0, -1e-30, 1e-30, -87.0, 500.0, 1e30])])[:, None]
    row = Side(torch.zeros(1, len(z)), None, torch.ones(len(z)))
    weights = torch.empty_like(z)
    cpu.weight_panel(SIGMOID, make_panel(z.clone(), (1.0, 0.0), weights=weights, row=row))
    exact = torch.nn.functional.softplus(z.double(), threshold=1e9)[:, 0], torch.sigmoid(z.double())[:, 0]
    for ours, truth, allowed in zip((row.state[0], weights[:, 0]), exact, (1e-6, 4 * EPS)):
        assert ((ours.double() - truth).abs() <= allowed * truth).all()


def run_everything(case, threads, set_threads):
    set_threads(threads)
    neutral, _ = start_states(case)
    sides = [
        Side(state.clone(), normalizer, gain) if used else Side()
        for state, normalizer, gain, used in zip(neutral, case.normalizers, case.gains, case.use)
    ]
    reduced = [Side(None if side.state is None else side.state.clone()) for side in sides]
    arguments = (case.params, case.exclude, case.first_column)
    weights, dparams = torch.empty_like(case.scores), torch.zeros(2, dtype=torch.float64)
    cpu.reduce_panel(EXPONENTIAL, make_panel(case.scores.clone(), *arguments, row=reduced[0], col=reduced[1]))
    cpu.weight_panel(EXPONENTIAL, make_panel(case.scores.clone(), *arguments, weights, *sides, dparams))
    return [weights, dparams] + [side.state for side in (*sides, *reduced) if side.state is not None]


def test_the_number_of_threads_does_not_show(instruction_set, case, set_threads):
    """Bitwise: stripes do not depend on it, and partial sums are merged in their order."""
    one = run_everything(case, 1, set_threads)
    for threads in (2, 5):
        for a, b in zip(run_everything(case, threads, set_threads), one):
            assert torch.equal(a, b)


@pytest.mark.parametrize("spread", [1.0, 90.0])
def test_a_nan_reaches_its_row_and_its_column_alone(instruction_set, spread):
    for i, j in ((0, 0), (31, 17), (32, 69), (64, 33)):
        case = Case(65, 70, spread=spread)
        case.scores[i, j] = torch.nan
        (row, col), _ = (tuple(Side(s) for s in states) for states in start_states(Case(65, 70, spread=spread)))
        cpu.reduce_panel(EXPONENTIAL, make_panel(case.scores.clone(), case.params, row=row, col=col))
        assert log_sums(row.state).isnan().nonzero().flatten().tolist() == [i]
        assert log_sums(col.state).isnan().nonzero().flatten().tolist() == [j]
        clean = Case(65, 70, spread=spread)
        sides = [Side(None, *vectors) for vectors in zip(clean.normalizers, clean.gains)]
        weights = torch.empty_like(case.scores)
        cpu.weight_panel(EXPONENTIAL, make_panel(case.scores, case.params, weights=weights, row=sides[0], col=sides[1]))
        assert weights.isnan().nonzero().tolist() == [[i, j]]


def test_rows_without_negatives_weigh_nothing(instruction_set):
    """A normaliser of +inf (the log-sum of nothing) and a gain of 0 give weights of 0, never 0 * inf."""
    for spread in (1.0, 90.0):
        case = Case(40, 50, spread=spread)
        rows, cols = (v.clone() for v in case.normalizers)
        rows[3], cols[7] = torch.inf, torch.inf
        gains = case.gains[0].clone(), case.gains[1].clone()
        gains[0][5], rows[5] = 0.0, -200.0  # an overflow that does not count
        weights, dparams = torch.empty_like(case.scores), torch.zeros(2, dtype=torch.float64)
        cpu.weight_panel(EXPONENTIAL, make_panel(
            case.scores.clone(), case.params, weights=weights, row=Side(None, rows, gains[0]),
            col=Side(None, cols, torch.zeros_like(gains[1])), dparams=dparams,
        ))  # fmt: skip
        assert (weights[3] == 0).all() and (weights[5] == 0).all()
        assert weights.isfinite().all() and dparams.isfinite().all()
        others = case.logits() - case.normalizers[0].double()[:, None]
        assert (weights[0].double() - 1.3 * gains[0][0] * others[0].exp()).abs().max() < 1e-3


# ---- bfloat16 operands ----


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no setting of the products")
def test_the_precision_of_other_products_is_left_as_it_was():
    """A setting that is inherited stays inherited: the loss within `flags` must not outlast them."""
    mkldnn = torch.backends.mkldnn
    switch = _AmxProducts()

    def run():
        with switch, switch:
            assert mkldnn.matmul.fp32_precision == "bf16"

    assert mkldnn.matmul.fp32_precision == "none"
    run()
    assert mkldnn.matmul.fp32_precision == "none"
    before = mkldnn.fp32_precision
    try:
        mkldnn.fp32_precision = "bf16"
        run()
        assert mkldnn.matmul.fp32_precision == "bf16"
        mkldnn.fp32_precision = "ieee"
        assert mkldnn.matmul.fp32_precision == "ieee", "no longer inherited"
        mkldnn.matmul.fp32_precision = "bf16"
        run()
        assert mkldnn.matmul.fp32_precision == "bf16"
    finally:
        mkldnn.fp32_precision, mkldnn.matmul.fp32_precision = before, "none"


def test_bfloat16_products_are_exact(set_threads):
    """Products of bfloat16 values, summed in float32: nothing is rounded to bfloat16, whichever unit multiplies."""
    set_threads(2)
    for rows, cols, d in ((300, 500, 64), (65, 70, 1000), (1, 257, 7)):
        g = torch.Generator().manual_seed(d)
        x, y = (torch.randn(n, d, generator=g).bfloat16().float() for n in (rows, cols))
        panel = make_panel(torch.empty(rows, cols), (1.0, 0.0))
        panel.x, panel.y, panel.scores_ready, panel.bfloat16_values = x, y, False, True
        score_product(panel)
        exact = x.double() @ y.double().T
        size = x.double().abs() @ y.double().abs().T
        assert ((panel.scores.double() - exact).abs() <= 4 * EPS * size).all()


def test_without_onednn_bfloat16_weights_stay_in_float32(monkeypatch):
    """Builds without it (some for ARM) have none of its operators to ask."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert _weights_dtype(torch.zeros(1, 1, dtype=torch.bfloat16)) == torch.float32
