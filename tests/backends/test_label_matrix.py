"""The supervised contrastive loss of a whole matrix in one call of C++, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from panels import EPS

from contrastive_kernels.panels.pairs import ALIKE_COUNT
from contrastive_kernels.reference.labels import sup_con_of_logits

_C = pytest.importorskip("contrastive_kernels._C", reason="the extension is not built")
pytestmark = pytest.mark.usefixtures("instruction_set")


class Labelled:
    """Scores of rows and columns with their labels; `alone`: of one set."""

    def __init__(self, rows, cols, classes, alone=False, level=0.0):
        g = torch.Generator().manual_seed(1000 * rows + cols)
        self.scores, self.alone = 3 * torch.randn(rows, cols, generator=g) + level, alone
        self.labels = [torch.randint(classes, (n,), generator=g) for n in (rows, cols)]
        if alone:
            self.scores, self.labels[1] = (self.scores + self.scores.T) / 2, self.labels[0]
        self.own = torch.eye(rows, cols, dtype=torch.bool) & alone
        alike = (self.labels[0][:, None] == self.labels[1]) & ~self.own
        count = alike.sum(1)
        self.share = (1.0 / count.clamp(min=1)).masked_fill(count == 0, 0.0)
        self.index = torch.where(count == 1, alike.int().argmax(1), -1)
        self.gain = torch.randn(rows, generator=g).masked_fill_(count == 0, 0.0)

    def run(self, threads=1):
        """Value, weights and gradients of scale and bias."""
        weights, others = (torch.full_like(self.scores, torch.nan) for _ in range(2))
        positive_weights = torch.full((len(weights),), torch.nan)
        row_ids, col_ids = (v.data_ptr() for v in self.labels)
        pairs = {"row_ids": row_ids, "col_ids": col_ids, "equal_ids": ALIKE_COUNT}
        found = [
            _C.label_matrix(
                self.scores.data_ptr(), *places, *self.scores.shape, pairs, 0 if self.alone else None,
                self.index.data_ptr(), None, 1.3, -0.5, self.gain.data_ptr(), self.share.data_ptr(), self.alone,
                threads,
            )
            for places in ((weights.data_ptr(), 0), (others.data_ptr(), positive_weights.data_ptr()))
        ]  # fmt: skip
        value, *dparams = found[0]
        assert found[1] == found[0]
        single = self.index >= 0
        places = (single.nonzero()[:, 0], self.index[single])
        assert (others[places] == 0).all() and (positive_weights[~single] == 0).all()
        others[places] = positive_weights[single]
        assert torch.equal(others, weights)
        return torch.tensor(value, dtype=torch.float64), weights, torch.tensor(dparams, dtype=torch.float64)

    def in_float64(self, gain):
        scores, params = self.scores.double().requires_grad_(), torch.tensor([1.3, -0.5]).double().requires_grad_()
        z = scores * params[0] + params[1]
        value = sup_con_of_logits(z, *self.labels, self.own, "outside", gain.double(), "sum")
        weights, dparams = torch.autograd.grad(value, (scores, params))
        return value.detach(), weights + weights.T if self.alone else weights, dparams


@pytest.mark.parametrize(
    "given",
    [
        (64, 300, 10),
        (5, 9, 4),
        (1, 1, 1),
        (33, 33, 12, True),
        (33, 33, 1, True),
        (3, 2100, 2),
        (40, 50, 10, False, 1e4),
    ],
    ids=str,
)
def test_value_weights_and_parameters(given):
    """Classes of none, of one and of many."""
    m = Labelled(*given)
    got, want, size = m.run(), m.in_float64(m.gain), m.in_float64(m.gain.abs())
    # of a level, logits have these digits
    allowed = 8 * EPS * (2 + 1.3 * m.scores.abs().max().item())
    gains = m.gain.abs().sum().item()
    assert abs(got[0] - want[0]) <= allowed * (size[0] + gains)
    weights = allowed * (size[1].abs() + m.gain.abs()[:, None] * m.share[:, None] * (1 + m.alone))
    if m.alone:
        weights = weights + allowed * m.gain.abs() * m.share
    assert ((got[1].double() - want[1]).abs() <= weights).all()
    assert abs(got[2][0] - want[2][0]) <= allowed * 2 * gains * (m.scores - m.scores.mean()).abs().max()
    assert abs(got[2][1] - want[2][1]) <= allowed * 2 * gains
    assert all(torch.equal(a, b) for a, b in zip(got, m.run(threads=3)))


def test_a_solved_batch_keeps_its_digits():
    """A row with one positive has a loss of e^-39."""
    m = Labelled(6, 6, 6)
    m.scores, m.labels = 30.0 * torch.eye(6), [torch.arange(6)] * 2
    m.share, m.index, m.gain = torch.ones(6), torch.arange(6), torch.ones(6)
    value, weights, _ = m.run()
    want = math.exp(-39)  # of each of the others, 5 in every row
    assert abs(value.item() - 30 * want) <= 1e-6 * value
    own = torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(weights[~own].double(), torch.full((30,), 1.3 * want, dtype=torch.float64))
    torch.testing.assert_close(weights[own].double(), torch.full((6,), -5 * 1.3 * want, dtype=torch.float64))
