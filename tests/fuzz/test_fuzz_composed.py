"""InfoNCE with drawn members, several at once, in float64 against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzzing import fuzzed
from hypothesis import strategies as st

import contrastive_kernels as ck
from contrastive_kernels.reference import composed as definitions

COUNTS, WIDTHS = (0, 1, 2, 5, 9), (1, 3, 6)
#: (debiased, hardness_beta, whether there is a weight function)
CORRECTIONS = [(None, None, False), (None, None, True), (0.1, None, False), (0.6, None, False), (0.0, 0.0, False),
               (None, 0.5, False), (0.1, 2.0, False)]  # fmt: skip


@st.composite
def members(draw: Any) -> tuple[dict[str, Any], int | None, torch.Generator]:
    """Members that go together, how many features the queue holds, and what the numbers are drawn with."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, m, d = draw(st.sampled_from(COUNTS)), draw(st.sampled_from((1, 2, 5, 9, 40))), draw(st.sampled_from(WIDTHS))
    kind = draw(st.sampled_from(("several", "one", "features", "logits")))
    x, y = (torch.randn(k, d, generator=g, dtype=torch.float64) for k in (n, m))
    # (at 0 the correction's bound is its value, and has two derivatives)
    said: dict[str, Any] = {"x": x, "y": y, "logit_scale": draw(st.sampled_from((0.3, 1.0, -2.0, 8.0)))}
    if kind == "several":
        said["positives"] = torch.randint(-1, m, (n, draw(st.sampled_from((1, 2, 4)))), generator=g)
    elif kind == "one" or draw(st.booleans()):
        said["positives"] = torch.randint(0 if kind == "one" else -1, m, (n,), generator=g)
    if kind == "features":
        said["positive_features"] = torch.randn(n, d, generator=g, dtype=torch.float64)
    if kind == "logits":
        said["positive_logits"] = torch.randn(n, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        rows = draw(st.sampled_from((1, 3)))
        said["ids"] = torch.randint(0, rows, (n,), generator=g), torch.randint(0, 3, (m,), generator=g)
    debiased, beta, weighted = draw(st.sampled_from(CORRECTIONS if kind != "several" else CORRECTIONS[:1]))
    weighted = weighted and kind != "logits"
    said |= {"debiased": debiased, "hardness_beta": beta}
    said["include_positive"] = not weighted and (kind == "several" or draw(st.booleans()))
    if weighted:
        said["weight_fn"] = lambda a, b: (a * b).sum(1).detach() + 0.3
    queued = draw(st.sampled_from((None, 0, 1, 6)))
    if queued is None and debiased is None and beta is None and draw(st.booleans()):
        padding = torch.rand(m, generator=g) < 0.3
        said["candidate_bias"] = torch.randn(m, generator=g, dtype=torch.float64).masked_fill(padding, -torch.inf)
        said["y"] = y.masked_fill(padding[:, None], torch.nan)
    if draw(st.booleans()):
        said["weight"] = torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3)
    said["reduction"] = draw(st.sampled_from(("none", "mean", "sum")))
    return said, queued, g


@fuzzed(100, drawn=members(), small=st.booleans())
def test_members(drawn, small):
    """Value and gradients, with rows of no positive, no negative and no weight among them."""
    said, queued, g = drawn
    ours, theirs = dict(said), dict(said)
    if queued is not None:
        d = said["x"].shape[1]
        features, ids = (
            torch.randn(queued, d, generator=g, dtype=torch.float64),
            torch.randint(0, 3, (queued,), generator=g),
        )
        ours["queue"] = ck.FeatureQueue(queued + 2, d, ids=True, dtype=torch.float64)
        ours["queue"].enqueue(features, ids)
        theirs["queue"] = (features, ids)
    names = ("x", "y", "positive_features", "positive_logits", "candidate_bias")
    leaves = [said[name].requires_grad_() for name in names if name in said]
    scale = torch.tensor(said["logit_scale"], dtype=torch.float64, requires_grad=True)
    ours["logit_scale"] = theirs["logit_scale"] = scale
    leaves.append(scale)
    found = ck.info_nce(**ours, workspace_bytes=2**19 if small else None)
    want = definitions.info_nce(**theirs)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)
    upstream = torch.randn(want.shape, generator=g, dtype=torch.float64)
    both = [torch.autograd.grad(v, leaves, upstream, materialize_grads=True) for v in (found, want)]
    torch.testing.assert_close(*both, rtol=1e-7, atol=1e-9)


def test_a_wrong_definition_would_show(monkeypatch: pytest.MonkeyPatch):
    """The draws reach what they are there for."""
    monkeypatch.setattr(definitions, "_corrected", lambda z, left_out, n, z_pos, *rest: n - z_pos)
    with pytest.raises(AssertionError):
        test_members(share=0)
