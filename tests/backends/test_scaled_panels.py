"""Panels whose rows and columns have scales of their own: one score, two logits; against plain formulas in float64."""

from __future__ import annotations

import emulated
import panels
import pytest
import torch
from panels import EPS, guided_out, made_guide, make_panel

from contrastive_kernels import backends
from contrastive_kernels.backends import cuda
from contrastive_kernels.panels.pairs import ALIKE_COUNT, Pairs
from contrastive_kernels.panels.panel import Side
from contrastive_kernels.panels.terms import EXPONENTIAL, SIGMOID

_C = pytest.importorskip("contrastive_kernels._C", reason="the extension is not built")


@pytest.fixture(params=[*panels.instruction_sets(), "torch"])
def backend(request):
    """A backend; what the CPU's calls is the instruction set under test."""
    if request.param == "torch":
        yield backends.get("torch")
    else:
        _C.set_instruction_set(request.param)
        yield backends.get("cpu")
        _C.set_instruction_set("auto")


class Scaled:
    """A panel: scores, scales of either sign and 0, which pairs count, and vectors for both sides."""

    def __init__(self, rows, cols, *, highest=4.0, ids=0, equal_ids=0, excluded=0, diagonal=None, capped=False,
                 targets=False, bias=0.0, guided=False):  # fmt: skip
        g = torch.Generator().manual_seed(rows + cols)

        def normal(*shape):
            return torch.randn(*shape, generator=g)

        self.scores, self.params = normal(rows, cols), (1.0, bias, 0.3)
        self.scales = [torch.linspace(-highest / 3, highest, n)[torch.randperm(n, generator=g)] for n in (rows, cols)]
        self.scales[0][rows // 2] = 0.0
        of_rows, of_cols = (torch.randint(-ids, ids, (n,), generator=g) if ids else None for n in (rows, cols))
        columns = torch.randint(-1, cols, (rows, excluded), generator=g) if excluded else None
        ceilings = [self.scaled(dim).amax(dim) * 0.7 - 1e-3 if capped else None for dim in (1, 0)]
        self.pairs = Pairs(diagonal, columns, None, of_rows, of_cols, 0, 0, equal_ids, *ceilings, *self.scales)
        self.pairs = self.pairs._replace(**made_guide(rows, cols)) if guided else self.pairs
        self.gains = normal(rows), normal(cols)
        self.targets = (normal(2, rows), normal(2, cols)) if targets else (None, None)
        self.normalizers = []
        for dim, n in ((1, rows), (0, cols)):
            shift = (self.logits(dim).logsumexp(dim) + 0.5 * normal(n)).float().nan_to_num(neginf=0.0)
            self.normalizers.append(torch.stack([shift, 0.1 * normal(n)]))

    def scaled(self, dim):
        """scale * score in float32, as it is compared with ceilings."""
        return self.scores * (self.scales[0][:, None] if dim else self.scales[1])

    def alike(self):
        ids = self.pairs.row_ids, self.pairs.col_ids
        return torch.zeros(self.scores.shape, dtype=torch.bool) if ids[0] is None else ids[0][:, None] == ids[1]

    def left_out(self):
        rows, cols = self.scores.shape
        out = self.alike() & (self.pairs.equal_ids == 0)
        if self.pairs.diagonal is not None:
            out |= torch.arange(cols) == torch.arange(rows)[:, None] + self.pairs.diagonal
        if self.pairs.columns is not None:
            out |= (torch.arange(cols)[None, :, None] == self.pairs.columns[:, None, :]).any(-1)
        return out

    def logits(self, dim):
        """In float64, pairs that are left out at -inf: among the rows' (dim 1), or among the columns'."""
        z = self.scores.double() * (self.scales[0][:, None] if dim else self.scales[1]).double() + self.params[1]
        ceiling = self.pairs.row_ceiling if dim else self.pairs.col_ceiling
        out, known = self.left_out(), guided_out(self.pairs, dim)
        out = out if known is None else out | known
        if ceiling is not None:
            out = out | (self.scaled(dim) > ceiling.unsqueeze(dim))
        return z.masked_fill(out, -torch.inf)

    def weights(self, dim):
        """One side's in float64 [R, C], and what they are the sum of."""
        z, k = self.logits(dim), 1 - dim
        exponent = z - self.normalizers[k].double().sum(0).unsqueeze(dim)
        w = self.gains[k].double().unsqueeze(dim) * exponent.exp()
        size = w.abs() * (2 + exponent.nan_to_num(neginf=0.0).abs() + z.nan_to_num(neginf=0.0).abs())
        if self.targets[k] is not None:
            of_others, of_alike = self.targets[k].double().unsqueeze(dim + 1)
            less = torch.where(self.alike(), of_alike, of_others).masked_fill(self.left_out(), 0.0)
            w, size = w - less, size + less.abs()
        return w, size


CASES = {
    "one": lambda: Scaled(1, 1),
    "nothing-counts": lambda: Scaled(1, 1, diagonal=0),
    "ragged": lambda: Scaled(33, 37, excluded=2, bias=1.5),
    "two-chunks": lambda: Scaled(66, 2051, ids=40, diagonal=3),
    "far-apart": lambda: Scaled(65, 70, highest=900.0, diagonal=0),
    "targets": lambda: Scaled(35, 70, targets=True, diagonal=0),
    "targets-beside-ids": lambda: Scaled(35, 70, targets=True, ids=4, excluded=1),
    "targets-of-ids": lambda: Scaled(35, 70, targets=True, ids=4, equal_ids=ALIKE_COUNT, diagonal=1),
    "ceilings": lambda: Scaled(65, 131, capped=True, ids=9, diagonal=0),
    "guide": lambda: Scaled(65, 131, guided=True, ids=9, diagonal=0),
    "guide-and-ceilings": lambda: Scaled(66, 2051, guided=True, capped=True),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_states(backend, case):
    sides, before = [], []
    for n in case.scores.shape:  # some rows have been summed before, some not
        state = torch.stack([torch.full((n,), -torch.inf), torch.zeros(n)])
        state[0, ::3], state[1, ::3] = 1.0, 0.5
        before.append(state.clone())
        sides.append(Side(state))
    backend.reduce_panel(EXPONENTIAL, make_panel(
        case.scores.clone(), case.params, case.pairs, row=sides[0], col=sides[1]
    ))  # fmt: skip
    for k, dim in ((0, 1), (1, 0)):
        z = case.logits(dim)
        want = torch.logaddexp(before[k][0].double() + before[k][1].double().log(), z.logsumexp(dim))
        got = sides[k].state[0].double() + sides[k].state[1].double().log()
        assert torch.equal(got == -torch.inf, want == -torch.inf)
        allowed = 8 * EPS * (2 + z.nan_to_num(neginf=0.0).abs().amax(dim))
        assert ((got - want).abs() <= allowed)[want > -torch.inf].all()


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in-place"])
def test_weights_and_gradients_of_scales(backend, case, in_place):
    scores = case.scores.clone()
    weights = scores if in_place else torch.full_like(scores, torch.nan)
    dscales = [torch.linspace(-1, 1, n) for n in scores.shape]  # what is there is added to
    before = [v.clone() for v in dscales]
    sides = [
        Side(None, *vectors, dscale=dscale)
        for *vectors, dscale in zip(case.normalizers, case.gains, case.targets, dscales)
    ]
    panel = make_panel(scores, case.params, case.pairs, weights, *sides)
    panel.factor = torch.tensor([1.7])
    backend.weight_panel(EXPONENTIAL, panel)
    want, allowed = torch.zeros(scores.shape, dtype=torch.float64), torch.zeros(scores.shape, dtype=torch.float64)
    for k, dim in ((0, 1), (1, 0)):
        (w, size), scale = case.weights(dim), case.scales[k].double().unsqueeze(dim)
        want, allowed = want + 1.7 * scale * w, allowed + 16 * EPS * 1.7 * scale.abs() * size
        centered = case.scores.double() - case.params[2]
        error = (dscales[k] - before[k] - (w * centered).sum(dim)).abs()
        assert (error <= 16 * EPS * ((size * centered.abs()).sum(dim) + 1)).all()
    assert ((weights.double() - want).abs() <= allowed + 1e-30).all()
    if in_place:  # and what nobody asks for is not made
        again = case.scores.clone()
        for side in sides:
            side.dscale = None
        panel.scores = panel.weights = again
        backend.weight_panel(EXPONENTIAL, panel)
        assert torch.equal(again, weights)


def test_a_nan_reaches_its_row_and_its_column_alone(backend):
    case = Scaled(65, 70)
    case.scores[31, 17] = torch.nan
    states = [torch.stack([torch.full((n,), -torch.inf), torch.zeros(n)]) for n in (65, 70)]
    backend.reduce_panel(EXPONENTIAL, make_panel(
        case.scores.clone(), case.params, case.pairs, row=Side(states[0]), col=Side(states[1])
    ))  # fmt: skip
    assert [state[1].isnan().nonzero().tolist() for state in states] == [[[31]], [[17]]]


def test_who_has_no_such_panels_refuses_them(monkeypatch):
    """Before a scale is passed over in silence."""
    case = Scaled(5, 7)
    monkeypatch.setattr(cuda, "_C", emulated.extension())
    states = [Side(torch.zeros(2, n)) for n in (5, 7)]
    scaled, cpu = case.pairs, backends.get("cpu")
    for backend, term, pairs, sides, words in (
        (backends.get("cuda"), EXPONENTIAL, scaled, states, "one scale"),
        (cpu, SIGMOID, scaled, [Side(torch.zeros(1, 5))], "scales by row with signs"),
        (cpu, EXPONENTIAL, scaled._replace(col_scale=None), states, "scales of rows need scales of columns"),
        (cpu, EXPONENTIAL, scaled, states[:1], "both sides' sums or weights"),
    ):
        row, col = (*sides, Side())[:2]
        with pytest.raises(ValueError, match=words):
            backend.reduce_panel(term, make_panel(case.scores.clone(), case.params, pairs, row=row, col=col))
