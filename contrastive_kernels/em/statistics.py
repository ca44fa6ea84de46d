"""How fresh a memory is: running averages of what batches find over what is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NormalizerStatistics", "averages", "last_of_each", "observe"]


#: Share of the running statistics that one update replaces.
_STEP = 0.1


@dataclass(frozen=True)
class NormalizerStatistics:
    """How fresh a memory is; running averages over the samples that updates met again, a number per direction.

    Parameters
    ----------
    samples, visited : int
        Samples of the data set, and those that were met.
    mean_visits : float
        Visits a sample and direction.
    log_ratio, log_ratio_std, largest : tuple of float
        Of log r, r = (mean that the batch found) / (mean that was stored): mean, standard deviation, and the largest so
        far.
    effective : tuple of float
        E[r]^2 / E[r^2], in 0 ... 1: the part of a batch's rows that its gradient effectively consists of.
    """

    samples: int
    visited: int
    mean_visits: float
    log_ratio: tuple[float, ...]
    log_ratio_std: tuple[float, ...]
    largest: tuple[float, ...]
    effective: tuple[float, ...]


def observe(running: Tensor, log_ratio: Tensor, counted: Tensor) -> Tensor:
    """Folds the log ratios [N, d] of the rows that count into the running statistics; the new ones [d, 6].

    By direction: E[log r], E[log r ^2], max log r, E[r], E[r^2], weight of the averages.
    """
    number = counted.sum(0)
    values = torch.where(counted, log_ratio, 0.0)
    ratio = torch.where(counted, log_ratio.clamp_max(40.0).exp(), 0.0)
    sums = torch.stack([values, values.square(), ratio, ratio.square()]).sum(1)  # [4, d]
    share = _STEP * (number > 0)
    means = torch.cat([sums / number.clamp_min(1), torch.ones_like(sums[:1])])
    old = running.T
    largest = torch.where(counted, log_ratio, -torch.inf).amax(0)
    largest = torch.where(old[5] > 0, torch.maximum(old[2], largest), largest)
    moved = torch.lerp(old[[0, 1, 3, 4, 5]], means, share.to(means.dtype))
    return torch.where(number > 0, torch.stack([*moved[:2], largest, *moved[2:]]), old).T


def averages(running: Tensor) -> dict[str, tuple[float, ...]]:
    """The statistics by direction, read from the device."""
    mean, square, largest, ratio, ratio_square, weight = running.double().cpu().T
    mean, square, ratio, ratio_square = (v / weight for v in (mean, square, ratio, ratio_square))
    spread = (square - mean.square()).clamp_min(0).sqrt()
    largest = torch.where(weight > 0, largest, torch.nan)
    return {
        "log_ratio": tuple(mean.tolist()),
        "log_ratio_std": tuple(spread.tolist()),
        "largest": tuple(largest.tolist()),
        "effective": tuple((ratio.square() / ratio_square).tolist()),
    }


def last_of_each(index: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's sample occurs last [N], and whether the row is that one [N]; the same in every run."""
    index = index.contiguous()
    ordered, order = torch.sort(index, stable=True)
    last = order[torch.searchsorted(ordered, index, right=True) - 1]
    return last, last == torch.arange(len(index), dtype=torch.int64, device=index.device)
