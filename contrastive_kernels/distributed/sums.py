"""Sums over the ranks of a group that are differentiated: what regularisers are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .group import Ranks, Sizes

__all__ = ["Sums"]


class Sums:
    """Sums over ranks within one call, once all have agreed on it.

    What a sum's own part is multiplied by in the backward pass is the sum of what the ranks' results get from
    upstream, as with the losses; with "sum" as the rule of gradients, divided by the number of ranks.
    """

    def __init__(self, ranks: Ranks, call: str, sizes: Sizes) -> None:
        self.ranks, self.call, self.rows = ranks, call, sum(sizes.rows)
        self._forward, self._backward = ranks.transport(call), ranks.transport(f"the backward pass of {call}")

    @classmethod
    def of(cls, ranks: Ranks, call: str, x: Tensor, *about: tuple[str, Any]) -> Sums:
        """Those of a call on matching rows x [n, D], once all ranks are there."""
        return cls(ranks, call, ranks.agree_on_rows(call, x, *about))

    @staticmethod
    def differentiated(*features: Tensor | None) -> tuple[str, Any]:
        """Which of a call's features get gradients, as all ranks have to say alike."""
        grad = torch.is_grad_enabled()
        return "gradients of", [grad and each is not None and each.requires_grad for each in features]

    def factor(self, upstream: Tensor) -> Tensor:
        """What gradients of this rank's part are multiplied by, given what its own result gets from upstream."""
        total = self._backward.sum(upstream.double()).to(upstream.dtype)
        return total / self.ranks.size if self.ranks.gradients == "sum" else total

    def of_matrices(self, own: Tensor) -> Tensor:
        """The sum of matrices [k, l]; not differentiated."""
        return self._forward.sum_of_matrices(own)

    def total(self, own: Tensor) -> Tensor:
        """The sum of numbers, differentiable."""
        found: Tensor = _Total.apply(own, self)
        return found

    def mean(self, own: Tensor) -> Tensor:
        """The sum of numbers over the number of all rows, differentiable; 0 of none."""
        return self.total(own) / max(self.rows, 1)

    def logsumexp(self, own: Tensor) -> Tensor:
        """log of the sum of exp over the entries of all ranks' vectors, differentiable."""
        lowest = own.new_full((1,), torch.finfo(own.dtype).min)
        highest = self._forward.all_gather(torch.cat([own.detach(), lowest]).amax()[None], [1] * self.ranks.size).amax()
        return self.total(torch.exp(own - highest).sum()).log() + highest


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, sums: Sums) -> Tensor:
        ctx.sums = sums
        ctx.save_for_backward(own)
        return sums._forward.sum(own.double()).to(own.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        with torch.no_grad():
            found = (ctx.sums.factor(upstream), None)
        return once(found, [*ctx.saved_tensors, upstream]) if torch.is_grad_enabled() else found


def once(gradients: Sequence[Tensor | None], of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients that say so where somebody differentiates them again; they are functions of these tensors."""
    there = [g for g in gradients if g is not None]
    marked = iter(_Once.apply(len(there), *there, *of))
    return tuple([None if g is None else next(marked) for g in gradients])


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([g.clone() for g in tensors[:count]])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError("contrastive_kernels: second derivatives over several ranks are not implemented")
