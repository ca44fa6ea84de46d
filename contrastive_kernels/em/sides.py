"""Rows that look for their positives: one direction of two towers, or all views of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.group import Ranks, Sizes
from ..losses.decomposable import decomposable
from ..losses.scales import scaled
from ..panels.size import score_dtype
from .expectation import wide

__all__ = ["Samples", "Side"]


@dataclass(frozen=True)
class Samples:
    """The samples of two views of one tower: the views of a row's own sample are no negatives of it."""

    #: [2 N] of this rank's views
    ids: Tensor
    #: [2 N] how many negatives a view has, over those in a batch of different samples
    share: Tensor
    #: whether all ranks' views are of more than one sample, 0-d
    several: Tensor

    @classmethod
    @torch.inference_mode(False)
    def of(cls, index: Tensor, device: torch.device, ranks: Ranks | None, sizes: Sizes, call: str) -> Samples:
        """Of the samples [N] of this rank's rows."""
        own = index.to(device).contiguous()
        every = own if ranks is None else ranks.transport(call).all_gather(own, sizes.rows)
        ordered = every.sort().values
        alike = torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own)
        share = (len(every) - alike).to(wide(device)) / (len(every) - 1)
        return cls(own.repeat(2), share.repeat(2), (ordered[:1] != ordered[-1:]).any())


@dataclass(frozen=True)
class Side:
    """Rows x [N, D] that look for their positives among rows y: row i, or of one tower's views the other one."""

    x: Tensor
    y: Tensor
    #: of all rows, or (`by_row`) of each [N]
    scale: Tensor
    by_row: bool
    #: of a row, where all samples are different
    negatives: int
    #: of x and y, the same views [2 N, D], whose positives' weight is 1 whatever their negatives' is
    samples: Samples | None
    #: of a call of the decomposable loss
    options: dict[str, Any]

    def positive_logits(self) -> Tensor:
        """Those of the rows [N], differentiable."""
        dtype = score_dtype(self.x.dtype)
        partners = self.y if self.samples is None else self.y.roll(len(self.y) // 2, 0)
        return self.scale * (self.x.to(dtype) * partners.to(dtype)).sum(1)

    def _loss(self, log_u: Tensor, **more: Any) -> Any:
        """The decomposable loss at these normalisers [N], which count from the positives' logits."""
        x, y, scale = (*scaled(self.x, self.y, self.scale), 1.0) if self.by_row else (self.x, self.y, self.scale)
        options: dict[str, Any] = {"positive_constant": 0.0, "negative_scale": 1.0 / self.negatives, **self.options}
        if self.samples is not None:
            with torch.no_grad():
                options |= {"ids": self.samples.ids, "positive_logits": self.positive_logits()}
            log_u = log_u.masked_fill(self.samples.share == 0, 0.0) + self._log_share(log_u.dtype)
        return decomposable(x, y, scale, log_u, **options, **more)

    def _log_share(self, dtype: torch.dtype) -> Tensor:
        """The logarithm of the share of negatives that a row has [N]; 0 where it has none."""
        assert self.samples is not None
        share = self.samples.share
        return share.masked_fill(share == 0, 1.0).log().to(dtype)

    @torch.no_grad()
    def log_means(self) -> Tensor:
        """log g_i [N] in float64: of the mean of exp(h_ij) over row i's negatives, h_ij a logit less the positive's."""
        zeros = torch.zeros(len(self.x), dtype=score_dtype(self.x.dtype), device=self.x.device)
        _, log_z = self._loss(zeros, return_log_normalizer=True, reduction="none")
        log_g: Tensor = log_z.to(wide(self.x.device))
        return log_g if self.samples is None else log_g - self._log_share(log_g.dtype)

    def value(self, log_u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i weight_i (log u_i + g_i / u_i - 1) over all ranks' rows, and what is to be added on this rank.

        `log_u` [N] counts from the positives' logits, as g_i does.
        """
        value: Tensor = self._loss(log_u, weight=weight, reduction="sum")
        if self.samples is None:
            return value, value.new_zeros(())
        positive = self.positive_logits()
        return value, (weight * (positive.detach() - positive - self._log_share(positive.dtype))).sum()

    def slopes(self, log_u: Tensor) -> Tensor:
        """The negatives' mean of h_ij exp(h_ij) / u_i [N]; of one tower's views, of their logits for h_ij."""
        with torch.inference_mode(False), torch.enable_grad():
            x, y, leaf, log_u = (
                v.clone() if v.is_inference() else v.detach() for v in (self.x, self.y, self.scale, log_u)
            )
            options = self.options | ({"gradients": "sum"} if "gradients" in self.options else {})
            side = replace(self, x=x, y=y, scale=leaf.requires_grad_(), options=options)
            (gradient,) = torch.autograd.grad(side._loss(log_u, reduction="sum"), leaf)
        return gradient * self.scale
