"""Metrics of several positives: every one's rank, MAP, precision@k and nDCG@k; a query's own copy left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels.reference.search import retrieval_figures

BACKENDS = [name for name in ("cpu", "torch") if ck.why_not(name, torch.zeros(1, 1)) is None]
SMALL = 2**19


def problem(n=120, m=300, p=5, integers=False):
    g = torch.Generator().manual_seed(n + m + p)
    x, y = (torch.randn(k, 16, generator=g) for k in (n, m))
    x, y = [(1.2 * v[:, :6]).round() if integers else normalize(v, dim=1) for v in (x, y)]
    positives = torch.stack([torch.randperm(m, generator=g)[:p] for _ in range(n)])
    positives[::3, 1:] = -1
    positives[min(5, n - 1)] = -1
    grades = torch.randint(0, 4, (n, p), generator=g)
    return x, y, positives, grades


def table(positives, grades, m):
    """How relevant each document is [N, M]."""
    full = torch.zeros(len(positives), m + 1, dtype=torch.float64)
    full.scatter_(1, positives.masked_fill(positives < 0, m), grades.double())
    return full[:, :m]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integers", [False, True], ids=["spread", "ties"])
def test_figures_are_the_definitions(backend, integers):
    x, y, positives, grades = problem(integers=integers)
    found = ck.retrieval_metrics(
        x, y, (1, 3, 10), positives=positives, relevance=grades, backend=backend, workspace_bytes=SMALL
    )
    for k in (1, 3, 10):
        want = retrieval_figures(x.double(), y.double(), table(positives, grades, 300), k)
        want = {name: v[~v.isnan()].mean().item() if name != "precision" else v for name, v in want.items()}
        counted = table(positives, grades, 300).amax(1) > 0
        assert found.precision[k] == pytest.approx(want["precision"][counted].mean().item())
        assert found.ndcg[k] == pytest.approx(want["ndcg"])
        assert found.mean_average_precision == pytest.approx(want["average_precision"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_positives_rank(backend):
    """By sorting all documents; a repeat and one of relevance 0 have none."""
    x, y, positives, _ = problem()
    positives[7, 4] = positives[7, 2]
    relevance = torch.ones(positives.shape)
    relevance[8, 0] = 0
    found = ck.retrieval_metrics(x, y, positives=positives, relevance=relevance, backend=backend, workspace_bytes=SMALL)
    place = (x.double() @ y.double().T).argsort(1, descending=True).argsort(1)
    want = place.gather(1, positives.clamp(min=0)).masked_fill(positives < 0, -1)
    want[7, 4] = want[8, 0] = -1
    assert torch.equal(found.positive_ranks, want)
    behind = want.masked_fill(want < 0, 999).amin(1)
    assert torch.equal(found.ranks, behind.masked_fill(behind == 999, -1))


def test_figures_of_scikit_learn():
    """scikit-learn 1.9.1's average_precision_score and ndcg_score, and its order's first k, of these scores."""
    x = torch.tensor([[0.0, -5, 6, -9], [-6, -9, 5, -3], [-5, -3, -9, -3]])
    y = torch.tensor([[9.0, -3, 9, 2], [9, 3, 2, -2], [-9, 7, 6, -6], [3, -2, 9, -2], [-9, 8, 5, -1], [9, 6, -2, 8],
                      [-8, 1, 2, 2], [6, -2, 7, -8]])  # fmt: skip
    positives, grades = (
        torch.tensor([[1, 4, 6], [0, 2, -1], [7, 3, 5]]),
        torch.tensor([[3, 1, 2], [1, 2, 0], [2, 2, 1]]),
    )
    found = ck.retrieval_metrics(x, y, (2, 5, 8), positives=positives, relevance=grades)
    assert found.mean_average_precision == pytest.approx(0.3276455026455026)
    assert [found.ndcg[k] for k in (2, 5, 8)] == pytest.approx([0.0, 0.3157083047641977, 0.47794563742513335])
    assert [found.precision[k] for k in (2, 5, 8)] == pytest.approx([0.0, 0.8 / 3, 1 / 3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_querys_own_copy_is_no_document(backend):
    x, _, _, _ = problem(n=90, m=90)
    labels = torch.arange(90) % 7
    others = [[j for j in range(90) if labels[j] == labels[i] and j != i] for i in range(90)]
    width = max(map(len, others))
    positives = torch.tensor([row + [-1] * (width - len(row)) for row in others])
    found = ck.retrieval_metrics(x, x, (5,), positives=positives, exclude_self=True, backend=backend)
    relevance = (labels[:, None] == labels).double()
    relevance.fill_diagonal_(-1)
    want = retrieval_figures(x.double(), x.double(), relevance, 5)
    assert found.mean_average_precision == pytest.approx(want["average_precision"].mean().item())
    assert found.precision[5] == pytest.approx(want["precision"].mean().item())
    kept = ck.retrieval_metrics(x, x, positives=positives, backend=backend)
    assert (kept.ranks == found.ranks + 1).all(), "itself it finds first"


def test_of_equal_scores_the_least_relevant_comes_first():
    found = ck.retrieval_metrics(
        torch.ones(1, 2), torch.ones(4, 2), (2,), positives=torch.tensor([[1, 3]]), relevance=torch.tensor([[3, 1]])
    )
    assert found.positive_ranks.tolist() == [[3, 2]]
    assert found.ndcg[2] == 0.0


def test_nan_counts_against_its_own_positive_alone():
    x, y, positives, _ = problem()
    y[positives[1, 0]] = torch.nan
    found = ck.retrieval_metrics(x, y, positives=positives)
    assert found.positive_ranks[1, 0] == 299
    assert 0 <= found.ranks[1] < 299


def test_nobody_has_positives():
    x, y, positives, _ = problem(n=4)
    for relevance in (None, torch.zeros(4, 5)):
        nobody = positives if relevance is not None else torch.full_like(positives, -1)
        found = ck.retrieval_metrics(x, y, (1, 2), positives=nobody, relevance=relevance)
        assert found.positive_ranks.tolist() == [[-1] * 5] * 4
        figures = (found.mean_average_precision, *found.precision.values(), *found.ndcg.values())
        assert len(figures) == 5 and all(map(math.isnan, figures))
    assert ck.retrieval_metrics(x, y, ()).ndcg == {}


X, Y = torch.eye(4, 3), torch.eye(6, 3)
INDEX = torch.tensor([[1, 2], [0, 2], [0, 1], [0, -1]])


@pytest.mark.parametrize(
    "name, expected, came, options",
    [
        ("relevance", "shape [4, 2]", "[4]", {"relevance": torch.ones(4)}),
        ("relevance", "tensor of shape [4, 2]", "list", {"relevance": [[1, 2]] * 4}),
        ("relevance", "real numbers", "bool", {"relevance": torch.ones(4, 2, dtype=torch.bool)}),
        ("relevance", "at least 0", "[-1, 1]", {"relevance": torch.tensor([[1.0, -1.0]] * 4)}),
        ("relevance", "finite", "nan", {"relevance": torch.full((4, 2), torch.nan)}),
        ("exclude_self", "a bool", "int", {"exclude_self": 1}),
        ("exclude_self", "as many documents as queries", "6 documents", {"exclude_self": True}),
        ("positives", "other documents", "row i", {"exclude_self": True, "positives": None, "y": X}),
    ],
)
def test_refusals(name, expected, came, options):
    options = {"positives": INDEX, "y": Y, **options}
    with pytest.raises((TypeError, ValueError)) as caught:
        ck.retrieval_metrics(X, **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    asked, _, got = message.partition("got")
    assert expected in asked and came in got, message
