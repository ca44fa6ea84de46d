"""Each loss in plain torch: the dense formula that people use, and the same in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from .cases import Inputs

__all__ = ["BLOCKED", "DENSE", "call_directly", "gathered_clip_loss"]


def clip_loss(i: Inputs) -> Tensor:
    """open_clip's formula: two matrices of logits."""
    logits_per_image = i.scale * i.x @ i.y.T
    logits_per_text = i.scale * i.y @ i.x.T
    return (cross_entropy(logits_per_image, i.labels) + cross_entropy(logits_per_text, i.labels)) / 2


def info_nce(i: Inputs) -> Tensor:
    """One direction."""
    return cross_entropy(i.scale * i.x @ i.y.T, i.labels)


def nt_xent(i: Inputs) -> Tensor:
    """The 2N x 2N matrix of all views, each one's product with itself masked."""
    views = torch.cat([i.x, i.y])
    n = len(i.x)
    itself = torch.eye(2 * n, dtype=torch.bool, device=views.device)
    logits = (i.scale * views @ views.T).masked_fill(itself, -torch.inf)
    return cross_entropy(logits, (torch.arange(2 * n, device=views.device) + n) % (2 * n))


def sigmoid(i: Inputs) -> Tensor:
    """open_clip's SigLIP formula."""
    assert i.bias is not None
    logits = i.scale * i.x @ i.y.T + i.bias
    signs = 2 * torch.eye(len(i.x), dtype=logits.dtype, device=logits.device) - 1
    return -logsigmoid(signs * logits).sum() / len(i.x)


def decomposable(i: Inputs) -> Tensor:
    """u Z - log u - 1 for u = 1 / Zbar, mean of both directions, from one matrix of logits."""
    assert i.log_z is not None
    logits = (i.scale * i.x @ i.y.T).to(i.scale.dtype)
    positive = logits.diagonal()
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    total = torch.zeros_like(i.scale)
    for scores, log_z in zip((logits, logits.T), i.log_z, strict=True):
        negatives = (scores - positive[:, None]).masked_fill(itself, -torch.inf)
        z = 1 + torch.exp(negatives).sum(1)
        total = total + (z * torch.exp(-log_z) + log_z - 1).mean()
    return total / 2


DENSE: dict[str, Callable[[Inputs], Tensor]] = {
    f.__name__: f for f in (clip_loss, info_nce, nt_xent, sigmoid, decomposable)
}

Call = Callable[..., Tensor]


def call_directly(function: Call, *args: Any) -> Tensor:
    """The ``call`` of a blocked formula that keeps the blocks' intermediates, or nothing under ``no_grad``."""
    return function(*args)


def _starts(x: Tensor, block: int) -> range:
    return range(0, len(x), block)


def _softmax_block(x: Tensor, y: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(scale * x @ y.T, labels, reduction="sum")


def _one_direction(x: Tensor, y: Tensor, i: Inputs, block: int, call: Call) -> Tensor:
    parts = [call(_softmax_block, x[s : s + block], y, i.scale, i.labels[s : s + block]) for s in _starts(x, block)]
    return torch.stack(parts).sum() / len(x)


def _info_nce_blocks(i: Inputs, block: int, call: Call) -> Tensor:
    return _one_direction(i.x, i.y, i, block, call)


def _clip_blocks(i: Inputs, block: int, call: Call) -> Tensor:
    return (_one_direction(i.x, i.y, i, block, call) + _one_direction(i.y, i.x, i, block, call)) / 2


def _nt_xent_block(rows: Tensor, views: Tensor, scale: Tensor, labels: Tensor, start: int) -> Tensor:
    logits = scale * rows @ views.T
    logits.diagonal(start).fill_(-torch.inf)
    return cross_entropy(logits, labels, reduction="sum")


def _nt_xent_blocks(i: Inputs, block: int, call: Call) -> Tensor:
    views = torch.cat([i.x, i.y])
    labels = (torch.arange(len(views), device=views.device) + len(i.x)) % len(views)
    parts = [
        call(_nt_xent_block, views[s : s + block], views, i.scale, labels[s : s + block], s)
        for s in _starts(views, block)
    ]
    return torch.stack(parts).sum() / len(views)


def _sigmoid_block(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
    logits = scale * x @ y.T + bias
    return softplus(logits).sum() - logits.diagonal(start).sum()  # softplus(-z) = softplus(z) - z


def _sigmoid_blocks(i: Inputs, block: int, call: Call) -> Tensor:
    assert i.bias is not None
    parts = [call(_sigmoid_block, i.x[s : s + block], i.y, i.scale, i.bias, s) for s in _starts(i.x, block)]
    return torch.stack(parts).sum() / len(i.x)


def _decomposable_block(x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, start: int) -> Tensor:
    logits = (scale * x @ y.T).to(scale.dtype)
    negatives = torch.ones_like(logits)
    negatives.diagonal(start).zero_()
    weights = torch.exp(logits - rows[:, None]) + torch.exp(logits - columns)
    return (weights * negatives).sum()


def _decomposable_blocks(i: Inputs, block: int, call: Call) -> Tensor:
    assert i.log_z is not None
    positive = i.scale * (i.x * i.y).sum(1)
    rows, columns = positive + i.log_z[0], positive + i.log_z[1]
    parts = [
        call(_decomposable_block, i.x[s : s + block], i.y, i.scale, rows[s : s + block], columns, s)
        for s in _starts(i.x, block)
    ]
    constant = torch.stack([(torch.exp(-log_z) + log_z - 1).mean() for log_z in i.log_z]).sum()
    return (torch.stack(parts).sum() / len(i.x) + constant) / 2


#: loss -> function(inputs, rows per block, call), call(function, *args) deciding what a block leaves behind
BLOCKED: dict[str, Callable[[Inputs, int, Call], Tensor]] = {
    "clip_loss": _clip_blocks,
    "info_nce": _info_nce_blocks,
    "nt_xent": _nt_xent_blocks,
    "sigmoid": _sigmoid_blocks,
    "decomposable": _decomposable_blocks,
}


# ---- over the processes of a group ----


# torch 2.13 renames it, and warns of the old name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Gather(torch.autograd.Function):
    """The rows [n, D] of all processes, one below the other; each gets the sum of what all of them make of its rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        rows = own.new_empty(dist.get_world_size() * len(own), own.shape[1])
        _all_gather(rows, own.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        parts = torch.empty_like(upstream)  # (gloo had no reduce-scatter for long)
        dist.all_to_all_single(parts, upstream.contiguous())
        return parts.view(dist.get_world_size(), -1, upstream.shape[1]).sum(0)


def gathered_clip_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The usual way (open_clip's ``local_loss`` with ``gather_with_grad``): own rows [n, D] against all of both sides.

    Two matrices of n x N. Means over processes are the loss and its gradients; as many rows in each.
    """
    start, rows_of = 0, (x, y)
    if dist.get_world_size() > 1:
        start, rows_of = dist.get_rank() * len(x), (_Gather.apply(x), _Gather.apply(y))
    labels = torch.arange(start, start + len(x), device=x.device)
    per_image, per_text = scale * x @ rows_of[1].T, scale * y @ rows_of[0].T
    return (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2
