"""The global contrastive loss whose temperatures are every sample's own, and learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._library import break_in_graphs
from ..arguments.checks import check_features, check_number, shown
from ..distributed.group import Ranks, Sizes, told
from ..losses.module import keeping_dtypes
from ..panels.size import score_dtype
from .expectation import wide
from .global_base import GlobalLoss, nothing
from .sides import Samples, Side
from .statistics import last_of_each

__all__ = ["ISogCLRLoss"]

#: Added to the roots of mean squares, as in torch's Adam.
_ADAM_EPS = 1e-8


class ISogCLRLoss(GlobalLoss):
    """The robust global contrastive loss, whose temperatures are every sample's own, and learnt (iSogCLR, FastCLIP v2).

    Row i of the loss is tau_i (log g_i + rho), as in :class:`SogCLRLoss` at the scale 1 / tau_i. A visit moves tau_i
    against its own gradient, log u_i + rho less the negatives' mean of h_ij exp(h_ij) / u_i, within bounds. Of one
    tower a sample has one temperature, for both views, and their logits stand for h_ij.

    Parameters
    ----------
    num_samples, towers, gamma, gamma_schedule, gamma_decay_epochs
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
    temperature_betas : pair of float, optional
        With them the step is Adam's, of these decays, a sample's visits being its steps (FastCLIP v2); the momentum has
        no part in it.
    temperature_clip : float, optional
        Gradients of temperatures beyond it are cut to it (FastCLIP v2: 5).
    normalize, backend, workspace_bytes, device, group, gradients, strategy, uneven
        As in :class:`SogCLRLoss`.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Notes
    -----
    A pass for each direction (of one tower, of all views), 8 products for value and gradients, and 2 without gradients
    of features for those of the temperatures. Those that a step was computed with are those before it. Over the ranks
    of a group all hold the same temperatures.

    FastCLIP v2 is this loss with a cosine of gamma and Adam's steps, bounds of 0.01 and 1 and a clip of 5. Adam is as
    defined here; the published code lets its averages decay from the second epoch on alone, and does not multiply a
    row's gradient by its temperature, as the loss that it states does.

    References
    ----------
    Z.-H. Qiu et al., "Not all semantics are created equal: contrastive self-supervised learning with automatic
    temperature individualization", ICML 2023. X. Wei et al., "FastCLIP: a suite of optimization techniques to
    accelerate CLIP training with limited resources", 2024.

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
    temperature_squares: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        rho: float = 6.0,
        temperature: float = 0.01,
        temperature_bounds: tuple[float, float] = (0.005, 1.0),
        temperature_rate: float = 0.01,
        temperature_momentum: float = 0.1,
        temperature_betas: tuple[float, float] | None = None,
        temperature_clip: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_samples, **options)
        self.rho: float = check_number(rho, "rho", positive=False)
        self.temperature = temperature = check_number(temperature, "temperature", positive=True)
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
        self.temperature_betas = None if temperature_betas is None else _check_betas(temperature_betas)
        self.temperature_clip = (
            None if temperature_clip is None else check_number(temperature_clip, "temperature_clip", positive=True)
        )
        shape, device = (num_samples, self.towers), self.memory.visits.device
        self.register_buffer("temperatures", torch.full(shape, temperature, dtype=torch.float32, device=device))
        self.register_buffer("temperature_gradients", torch.zeros(shape, dtype=torch.float32, device=device))
        if self.temperature_betas is not None:
            self.register_buffer("temperature_squares", torch.zeros(shape, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ISogCLRLoss:
        """Moves, and keeps the tables' dtype."""
        super()._apply(keeping_dtypes(fn), recurse)
        return self

    def extra_repr(self) -> str:
        """The options, as they print."""
        names = ("rho", "temperature", "temperature_bounds", "temperature_rate", "temperature_momentum",
                 "temperature_betas", "temperature_clip")  # fmt: skip
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)!r}" for name in names)])

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
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

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit.
        RuntimeError
            In training within the recomputation of activation checkpointing: the memory would move twice.
        """
        ranks = self._ranks()
        call_it = _over_ranks if ranks is not None else ISogCLRLoss._forward
        loss: Tensor = call_it(self, ranks, x, y, index)
        return loss

    def _forward(self, ranks: Ranks | None, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        with told(ranks, x):
            x, y = check_features(x, y, ("x", "y"), self.normalize, matching=True)
            stored = self._stored(index, len(x))
        rule = (self.rho, self.temperature, self.temperature_bounds, self.temperature_rate, self.temperature_momentum,
                self.temperature_betas, self.temperature_clip)  # fmt: skip
        sizes = self._agreed(ranks, x, ("rho and the rule of temperatures", rule))
        total = sum(sizes.rows)
        if total < 2:
            return nothing(x, y)
        rows = index.to(self.temperatures.device)
        taus = self.temperatures[rows].to(x.device, score_dtype(x.dtype))
        options = self._options(ranks)
        weight = taus.expand(-1, 2) / (2 * total)
        samples: Samples | None = None
        if self.towers == 1:
            samples = Samples.of(index, x.device, ranks, sizes, type(self).__name__)
            views, weight = torch.cat([x, y]), weight * samples.several
            sides = [Side(views, views, 1.0 / taus[:, 0].repeat(2), True, 2 * total - 2, samples, options)]
        else:
            sides = [Side(*each, True, total - 1, None, options)
                     for each in ((x, y, 1.0 / taus[:, 0]), (y, x, 1.0 / taus[:, 1]))]  # fmt: skip
        loss, own, log_u, slopes = self._weighed(sides, samples, index, stored, weight)
        if self.training:
            gradient = log_u + self.rho - slopes
            self._move(rows, gradient if self.towers == 2 else gradient.mean(1, keepdim=True), ranks, sizes)
        return loss + self._total(own + self.rho * weight.sum(), ranks, sizes)

    def _weighed(
        self,
        sides: list[Side],
        samples: Samples | None,
        index: Tensor,
        stored: tuple[Tensor, Tensor],
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of both sides or of all views, weighed [N, 2]: the sum over ranks, what this rank adds; log u and slopes."""
        lengths = [len(side.x) for side in sides]

        def by_row(parts: list[Tensor]) -> Tensor:
            """[N, 2] of the sides' vectors."""
            return torch.cat(parts).view(2, -1).T

        log_g = by_row([side.log_means() for side in sides])
        if samples is None:
            log_u = relative = self._visited(index, stored, log_g)
        else:
            z_pos = by_row([side.positive_logits().detach() for side in sides]).to(log_g.dtype)
            log_u = self._visited(index, stored, log_g + z_pos).where(samples.several, torch.nan)
            relative = log_u - z_pos
        of_sides = relative.to(weight.dtype).T.reshape(-1).split(lengths)
        weights = weight.T.reshape(-1).split(lengths)
        values = [side.value(*each) for side, *each in zip(sides, of_sides, weights)]
        slopes = [side.slopes(each) for side, each in zip(sides, of_sides)] if self.training else [weight.T.reshape(-1)]
        total, own = (sum(parts[1:], parts[0]) for parts in zip(*values))
        return total, own, log_u, by_row(slopes)

    @torch.no_grad()
    def _move(self, rows: Tensor, gradient: Tensor, ranks: Ranks | None, sizes: Sizes) -> None:
        """A step of the temperatures of samples [N], given their gradients [N, towers]."""
        if ranks is not None:
            transport, device = ranks.transport(type(self).__name__), gradient.device
            rows, gradient = (transport.all_gather(v.to(device), sizes.rows) for v in (rows, gradient))
        rows, gradient = rows.to(self.temperatures.device), gradient.to(self.temperatures.device, torch.float32)
        last, _ = last_of_each(rows)  # duplicates write the same
        gradient = gradient[last]
        usable = gradient.isfinite()
        if self.temperature_clip is not None:
            gradient = gradient.clamp(-self.temperature_clip, self.temperature_clip)
        former, before = self.temperature_gradients[rows], self.temperatures[rows]
        kept = self.temperature_momentum if self.temperature_betas is None else self.temperature_betas[0]
        moved = torch.where(usable, kept * former + (1 - kept) * gradient, former)
        step = moved if self.temperature_betas is None else self._adam(rows, moved, gradient, usable)
        after = (before - self.temperature_rate * step).clamp(*self.temperature_bounds)
        self.temperature_gradients[rows] = moved
        self.temperatures[rows] = torch.where(usable, after, before)

    def _adam(self, rows: Tensor, mean: Tensor, gradient: Tensor, usable: Tensor) -> Tensor:
        """The mean gradients of samples [N], corrected for where they began, over the roots of the mean squares."""
        assert self.temperature_betas is not None
        first, second = self.temperature_betas
        former = self.temperature_squares[rows]
        squares = torch.where(usable, second * former + (1 - second) * gradient.square(), former)
        self.temperature_squares[rows] = squares
        visits = self.memory.visits[rows].to(mean.device, wide(mean.device))
        of_mean, of_squares = (1 - torch.full_like(visits, beta).pow(visits) for beta in (first, second))
        return ((mean / of_mean) / ((squares / of_squares).sqrt() + _ADAM_EPS)).to(mean.dtype)


_over_ranks = break_in_graphs(ISogCLRLoss._forward)


def _check_betas(betas: Any) -> tuple[float, float]:
    """Adam's decays."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"temperature_betas: expected None or a pair of numbers; got {shown(betas)}")
    first, second = (check_number(v, "temperature_betas", positive=False) for v in betas)
    if max(first, second) >= 1:
        raise ValueError(f"temperature_betas: expected numbers below 1; got {first} and {second}")
    return first, second
