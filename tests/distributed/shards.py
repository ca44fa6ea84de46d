"""A problem of the one list over the ranks of a group: its parts, and the whole put together again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from problems import BY_NAME, PAIRED, Inputs, Outcome, differentiable, make_inputs, upstream_like
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck


@dataclass(frozen=True)
class Case:
    """One loss of one problem, as all ranks call it."""

    problem: str
    loss: str
    dtype: torch.dtype
    reduction: str = "mean"
    gradients: str = "average"
    #: the arguments that want gradients; None: all there are
    needs: tuple[str, ...] | None = None
    #: rows and columns of a grid that is given as a mesh
    mesh: tuple[int, int] | None = None
    uneven: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> Inputs:
        return make_inputs(BY_NAME[self.problem], self.dtype)


def parts(inputs: Inputs, loss: str, ranks: int, uneven: bool) -> list[tuple[Tensor, Tensor]]:
    """(rows, columns) of every rank, each row with its positive; of uneven parts the second one is empty."""
    n, m = len(inputs.x), len(inputs.y)
    shares = torch.tensor([0.0 if rank == 1 else 1.0 + rank for rank in range(ranks)] if uneven else [1.0] * ranks)
    ends = (shares.cumsum(0) / shares.sum() * m).round().long().tolist()
    starts = [0, *ends[:-1]]
    positives = inputs.positives
    if loss in PAIRED or (positives is None and inputs.positive_logits is None):
        positives = torch.arange(n)
    elif isinstance(positives, int):
        positives = torch.arange(n) + positives
    if positives is None:  # rows may be anywhere
        owners = torch.arange(n) * ranks // max(n, 1)
    else:
        owners = torch.bucketize(positives.clamp(min=0), torch.tensor(ends), right=True)
    return [
        ((owners == rank).nonzero()[:, 0], torch.arange(start, end))
        for rank, (start, end) in enumerate(zip(starts, ends))
    ]


def share(inputs: Inputs, loss: str, rows: Tensor, cols: Tensor) -> Inputs:
    """A rank's part of a problem."""
    of = replace(inputs, x=inputs.x[rows], y=inputs.y[cols])
    if inputs.weight is not None:
        of.weight = inputs.weight[rows]
    if inputs.ids is not None:
        of.ids = (inputs.ids[0][rows], inputs.ids[1][cols])
    if inputs.guide:
        of_rows, of_cols = inputs.guide["guided"]
        of.guide = {**inputs.guide, "guided": (of_rows[rows], of_cols[cols])}
    if inputs.candidate_bias is not None:
        of.candidate_bias = inputs.candidate_bias[cols]
    if inputs.log_normalizer is not None:
        of.log_normalizer = (inputs.log_normalizer[0][rows], inputs.log_normalizer[1][cols])
    if inputs.positive_logits is not None:
        of.positive_logits = (inputs.positive_logits[0][rows], inputs.positive_logits[1][cols])
    positives = inputs.positives
    if isinstance(positives, Tensor):
        of.positives = torch.where(positives[rows] < 0, -1, positives[rows] - (cols[0] if len(cols) else 0))
    elif positives is not None or (inputs.positive_logits is None and len(inputs.x) != len(inputs.y)):
        of.positives = rows + (positives or 0) - (cols[0] if len(cols) else 0)
    return of


def lose(cases: list[Case]) -> list[Outcome]:
    """What this rank finds of each."""
    return [_lose(case) for case in cases]


def _lose(case: Case) -> Outcome:
    inputs, rank, ranks = case.inputs(), dist.get_rank(), dist.get_world_size()
    rows, cols = parts(inputs, case.loss, ranks, case.uneven)[rank]
    own = share(inputs, case.loss, rows, cols)
    names = differentiable(case.loss) if case.needs is None else case.needs
    values = {"x": own.x, "y": own.y, "scale": own.scale, "bias": own.bias}
    leaves = {name: v.detach().clone().requires_grad_(name in names) for name, v in values.items()}
    group: Any = "world"
    if case.mesh is not None:
        group = dist.device_mesh.init_device_mesh("cpu", case.mesh)
    biased = {}
    if own.candidate_bias is not None:
        bias = own.candidate_bias.to(own.scale.dtype).detach().clone()
        biased = {"candidate_bias": bias.requires_grad_(case.needs is None)}
    value = own.call(
        ck, case.loss, *leaves.values(), reduction=case.reduction, group=group, gradients=case.gradients,
        uneven=True, **biased, **case.options,
    )  # fmt: skip
    leaves |= biased
    upstream = _upstream(case, inputs, rows)
    if names:
        torch.autograd.backward(value, upstream.to(value))
    return Outcome(value.detach(), {name: leaf.grad for name, leaf in leaves.items()})


def _upstream(case: Case, inputs: Inputs, rows: Tensor) -> Tensor:
    """This rank's part of what comes from upstream."""
    n = len(inputs.x)
    if case.reduction != "none":
        return upstream_like(torch.zeros(()), inputs.problem.seed)
    if case.loss == "nt_xent":
        return upstream_like(torch.zeros(2 * n), inputs.problem.seed)[torch.cat([rows, n + rows])]
    return upstream_like(torch.zeros(n), inputs.problem.seed)[rows]


def together(case: Case, found: list[Outcome]) -> Outcome:
    """The whole problem's outcome, of the ranks'; a value is the same on all of them, to the bit."""
    inputs, ranks = case.inputs(), len(found)
    places = parts(inputs, case.loss, ranks, case.uneven)
    if case.reduction == "none":
        n = len(inputs.x)
        value = found[0].value.new_full((2 * n if case.loss == "nt_xent" else n,), torch.nan)
        for (rows, _), one in zip(places, found):
            value[torch.cat([rows, n + rows]) if case.loss == "nt_xent" else rows] = one.value
    else:
        value = found[0].value
        assert all(torch.equal(one.value, value) for one in found), [one.value.item() for one in found]
    times = ranks if case.gradients == "average" and case.reduction != "none" else 1
    gradients: dict[str, Tensor | None] = {}
    likes = {"x": inputs.x, "y": inputs.y, "scale": inputs.scale, "bias": inputs.bias}
    if inputs.candidate_bias is not None:
        likes["candidate_bias"] = inputs.candidate_bias.to(inputs.scale.dtype)
    for name, like in likes.items():
        mine = [one.gradients[name] for one in found]
        if any(g is None for g in mine):
            assert all(g is None for g in mine), name
            gradients[name] = None
        elif name in ("x", "y", "candidate_bias"):
            whole = torch.full(like.shape, torch.nan, dtype=torch.float64)
            for place, g in zip(places, mine):
                whole[place[name != "x"]] = g.double() / times
            gradients[name] = whole.to(like.dtype)
        else:
            gradients[name] = (torch.stack([g.double() for g in mine]).sum(0) / times).to(like.dtype)
    return Outcome(value, gradients)
