"""Draws of the gamma-distributed auxiliary variable u, as logarithms, and what drawing adds to a loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_log_weights", "expected_excess", "log_or_minus_infinity"]


def draw_log_weights(log_normalizer: Tensor, shape: float | None, generator: torch.Generator | None) -> Tensor:
    """log(u_i Zbar_i) with u_i ~ Gamma(shape, rate = shape * Zbar_i), or 0 where ``shape`` is None (the mean).

    Parameters
    ----------
    log_normalizer : Tensor
        log Zbar_i [N]; it gives the draws' number, device and dtype.
    shape : float, optional
        The gamma distribution's shape a; 1 is the exact conditional distribution.
    generator : torch.Generator, optional
        Source of the draws.

    Returns
    -------
    Tensor
        [N]. Drawn as Gamma(a + 1) times U^(1/a), so that no draw underflows at a small shape.
    """
    if shape is None:
        return torch.zeros_like(log_normalizer)
    alpha = torch.full(log_normalizer.shape, shape + 1.0, dtype=torch.float32, device=log_normalizer.device)
    gamma = torch._standard_gamma(alpha, generator=generator)
    uniform = torch.zeros_like(alpha).uniform_(generator=generator)
    log_uniform = torch.log1p(-uniform)  # uniform is in [0, 1)
    return (gamma.log() + log_uniform / shape - math.log(shape)).to(log_normalizer.dtype)


def expected_excess(shape: float | None) -> float | Tensor:
    """What drawing u adds to the expected value of u Z - log u - 1: log a - digamma(a)."""
    if shape is None:
        return 0.0
    return log_or_minus_infinity(shape) - torch.digamma(torch.full((), shape, dtype=torch.float64, device="cpu"))


def log_or_minus_infinity(value: float) -> float:
    """log of a non-negative number; log 0 = -inf."""
    return math.log(value) if value > 0 else -math.inf
