"""Ranks counted in the stream: against the dense definition, by every panel and backend, with ties and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels.reference.structure import ranks

BACKENDS = [name for name in ("cpu", "torch") if ck.why_not(name, torch.zeros(1, 1)) is None]
SMALL = 2**19  # several panels, of either backend


def features(n, m=None, d=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=g) for k in (n, m or n))
    y[: min(n, len(y))] += 0.7 * x[: len(y)]
    return [normalize(v, dim=1).to(dtype) for v in (x, y)]


def dense(x, y, positives):
    return ranks(x.double(), y.double(), positives if positives.dim() == 2 else positives[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranks_are_the_definitions(backend, dtype):
    for n, m in ((1, 1), (3, 200), (200, 333), (333, 333)):
        x, y = features(n, m, dtype=dtype)
        found = ck.retrieval_metrics(x, y, backend=backend, workspace_bytes=SMALL)
        want = dense(x, y, torch.arange(n))
        assert torch.equal(found.ranks, want)
        assert found.recall == {k: pytest.approx((want < k).double().mean().item()) for k in (1, 5, 10)}
        assert found.mean_reciprocal_rank == pytest.approx((1 / (want + 1.0)).mean().item())
        assert found.median_rank == want.double().quantile(0.5).item() + 1


def test_no_documents():
    """Nobody has a positive, by definition and by the stream."""
    x, y = torch.ones(3, 2), torch.ones(0, 2)
    found = ck.retrieval_metrics(x, y, positives=torch.full((3,), -1))
    assert found.ranks.tolist() == [-1] * 3 == dense(x, y, torch.full((3,), -1)).tolist()


def test_float64():
    x, y = features(100, 150, dtype=torch.float64)
    assert torch.equal(ck.retrieval_metrics(x, y).ranks, dense(x, y, torch.arange(100)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_positives(backend):
    """The best of them counts, the others do not stand in its way; repeats count once, -1 is nobody."""
    x, y = features(120, 300)
    g = torch.Generator().manual_seed(0)
    positives = torch.randint(300, (120, 4), generator=g)
    positives[::3, 1:] = -1
    positives[1::3, 2] = positives[1::3, 0]
    positives[5] = -1
    found = ck.retrieval_metrics(x, y, positives=positives, backend=backend, workspace_bytes=SMALL)
    want = dense(x, y, positives)
    assert torch.equal(found.ranks, want) and want[5] == -1
    counted = want[want >= 0]
    assert len(counted) == 119
    assert found.recall[5] == pytest.approx((counted < 5).double().mean().item())
    one_by_one = torch.stack([dense(x, y, positives[:, k]) for k in range(4)], 1)
    assert (one_by_one.masked_fill(one_by_one < 0, 999).amin(1)[want >= 0] >= counted).all()
    # a transposed tensor of indices
    assert torch.equal(ck.retrieval_metrics(x, y, positives=positives.T.contiguous().T).ranks, want)


def test_figures_are_means_in_float64():
    x = torch.eye(7, dtype=torch.float64)
    assert ck.retrieval_metrics(x, x, k=(10,)).precision[10] == pytest.approx(0.1, rel=1e-15)


def test_offsets_and_indices():
    x, y = features(50, 90)
    index = torch.arange(50) + 30
    for positives in (30, index, index[:, None], index.int()):
        assert torch.equal(ck.retrieval_metrics(x, y, positives=positives).ranks, dense(x, y, index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_count_against_the_query(backend):
    """Integers, whose scores are exact: the dense count itself, ties and all, in any panel."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-2, 3, (n, 6), generator=g).float() for n in (150, 400))
    want = dense(x, y, torch.arange(150))
    scores = x @ y.T
    own = scores.diagonal()[:, None]
    assert torch.equal(want, (scores >= own).sum(1) - 1), "the rule"
    assert ((scores == own).sum(1) > 1).double().mean() > 0.9, "ties are everywhere"
    for size in (SMALL, 2**26):
        assert torch.equal(ck.retrieval_metrics(x, y, backend=backend, workspace_bytes=size).ranks, want)
    collapsed = ck.retrieval_metrics(torch.ones(70, 5), torch.ones(70, 5), backend=backend)
    assert collapsed.ranks.tolist() == [69] * 70
    assert collapsed.recall == {1: 0.0, 5: 0.0, 10: 0.0}


def test_equal_documents_are_ties_wherever_they_lie():
    """The last digits of a float32 score depend on where it lies in a product: rounding must not decide."""
    x, y = features(64, 40, d=123)
    copies = y.repeat(9, 1)  # ragged panels
    index = torch.arange(64) % 40
    once = dense(x, y, index)
    for size in (SMALL, 3 * SMALL, 2**26):
        found = ck.retrieval_metrics(x, copies, positives=index, workspace_bytes=size)
        assert torch.equal(found.ranks, 9 * once + 8)


def test_documents_closer_than_rounding_are_told_apart():
    """Scores 1e-8 apart, in both directions: float32 cannot see it."""
    x = normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    along = torch.zeros(40, 32)
    along[:, 0] = 1.5e-8 / x[:, 0]
    rows = torch.arange(40)
    y = torch.cat([x, x])
    other = (x.double() @ x.double().T).fill_diagonal_(0)
    sign = torch.where(rows % 2 == 0, 1, -1)[:, None]
    wide = torch.cat([x.double(), x.double() + sign * along.double()])
    found = ck.retrieval_metrics(x.double(), wide)
    assert torch.equal(found.ranks, (rows % 2 == 0).long() + (other > 1).sum(1))
    assert torch.equal(ck.retrieval_metrics(x, y).ranks, torch.ones(40, dtype=torch.int64))


def test_workspaces_threads_and_backends_agree(set_threads):
    """Nearly collapsed features: many scores within rounding of one another."""
    g = torch.Generator().manual_seed(0)
    common = normalize(torch.randn(1, 64, generator=g), dim=1)
    x, y = (normalize(common + 2e-3 * torch.randn(n, 64, generator=g), dim=1) for n in (100, 700))
    want = dense(x, y, torch.arange(100))
    for backend in BACKENDS:
        for size in (SMALL, 2**26):
            for threads in (1, 3):
                set_threads(threads)
                assert torch.equal(ck.retrieval_metrics(x, y, backend=backend, workspace_bytes=size).ranks, want)


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch cannot take float32 for bfloat16 on a CPU"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_products_may_be_rounded(backend):
    """Where torch may round operands to bfloat16 (and does, on AMX units), ranks are still those of float32."""
    x, y = features(200, 700, d=64)
    anywhere = (torch.arange(200) * 37 + 5) % 700  # in the middle of the crowd, where rounding matters
    want = dense(x, y, anywhere)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert torch.equal(ck.retrieval_metrics(x, y, positives=anywhere, backend=backend).ranks, want)
    finally:
        matmul.fp32_precision = "none" if before == torch.backends.mkldnn.fp32_precision else before


def test_nan_counts_against_the_query():
    x, y = features(20, 30)
    y[25] = torch.nan
    x[3] = torch.nan
    found = ck.retrieval_metrics(x, y)
    assert torch.equal(found.ranks, dense(x, y, torch.arange(20)))
    assert found.ranks[3] == 29


def test_nothing():
    x, y = features(3, 5)
    none = ck.retrieval_metrics(x, y, positives=torch.full((3,), -1))
    assert none.ranks.tolist() == [-1] * 3
    for found in (none, ck.retrieval_metrics(x[:0], y)):
        assert all(math.isnan(value) for value in (*found.recall.values(), found.median_rank))
        assert math.isnan(found.mean_reciprocal_rank)
    assert ck.retrieval_metrics(x, y[:0], positives=torch.full((3, 1), -1)).ranks.tolist() == [-1] * 3


def test_normalize_and_gradients():
    x, y = (v.requires_grad_() for v in features(20, 30))
    found = ck.retrieval_metrics(3 * x, torch.arange(1, 31)[:, None] * y, normalize=True)
    assert torch.equal(found.ranks, ck.retrieval_metrics(x, y).ranks)
    assert not found.ranks.requires_grad


X, Z = torch.eye(4, 3), torch.eye(6, 3)


@pytest.mark.parametrize(
    "name, expected, came, options",
    [
        ("k", "sequence of ints", "int", {"k": 5}),
        ("k", "sequence of ints", "float", {"k": (1.5,)}),
        ("k", "at least 1", "0", {"k": (0, 1)}),
        ("positives", "shape [4, P]", "[6, 2]", {"positives": torch.zeros(6, 2, dtype=torch.int64)}),
        ("positives", "shape [4, P]", "[4, 0]", {"positives": torch.zeros(4, 0, dtype=torch.int64)}),
        ("positives", "int64", "float32", {"positives": torch.zeros(4, 2)}),
        ("positives", "indices in [-1, 6)", "[0, 6]", {"positives": torch.tensor([[0, 6]] * 4)}),
        ("positives", "device cpu", "meta", {"positives": torch.zeros(4, 2, dtype=torch.int64, device="meta")}),
        ("positives", "0 <= offset", "offset 3", {"positives": 3}),
        ("backend", "one of", "'fast'", {"backend": "fast"}),
        ("workspace_bytes", "at least", "20000", {"workspace_bytes": 20000}),
    ],
)
def test_refusals(name, expected, came, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        ck.retrieval_metrics(X, Z, **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    asked, _, got = message.partition("got")
    assert expected in asked and came in got, message
