"""Scales of every row, drawn, beside members that may be given with them: against the reference of features that are
multiplied by them, in float64, and in float32 by the one rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import BACKENDS, FEATURES, REDUCTIONS, ROWS
from fuzzing import fuzzed
from hypothesis import strategies as st
from tolerance import LOGIT_UNITS, UNITS, assert_accurate
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


@st.composite
def cases(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves and members of clip_loss, and how it is asked for."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, d = draw(st.sampled_from((*ROWS, 200))), draw(st.sampled_from(FEATURES))
    low, high = draw(st.sampled_from(((1.0, 1.0), (0.1, 20.0), (-3.0, 3.0), (-100.0, 300.0), (0.0, 0.0))))
    features = [torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1) for _ in range(2)]
    scales = [low + (high - low) * torch.rand(n, generator=g) for _ in range(2)]
    said: dict[str, Any] = {"reduction": draw(st.sampled_from(REDUCTIONS))}
    if draw(st.booleans()):
        said["ids"] = tuple(torch.randint(0, max(n // 2, 1), (n,), generator=g) for _ in range(2))
    kind = draw(st.sampled_from(("plain", "smoothing", "margin", "without", "biased")))
    if kind == "smoothing":
        said["label_smoothing"] = draw(st.sampled_from((0.01, 0.3, 1.0)))
    if kind == "margin":  # (rounding decides about no candidate: all count, or none)
        said["margin"] = draw(st.sampled_from((1e30, -1e30)))
    if kind == "without" or (kind == "margin" and draw(st.booleans())):
        said["include_positive"] = False
    if kind == "biased":
        said["candidate_bias"] = tuple(torch.randn(n, generator=g) for _ in range(2))
    if draw(st.booleans()):
        said["weight"] = torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3)
    way = {
        "backend": draw(st.sampled_from(BACKENDS)),
        "dtype": draw(st.sampled_from((torch.float32, torch.float64))),
        "workspace_bytes": draw(st.sampled_from((None, 2**19))),
        "shared": draw(st.booleans()),
        "frozen": draw(st.sampled_from((None, None, 0, 1, 2))),
    }
    return said | {"leaves": (*features, *scales)}, way


def definition(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, said: dict[str, Any]) -> Tensor:
    """The mean of both directions, of features times their scales."""
    there, back = dict(said), dict(said)
    if "ids" in said:
        back["ids"] = said["ids"][::-1]
    if "candidate_bias" in said:
        there["candidate_bias"], back["candidate_bias"] = (b.to(x.dtype) for b in said["candidate_bias"][::-1])
    one = reference.info_nce(x * of_x[:, None], y, 1.0, **there)
    return (one + reference.info_nce(y * of_y[:, None], x, 1.0, **back)) / 2


@fuzzed(50, case=cases())
def test_scales_of_both_towers(case):
    """Value and gradients: of features, and of scales, which both towers may share."""
    said, way = case
    said = dict(said)
    given, dtype = said.pop("leaves"), way["dtype"]
    backend = "torch" if dtype == torch.float64 else way["backend"]
    leaves = [*given[:2], given[2], given[2] if way["shared"] else given[3]]

    def found(ours: bool, kind: torch.dtype) -> tuple[Tensor, ...]:
        asked = [
            v.detach().to(kind, copy=True).requires_grad_(k != way["frozen"])
            for k, v in enumerate(leaves[: 4 - way["shared"]])
        ]
        x, y, *scales = asked
        scale, rest = (scales[0] if way["shared"] else tuple(scales)), dict(said)
        if "candidate_bias" in said:
            rest["candidate_bias"] = tuple(b.to(kind) for b in said["candidate_bias"])
        if ours:
            engine = {"backend": backend, "workspace_bytes": way["workspace_bytes"]}
            value = ck.clip_loss(x, y, scale, **rest, **engine)
        else:
            value = definition(x, y, scales[0], scales[-1], said)
        wanted = [v for v in asked if v.requires_grad]
        upstream = torch.linspace(-1, 1, value.numel(), dtype=kind).reshape(value.shape) if value.dim() else None
        return value.detach(), *torch.autograd.grad(value, wanted, upstream, materialize_grads=True)

    truth, plain, got = found(False, torch.float64), found(False, torch.float32), found(True, dtype)
    size, eps = max([1.0, *(float(v.abs().max()) for v in leaves[2:] if len(v))]), EPS[dtype]
    weight = said.get("weight", torch.ones(1))
    most = float(weight.max()) if len(weight) else 1.0
    if said["reduction"] == "mean":
        most /= max(float(weight.sum()) if "weight" in said else float(len(leaves[0])), 1e-30)
    biased = max([0.0, *(float(b.abs().max()) for b in said.get("candidate_bias", ()) if len(b))])
    rounding = eps * (UNITS + LOGIT_UNITS * (size + biased))
    names = [name for k, name in enumerate(("x", "y", "scale", "scale")[: 4 - way["shared"]]) if k != way["frozen"]]
    for name, ours, want, theirs in zip(("value", *names), got, truth, plain, strict=True):
        error = (theirs.double() - want).abs() * (eps / EPS[torch.float32])
        count = len(leaves[0]) if name == "value" and not want.dim() else 1
        floor = rounding * most * (4.0 * size if name in ("x", "y") else 4.0 * count)
        floor = torch.as_tensor(floor) + (UNITS * eps * want.abs().max() if want.numel() else 0.0)
        assert_accurate(name, ours, want, error, floor)


def test_a_wrong_definition_would_show(monkeypatch: pytest.MonkeyPatch):
    """The draws reach what they are there for."""
    own = definition.__globals__["definition"]
    monkeypatch.setitem(definition.__globals__, "definition", lambda x, y, a, b, said: own(x, y, a, a, said))
    with pytest.raises(AssertionError):
        test_scales_of_both_towers(share=0)
