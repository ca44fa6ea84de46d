"""The k hardest negatives by rank range and margin: against the dense definition, by every panel, with ties."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels.reference.search import hardest_negatives

SMALL = 2**19  # several panels
IDS = torch.arange(90) % 5, torch.arange(333) % 9


def features(n, m, d=16, dtype=torch.float32, integers=False):
    g = torch.Generator().manual_seed(n + m)
    if integers:
        return [torch.randint(-2, 3, (k, d), generator=g).to(dtype) for k in (n, m)]
    return [normalize(torch.randn(k, d, generator=g), dim=1).to(dtype) for k in (n, m)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [SMALL, None])
def test_ties_and_all(dtype, size):
    """Integers, whose scores are exact: the dense sort itself."""
    x, y = features(90, 333, d=6, dtype=dtype, integers=True)
    some = torch.arange(90) * 3 - 1
    for k, skip, margin, exclude in (
        (1, 0, None, None), (3, 2, None, IDS), (40, 7, -1.0, None), (5, 0, 0, IDS), (7, 1, ("relative", 0.25), IDS),
        (4, 0, ("relative", -0.5), None), (333, 0, None, None), (5, 400, None, None), (400, 2, 2.0, IDS),
    ):  # fmt: skip
        found = ck.hardest_negatives(
            x, y, k=k, skip=skip, margin=margin, positives=some, exclude=exclude, workspace_bytes=size
        )
        want = hardest_negatives(
            x.double(), y.double(), k, positives=some, skip=skip, margin=margin, exclude=exclude
        )  # fmt: skip
        assert torch.equal(found, want), (k, skip, margin)


def test_scores_that_differ():
    x, y = features(200, 517)
    own = torch.arange(200) + 300
    for margin in (None, -0.1, ("relative", -0.3)):
        found = ck.hardest_negatives(x, y, k=11, skip=3, margin=margin, positives=300, workspace_bytes=SMALL)
        want = hardest_negatives(x.double(), y.double(), 11, positives=own, skip=3, margin=margin)
        scores = x.double() @ y.double().T
        bounds = [torch.where(v < 0, -9.0, scores.gather(1, v.clamp(min=0))) for v in (found, want)]
        torch.testing.assert_close(*bounds, rtol=0, atol=1e-6)


def test_one_of_a_rank_has_one_dimension():
    x, y = features(30, 50)
    many = ck.hardest_negatives(x, y, k=4)
    for skip in range(3):
        assert torch.equal(ck.hardest_negatives(x, y, skip=skip), many[:, skip])
    assert torch.equal(ck.hardest_negatives(x, y, margin=5.0), ck.hardest_negatives(x, y))
    assert torch.equal(ck.hardest_negatives(2 * x, 3 * y, k=4, normalize=True), many)
    assert torch.equal(ck.hardest_negatives(x, y, k=4, backend="torch"), many)
    assert ck.hardest_negatives(x[:0], y, k=3).shape == (0, 3)
    assert ck.hardest_negatives(x, y[:0], k=3, positives=torch.full((30,), -1)).tolist() == [[-1] * 3] * 30


def test_nan_is_passed_over_and_a_row_without_a_positive_has_no_bound():
    x, y = features(30, 50)
    y[::2] = torch.nan
    found = ck.hardest_negatives(x, y, k=30, margin=-0.2, positives=torch.full((30,), -1))
    assert (found[:, :25] % 2 == 1).all() and (found[:, 25:] == -1).all()


def test_a_negative_of_the_margin_lies_behind_the_positive():
    x, y = features(100, 100)
    y = normalize(y + x, dim=1)
    found, scores = ck.hardest_negatives(x, y, k=5, margin=("relative", -0.05)), x @ y.T
    bound = 0.95 * scores.diagonal()[:, None]
    kept = scores.gather(1, found.clamp(min=0)).masked_fill(found < 0, -9.0)
    assert (kept <= bound + 1e-6).all()
    assert (ck.hardest_negatives(x, y, k=5) != found).any(), "the margin leaves some out"


@pytest.mark.parametrize(
    "name, expected, came, options",
    [
        ("k", "an int", "float", {"k": 2.0}),
        ("k", "at least 1", "0", {"k": 0}),
        ("k", "an int", "bool", {"k": True}),
        ("skip", "at least 0", "-1", {"skip": -1}),
        ("margin", "a number", "'0.1'", {"margin": "0.1"}),
        ("margin", "('relative', number)", "('absolute', 0.1)", {"margin": ("absolute", 0.1)}),
        ("margin", "finite", "nan", {"margin": ("relative", float("nan"))}),
        ("margin", "('relative', number)", "(0.1, 0.2)", {"margin": (0.1, 0.2)}),
        ("backend", "'torch' with k, skip or margin", "'cpu'", {"k": 2, "backend": "cpu"}),
        ("workspace_bytes", "at least", "20000", {"k": 2, "workspace_bytes": 20000}),
    ],
)
def test_refusals(name, expected, came, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        ck.hardest_negatives(torch.eye(4, 3), torch.eye(6, 3), **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    asked, _, got = message.partition("got")
    assert expected in asked and came in got, message


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_opcheck_and_one_graph():
    x, y = features(9, 12)
    exclude, params, upper = torch.arange(9)[:, None], torch.tensor([1.0, 0.0, 0.0]), torch.full((9,), 0.5)
    torch.library.opcheck(
        torch.ops.contrastive_kernels.best_columns.default, (x, y, params, exclude, *IDS_9, upper, 4, "", 2**20)
    )
    compiled = torch.compile(
        lambda x, y: ck.hardest_negatives(x, y, k=3, margin=0.1), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (20, 31):
        x, y = features(n, n)
        assert torch.equal(compiled(x, y), ck.hardest_negatives(x, y, k=3, margin=0.1))


IDS_9 = torch.arange(9), torch.arange(12)
