"""The losses over the ranks of a group: exactly the one of the concatenated batch, with its gradients.

Gradients of a mean or a sum are made together with the value, while the ranks' rows are at hand; the backward pass
multiplies them by what the ranks' losses get from upstream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._library import break_in_graphs
from ..arguments.checks import autocasts
from ..arguments.reduction import row_gains
from ..engine.driver import normalizer_of
from ..engine.gradients import Wanted
from ..engine.matrix import Problem
from ..engine.strategy import remembered_shape
from ..panels.size import saved_dtype, score_dtype
from .grid import Grid, grid_rows
from .group import Ranks, Sizes
from .replicated import Brought, Replicated, Strips, for_few_messages
from .ring import Ring
from .route import Made, Own, Route
from .rules import Alone, Rule, Softmax
from .sums import once

__all__ = ["gains_over_ranks", "normalizers_over_ranks", "over_ranks", "reduce_over_ranks"]

#: The part of a device's memory that gathered blocks and their gradients may take: a ring needs less, and waits more.
GATHERED_SHARE = 8


# ---- autograd ----


@dataclass
class _Work:
    """One call: who computes what, with whom."""

    rule: Rule
    ranks: Ranks
    call: str
    reduction: str
    #: whether rows have weights
    weighted: bool
    #: whether gradients of x, y, scale, bias and the rule's own tensors are needed
    needs: tuple[bool, ...]

    @property
    def wanted(self) -> Wanted:
        """The same for the gradient pass; a mirrored one gives the whole gradient of x."""
        x, y, scale, bias = self.needs[:4]
        return Wanted(x, y, scale or bias)


class _OverRanks(torch.autograd.Function):
    """The loss; its gradients are made with it, except of single rows."""

    @staticmethod
    def forward(ctx: Any, work: _Work, route: Route, problem: Problem, gain: Tensor, *tensors: Any) -> Tensor:
        ctx.work, ctx.like = work, [(t.shape, t.dtype) if isinstance(t, Tensor) else None for t in tensors]
        ctx.save_for_backward(*[t for t in tensors if isinstance(t, Tensor)])
        rule, wants = work.rule, True in work.needs
        with _no_autocast(problem.x):
            if work.reduction == "none":
                losses, kept = rule.losses(route, problem)
                ctx.kept = (route, problem, kept, gain) if wants else None
                return route.own(gain * losses)
            if route.alone and (alone := _alone(work, problem, gain, route.places)) is not None:
                loss, ctx.gradients = alone
                return loss
            if wants:
                losses, made = rule.both(route, problem, gain, work.wanted)
                ctx.gradients = _rounded(made, problem)
            else:
                losses, _ = rule.losses(route, problem)
            counted = losses.masked_fill(gain == 0, 0.0) * gain  # (a row that does not count may have overflowed)
            return route.total(counted.sum(dtype=torch.float64)).to(losses.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True: whoever differentiates them meets an error
            with torch.no_grad():
                gradients = _OverRanks.backward(ctx, upstream.detach())
            return once(gradients, [*ctx.saved_tensors, upstream])
        work, factor = ctx.work, None
        if work.reduction == "none":  # single rows' gradients from upstream, and no factor
            _ = ctx.saved_tensors  # autograd refuses features that were overwritten meanwhile
            route, problem, kept, gain = ctx.kept
            with _no_autocast(problem.x):
                gain = gain * route.of_all(upstream)
                gradients = work.rule.gradients(route, problem, kept, gain, work.wanted).tensors
        else:
            gradients = ctx.gradients
            factor = work.ranks.transport(f"the backward pass of {work.call}").sum(upstream.double())
            if work.ranks.gradients == "sum":
                factor = factor / work.ranks.size
        found: list[Tensor | None] = []
        for gradient, need, like in zip(gradients, work.needs, ctx.like):
            if not need or gradient is None:
                found.append(None)
                continue
            if factor is not None:  # (a number, which leaves dtypes of matrices as they are)
                gradient = gradient * factor
            found.append(gradient.to(like[1]).view(like[0]))
        return (None, None, None, None, *found, *[None] * (len(work.needs) - len(found)))


def _alone(work: _Work, problem: Problem, gain: Tensor, own: tuple[slice, slice]) -> Alone | None:
    """Value of a whole batch by the operator of one process, if there is one, and gradients of some rows of it."""
    found = work.rule.alone(problem, gain if work.weighted else None, work.reduction, work.needs[:4], own)
    if found is None:
        return None
    loss, (dx, dy, *of_params) = found  # an equal share of these is a rank's
    return loss, (dx, dy, *[None if g is None else g.double() / work.ranks.size for g in of_params])


def _rounded(made: Made, problem: Problem) -> tuple[Tensor | None, ...]:
    """The gradients as they wait for the factor from upstream."""
    dtype = saved_dtype(problem.x.dtype)
    dx, dy, *rest = made.tensors
    return None if dx is None else dx.to(dtype), None if dy is None else dy.to(dtype), *rest


def over_ranks(
    rule: Rule,
    ranks: Ranks,
    call: str,
    problem: Problem,
    weight: Tensor | None,
    reduction: str,
    about: tuple[tuple[str, Any], ...] = (),
    repeats: int = 1,
) -> Tensor:
    """A loss over the rows of all ranks.

    Parameters
    ----------
    rule : Rule
        The loss.
    ranks : Ranks
        Who shares it.
    call : str
        Its name.
    problem : Problem
        This rank's rows.
    weight : Tensor, optional
        Weights of its rows [n / repeats], as :func:`.row_weights` gives them.
    reduction : {"mean", "sum", "none"}
        Over all ranks' rows; "none" gives this rank's [n].
    about : tuple
        What else must be the same everywhere: (name, value) pairs.
    repeats : int
        Rows that a weight serves.
    """
    loss: Tensor = _over_ranks(rule, ranks, call, problem, weight, reduction, about, repeats)
    return loss


@break_in_graphs
def _over_ranks(
    rule: Rule,
    ranks: Ranks,
    call: str,
    problem: Problem,
    weight: Tensor | None,
    reduction: str,
    about: tuple[tuple[str, Any], ...],
    repeats: int,
) -> Tensor:
    x, y = problem.x, problem.y
    tensors = (x, None if rule.mirrored else y, problem.scale, problem.bias, *rule.extras)
    grad = torch.is_grad_enabled()
    needs = tuple([grad and isinstance(t, Tensor) and t.requires_grad for t in tensors])
    _require_engine(ranks, problem)
    own_x = x.detach()
    plain = replace(problem, x=own_x, y=own_x if rule.mirrored else y.detach())
    described = _described(ranks, problem, weight, reduction, needs, about)
    with torch.no_grad(), _no_autocast(x):
        route, shared, problem = _shared(ranks, rule, plain, call, described, keeps=True in needs)
        sizes = route.sizes
        gain = gains_over_ranks(ranks, call, sizes, weight, x, reduction, repeats, whole=route.whole)
    loss: Tensor = _OverRanks.apply(
        _Work(shared, ranks, call, reduction, weight is not None, needs), route, problem, gain, *tensors
    )
    rule.keep(shared, route)
    return loss


@torch.no_grad()
def normalizers_over_ranks(
    ranks: Ranks, call: str, problem: Problem, *, cols: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The log-sum-exps of this rank's rows over all ranks' columns [2, n], and of its columns [2, m]: (shift, rest)."""
    x, y = problem.x.detach(), problem.y.detach()
    _require_engine(ranks, problem)
    described = _described(ranks, problem, None, "none", (), (("columns", cols),))
    with _no_autocast(x):
        plain = replace(problem, x=x, y=y)
        route, _, problem = _shared(ranks, Softmax(both_ways=cols), plain, call, described, keeps=False)
        row, col = route.statistics(problem.params(), cols=cols)
    return normalizer_of(route.own(row)), None if col is None else normalizer_of(route.own_cols(col))


def _require_engine(ranks: Ranks, problem: Problem) -> None:
    """A backend that can serve, and a workspace for its smallest panel: on every rank, or on none."""
    try:
        remembered_shape(problem.backend(), problem.size(), True)
    except ValueError as error:
        ranks.fail(error, problem.x)
        raise


def _described(
    ranks: Ranks,
    problem: Problem,
    weight: Tensor | None,
    reduction: str,
    needs: tuple[bool, ...],
    about: tuple[tuple[str, Any], ...],
) -> list[tuple[str, Any]]:
    """What must be the same on all ranks."""
    extras = [f"positive_logits[{i}]" for i in range(len(needs) - 4)]
    wanted = [name for name, need in zip(("x", "y", "scale", "bias", *extras), needs) if need]
    described = [
        ("features", problem.x.shape[1]), ("dtype", problem.x.dtype), ("reduction", reduction),
        ("weights", None if weight is None else weight.dtype),
        ("ids", "given" if problem.pairs.row_ids is not None else None), ("gradients of", "+".join(wanted)),
        ("gradients", ranks.gradients), ("strategy", ranks.strategy), *about,
    ]  # fmt: skip
    if problem.x.is_cpu:  # where reading a number waits for nobody
        for name, value in (("scale", problem.scale), ("bias", problem.bias)):
            described.append((name, value.item() if isinstance(value, Tensor) else value))
    return described


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast would round the results of out=."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def _shared(
    ranks: Ranks, rule: Rule, problem: Problem, call: str, described: list[tuple[str, Any]], *, keeps: bool
) -> tuple[Route, Rule, Problem]:
    """How the ranks' rows meet once all agree on the call, and the loss and the rows that this rank computes."""
    n, m = len(problem.x), len(problem.y)
    brought = Brought(problem, rule) if _strategy(ranks, problem, (n,), (m,)) in _GATHERING else None
    sizes = ranks.agree(
        call, described, problem.x, n, m, None if brought is None else brought.lines,
        lambda sizes: _strategy(ranks, problem, sizes.rows, sizes.cols) in _GATHERING,
    )  # fmt: skip
    strategy = _strategy(ranks, problem, sizes.rows, sizes.cols)
    if strategy in _GATHERING:
        assert brought is not None  # as fewer rows want to be
        whole = _GATHERING[strategy](ranks, brought, sizes, call, keeps=keeps)
        return whole, whole.rule, whole.problem
    if strategy == "auto":  # the grid where its blocks fit their share of the memory, otherwise the ring
        strategy = "grid" if gathered_bytes(ranks, problem, sizes) <= sizes.memory // GATHERED_SHARE else "ring"
    own = Own(problem, rule.term, rule.mirrored)
    route = Ring(ranks, own, sizes, call) if strategy == "ring" else Grid(ranks, own, sizes, call, keeps=keeps)
    return route, rule, problem


def _strategy(ranks: Ranks, problem: Problem, rows: Sequence[int], cols: Sequence[int]) -> str:
    """The one that is asked for; "auto" gathers all of so many rows and columns where they are few."""
    if ranks.strategy == "auto" and ranks.mesh is None:
        return for_few_messages(ranks.size, sum(rows), sum(cols), problem.x.shape[1]) or "auto"
    return ranks.strategy


#: Those whose ranks gather all rows.
_GATHERING = {"replicated": Replicated, "strips": Strips}


def gathered_bytes(ranks: Ranks, problem: Problem, sizes: Sizes) -> int:
    """Bytes of the largest block of features and of its gradients' sums that a rank of the grid has."""
    n, m = sum(sizes.rows), sum(sizes.cols)
    rows = grid_rows(ranks.size, n, m, ranks.mesh and ranks.mesh[0])
    x = problem.x
    per_row = bytes_per_gathered_row(x.shape[1], x.dtype.itemsize, score_dtype(x.dtype).itemsize)
    processes = ranks.size if x.device.type == "cpu" else 1  # which share a machine's memory
    return (n // rows + m // (ranks.size // rows)) * per_row * processes


def bytes_per_gathered_row(features: int, operand_bytes: int, score_bytes: int) -> int:
    """Of a gathered row, the sums of its gradient, and the same as other ranks send them."""
    return features * (operand_bytes + 2 * score_bytes)


def reduce_over_ranks(
    ranks: Ranks, call: str, losses: Tensor, weight: Tensor | None, reduction: str, x: Tensor
) -> Tensor:
    """What is added to this rank's losses [n] outside of the stream, reduced like them; without gradient."""
    about = (("reduction", reduction), ("weights", None if weight is None else weight.dtype))
    sizes = ranks.agree(call, about, x, len(x), len(x))
    gain = gains_over_ranks(ranks, call, sizes, weight, x, reduction, 1)
    losses = losses.masked_fill(gain == 0, 0.0) * gain
    return losses if reduction == "none" else ranks.transport(call).sum(losses.sum())


def gains_over_ranks(
    ranks: Ranks,
    call: str,
    sizes: Sizes,
    weight: Tensor | None,
    x: Tensor,
    reduction: str,
    repeats: int,
    *,
    whole: bool = False,
) -> Tensor:
    """dL/d(loss of row i) of this rank's rows [n], or of all ranks': those of the concatenated batch."""
    total, dtype = sum(sizes.rows), score_dtype(x.dtype)
    if weight is None:
        share = 1.0 / max(total, 1) if reduction == "mean" else 1.0
        return torch.full((total if whole else len(x),), share, dtype=dtype, device=x.device)
    counts = [n // repeats for n in sizes.rows]
    every = ranks.transport(call).all_gather(weight, counts)
    gains = row_gains(every, len(every), x, reduction, repeats)
    assert gains is not None
    of_each = gains.view(repeats, len(every)).split(counts, dim=1)  # views of a rank's samples lie together
    return torch.cat([part.reshape(-1) for part in of_each]) if whole else of_each[ranks.rank].reshape(-1)
