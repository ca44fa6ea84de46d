"""Panels for the C++ passes, with every hard input, and their results by plain formulas in float64."""

from __future__ import annotations

import math

import torch

from contrastive_kernels.panels.panel import Panel, Side

EPS = torch.finfo(torch.float32).eps


def instruction_sets():
    """Those of the CPU's pass that this machine has."""
    from contrastive_kernels import _C

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
    "tiles": lambda: Case(130, 264, excluded=1, first_column=-9),
    "tiles-far-apart": lambda: Case(257, 129, spread=90.0, excluded=2),
    "deep": lambda: Case(65, 131, spread=12.0, excluded=1, deep=True),
}


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


def weights_in_float64(case):
    z = case.logits()
    row = case.gains[0].double()[:, None] * torch.exp(z - case.normalizers[0].double()[:, None])
    col = case.gains[1].double() * torch.exp(z - case.normalizers[1].double())
    size = row.abs() * case.use[0] + col.abs() * case.use[1]
    return row * case.use[0] + col * case.use[1], size
