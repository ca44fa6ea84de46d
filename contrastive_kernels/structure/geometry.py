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

from ..arguments.checks import check_number
from ..distributed.group import ranks_of, told
from ..distributed.sums import Sums
from .matching import matching

__all__ = ["difference_sum", "geometric_consistency"]


def geometric_consistency(
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None = None,
    text_aug: Tensor | None = None,
    *,
    cross: float = 1.0,
    intra: float = 1.0,
    augmented: float = 1.0,
    normalize: bool = False,
    group: Any | None = None,
    gradients: str = "average",
    uneven: bool = False,
) -> Tensor:
    """Geometric consistency: images and texts have the same table of similarities.

    Parameters
    ----------
    image, text : Tensor
        Matching rows V, T [N, D] of one dtype and device.
    image_aug, text_aug : Tensor, optional
        Features of their augmented views Va, Ta [N, D].
    cross : float
        Weight of sum_jk (<V_j, T_k> - <V_k, T_j>)^2 / N, at least 0.
    intra : float
        Weight of sum_jk (<V_j, V_k> - <T_j, T_k>)^2 / N, at least 0.
    augmented : float
        Weight of the same between a modality and its augmented view, and of sum_j (<V_j, T_j> - <Va_j, Ta_j>)^2 / N
        where there are both views; at least 0.
    normalize : bool
        Divide rows by their Euclidean norm first.
    group, gradients, uneven
        As in :func:`contrastive_kernels.info_nce`.

    Returns
    -------
    Tensor
        A scalar; float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Notes
    -----
    Exact, in O(N D^2) time and O(N D + D^2) memory (O(N^2 D) and O(N^2) where N < D): with A = V - T, B = V + T, both
    double sums follow from the D x D matrices AT A, BT B and BT A (docs/structures.md). With ``cross == intra`` the
    third one is not needed, and the value keeps its digits however close V and T are. One sum alone is the difference
    of two: its error is relative to <AT A, BT B>, and a true 0 may come out as 1e-6 of that. It is never below 0.

    With a `group` every rank returns the value of the concatenated batch; the D x D matrices are summed over ranks.

    References
    ----------
    Q. Jiang et al., "Understanding and constructing latent modality structures in multi-modal representation
    learning", CVPR 2023. S. Goel et al., "CyCLIP: Cyclic contrastive language-image pretraining", NeurIPS 2022 (whose
    weights for the two sums are 0.25).

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> image, text = torch.eye(3), torch.eye(3)[[1, 2, 0]]
    >>> ck.geometric_consistency(image, text).item()
    2.0
    >>> ck.geometric_consistency(image, text, cross=0.0).item()
    0.0
    """
    ranks = ranks_of(group, gradients, "auto", uneven)
    with told(ranks, image):
        weights = {"cross": cross, "intra": intra, "augmented": augmented}
        cross, intra, augmented = (check_number(value, name, positive=False) for name, value in weights.items())
        (v, t), (va, ta) = matching(
            {"image": image, "text": text}, {"image_aug": image_aug, "text_aug": text_aug}, normalize
        )
    about = (("weights", weights), ("views", [view is not None for view in (va, ta)]), ("normalize", normalize))
    grads = Sums.differentiated(v, t, va, ta)
    sums = None if ranks is None else Sums.of(ranks, "geometric_consistency", v, *about, grads)
    total = difference_sum(v, t, cross, intra, sums)
    for feature, view in ((v, va), (t, ta)):
        if view is not None:
            total = total + augmented * difference_sum(feature, view, 0.0, 1.0, sums)
    if va is not None and ta is not None:
        # <V, T> - <Va, Ta>, from differences that are exact where the views are close
        pairs = (((v - va) * t).sum(1) + (va * (t - ta)).sum(1)).square().sum()
        total = total + augmented * (pairs if sums is None else sums.total(pairs))
    return total / max(v.shape[0] if sums is None else sums.rows, 1)


def difference_sum(u: Tensor, v: Tensor, cross: float, intra: float, sums: Sums | None = None) -> Tensor:
    """cross * sum_jk (<u_j, v_k> - <u_k, v_j>)^2 + intra * sum_jk (<u_j, u_k> - <v_j, v_k>)^2, a scalar.

    u, v [N, D] in float32 or float64, of all ranks where these sum. O(N D min(N, D)) time, O(N D + D^2) memory.
    """
    return _DifferenceSum.apply(u - v, u + v, cross, intra, sums)


class _DifferenceSum(torch.autograd.Function):
    """Of A and B. The gradient is written out: half of the products that autograd would take."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, cross: float, intra: float, sums: Sums | None) -> Tensor:
        # weights of <P, Q> and of <R, RT>
        straight, twisted = (intra + cross) / 2, (intra - cross) / 2
        ctx.weights, ctx.sums = (straight, twisted), sums
        with torch.autocast(a.device.type, enabled=False):
            if len(a) < a.shape[1] and sums is None:  # the N x N table is the smaller one
                c = a @ b.T
                ctx.save_for_backward(a, b, c)
                return cross / 4 * (c - c.T).square().sum() + intra / 4 * (c + c.T).square().sum()
            p, q = a.T @ a, b.T @ b
            r = b.T @ a if twisted else None
            if sums is not None:
                p, q, r = sums.of_matrices(p), sums.of_matrices(q), None if r is None else sums.of_matrices(r)
            total = straight * (p * q).sum()
            if r is not None:
                total = total + twisted * (r * r.T).sum()
            ctx.save_for_backward(a, b, p, q, r)
            # a sum of squares: what lies below 0 is rounding
            return total.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("contrastive_kernels: second derivatives are not implemented; got create_graph=True")
        if ctx.sums is not None:
            upstream = ctx.sums.factor(upstream)
        straight, twisted = (2 * weight * upstream for weight in ctx.weights)
        a, b, *tables = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            if len(tables) == 1:
                (c,) = tables
                dc = straight * c + twisted * c.T
                return dc @ b, dc.T @ a, None, None, None
            p, q, r = tables
            da, db = a @ (straight * q), b @ (straight * p)
            if r is not None:
                da = torch.addmm(da, b, twisted * r.T)
                db = torch.addmm(db, a, twisted * r)
            return da, db, None, None, None
