"""What global contrastive losses share: the memory that moves by gamma, its schedule, and the ranks of a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._library import outside_graphs
from ..arguments.checks import (
    check_backend,
    check_count,
    check_device,
    check_distribution,
    check_flag,
    check_number,
    check_workspace,
    recomputing,
    scale_tensor,
    shown,
)
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..distributed.group import Ranks, Sizes, check_group, ranks_of
from ..distributed.sums import Sums
from .memory import NormalizerMemory

__all__ = ["GlobalLoss", "nothing"]


class _GammaMemory(NormalizerMemory):
    """A memory whose visits after the first all move the mean by the same part."""

    gamma = 1.0

    def average(self, stored: Tensor, visits: Tensor, found: Tensor) -> Tensor:
        """(1 - gamma) stored + gamma found, in logarithms [N, d]; what was found where nothing is stored."""
        rest = math.log1p(-self.gamma) if self.gamma < 1 else -math.inf
        moved = torch.logaddexp(stored + rest, found + math.log(self.gamma))
        return torch.where(visits > 0, moved, found)


class GlobalLoss(nn.Module):
    """A loss whose rows are weighed by a memory that moves by gamma. Arguments as in :class:`SogCLRLoss`."""

    def __init__(
        self,
        num_samples: int,
        *,
        towers: int = 2,
        gamma: float = 0.9,
        gamma_schedule: str = "constant",
        gamma_decay_epochs: int | None = None,
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
        device: torch.device | str | None = None,
        group: Any | None = "auto",
        gradients: str = "average",
        strategy: str = "auto",
        uneven: bool = False,
    ) -> None:
        super().__init__()
        self.towers = check_count(towers, "towers")
        if self.towers > 2:
            raise ValueError(f"towers: expected 1 or 2; got {towers}")
        self.gamma = check_number(gamma, "gamma", positive=True)
        if self.gamma > 1:
            raise ValueError(f"gamma: expected a number above 0 and at most 1; got {shown(gamma)}")
        if not isinstance(gamma_schedule, str) or gamma_schedule not in ("constant", "cosine"):
            raise ValueError(f"gamma_schedule: expected 'constant' or 'cosine'; got {shown(gamma_schedule)}")
        self.gamma_schedule = gamma_schedule
        if (gamma_decay_epochs is None) == (gamma_schedule == "cosine"):
            expected = "a number of epochs with" if gamma_decay_epochs is None else "None without"
            raise ValueError(
                f"gamma_decay_epochs: expected {expected} gamma_schedule='cosine'; got {gamma_decay_epochs}"
            )
        if gamma_decay_epochs is not None:
            check_count(gamma_decay_epochs, "gamma_decay_epochs")
        self.gamma_decay_epochs = gamma_decay_epochs
        self.normalize = check_flag(normalize, "normalize")
        check_distribution(gradients, strategy, uneven)
        self.over: dict[str, Any] = {
            "group": check_group(group), "gradients": gradients, "strategy": strategy, "uneven": uneven
        }  # fmt: skip
        self.engine: dict[str, Any] = {
            "backend": check_backend(backend) or None,
            "workspace_bytes": check_workspace(workspace_bytes),
        }
        where = None if device is None else check_device(device, here=True)
        self.memory = _GammaMemory(num_samples, self.towers, device=where, group=group)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tells the schedule the epoch, from 0."""
        self.epoch = check_count(epoch, "epoch", least=0)

    def current_gamma(self) -> float:
        """What the schedule makes of the epoch."""
        if self.gamma_decay_epochs is None or self.epoch >= self.gamma_decay_epochs:
            return self.gamma
        return self.gamma + (1 - self.gamma) * 0.5 * (1 + math.cos(math.pi * self.epoch / self.gamma_decay_epochs))

    def get_extra_state(self) -> dict[str, int]:
        """The epoch."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """... and back."""
        if not isinstance(state, dict) or "epoch" not in state:
            raise TypeError(f"state: expected what get_extra_state gives; got {type(state).__name__}")
        self.set_epoch(state["epoch"])

    def extra_repr(self) -> str:
        """The options, as they print."""
        names = ("towers", "gamma", "gamma_schedule", "gamma_decay_epochs", "normalize")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    # ---- for the losses ----

    def _ranks(self) -> Ranks | None:
        """The ranks whose rows make up a batch."""
        if self.training and recomputing():
            raise RuntimeError(
                f"{type(self).__name__}: called again by activation checkpointing, which would move the memory twice; "
                "checkpoint the encoders alone"
            )
        return ranks_of(**self.over)

    def _agreed(self, ranks: Ranks | None, x: Tensor, *about: tuple[str, Any]) -> Sizes:
        """The rows [n, D] of every rank, once all are about to compute the same; of one process its own."""
        if ranks is None:
            return Sizes((len(x),), (len(x),), 0)
        names = ("training", "normalize", "towers")
        said = [("features", x.shape[1]), ("dtype", x.dtype), ("samples", self.memory.num_samples)]
        said += [("gamma", self.current_gamma()), *((name, getattr(self, name)) for name in names), *about]
        return ranks.agree(type(self).__name__, said, x, len(x), len(x))

    def _total(self, own: Tensor, ranks: Ranks | None, sizes: Sizes) -> Tensor:
        """The sum of all ranks' numbers, differentiable."""
        return own if ranks is None else Sums(ranks, type(self).__name__, sizes).total(own)

    def _options(self, ranks: Ranks | None) -> dict[str, Any]:
        """Of a call of a loss of this package."""
        return {**self.engine, **(self.over if ranks is not None else {})}

    @outside_graphs
    def _stored(self, index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """What the memory has of these samples, one a row, and how often they were visited."""
        stored, visits = self.memory.read(index)
        if len(stored) != rows:
            raise ValueError(f"index: expected one sample per row of x [{rows}]; got {len(stored)}")
        return stored, visits

    @outside_graphs
    @torch.no_grad()
    def _visited(self, index: Tensor, memory: tuple[Tensor, Tensor], found: Tensor) -> Tensor:
        """log u [N, k] after this visit, from log g [N, k]; in training mode the memory holds it then, or its mean."""
        self.memory.gamma = self.current_gamma()
        stored, visits = (v.to(found.device).expand_as(found) for v in memory)
        log_u = self.memory.average(stored.to(found.dtype), visits, found)
        if self.training:
            of_sample = found.shape[1] == self.memory.directions
            found = found if of_sample else torch.logsumexp(found, 1, keepdim=True) - math.log(found.shape[1])
            self.memory.update(index, found)
        return log_u


def nothing(x: Tensor, y: Tensor, *others: Tensor) -> Tensor:
    """0 of a batch without negatives, and a gradient of 0 for all."""
    total = torch.zeros((), dtype=scale_tensor(x, 1.0).dtype, device=x.device)
    for used in (x, y, *others):
        total = total + used.reshape(-1)[:0].sum().to(total.dtype)
    return total
