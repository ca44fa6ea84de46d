"""Searches on drawn problems against dense scores in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from asked import settings_of, workspace_of
from drawn import FEATURES, LAYOUTS, ROWS, SCALES, Way, ways_of
from fuzzing import fuzzed
from hypothesis import strategies as st
from problems import Problem, make_inputs, score_dtype
from tolerance import UNITS

import contrastive_kernels as ck
from contrastive_kernels.arguments.checks import normalized
from contrastive_kernels.draws import philox
from contrastive_kernels.reference.structure import ranks


@dataclass(frozen=True)
class Search:
    """What is looked for."""

    problem: Problem
    #: features are small integers: scores are exact, and ties are everywhere
    integers: bool
    #: None, an offset, "some" (indices and -1) or "several" (of a query; retrieval alone)
    positives: int | str | None
    #: ids of rows and columns are their numbers modulo these
    ids: tuple[int, int] | None
    #: a square is given those of the rows alone, as one tensor
    one_of_ids: bool
    scale: float

    def positives_of(self, n: int, m: int, several: bool) -> torch.Tensor | int | None:
        """The argument."""
        if self.positives is None or isinstance(self.positives, int):
            return self.positives
        g = torch.Generator().manual_seed(self.problem.seed)
        shape = (n, 4) if several and self.positives == "several" else (n,)
        return torch.randint(-1, m, shape, generator=g)


@st.composite
def searches(draw):
    """A search of a drawn problem."""
    n, positives = draw(st.sampled_from(ROWS)), draw(st.sampled_from((None, 0, 1, 64, "some", "several")))
    m = n + (positives or 0) + draw(st.sampled_from((0, 1, 31, 67))) if not isinstance(positives, str) else None
    problem = Problem(
        name=f"drawn-{draw(st.integers(0, 2**16))}",
        reason="drawn",
        n=n,
        m=draw(st.sampled_from(ROWS)) if m is None else m,
        d=draw(st.sampled_from(FEATURES)),
        features=draw(st.sampled_from(("random", "normal", "opposed", "common"))),
        layout=draw(st.sampled_from(LAYOUTS[:-1])),
        losses=("info_nce",),
    )
    integers = draw(st.booleans())
    ids = draw(st.sampled_from((None, None, (3, 5), (1, 1), (7, 1000))))
    return Search(problem, integers, positives, ids, draw(st.booleans()), draw(st.sampled_from(SCALES)))


def features_of(search: Search, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, D] and y [M, D] as they are asked with."""
    inputs = make_inputs(search.problem, way.dtype)
    if search.integers:
        return tuple((3 * v).round() for v in (inputs.x, inputs.y))
    return inputs.x, inputs.y


def dense_scores(x: torch.Tensor, y: torch.Tensor, way: Way) -> torch.Tensor:
    """[N, M] in float64, of the features as normalised."""
    x, y = (normalized(v) if way.normalize else v for v in (x, y))
    return x.double() @ y.double().T


def left_out(search: Search, n: int, m: int) -> torch.Tensor:
    """[N, M]: positives, and equal ids."""
    positives = search.positives_of(n, m, several=False)
    where = positives if torch.is_tensor(positives) else torch.arange(n) + (positives or 0)
    mask = torch.arange(m) == where[:, None]
    if search.ids is not None:
        rows, cols = (torch.arange(k) % modulus for k, modulus in zip((n, m), search.ids))
        cols = rows if search.one_of_ids and n == m else cols
        mask |= rows[:, None] == cols
    return mask


def assert_largest(found: torch.Tensor, z: torch.Tensor, mask: torch.Tensor, slack: torch.Tensor | float) -> None:
    """The columns found [N] hold the largest z of those that are left, but for rounding; -1 where none is."""
    n, m = z.shape
    assert found.shape == (n,) and found.dtype == torch.int64
    nothing = mask.all(1)
    assert torch.equal(found == -1, nothing), "-1 where no candidate is left, and only there"
    rows, kept = (~nothing).nonzero()[:, 0], z.masked_fill(mask, -torch.inf)
    assert ((found >= -1) & (found < m)).all() and not mask[rows, found[rows]].any(), "a candidate that was left out"
    best = kept.amax(1) if m else z.new_zeros(n)
    behind = best[rows] - kept[rows, found[rows]]
    assert (behind <= slack).all(), f"behind the largest by {behind.max().item():.3g}"


@pytest.fixture(autouse=True)
def forget():
    """Problems that were drawn are not met again."""
    yield
    make_inputs.cache_clear()


def ask(search: Search, way: Way, function, *more, several=False, excluded=True, seed=None):
    """The function's answer for the features, and these."""
    x, y = features_of(search, way)
    options = {"positives": search.positives_of(len(x), len(y), several), "normalize": way.normalize}
    if excluded and search.ids is not None:
        ids = tuple(torch.arange(len(v)) % modulus for v, modulus in zip((x, y), search.ids))
        options["exclude"] = ids[0] if search.one_of_ids and len(x) == len(y) else ids

    def call(size: int | None = None):
        given = options | ({} if size is None else {"workspace_bytes": size})
        if seed is not None:
            given["generator"] = torch.Generator().manual_seed(seed)
        return function(x, y, *more, backend=way.backend, **given)

    with settings_of(way):
        return x, y, call(workspace_of(way, call))


@fuzzed(30, search=searches(), way=ways_of())
def test_hardest_negatives(search, way):
    """The largest score, and the first of equal ones where scores are exact."""
    x, y, found = ask(search, way, ck.hardest_negatives)
    scores, mask = dense_scores(x, y, way), left_out(search, len(x), len(y))
    if search.integers and not way.normalize:
        assert_largest(found, scores, mask, 0.0)
        first = scores.masked_fill(mask, -torch.inf).argmax(1) if len(y) else found
        assert torch.equal(found, torch.where(mask.all(1), -1, first))
    else:
        assert_largest(found, scores, mask, rounding(x, y, way))


@fuzzed(30, search=searches(), way=ways_of(), k=st.sampled_from((1, 3, 70)), skip=st.sampled_from((0, 1, 40)))
def test_hardest_by_rank(search, way, k, skip):
    """The scores at these ranks, and the first of equal ones where scores are exact."""
    way = replace(way, backend=None)
    x, y, found = ask(search, way, partial(ck.hardest_negatives, k=k, skip=skip))
    kept = dense_scores(x, y, way).masked_fill(left_out(search, len(x), len(y)), -torch.inf)
    kept = torch.cat([kept, kept.new_full((len(x), k + skip), -torch.inf)], 1)
    falling = kept.sort(dim=1, descending=True, stable=True)
    values, want = (v[:, skip : skip + k] for v in falling)
    want = want.masked_fill(values == -torch.inf, -1)
    assert found.shape == want.shape and torch.equal(found < 0, want < 0)
    if search.integers and not way.normalize:
        assert torch.equal(found, want)
    ours = kept.gather(1, found.clamp(min=0)) if kept.shape[1] else values
    assert ((ours - values).abs()[want >= 0] <= rounding(x, y, way)).all()


def rounding(x: torch.Tensor, y: torch.Tensor, way: Way) -> float:
    """Of two scores."""
    x, y = (normalized(v) if way.normalize else v for v in (x, y))
    lengths = [v.double().norm(dim=1).amax().item() if len(v) else 0.0 for v in (x, y)]
    return UNITS * torch.finfo(score_dtype(way.dtype)).eps * lengths[0] * lengths[1]


@fuzzed(30, search=searches(), way=ways_of(), seed=st.integers(0, 1000))
def test_sampled_negatives(search, way, seed):
    """The largest of scale * score + the documented noise."""
    x, y, found = ask(search, way, ck.sample_negatives, search.scale, seed=seed)
    n, m = len(x), len(y)
    key = torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().manual_seed(seed))
    noise = philox.gumbel(key, slice(0, n), slice(0, m)).double()
    eps = torch.finfo(torch.float32).eps
    slack = abs(search.scale) * rounding(x, y, way) + UNITS * eps * (noise.abs().max().item() if n and m else 0.0)
    assert_largest(found, search.scale * dense_scores(x, y, way) + noise, left_out(search, n, m), slack)


@fuzzed(30, search=searches(), way=ways_of())
def test_retrieval_metrics(search, way):
    """Every rank, exactly, and what is made of ranks."""
    way = replace(way, normalize=way.normalize and not search.integers)  # whose ties rounding would break
    x, y, found = ask(search, way, ck.retrieval_metrics, several=True, excluded=False)
    positives = search.positives_of(len(x), len(y), several=True)
    index = positives if torch.is_tensor(positives) else torch.arange(len(x)) + (positives or 0)
    x, y = (normalized(v) if way.normalize else v for v in (x, y))
    want = ranks(x.double(), y.double(), index if index.dim() == 2 else index[:, None])
    assert torch.equal(found.ranks, want)
    places = want[want >= 0].double() + 1
    for k, recall in found.recall.items():
        assert recall == pytest.approx((places <= k).double().mean().item(), nan_ok=True)
    assert found.mean_reciprocal_rank == pytest.approx((1 / places).mean().item(), nan_ok=True)
