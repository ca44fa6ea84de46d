"""A large batch in micro-batches, each encoded once: what a sum over pairs allows and a logarithm of sums does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_features, check_scale
from ..arguments.temperature import scale_of
from ..draws.gamma import expected_excess
from ..losses.decomposable import decomposable
from .expectation import wide
from .normalizers import Batch, positive_term, row_normalizers

__all__ = ["accumulate"]


@dataclass(frozen=True)
class _Rows:
    """Encoded rows: features [N, D] of both sides, dots of the positive pairs [N], log u and weights [N, d]."""

    x: Tensor
    y: Tensor
    dots: Tensor
    log_u: Tensor
    weight: Tensor

    def doubled(self) -> _Rows:
        """The same values with features whose gradients count twice."""
        x, y = (2 * v - v.detach() for v in (self.x, self.y))
        return _Rows(x, y, _dots(x, y, self.dots.dtype), self.log_u, self.weight)

    def detached(self) -> _Rows:
        return _Rows(*(v.detach() for v in (self.x, self.y, self.dots, self.log_u, self.weight)))


class _Accumulator:
    """Sums over the pairs of a batch whose micro-batches come one after the other.

    ``add`` gives the loss of the pairs of which one row is in the new micro-batch: those within it, and those with
    earlier rows, whose features are constants by now. The latter's gradients to the new features count twice, for the
    earlier features get none: in a random order of micro-batches the mean is right.
    """

    def __init__(self, scale: float | Tensor, engine: dict[str, Any]) -> None:
        self.scale, self.engine = scale, engine
        self.earlier: list[_Rows] = []
        self.sums: list[Tensor] = []  # by micro-batch, the log of the sum over negatives so far [N, d]
        self.negatives: list[int] = []  # and how many they were

    def add(self, x: Tensor, y: Tensor, log_u: Tensor, weight: Tensor, k: float, across: bool) -> Tensor:
        """sum_i u_i k sum_j exp(h_ij) over the new pairs, mean over directions; 0-d."""
        new = _Rows(x, y, _dots(x, y, log_u.dtype), log_u, weight)
        self.sums.append(torch.full_like(log_u, -torch.inf, dtype=wide(x.device)))
        self.negatives.append(0)
        here = len(self.sums) - 1
        value = torch.zeros((), dtype=log_u.dtype, device=x.device)
        for direction in range(log_u.shape[1]):
            if len(x) > 1:
                itself = torch.arange(len(x), dtype=torch.int64, device=x.device)
                value = value + self._block(new, new, k, direction, here, itself)
            if across:
                twice = new.doubled()
                for there, rows in enumerate(self.earlier):
                    value = value + self._block(twice, rows, k, direction, here)
                    value = value + self._block(rows, twice, k, direction, there)
        self.earlier.append(new.detached())
        return value / log_u.shape[1]

    def found(self) -> list[Tensor]:
        """By micro-batch, the log of the mean over its rows' negatives [N, d]."""
        return [sums - math.log(max(count, 1)) for sums, count in zip(self.sums, self.negatives)]

    def _block(
        self, rows: _Rows, columns: _Rows, k: float, direction: int, place: int, own: Tensor | None = None
    ) -> Tensor:
        """The sum over one block of pairs, one way; notes what the rows' negatives sum to."""
        anchors, candidates = (rows.x, columns.y) if direction == 0 else (rows.y, columns.x)
        log_u, weight = rows.log_u[:, direction], rows.weight
        z_pos = self.scale * rows.dots
        result: Any = decomposable(
            anchors, candidates, self.scale, -log_u, positive_constant=0.0, negative_scale=k,
            positive_logits=z_pos, positives=own, weight=weight, return_log_normalizer=True, reduction="sum",
            **self.engine,
        )  # fmt: skip
        value, log_z = result
        sums = self.sums[place][:, direction]
        raw = log_z.to(sums) - math.log(k) + z_pos.detach().to(sums)
        if direction == 0:
            self.negatives[place] += len(columns.x) - (own is not None)
        self.sums[place][:, direction] = torch.logaddexp(sums, raw)
        constant = (log_u + 1).masked_fill(weight == 0, 0.0) * weight
        return value + constant.sum()


def accumulate(
    loss: Any,
    encode: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Sequence[Any],
    index: Sequence[Tensor],
    given: tuple[float | Tensor | None, float | Tensor | None],
    across: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """The body of ``DatasetContrastiveLoss.accumulate``, given a scale or a temperature."""
    expectations = [loss.e_step(i, generator=generator) for i in index]
    sizes = [len(i) for i in index]
    total = sum(sizes)
    logit_scale: Any = None
    pairs: Any = None
    value: Any = 0.0
    for batch, expectation, size in zip(batches, expectations, sizes):
        x, y = check_features(*_encoded(encode, batch), ("x", "y"), loss.normalize)
        if len(x) != size or len(y) != size:
            raise ValueError(f"encode: expected {size} rows, as its index has; got {len(x)} and {len(y)}")
        if pairs is None:  # features tell in which dtype a temperature is inverted
            logit_scale = scale_of(x, *given)
            scale = check_scale(x, logit_scale)
            if isinstance(scale, Tensor):
                scale = scale.detach().requires_grad_(scale.requires_grad)
            pairs = _Accumulator(scale, loss.engine)
        expectation = expectation.to(x.device)
        negatives = max((total if across else size) - 1, 1)
        notional = loss._notional(negatives)
        both = Batch(x, y, pairs.scale, None, None, expectation.log_mean.shape[1] == 2)
        z_pos = both.positive_scores()
        log_z, counted = row_normalizers(loss, both, expectation, z_pos, notional)
        log_u = expectation.log_weight.to(log_z) - log_z
        weight = torch.ones_like(z_pos) if counted is None else counted
        part = pairs.add(x, y, log_u, weight, notional / negatives, across) / total
        if part.requires_grad:
            part.backward()
        rest = positive_term(loss.include_positive, log_u) - log_u - 1 - expected_excess(loss.shape)
        value = value + part.detach() + (rest.mean(1).masked_fill(weight == 0, 0.0) * weight).sum() / total
    if isinstance(logit_scale, Tensor) and pairs.scale.grad is not None:
        logit_scale.backward(pairs.scale.grad)
    for expectation, found, size in zip(expectations, pairs.found(), sizes):
        loss.update(expectation, found, columns=(total if across else size) - 1)
    return value


def _encoded(encode: Callable[[Any], Any], batch: Any) -> tuple[Any, Any]:
    """What an encoder makes of a micro-batch."""
    pair = encode(batch)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        count = f" of length {len(pair)}" if isinstance(pair, (tuple, list)) else ""
        raise TypeError(f"encode: expected it to return a pair (x, y); got {type(pair).__name__}{count}")
    return pair[0], pair[1]


def _dots(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """<x_i, y_i> [N], differentiable."""
    return (x.to(dtype) * y.to(dtype)).sum(1)
