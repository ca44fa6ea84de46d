"""Panels for the backends, with every hard input, and their results by plain formulas in float64."""

from __future__ import annotations

import math

import torch

from contrastive_kernels.panels.pairs import ALIKE_ALONE, ALIKE_COUNT, Pairs
from contrastive_kernels.panels.panel import Panel, Side

EPS = torch.finfo(torch.float32).eps


def instruction_sets():
    """Those of the CPU's pass that this machine has; none where the extension is not built."""
    try:
        from contrastive_kernels import _C
    except ImportError:
        return []

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


def made_guide(rows, cols, sides="rows, cols"):
    """A guide's features and thresholds, as members of pairs; its scores are whole numbers, and thresholds none."""
    g = torch.Generator().manual_seed(rows * 7 + cols)
    features = [torch.randint(-3, 4, (n, 5), generator=g).float() for n in (rows, cols)]
    made = dict(zip(("row_guide", "col_guide"), features))
    scores = features[0] @ features[1].T
    for name, dim, share in (("row", 1, 0.7), ("col", 0, 0.8)):
        if name in sides:
            threshold = scores.quantile(share, dim).floor() + 0.5
            threshold[3::7], threshold[5::11] = torch.inf, -torch.inf
            made[f"{name}_threshold"] = threshold
    return made


def guide_of(pairs):
    """A guide's scores, in rows that lie apart; None without one."""
    if pairs is None or pairs.row_guide is None:
        return None
    scores = pairs.row_guide @ pairs.col_guide.T
    return torch.nn.functional.pad(scores, (0, 3), value=torch.nan)[:, : scores.shape[1]]


def guided_out(pairs, dim):
    """Which pairs a guide's scores leave out of the rows' parts (dim 1), or of the columns'; None: it has no say."""
    threshold = pairs.row_threshold if dim else pairs.col_threshold
    return None if threshold is None else guide_of(pairs) > threshold.unsqueeze(dim)


def make_panel(scores, params, pairs=None, weights=None, row=None, col=None, dparams=None):
    """A panel whose scores are there already. `params`: scale, bias and perhaps the center."""
    empty = torch.zeros(0, 0)
    return Panel(
        x=empty,
        y=empty,
        scores=scores,
        weights=scores if weights is None else weights,
        params=torch.tensor([*params, 0.0][:3]),
        pairs=pairs or Pairs(),
        scores_ready=True,
        row=row or Side(),
        col=col or Side(),
        dparams=dparams,
        guide=guide_of(pairs),
    )


def split(normalizer, highest):
    """float64 log-normalisers [n] as two float32 numbers [2, n]: the highest logit and what is left, or, of every other
    one, rounded and what is left."""
    rounded = (torch.arange(len(highest)) % 2 == 1) | highest.isinf()
    shift = torch.where(rounded, normalizer, highest).float()
    return torch.stack([shift, (normalizer - shift.double()).float()])


class Case:
    """One panel: scores, which pairs count, and vectors for both sides."""

    def __init__(
        self, rows, cols, *, spread=1.0, excluded=0, diagonal=None, first_row=0, first_column=0, params=(1.3, 0.0, 0.0),
        sides="both", deep=False, stale=0.0, level=0.0, biased=False, ids=0, equal_ids=0,
        targets=False, capped="", guided="",
    ):  # fmt: skip
        g = torch.Generator().manual_seed(rows * 10_007 + cols)

        def normal(*shape):
            return torch.randn(*shape, generator=g)

        # rows and columns of different levels, as far apart as `spread`; all of them around `level`
        self.levels = spread * torch.linspace(-1, 1, max(rows, 2))[:rows, None], spread * normal(cols).clamp(-1, 1)
        self.scores = 3 * normal(rows, cols) + self.levels[0] + self.levels[1] + level
        if deep:  # pairs that vanish against the common shift of rows and columns
            self.scores -= 100.0 * (torch.rand(rows, cols, generator=g) < 0.5)
        self.params = params
        self.use = {"both": (True, True), "rows": (True, False), "cols": (False, True)}[sides]
        # excluded columns of the whole matrix: some lie outside of this panel
        columns = torch.randint(-2, cols + 2, (rows, excluded), generator=g) + first_column
        col_bias = normal(cols).masked_fill_(torch.rand(cols, generator=g) < 0.1, -torch.inf) if biased else None
        # so many ids of either sign
        row_ids, col_ids = (torch.randint(-ids, ids, (k,), generator=g) if ids else None for k in (rows, cols))
        left_out = columns if excluded else None
        self.pairs = Pairs(diagonal, left_out, col_bias, row_ids, col_ids, first_row, first_column, equal_ids)
        self.gains = normal(rows), normal(cols)
        self.targets = (normal(2, rows), normal(2, cols)) if targets else (None, None)
        of_rows, of_cols = (self._ceilings(dim) if side in capped else None for dim, side in ((1, "rows"), (0, "cols")))
        of_guide = made_guide(rows, cols, guided) if guided else {}
        self.pairs = self.pairs._replace(row_ceiling=of_rows, col_ceiling=of_cols, **of_guide)
        # near the log-sums, as they are in use
        self.normalizers = tuple(
            split((torch.logsumexp(z, dim) + 0.5 * normal(n) - stale).nan_to_num(neginf=0.0), z.amax(dim))
            for z, dim, n in ((self.logits(1), 1, rows), (self.logits(0), 0, cols))
        )
        z = self.logits()
        finite = z[z.isfinite()]
        # what an exponent's rounding goes by: not how large logits are, but how far from the normaliser
        size = (finite - (level * params[0] + params[1])).abs().max().item() if finite.numel() else 0.0
        self.magnitude = stale + size
        # a shift common to all rows and columns lies within 40 of each: what vanishes is below e^(40 - 87)
        self.vanishing = math.exp(stale - 47) * (self.gains[0].abs()[:, None] + self.gains[1].abs()).double()

    def left_out(self):
        """The pairs that do not count, but for what the term makes of equal ids [R, C]."""
        rows, cols = self.scores.shape
        columns = torch.arange(cols) + self.pairs.first_column
        left_out = torch.zeros(rows, cols, dtype=torch.bool)
        if self.pairs.columns is not None:
            left_out |= (columns[None, :, None] == self.pairs.columns[:, None, :]).any(-1)
        if self.pairs.diagonal is not None:
            left_out |= columns == torch.arange(rows)[:, None] + self.pairs.first_row + self.pairs.diagonal
        if self.pairs.equal_ids == ALIKE_ALONE:
            left_out |= ~self.alike()
        return left_out

    def alike(self):
        """The pairs of equal ids [R, C]."""
        if self.pairs.row_ids is None:
            return torch.zeros(self.scores.shape, dtype=torch.bool)
        return self.pairs.row_ids[:, None] == self.pairs.col_ids

    def _ceilings(self, dim):
        """Between two of a row's (column's) scaled scores, as far from both as can be; of some +inf, of some -inf."""
        ordered = (self.scores * torch.tensor(self.params[0])).sort(dim).values.movedim(dim, 0)
        n = max(len(ordered) - 1, 1)
        place = n * 3 // 4 + torch.arange(ordered.shape[1]) % (n - n * 3 // 4)
        high = ordered.gather(0, place.clamp(max=len(ordered) - 1)[None])[0]
        low = ordered.gather(0, (place - 1).clamp(min=0)[None])[0]
        ceilings = (high + low) / 2
        ceilings[3::7], ceilings[5::11] = torch.inf, -torch.inf
        return ceilings

    def logits(self, dim=None, signed=False):
        """z in float64 of what a backend makes in float32: scale * score is exact in it; excluded pairs at -inf.

        Pairs of equal ids are among these or, if `signed`, have -z. dim 1: those above the rows' ceilings are among
        them; 0: above the columns'; and those that a guide leaves out.
        """
        if dim is not None:
            ceiling, out = self.pairs.row_ceiling if dim else self.pairs.col_ceiling, guided_out(self.pairs, dim)
            z = self.logits() if out is None else self.logits().masked_fill(out, -torch.inf)
            if ceiling is None:
                return z
            too_high = self.scores * torch.tensor(self.params[0]) > ceiling.unsqueeze(dim)
            return z.masked_fill(too_high, -torch.inf)
        z = self.scores.double() * torch.tensor(self.params[0]).double() + torch.tensor(self.params[1]).double()
        if self.pairs.col_bias is not None:
            z = z + self.pairs.col_bias.double()
        if not signed:
            out = self.left_out() if self.pairs.equal_ids else self.left_out() | self.alike()
            return z.masked_fill(out, -torch.inf)
        return torch.where(self.alike() & (z > -torch.inf), -z, z).masked_fill(self.left_out(), -torch.inf)

    def sides(self, states=(None, None)):
        """Both sides of a weight panel, as far as they take part."""
        vectors = zip(states, self.normalizers, self.gains, self.targets, self.use)
        return [Side(*given) if used else Side() for *given, used in vectors]


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
    "bias": lambda: Case(33, 37, excluded=1, params=(-0.7, 11.0, 0.0)),
    "center": lambda: Case(33, 37, excluded=1, params=(0.7, -3.0, 2.5)),
    "diagonal": lambda: Case(70, 70, diagonal=0),
    "diagonal-of-a-block": lambda: Case(66, 2051, diagonal=-30, first_row=1040, first_column=1000, excluded=1),
    "diagonal-elsewhere": lambda: Case(40, 50, diagonal=3, first_row=100),
    "column-biases": lambda: Case(65, 131, biased=True),
    "column-biases-far-apart": lambda: Case(35, 2060, biased=True, spread=90.0, excluded=1, diagonal=7, sides="rows"),
    # logits large, their differences not: no digit of these is to be lost
    "high": lambda: Case(65, 131, level=1e4, excluded=1, params=(1.0, 0.0, 1e4)),
    "higher": lambda: Case(65, 131, level=1e6, params=(1.0, 0.0, 1e6)),
    "low": lambda: Case(65, 131, level=-1e6, diagonal=0, params=(1.0, 0.0, -1e6)),
    "high-and-far-apart": lambda: Case(65, 131, level=1e4, spread=90.0, params=(1.0, 0.0, 1e4)),
    "tiles": lambda: Case(130, 264, excluded=1, first_column=-9),
    "tiles-far-apart": lambda: Case(257, 129, spread=90.0, excluded=2),
    "ids": lambda: Case(65, 131, ids=4, excluded=1, diagonal=3),
    "ids-of-a-block": lambda: Case(66, 70, ids=20, first_row=1040, first_column=1000, biased=True),
    "ids-far-apart": lambda: Case(65, 131, ids=2, spread=90.0, excluded=1),
    "ids-of-rows": lambda: Case(65, 70, ids=2, sides="rows"),
    "ids-of-cols": lambda: Case(130, 264, ids=9, sides="cols", params=(-0.7, 11.0, 0.0)),
    "one-id": lambda: Case(1, 1, ids=1),
    "deep": lambda: Case(65, 131, spread=12.0, excluded=1, deep=True),
    # pairs of equal ids that count, alone or with others, and what comes off the weights
    "alike-alone": lambda: Case(65, 131, ids=4, equal_ids=ALIKE_ALONE, excluded=1, diagonal=3),
    "alike-alone-biased": lambda: Case(66, 70, ids=2, equal_ids=ALIKE_ALONE, biased=True, spread=90.0),
    "alike-count": lambda: Case(65, 131, ids=4, equal_ids=ALIKE_COUNT, excluded=1),
    "targets": lambda: Case(65, 131, targets=True, excluded=1, diagonal=3, biased=True),
    "targets-of-ids": lambda: Case(
        65, 131, ids=4, equal_ids=ALIKE_COUNT, targets=True, diagonal=3, params=(0.7, -3.0, 2.5)
    ),
    "targets-beside-ids": lambda: Case(130, 264, ids=4, targets=True, excluded=1, first_column=-9),
    "targets-alone": lambda: Case(65, 70, ids=2, equal_ids=ALIKE_ALONE, targets=True),
    "targets-far-apart": lambda: Case(65, 131, ids=3, equal_ids=ALIKE_COUNT, targets=True, spread=90.0, excluded=1),
    "targets-of-rows": lambda: Case(66, 2051, ids=3, equal_ids=ALIKE_COUNT, targets=True, sides="rows", biased=True),
    "targets-of-cols": lambda: Case(130, 264, ids=3, equal_ids=ALIKE_COUNT, targets=True, sides="cols"),
    # pairs too high to count, of a row, of a column, or of both
    "ceilings": lambda: Case(65, 131, capped="rows, cols", excluded=1, diagonal=3),
    "ceilings-far-apart": lambda: Case(65, 131, capped="rows, cols", spread=90.0),
    "ceilings-very-far-apart": lambda: Case(40, 70, capped="rows, cols", spread=3000.0),
    "ceilings-deep": lambda: Case(130, 264, capped="rows, cols", spread=12.0, deep=True, ids=4, first_column=-9),
    "ceilings-biased": lambda: Case(66, 2051, capped="rows", sides="rows", biased=True, params=(-0.7, 11.0, 0.0)),
    "ceilings-of-cols": lambda: Case(130, 264, capped="cols", sides="cols", ids=9),
    "ceilings-of-one-side": lambda: Case(65, 70, capped="cols", diagonal=0),
    "ceilings-high": lambda: Case(65, 131, capped="rows, cols", level=1e4, params=(1.0, 0.0, 1e4)),
    "ceilings-stale": lambda: Case(65, 131, capped="rows, cols", stale=60.0, spread=90.0),
    # pairs that a guide leaves out, alone and beside ceilings
    "guide": lambda: Case(65, 131, guided="rows, cols", excluded=1, diagonal=3),
    "guide-far-apart": lambda: Case(130, 264, guided="rows, cols", spread=90.0, ids=4),
    "guide-and-ceilings": lambda: Case(130, 264, guided="rows, cols", capped="rows, cols", spread=12.0, deep=True),
    "guide-of-rows": lambda: Case(66, 2051, guided="rows", sides="rows", biased=True, params=(-0.7, 11.0, 0.0)),
    "guide-of-one-side": lambda: Case(65, 70, guided="cols", capped="rows", diagonal=0),
}


def relative(case):
    """Allowed relative error of an exponential: its own, and the rounding of its argument."""
    return 8 * EPS * (2 + case.magnitude)


def start_states(case):
    """Neutral states; states of earlier panels, some higher and some lower than this one's."""
    rows, cols = case.scores.shape
    neutral, earlier = [], []
    for n, z, dim in ((rows, case.logits(1), 1), (cols, case.logits(0), 0)):
        neutral.append(torch.stack([torch.full((n,), -torch.inf), torch.zeros(n)]))
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
    """dL/dz [R, C], and the size of what it is the sum of."""
    z = case.logits()
    row_normalizer, col_normalizer = (pair.double().sum(0) for pair in case.normalizers)
    row = case.gains[0].double()[:, None] * torch.exp(case.logits(1) - row_normalizer[:, None]) * case.use[0]
    col = case.gains[1].double() * torch.exp(case.logits(0) - col_normalizer) * case.use[1]
    weights, size = row + col, row.abs() + col.abs()
    counts, alike = z > -torch.inf, case.alike()
    for target, used, dim in zip(case.targets, case.use, (2, 1)):
        if target is not None and used:
            of_others, of_alike = target.double().unsqueeze(dim)
            less = torch.where(alike, of_alike, of_others) * counts
            weights, size = weights - less, size + less.abs()
    return weights, size


def params_in_float64(case, weights):
    """Sum of w * (score - center), and of w."""
    centered = case.scores.double() - torch.tensor(case.params[2]).double()
    return torch.stack([(weights * centered).sum(), weights.sum()])
