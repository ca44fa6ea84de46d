"""Global contrastive losses: every sample's mean over negatives is averaged over its visits and weighs its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._library import outside_graphs
from ..arguments.checks import (
    check_backend,
    check_count,
    check_device,
    check_features,
    check_flag,
    check_number,
    check_workspace,
    scale_tensor,
    shown,
)
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.temperature import scale_of
from ..distributed.group import check_group, ranks_of
from ..losses.decomposable import decomposable
from .memory import NormalizerMemory
from .normalizers import Batch, found_by_batch

__all__ = ["ISogCLRLoss", "SogCLRLoss"]


class _GammaMemory(NormalizerMemory):
    """A memory whose visits after the first all move the mean by the same part."""

    gamma = 1.0

    def average(self, stored: Tensor, visits: Tensor, found: Tensor) -> Tensor:
        """(1 - gamma) stored + gamma found, in logarithms [N, d]; what was found where nothing is stored."""
        rest = math.log1p(-self.gamma) if self.gamma < 1 else -math.inf
        moved = torch.logaddexp(stored + rest, found + math.log(self.gamma))
        return torch.where(visits > 0, moved, found)


class SogCLRLoss(nn.Module):
    """The global contrastive loss of two towers (SogCLR; FastCLIP v1 and v3): small batches, negatives of all data.

    With h_ij = logit_scale * (<x_i, y_j> - <x_i, y_i>), row i's mean g_i of exp(h_ij) over the batch's negatives moves
    the stored u_i by ``gamma`` of the way, and the row's gradient is that of g_i / u_i; the same for columns. The value
    is the mean of log u_i + g_i / u_i - 1 over both directions, which is log g_i where nothing was stored.

    Parameters
    ----------
    num_samples : int
        Samples of the data set.
    gamma : float
        The part that a visit replaces, in 0 ... 1. A first visit stores what it found.
    gamma_schedule : {"constant", "cosine"}
        "cosine": from 1 in epoch 0 to ``gamma`` in epoch ``gamma_decay_epochs``, along half a cosine. The epoch is what
        :meth:`set_epoch` was told.
    gamma_decay_epochs : int, optional
        Of the cosine.
    rho : float, optional
        With it, the temperature 1 / logit_scale multiplies the loss, and is learnt: ``rho`` times the temperature is
        added (FastCLIP v3). Without it the loss is SogCLR's, of a given temperature.
    normalize, backend, workspace_bytes
        As in :func:`contrastive_kernels.clip_loss`.
    device : torch.device or str, optional
        Where the memory lies.
    group : ProcessGroup, DeviceMesh or "world", optional
        As in :class:`DatasetContrastiveLoss`; more than one rank is refused.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    NotImplementedError
        From a call, for several ranks.

    Notes
    -----
    4 products of 2 N^2 D flop, O(N D) memory and 24 bytes of state a sample, all of which is in the ``state_dict``.
    Everything is kept in logarithms: no temperature overflows, and nothing is added to a denominator.

    References
    ----------
    Z. Yuan et al., "Provable stochastic optimization for global contrastive learning: small batch does not harm
    performance", ICML 2022. X. Wei et al., "FastCLIP: a suite of optimization techniques to accelerate CLIP training
    with limited resources", 2024.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.SogCLRLoss(num_samples=1000, gamma=0.2, gamma_schedule="cosine", gamma_decay_epochs=18)
    >>> loss.set_epoch(18)
    >>> x = torch.eye(4).requires_grad_()
    >>> loss(x, torch.eye(4), torch.arange(4), 5.0)
    tensor(-5., grad_fn=<...>)
    >>> loss.memory.visits[:5, 0].tolist()
    [1, 1, 1, 1, 0]
    """

    def __init__(
        self,
        num_samples: int,
        *,
        gamma: float = 0.9,
        gamma_schedule: str = "constant",
        gamma_decay_epochs: int | None = None,
        rho: float | None = None,
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
        device: torch.device | str | None = None,
        group: Any | None = "auto",
    ) -> None:
        super().__init__()
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
        self.rho = None if rho is None else check_number(rho, "rho", positive=False)
        self.normalize = check_flag(normalize, "normalize")
        self.group = check_group(group)
        self.engine: dict[str, Any] = {
            "backend": check_backend(backend) or None,
            "workspace_bytes": check_workspace(workspace_bytes),
        }
        where = None if device is None else check_device(device, here=True)
        self.memory = _GammaMemory(num_samples, 2, device=where, group=None)
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
        names = ("gamma", "gamma_schedule", "gamma_decay_epochs", "rho", "normalize")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; in training mode it moves the memory.

        Parameters
        ----------
        x, y : Tensor
            Matching rows [N, D] of one dtype and device.
        index : Tensor
            Which samples they are, int64 [N].
        logit_scale : float or Tensor
            The inverse temperature.
        temperature : float or Tensor, optional
            1 / logit_scale, in its place: above 0.

        Returns
        -------
        Tensor
            A scalar; float32 (float64 for float64 inputs).
        """
        logit_scale = scale_of(x, logit_scale, temperature)
        x, y = self._checked(x, y)
        scale = scale_tensor(x, logit_scale)
        stored = self._stored(index, len(x))
        if len(x) < 2:
            return _nothing(x, y, scale)
        z_pos = (scale.detach() * _dots(x, y)).double()
        batch = Batch(x, y, scale.detach(), None, None, True)
        log_u = self._visited(index, stored, found_by_batch(batch, self.engine) - z_pos[:, None]).to(scale.dtype)
        sides = log_u[:, 0], log_u[:, 1]
        options: dict[str, Any] = {"positive_constant": 0.0, "negative_scale": 1.0 / (len(x) - 1), **self.engine}
        value: Any = decomposable(x, y, scale, sides, **options)
        loss: Tensor = value
        if self.rho is not None:
            tau = 1.0 / scale
            fixed = tau.detach()
            # the temperature's gradient has log u where the value has log u + g / u - 1
            loss = fixed * loss + (tau - fixed) * log_u.mean() + self.rho * tau
        return loss

    def _checked(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        if ranks_of(self.group, "average", "auto", False) is not None:
            raise NotImplementedError(
                f"group: {type(self).__name__} is not there over the ranks of a process group; group=None computes the "
                "loss of this process's rows: gather the others' with their gradients, and their index"
            )
        return check_features(x, y, ("x", "y"), self.normalize, matching=True)

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
        """log u [N, 2] after this visit, from log g [N, 2]; in training mode the memory holds it then."""
        self.memory.gamma = self.current_gamma()
        stored, visits = memory
        stored, visits = stored.to(found.device, found.dtype), visits.to(found.device)
        log_u = self.memory.average(stored, visits, found)
        if self.training:
            self.memory.update(index, found)
        return log_u


class ISogCLRLoss(SogCLRLoss):
    """The robust global contrastive loss, whose temperatures are every sample's own, and learnt (iSogCLR, FastCLIP v2).

    Row i of the loss is tau_i (log g_i + rho), as in :class:`SogCLRLoss` at the scale 1 / tau_i. A visit moves tau_i
    against its own gradient, log u_i + rho less the negatives' mean of h_ij exp(h_ij) / u_i, within bounds.

    Parameters
    ----------
    num_samples, gamma, gamma_schedule, gamma_decay_epochs
        As in :class:`SogCLRLoss`.
    rho : float
        How far weights may be from even: the larger, the higher the temperatures.
    temperature : float
        Every sample's first one.
    temperature_bounds : pair of float
        The least and the largest.
    temperature_rate : float
        The learning rate of the temperatures.
    temperature_momentum : float
        Of the step: this part of the former gradient stays. The first gradient counts as if there had been a 0 before.
    normalize, backend, workspace_bytes, device, group
        As in :class:`SogCLRLoss`.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    NotImplementedError
        From a call, for several ranks.

    Notes
    -----
    A pass for each direction, 8 products for value and gradients, and 2 without gradients of features for those of the
    temperatures. Those that a step was computed with are those before it.

    References
    ----------
    Z.-H. Qiu et al., "Not all semantics are created equal: contrastive self-supervised learning with automatic
    temperature individualization", ICML 2023.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.ISogCLRLoss(num_samples=100, temperature=0.05, temperature_rate=0.001)
    >>> value = loss(torch.eye(4), torch.eye(4), torch.arange(4))
    >>> loss.temperatures[:5, 0]
    tensor([0.0446, 0.0446, 0.0446, 0.0446, 0.0500])
    """

    temperatures: Tensor
    temperature_gradients: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        rho: float = 6.0,
        temperature: float = 0.01,
        temperature_bounds: tuple[float, float] = (0.005, 1.0),
        temperature_rate: float = 0.01,
        temperature_momentum: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_samples, **options)
        self.rho: float = check_number(rho, "rho", positive=False)
        temperature = check_number(temperature, "temperature", positive=True)
        if not isinstance(temperature_bounds, (tuple, list)) or len(temperature_bounds) != 2:
            raise TypeError(f"temperature_bounds: expected a pair of numbers; got {shown(temperature_bounds)}")
        low, high = (check_number(v, "temperature_bounds", positive=True) for v in temperature_bounds)
        if not low <= temperature <= high:
            raise ValueError(
                f"temperature_bounds: expected the least and the largest, and temperature between them; got {low}, "
                f"{high} and {temperature}"
            )
        self.temperature_bounds = low, high
        self.temperature_rate = check_number(temperature_rate, "temperature_rate", positive=False)
        self.temperature_momentum = check_number(temperature_momentum, "temperature_momentum", positive=False)
        if self.temperature_momentum >= 1:
            raise ValueError(f"temperature_momentum: expected a number below 1; got {shown(temperature_momentum)}")
        shape, device = (num_samples, 2), self.memory.visits.device
        self.register_buffer("temperatures", torch.full(shape, temperature, dtype=torch.float32, device=device))
        self.register_buffer("temperature_gradients", torch.zeros(shape, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ISogCLRLoss:
        """Moves, and keeps the tables' dtype."""

        def keeping(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keeping, recurse)
        return self

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        """The loss of a batch; in training mode it moves the memory and the samples' temperatures.

        Parameters
        ----------
        x, y : Tensor
            Matching rows [N, D] of one dtype and device.
        index : Tensor
            Which samples they are, int64 [N].

        Returns
        -------
        Tensor
            A scalar; float32 (float64 for float64 inputs).
        """
        x, y = self._checked(x, y)
        dtype = scale_tensor(x, 1.0).dtype
        stored = self._stored(index, len(x))
        if len(x) < 2:
            return _nothing(x, y)
        rows = index.to(self.temperatures.device)
        taus = self.temperatures[rows].to(x.device, dtype)
        count = len(x) - 1
        options: dict[str, Any] = {"positive_constant": 0.0, "negative_scale": 1.0 / count, **self.engine}
        sides, found, slopes = [(x, y, taus[:, 0]), (y, x, taus[:, 1])], [], []
        for rows_of, cols_of, tau in sides:
            found.append(_log_means(rows_of, cols_of, 1.0 / tau, options))
        log_g = torch.stack(found, 1)
        log_u = self._visited(index, stored, log_g).to(dtype)
        total = torch.zeros((), dtype=dtype, device=x.device)
        for k, (rows_of, cols_of, tau) in enumerate(sides):
            weight = tau / len(x)
            value: Any = decomposable(
                rows_of, cols_of, 1.0 / tau, log_u[:, k], weight=weight, reduction="sum", **options
            )
            total = total + 0.5 * (value + self.rho * weight.sum())
            if self.training:
                slopes.append(_slopes(rows_of, cols_of, 1.0 / tau, log_u[:, k], options))
        if self.training:
            self._move(rows, log_u, torch.stack(slopes, 1))
        return total

    @torch.no_grad()
    def _move(self, rows: Tensor, log_u: Tensor, slopes: Tensor) -> None:
        """A step of the temperatures of samples [N]."""
        kept = self.temperature_momentum
        gradient = (log_u + self.rho - slopes).to(self.temperatures.device, torch.float32)
        usable = gradient.isfinite()
        former, before = self.temperature_gradients[rows], self.temperatures[rows]
        moved = torch.where(usable, kept * former + (1 - kept) * gradient, former)
        after = (before - self.temperature_rate * moved).clamp(*self.temperature_bounds)
        self.temperature_gradients[rows] = moved
        self.temperatures[rows] = torch.where(usable, after, before)


@torch.no_grad()
def _log_means(x: Tensor, y: Tensor, scale: Tensor, options: dict[str, Any]) -> Tensor:
    """log g_i [N] in float64: of the mean of exp(h_ij) over the negatives of row i."""
    zeros = torch.zeros(len(x), dtype=scale.dtype, device=x.device)
    found: Any = decomposable(x, y, scale, zeros, return_log_normalizer=True, reduction="none", **options)
    log_z: Tensor = found[1]
    return log_z.double()


def _slopes(x: Tensor, y: Tensor, scale: Tensor, log_u: Tensor, options: dict[str, Any]) -> Tensor:
    """The negatives' mean of h_ij exp(h_ij) / u_i [N]: the scale's gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        x, y, leaf, log_u = (v.clone() if v.is_inference() else v.detach() for v in (x, y, scale, log_u))
        value: Any = decomposable(x, y, leaf.requires_grad_(), log_u, reduction="sum", **options)
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient * scale


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> [N] in the dtype of the scores, not differentiable."""
    dtype = scale_tensor(x, 1.0).dtype
    return (x.detach().to(dtype) * y.detach().to(dtype)).sum(1)


def _nothing(x: Tensor, y: Tensor, *others: Tensor) -> Tensor:
    """0 of a batch without negatives, and a gradient of 0 for all."""
    total = torch.zeros((), dtype=scale_tensor(x, 1.0).dtype, device=x.device)
    for used in (x, y, *others):
        total = total + used.reshape(-1)[:0].sum().to(total.dtype)
    return total
