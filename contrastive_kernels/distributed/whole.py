"""Losses that are no sum over a rank's own rows: every rank gathers all rows and computes what one process would.

One message forward and one backward, P times the products, all rows on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._library import break_in_graphs
from .group import Ranks, Sizes
from .lines import Lines, among_all
from .sums import once
from .transport import count_entries

__all__ = ["OfRank", "row_of", "whole_over_ranks"]


@dataclass(frozen=True)
class OfRank:
    """A tensor of this rank's part of a batch."""

    tensor: Tensor
    #: its rows are columns of the matrix
    of_cols: bool = False
    #: it names columns, of the rank's own ones, -1 none
    names_cols: bool = False


@dataclass
class _Work:
    ranks: Ranks
    call: str
    sizes: Sizes
    #: gives the value, of all ranks' tensors
    compute: Callable[..., Tensor]
    parts: tuple[OfRank, ...]
    #: rows of a loss that a row of x has
    repeats: int

    def own(self, vector: Tensor, of_cols: bool) -> Tensor:
        """This rank's part of what all have."""
        sizes, rank = self.sizes.cols if of_cols else self.sizes.rows, self.ranks.rank
        return vector[sum(sizes[:rank]) : sum(sizes[: rank + 1])]

    def own_losses(self, losses: Tensor) -> Tensor:
        """This rank's of all rows' losses [repeats N]."""
        return self.own(losses.view(self.repeats, -1).T, False).T.reshape(-1)

    def upstream(self, own: Tensor, single: bool) -> Tensor:
        """What the value gets from all ranks; `single`: it is of single rows."""
        transport = self.ranks.transport(f"the backward pass of {self.call}")
        if not single:
            total = transport.sum(own.double())
            return total / self.ranks.size if self.ranks.gradients == "sum" else total
        rows = own.view(self.repeats, -1).T.contiguous()[:, None]  # (no matrix of features)
        return transport.all_gather(rows, self.sizes.rows)[:, 0].T.reshape(-1)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, found: Sequence[Tensor], *tensors: Any) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        *_, scale = tensors
        if isinstance(scale, Tensor):
            scale = scale.detach()
        leaves = [
            v.requires_grad_(need) if isinstance(v, Tensor) else v
            for v, need in zip((*found, scale), needs, strict=True)
        ]
        with torch.enable_grad():
            value = work.compute(*leaves)
        ctx.work, ctx.like = work, [t.shape if isinstance(t, Tensor) else None for t in tensors]
        ctx.kept = (value, leaves) if True in needs else None
        ctx.save_for_backward(*[t for t in tensors if isinstance(t, Tensor)])
        return value.detach() if value.dim() == 0 else work.own_losses(value.detach())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True: whoever differentiates them meets an error
            with torch.no_grad():
                gradients = _Whole.backward(ctx, upstream.detach())
            return once(gradients, [*ctx.saved_tensors, upstream])
        work, (value, leaves), _ = ctx.work, ctx.kept, ctx.saved_tensors
        factor = work.upstream(upstream, value.dim() > 0).to(value.dtype)
        needs = ctx.needs_input_grad[2:]
        wanted = [leaf for leaf, need in zip(leaves, needs) if need]
        made = iter(torch.autograd.grad(value, wanted, factor, retain_graph=True, allow_unused=True))
        found: list[Tensor | None] = []
        for i, (need, shape) in enumerate(zip(needs, ctx.like)):
            g = next(made) if need else None
            if g is not None and i < len(work.parts):
                g = work.own(g, work.parts[i].of_cols).clone()
            elif g is not None:
                g = (g / work.ranks.size).reshape(shape)
            found.append(g)
        return (None, None, *found)


def row_of(tensor: Tensor) -> str:
    """What is said of a tensor [n, ...] of which ranks may have different numbers of rows."""
    return f"{list(tensor.shape[1:])} of {tensor.dtype}"


def whole_over_ranks(
    ranks: Ranks,
    call: str,
    parts: Mapping[str, OfRank],
    scale: Tensor | float,
    compute: Callable[..., Tensor],
    about: Sequence[tuple[str, Any]],
    repeats: int = 1,
) -> Tensor:
    """The loss of all ranks' rows, as one process computes it.

    Parameters
    ----------
    ranks : Ranks
        Who shares it.
    call : str
        Its name.
    parts : mapping
        This rank's tensors by name, "x" first; all ranks have the same names.
    scale : Tensor or float
        The same on all ranks.
    compute : callable
        Gives the value, a number or the losses of all rows, of all ranks' tensors by name and of the scale. What it
        refuses it refuses on every rank.
    about : sequence
        What must be the same everywhere: (name, value) pairs.
    repeats : int
        Losses that each row of x has, the first ones of all rows first.
    """
    loss: Tensor = _whole_over_ranks(ranks, call, parts, scale, compute, about, repeats)
    return loss


@break_in_graphs
def _whole_over_ranks(
    ranks: Ranks,
    call: str,
    parts: Mapping[str, OfRank],
    scale: Tensor | float,
    compute: Callable[..., Tensor],
    about: Sequence[tuple[str, Any]],
    repeats: int,
) -> Tensor:
    x, owns, grad = parts["x"].tensor, tuple(parts.values()), torch.is_grad_enabled()
    n, m = (next((len(p.tensor) for p in owns if p.of_cols == of_cols), len(x)) for of_cols in (False, True))
    lines = Lines([(p.tensor.detach(), p.of_cols) for p in owns], n, m)
    said: list[tuple[str, Any]] = [("gradients", ranks.gradients), *about]
    for name, p in parts.items():
        said.append((name, row_of(p.tensor)))
    tensors = (*[p.tensor for p in owns], scale)
    names = [*parts, "scale"]
    wanting = [k for k, t in zip(names, tensors) if grad and isinstance(t, Tensor) and t.requires_grad]
    said.append(("gradients of", "+".join(wanting)))
    if x.is_cpu:  # where reading a number waits for nobody
        said.append(("scale", scale.item() if isinstance(scale, Tensor) else scale))
    with torch.no_grad():
        sizes = ranks.agree(call, said, x, n, m, lines, lambda sizes: True)
        transport = ranks.transport(call)
        found = lines.read(
            lines.gather(transport, sizes.rows, sizes.cols) if sizes.lines is None else sizes.lines,
            sizes.rows,
            sizes.cols,
        )
        count_entries((ranks.size - 1) * lines.entries(sizes.rows, sizes.cols))
        for i, p in enumerate(owns):
            if p.names_cols:
                found[i] = among_all(found[i], sizes.rows, sizes.cols)

    def named(*leaves: Any) -> Tensor:
        *values, of_scale = leaves
        return compute(dict(zip(parts, values)), of_scale)

    loss: Tensor = _Whole.apply(_Work(ranks, call, sizes, named, owns, repeats), found, *tensors)
    return loss
