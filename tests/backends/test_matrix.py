"""Whole small matrices in one call of C++, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from panels import EPS, made_guide

from contrastive_kernels.panels.terms import EXPONENTIAL, SIGMOID

_C = pytest.importorskip("contrastive_kernels._C", reason="the extension is not built")
pytestmark = pytest.mark.usefixtures("instruction_set")


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


class Matrix:
    """Scores of rows and columns with what is said of their pairs."""

    def __init__(
        self, rows, cols, *, offset=0, positives=None, diagonal=None, excluded=0, biased=False, symmetric=False,
        params=(1.3, 0.0), level=0.0, spread=1.0, gains=True, include=True, capped=False, lifted=False,
        guided=False,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(1000 * rows + cols)
        self.scores = 3 * torch.randn(rows, cols, generator=g) + level
        self.scores += spread * torch.linspace(-1, 1, rows)[:, None]
        if symmetric:
            self.scores = (self.scores + self.scores.T) / 2
        self.symmetric, self.diagonal, self.params = symmetric, diagonal, params
        self.positives = None if positives is None else torch.tensor(positives)
        self.offset = None if positives is not None else offset
        self.columns = torch.randint(-1, cols, (rows, excluded), generator=g) if excluded else None
        self.col_bias = torch.randn(cols, generator=g) if biased else None
        self.gain = torch.randn(rows, generator=g) if gains else None
        self.share, self.include = 0.3, include
        self.lift = torch.randn(rows, generator=g) if lifted else None
        # between two of a row's (column's) scores
        self.ceilings = [
            (self.scores * torch.tensor(params[0])).sort(dim).values.movedim(dim, 0)[-3:-1].mean(0) if capped else None
            for dim in (1, 0)
        ]

        of_guide = made_guide(rows, cols) if guided else {}
        if guided and symmetric:
            of_guide.update(col_guide=of_guide["row_guide"], col_threshold=of_guide["row_threshold"])
        self.thresholds = [of_guide.get(name) for name in ("row_threshold", "col_threshold")]
        self.guide = of_guide["row_guide"] @ of_guide["col_guide"].T if guided else None

    def where(self):
        """The positives' columns [N], -1 for none."""
        if self.positives is not None:
            return self.positives
        return (
            torch.arange(len(self.scores)) + self.offset
            if self.offset is not None
            else torch.full((len(self.scores),), -1)
        )

    def negatives(self):
        rows, cols = self.scores.shape
        kept, columns = torch.ones(rows, cols, dtype=torch.bool), torch.arange(cols)
        if self.diagonal is not None:
            kept &= columns != torch.arange(rows)[:, None] + self.diagonal
        if self.columns is not None:
            kept &= (columns[:, None] != self.columns[:, None, :]).all(-1)
        return kept & (columns != self.where()[:, None])

    def gains(self):
        return (
            torch.full((len(self.scores),), self.share, dtype=torch.float64)
            if self.gain is None
            else self.gain.double()
        )

    def leaves(self):
        """Scores, scale and bias in float64, with gradients; logits, and those of the positives (0 without)."""
        scores = self.scores.double().requires_grad_()
        params = torch.tensor(self.params).double().requires_grad_()
        z = scores * params[0] + params[1]
        if self.col_bias is not None:
            z = z + self.col_bias.double()
        where = self.where()
        z_pos = torch.where(where >= 0, z.gather(1, where.clamp(min=0)[:, None])[:, 0], 0.0)
        return scores, params, z, z_pos

    def gradients(self, value, scores, params, **options):
        weights, dparams = torch.autograd.grad(value, (scores, params), **options)
        return value.detach(), weights + weights.T if self.symmetric else weights, dparams

    def arguments(self, scores, weights, positive_weights=None):
        said = {"columns": self.columns, "col_bias": self.col_bias}
        said |= dict(zip(("row_ceiling", "col_ceiling"), self.ceilings))
        said |= {"guide": self.guide, **dict(zip(("row_threshold", "col_threshold"), self.thresholds))}
        pairs = {name: address(vector) for name, vector in said.items() if vector is not None}
        if self.columns is not None:
            pairs["columns_count"] = self.columns.shape[1]
        if self.guide is not None:
            pairs["guide_stride"] = self.guide.stride(0)
        return (
            address(scores), address(weights), address(positive_weights), *scores.shape, pairs or None, self.diagonal,
            address(self.positives), self.offset, *self.params,
        )  # fmt: skip

    def softmax(self, both, in_place=False, wanted=True, threads=1, unscaled=False):
        """Value, weights and gradients of the parameters, by one call; of lifts, too, where there are some."""
        scores, dlift = self.scores.clone(), None if self.lift is None else torch.full_like(self.lift, torch.nan)
        weights = scores if in_place else torch.full_like(scores, torch.nan)

        def call(scores, weights, positive_weights=None):
            out = _C.softmax_matrix(
                *self.arguments(scores, weights, positive_weights), address(self.gain), self.share, both,
                self.symmetric, self.include, unscaled, address(self.lift), address(dlift), threads,
            )  # fmt: skip
            return torch.tensor(out, dtype=torch.float64)

        out = call(scores, weights if wanted else None)
        if wanted:
            self.assert_same_beside(call, out, weights)
        assert in_place or torch.equal(scores.nan_to_num(), self.scores.nan_to_num())
        return out[0], weights, out[1:], *([] if dlift is None else [dlift])

    def assert_same_beside(self, call, out, weights):
        """positive_weights receive what lies in the positives' places otherwise, which become 0."""
        positive_weights, others = torch.full((len(weights),), torch.nan), self.scores.clone()
        again = call(others, others, positive_weights)
        there = self.where() >= 0
        places = (there.nonzero()[:, 0], self.where()[there])
        assert (others[places] == 0).all() and (positive_weights[~there] == 0).all()
        others[places] = positive_weights[there]
        for mine, other in ((again, out), (others, weights)):
            torch.testing.assert_close(mine, other, rtol=0.0, atol=0.0, equal_nan=True)

    def softmax_in_float64(self, both, gains):
        """Value, weights and gradients of the parameters, by autograd."""
        scores, params, z, z_pos = self.leaves()
        z = z.masked_fill(~self.negatives(), -torch.inf)
        losses = [self.losses(z, z_pos, dim) for dim in ((1, 0) if both else (1,))]
        if self.lift is not None:
            lift = self.lift.double().requires_grad_()
            value = (gains * self.losses(z, z_pos + lift, 1)).sum()
            return *self.gradients(value, scores, params, retain_graph=True), torch.autograd.grad(value, lift)[0]
        value, *rest = self.gradients((gains * sum(losses)).sum(), scores, params)
        if not self.include and (gains >= 0).all():  # as a size: losses have either sign
            value = (gains * sum(each.detach().abs() for each in losses)).sum()
        return value, *rest

    def losses(self, z, z_pos, dim):
        """Of rows (1) or columns (0)."""
        ceiling = self.ceilings[1 - dim]
        if ceiling is not None:
            z = z.masked_fill(self.scores * torch.tensor(self.params[0]) > ceiling.unsqueeze(dim), -torch.inf)
        threshold = self.thresholds[1 - dim]
        if threshold is not None:
            z = z.masked_fill(self.guide > threshold.unsqueeze(dim), -torch.inf)
        margins = torch.logsumexp(z, dim) - z_pos
        return torch.nn.functional.softplus(margins, threshold=1e9) if self.include else margins

    def size(self):
        """What an exponent's rounding goes by."""
        return (self.scores - self.scores.mean()).abs().max().item() * abs(self.params[0]) + abs(self.params[1])


def half(n):
    """NT-Xent's positives: the other view."""
    return [*range(n // 2, n), *range(n // 2)]


MATRICES = {
    "one": lambda: Matrix(1, 1),
    "8": lambda: Matrix(8, 8),
    "share": lambda: Matrix(9, 9, gains=False),
    "wide": lambda: Matrix(7, 20, offset=5),
    "index": lambda: Matrix(5, 9, positives=[3, 8, 0, 3, 1]),
    "index-and-columns": lambda: Matrix(5, 9, positives=[3, 8, 0, 3, 1], excluded=3),
    "columns": lambda: Matrix(40, 70, excluded=2, offset=30),
    "diagonal": lambda: Matrix(40, 70, diagonal=3, offset=7, excluded=1),
    "biases-of-columns": lambda: Matrix(33, 33, biased=True, params=(0.7, -2.0)),
    "two-stripes": lambda: Matrix(65, 65, spread=60.0),
    "beyond-a-chunk": lambda: Matrix(3, 2100, offset=2090),
    "high": lambda: Matrix(24, 24, level=1e4, params=(1.0, 0.0)),
    "higher": lambda: Matrix(24, 24, level=1e6, params=(1.0, 0.0)),
    # stripes of rows with and without a shift that serves their columns too
    "symmetric-far": lambda: Matrix(100, 100, symmetric=True, diagonal=0, positives=half(100), spread=50.0),
    "symmetric": lambda: Matrix(12, 12, symmetric=True, diagonal=0, positives=half(12)),
    "symmetric-high": lambda: Matrix(
        40, 40, symmetric=True, diagonal=0, positives=half(40), level=1e4, params=(1.0, 0.0)
    ),
    "dcl": lambda: Matrix(33, 33, excluded=2, include=False),
    "dcl-index": lambda: Matrix(5, 9, positives=[3, 8, 0, 3, 1], include=False),
    "dcl-far": lambda: Matrix(65, 65, spread=60.0, include=False),
    "dcl-symmetric": lambda: Matrix(12, 12, symmetric=True, diagonal=0, positives=half(12), include=False),
    "dcl-beyond-a-chunk": lambda: Matrix(3, 2100, offset=2090, include=False),
    "ceilings": lambda: Matrix(65, 65, excluded=1, capped=True),
    "ceilings-dcl": lambda: Matrix(40, 70, offset=30, biased=True, capped=True, include=False, spread=50.0),
    "guide": lambda: Matrix(65, 65, excluded=1, guided=True),
    "guide-and-ceilings": lambda: Matrix(40, 70, offset=30, biased=True, guided=True, capped=True),
    "guide-symmetric": lambda: Matrix(40, 40, symmetric=True, diagonal=0, positives=half(40), guided=True),
    "ceilings-symmetric": lambda: Matrix(40, 40, symmetric=True, diagonal=0, positives=half(40), capped=True),
    "threads": lambda: Matrix(257, 200, positives=[i % 200 for i in range(257)]),
    "lifted": lambda: Matrix(40, 70, offset=30, lifted=True),
    "lifted-columns": lambda: Matrix(5, 9, positives=[3, 8, 0, 3, 1], excluded=3, lifted=True, biased=True),
    "lifted-dcl": lambda: Matrix(5, 9, offset=2, lifted=True, include=False, gains=False),
}


def assert_equal(got, want, size, m, level=0.0):
    """Value, weights and gradients of the parameters. `size`: these with gains that do not cancel each other; `level`:
    of scores that no center cancels."""
    allowed = 8 * EPS * (2 + m.size())
    assert abs(got[0] - want[0]) <= allowed * size[0]
    vanishing = math.exp(-40) * size[1].abs().max()  # against the common shift of rows and columns
    assert ((got[1].double() - want[1]).abs() <= allowed * size[1].abs() + vanishing).all()
    weights = size[1].abs().sum() / abs(m.params[0])
    assert abs(got[2][0] - want[2][0]) <= allowed * weights * ((m.scores - m.scores.mean()).abs().max() + level)
    assert abs(got[2][1] - want[2][1]) <= allowed * weights


@pytest.mark.parametrize("name", MATRICES)
def test_softmax(name):
    m = MATRICES[name]()
    square = len(m.scores) == len(m.scores[0])
    for both in {False, square and m.offset == 0 and not m.symmetric}:
        want, size = (m.softmax_in_float64(both, gains) for gains in (m.gains(), m.gains().abs()))
        got = m.softmax(both)
        assert_equal(got, want, size, m)
        for other in (m.softmax(both, in_place=True), m.softmax(both, threads=3)):
            assert all(torch.equal(a, b) for a, b in zip(got, other))
        value, _, dparams, *_ = m.softmax(both, wanted=False)
        assert value == got[0] and (dparams == 0).all()
        if m.lift is not None:
            assert ((got[3] - want[3]).abs() <= 8 * EPS * (2 + m.size()) * m.gains().abs()).all()


@pytest.mark.parametrize("name", ["8", "index-and-columns", "beyond-a-chunk", "ceilings", "symmetric"])
def test_weights_that_are_not_scaled(name):
    """dL/dz itself, which is there at a scale of 0, too."""
    m = MATRICES[name]()
    scaled, plain = m.softmax(False), m.softmax(False, unscaled=True)
    torch.testing.assert_close(plain[1] * torch.tensor(m.params[0]), scaled[1], rtol=4 * EPS, atol=0)
    assert scaled[0] == plain[0] and torch.equal(scaled[2], plain[2])
    m.params = (0.0, 0.0)
    assert (m.softmax(False)[1] == 0).all() and (m.softmax(False, unscaled=True)[1] != 0).any()


@pytest.mark.parametrize("both", [False, True])
def test_softmax_of_rows_without_negatives_and_of_nearly_solved_ones(both):
    """The log-sum of nothing has loss and weights 0; a loss of e^-60 keeps its digits."""
    m = Matrix(6, 6, gains=False, params=(1.0, 0.0))
    m.scores = 60.0 * torch.eye(6)
    m.columns = torch.full((6, 5), -1)
    m.columns[2] = torch.tensor([0, 1, 3, 4, 5])
    value, weights, dparams = m.softmax(both)
    want, exact, exact_params = m.softmax_in_float64(both, m.gains())
    assert abs(value - want) <= 1e-6 * want
    assert ((weights - exact).abs() <= 1e-6 * exact.abs()).all() and exact[0, 0] < 0
    assert both or (weights[2] == 0).all()
    assert ((dparams - exact_params).abs() <= 1e-6 * 60 * exact.abs().sum()).all()


@pytest.mark.parametrize("include", [True, False])
def test_nothing_but_positives(include):
    for both in (False, True):
        value, weights, dparams = Matrix(1, 1, include=include).softmax(both)
        assert value == 0 and (weights == 0).all() and (dparams == 0).all()
    m = Matrix(0, 5)
    assert [each.sum().item() for each in m.softmax(False)] == [0, 0, 0]


@pytest.mark.parametrize("place", [(3, 3), (3, 5)])
def test_a_nan_is_told(place):
    m = Matrix(8, 8)
    m.scores[place] = torch.nan
    for both in (False, True):
        value, weights, dparams = m.softmax(both)
        assert value.isnan() and dparams.isnan().all()
        assert weights[3].isnan().all() and not weights[0, :3].isnan().any()


def test_softmax_refuses_what_it_cannot_do():
    for m, both, what in (
        (Matrix(3, 4), True, "square"),
        (Matrix(4, 4, positives=[0, 1, 2, 3]), True, "their rows' positives"),
        (Matrix(4, 4, positives=[0, 1, 4, 3]), False, "in no column"),
        (Matrix(4, 4, positives=[0, 1, -1, 3]), False, "every row"),
        (Matrix(4, 4, offset=1), False, "in no column"),
        (Matrix(4, 4, offset=None), False, "every row"),
        (Matrix(4, 4, lifted=True), True, "rows alone have lifts"),
    ):
        with pytest.raises(ValueError, match=what):
            m.softmax(both)


# ---- weights known beforehand ----


class Weighted:
    """A weighted sum over a matrix: term, normalisers and gains."""

    def __init__(self, m, term, cols=False, relative=False, far=0.0):
        g = torch.Generator().manual_seed(5)
        self.m, self.term, self.relative = m, term, relative
        z = m.leaves()[2].detach()
        kept, z_pos = z.masked_fill(~m.negatives(), -torch.inf), m.leaves()[3].detach()
        self.normalizers, self.gains = [], []
        for dim in (1, 0) if cols else (1,):
            log_sum = torch.logsumexp(kept, dim) + torch.randn(z.shape[1 - dim], generator=g) - far
            exact = log_sum.nan_to_num(neginf=0.0) - (z_pos if relative else 0.0)
            shift = exact.float().round()
            self.normalizers.append(torch.stack([shift, (exact - shift).float()]))
            self.gains.append(torch.randn(len(exact), generator=g) if m.gain is not None else None)

    def run(self, in_place=False, wanted=True, threads=1):
        """Value, weights, gradients of the parameters, the sides' states and the positives' scores."""
        m = self.m
        scores = m.scores.clone()
        weights = scores if in_place else torch.full_like(scores, torch.nan)
        lines = 1 if self.term is SIGMOID else 2
        states = [torch.full((lines, n), torch.nan) for n in scores.shape[: len(self.normalizers)]]
        dots = torch.full((len(scores),), torch.nan)
        # relative ones are told by one number: what is added to the positive's logit
        given = [n.sum(0) if self.relative else n for n in self.normalizers]
        sides = [address(v) for pair in zip(given, self.gains) for v in pair]
        if self.term is SIGMOID:
            sides[0] = 0
        sides += [0] * (4 - len(sides))

        def call(scores, weights, positive_weights=None):
            out = _C.weighted_matrix(
                self.term.code, *m.arguments(scores, weights, positive_weights), *sides, m.share, self.relative,
                *[address(state) for state in (*states, None)[:2]], address(dots), threads,
            )  # fmt: skip
            return torch.tensor(out, dtype=torch.float64)

        out = call(scores, weights if wanted else None)
        if wanted:
            m.assert_same_beside(call, out, weights)
        return out[0], weights, out[1:], states, dots

    def in_float64(self, absolute):
        m = self.m
        scores, params, z, z_pos = m.leaves()
        kept = z.masked_fill(~m.negatives(), -torch.inf)
        gains = [torch.full((n,), m.share) if gain is None else gain for n, gain in zip(z.shape, self.gains)]
        gains = [gain.double().abs() if absolute else gain.double() for gain in gains]
        if self.term is SIGMOID:
            there = m.where() >= 0
            losses = torch.nn.functional.softplus(kept, threshold=1e9).sum(1)
            losses = losses + there * torch.nn.functional.softplus(-z_pos, threshold=1e9)
            return m.gradients((gains[0] * losses).sum(), scores, params)
        value = 0.0
        for dim, gain, normalizer in zip((1, 0), gains, self.normalizers):
            total = normalizer.sum(0).double() + z_pos if self.relative else normalizer.double().sum(0)
            value = value + (gain * torch.exp(torch.logsumexp(kept, dim) - total)).sum()
        return m.gradients(value, scores, params)


WEIGHTED = {
    "sigmoid": lambda: Weighted(Matrix(9, 9, params=(2.0, -3.0)), SIGMOID),
    "sigmoid-share": lambda: Weighted(Matrix(9, 12, offset=2, gains=False, diagonal=0), SIGMOID),
    "sigmoid-some-positives": lambda: Weighted(Matrix(5, 9, positives=[3, -1, 0, 3, -1], excluded=1), SIGMOID),
    "sigmoid-no-positives": lambda: Weighted(Matrix(5, 9, offset=None), SIGMOID),
    "sigmoid-threads": lambda: Weighted(Matrix(257, 200, positives=[i % 200 for i in range(257)]), SIGMOID),
    "rows": lambda: Weighted(Matrix(40, 70, offset=30), EXPONENTIAL),
    "rows-no-positives": lambda: Weighted(Matrix(40, 70, offset=None, excluded=2), EXPONENTIAL),
    "rows-relative": lambda: Weighted(Matrix(40, 70, offset=30), EXPONENTIAL, relative=True),
    "both": lambda: Weighted(Matrix(33, 33, gains=False), EXPONENTIAL, cols=True),
    "both-relative": lambda: Weighted(Matrix(33, 33, biased=True), EXPONENTIAL, cols=True, relative=True),
    "both-far": lambda: Weighted(Matrix(65, 65, spread=50.0), EXPONENTIAL, cols=True, relative=True, far=30.0),
    "high": lambda: Weighted(Matrix(24, 24, level=1e4, params=(1.0, 0.0)), EXPONENTIAL, cols=True),
    "higher-relative": lambda: Weighted(
        Matrix(24, 24, level=1e6, params=(1.0, 0.0)), EXPONENTIAL, cols=True, relative=True
    ),
    "threads": lambda: Weighted(Matrix(200, 200), EXPONENTIAL, cols=True, relative=True),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted(name):
    w = WEIGHTED[name]()
    m = w.m
    want, size = w.in_float64(False), w.in_float64(True)
    value, weights, dparams, states, dots = w.run()
    # without a center the parameters' sums do not cancel a level
    level = 0.0 if w.relative or w.term is SIGMOID else m.scores.abs().max().item()
    assert_equal((value, weights, dparams), want, size, m, level)
    where = m.where()
    exact = torch.where(where >= 0, m.scores.gather(1, where.clamp(min=0)[:, None])[:, 0], 0.0)
    assert torch.equal(dots, exact)
    for other in (w.run(in_place=True), w.run(threads=3)):
        assert all(torch.equal(a, b) for a, b in zip((value, weights, dparams, dots), (*other[:3], other[4])))
        assert all(torch.equal(a, b) for a, b in zip(states, other[3]))
    without = w.run(wanted=False)
    assert without[0] == value and (without[2] == 0).all()
    kept = m.leaves()[2].masked_fill(~m.negatives(), -torch.inf)
    if w.term is SIGMOID:
        losses = torch.nn.functional.softplus(kept, threshold=1e9).sum(1)
        losses += (where >= 0) * torch.nn.functional.softplus(-m.leaves()[3], threshold=1e9)
        assert ((states[0][0].double() - losses).abs() <= 8 * EPS * (2 + m.size()) * losses).all()
    else:
        for dim, state in zip((1, 0), states):
            error = state[0].double() + state[1].double() - torch.logsumexp(kept, dim)
            assert (error.abs() <= 8 * EPS * (2 + m.size())).all()


def test_weighted_without_rows():
    """Nothing has no address."""
    for m, cols in ((Matrix(0, 5), False), (Matrix(0, 0), True)):
        value, _, dparams, *_ = Weighted(m, EXPONENTIAL, cols=cols).run()
        assert value == 0 and (dparams == 0).all()
