"""The sums of squared differences between two tables of similarities, without the tables.

With A = u - v, B = u + v [N, D] and C = A BT [N, N], for any two sets of features

    <u_j, v_k> - <u_k, v_j> = (C_jk - C_kj) / 2        <u_j, u_k> - <v_j, v_k> = (C_jk + C_kj) / 2

so that both double sums follow from |C|^2 = <P, Q> and <C, CT> = <R, RT>, where P = AT A, Q = BT B and R = BT A are
D x D. Unlike |uT u|^2 + |vT v|^2 - 2 |uT v|^2, which is the same number, nothing cancels where u and v are close.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["difference_sum"]


def difference_sum(u: Tensor, v: Tensor, cross: float, intra: float) -> Tensor:
    """cross * sum_jk (<u_j, v_k> - <u_k, v_j>)^2 + intra * sum_jk (<u_j, u_k> - <v_j, v_k>)^2, a scalar.

    u, v [N, D] in float32 or float64. O(N D min(N, D)) time, O(N D + D^2) memory.
    """
    return _DifferenceSum.apply(u - v, u + v, cross, intra)


class _DifferenceSum(torch.autograd.Function):
    """Of A and B. The gradient is written out: half of the products that autograd would take."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, cross: float, intra: float) -> Tensor:
        # weights of <P, Q> and of <R, RT>
        straight, twisted = (intra + cross) / 2, (intra - cross) / 2
        ctx.weights = straight, twisted
        with torch.autocast(a.device.type, enabled=False):
            if len(a) < a.shape[1]:  # the N x N table is the smaller one
                c = a @ b.T
                ctx.save_for_backward(a, b, c)
                return cross / 4 * (c - c.T).square().sum() + intra / 4 * (c + c.T).square().sum()
            p, q = a.T @ a, b.T @ b
            total = straight * (p * q).sum()
            r = None
            if twisted:
                r = b.T @ a
                total = total + twisted * (r * r.T).sum()
            ctx.save_for_backward(a, b, p, q, r)
            # a sum of squares: what lies below 0 is rounding
            return total.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("contrastive_kernels: second derivatives are not implemented; got create_graph=True")
        straight, twisted = (2 * weight * upstream for weight in ctx.weights)
        a, b, *tables = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            if len(tables) == 1:
                (c,) = tables
                dc = straight * c + twisted * c.T
                return dc @ b, dc.T @ a, None, None
            p, q, r = tables
            da, db = a @ (straight * q), b @ (straight * p)
            if r is not None:
                da = torch.addmm(da, b, twisted * r.T)
                db = torch.addmm(db, a, twisted * r)
            return da, db, None, None
