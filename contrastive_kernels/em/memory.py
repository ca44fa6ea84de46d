"""What every sample's negatives summed to when it was last met: the state of stochastic EM over a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments.checks import check_number

__all__ = ["NormalizerMemory", "NormalizerStatistics"]


#: Share of the running statistics that one update replaces.
_STATISTICS_STEP = 0.1


#: Samples that are counted at a time.
_CHUNK = 2**22


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


class NormalizerMemory(nn.Module):
    """The logarithm of every sample's mean of exp(z) over its negatives, per direction, averaged over visits.

    Visit v moves the stored mean by ``g = max(v ** -step, floor)`` of the way to the one that a batch found:
    ``mean <- (1 - g) * mean + g * found``, in logarithms. A first visit stores what it found.

    Parameters
    ----------
    num_samples : int
        Samples of the data set.
    directions : int
        Kinds of anchors that a sample has: 2 for pairs (x finds y, y finds x), 1 where one side is queried alone.
    step : float
        The exponent: 1 averages all visits alike, smaller ones forget; 0.5 < step <= 1 converges while the encoder
        stands still.
    floor : float
        The least part that a visit replaces, in 0 ... 1: an encoder that learns makes old visits stale.
    device : torch.device or str, optional
        Where it is kept: the features' device, so that nothing waits for the host, or "cpu" for a data set that does
        not fit there.
    storage : str or Path, optional
        A folder whose files hold the state, mapped into memory; on the CPU alone. Files that exist are taken up again.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Notes
    -----
    8 bytes a sample and direction: float32 and a count of visits. 10^8 samples in both directions take 1.6 GB, of which
    the logarithms are 800 MB. The raw scores' mean is stored, not the normaliser: a positive's own score is known
    exactly whenever its sample is met, so that neither its progress nor another view of the sample makes the state
    stale, and neither c nor K is part of it.

    The updates run on the memory's device, in place, without synchronisation. Where a sample occurs more than once in a
    batch, its last row counts, and it is one visit. A found mean that is not finite (no negatives, or a batch that
    overflowed) leaves the sample as it was.

    References
    ----------
    After C. Chen et al., "Why do we need large batch sizes in contrastive learning? A gradient-bias perspective",
    NeurIPS 2022; derivation in docs/decomposable.md.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> memory = ck.NormalizerMemory(1000, directions=1, step=1.0)
    >>> index = torch.tensor([3, 7])
    >>> memory.update(index, torch.tensor([[0.0], [1.0]]))
    >>> memory.update(index, torch.tensor([[0.0], [2.0]]))
    >>> memory.read(index)[0].exp().mean(1)  # (1 + 1) / 2 and (e + e^2) / 2
    tensor([1.0000, 5.0537])
    """

    log_mean: Tensor
    visits: Tensor
    unvisited: Tensor
    running: Tensor

    def __init__(
        self,
        num_samples: int,
        directions: int = 2,
        *,
        step: float = 1.0,
        floor: float = 0.0,
        device: torch.device | str | None = None,
        storage: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.step = check_number(step, "step", positive=True)
        self.floor = check_number(floor, "floor", positive=False)
        if self.step > 1 or self.floor > 1:
            raise ValueError(f"step, floor: expected at most 1; got {step} and {floor}")
        if directions not in (1, 2):
            raise ValueError(f"directions: expected 1 or 2; got {directions!r}")
        if storage is not None and torch.device(device or "cpu").type != "cpu":
            raise ValueError(f"storage: expected a memory on the CPU; got device {device}")
        self.storage = None if storage is None else Path(storage)
        shape = (_check_samples(num_samples, 1), directions)
        taken_up = self.storage is not None and (self.storage / "visits.bin").exists()
        self.register_buffer("log_mean", self._allocate("log_mean", shape, torch.float32, device))
        self.register_buffer("visits", self._allocate("visits", shape, torch.int32, device))
        # by direction: samples that were never met, on the device; the host's copy arrives when it arrives
        self.register_buffer("unvisited", torch.full((directions,), num_samples, device=self.visits.device))
        if taken_up:
            self.unvisited.sub_(torch.stack([part.count_nonzero(0) for part in self.visits.split(_CHUNK)]).sum(0))
        # by direction: E[log r], E[log r ^2], max log r, E[r], E[r^2], weight of the averages
        self.register_buffer("running", torch.zeros(directions, 6, device=self.visits.device))
        self._cold = True
        self._arriving: tuple[Tensor, Any] | None = None

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return self.log_mean.shape[0]

    @property
    def directions(self) -> int:
        """1 or 2."""
        return self.log_mean.shape[1]

    @property
    def cold(self) -> bool:
        """Whether some sample may not have been met yet; the host learns of the last one with a delay."""
        if self._cold and self._arriving is not None:
            value, event = self._arriving
            if event is None or event.query():
                self._cold = bool((value > 0).any())
                self._arriving = None
        return self._cold

    def extra_repr(self) -> str:
        """Sizes and rule, as they print."""
        return f"{self.num_samples}, directions={self.directions}, step={self.step}, floor={self.floor}"

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The stored logarithms [N, directions] and the visits so far, on the index's device.

        Raises
        ------
        TypeError, ValueError
            For an index that is no int64 vector, or outside the data set (on a GPU: a device-side assertion).
        """
        rows = self._check_index(index)
        return self.log_mean[rows].to(index.device), self.visits[rows].to(index.device)

    def average(self, stored: Tensor, visits: Tensor, found: Tensor) -> Tensor:
        """What a visit makes of `stored` [N, d] after `visits` earlier ones; a pure function."""
        gain = (visits + 1).to(stored.dtype).pow(-self.step).clamp_min(self.floor)
        # the first visit: gain 1, and log(1 - 1) = -inf leaves nothing of what was stored
        return torch.logaddexp(stored + torch.log1p(-gain), found + gain.log())

    @torch.compiler.disable
    @torch.no_grad()
    def update(
        self, index: Tensor, found: Tensor, direction: int | None = None, lower_bound: Tensor | None = None
    ) -> None:
        """Moves the samples of a batch towards what it found.

        Parameters
        ----------
        index : Tensor
            Samples [N], int64.
        found : Tensor
            Logarithms of the batch's means of exp(z) over negatives: [N, directions], or [N, 1] for one direction.
        direction : int, optional
            The one that was queried; None for all.
        lower_bound : Tensor, optional
            Like ``found``: logarithms that the state is raised to where it lies below. Of a finite data set, the part
            of the sum that the batch has seen is such a bound; of infinitely many negatives there is none.

        Raises
        ------
        TypeError, ValueError
            As :meth:`read`, and for a ``found`` of another shape.
        """
        rows, columns = self._check_index(index), self._columns(direction)
        found = self._check_found(found, "found", len(rows), columns)
        if len(rows) == 0:
            return
        last, first = _last_of_each(rows)
        stored, visits = self.log_mean[rows, columns], self.visits[rows, columns]
        found = found[last]
        usable = found.isfinite()
        moved = self.average(stored, visits, found)
        if lower_bound is not None:
            bound = self._check_found(lower_bound, "lower_bound", len(rows), columns)[last]
            moved = torch.where(bound.isfinite(), torch.maximum(moved, bound), moved)
        self._observe(columns, found - stored, usable & (visits > 0) & first[:, None])
        self.unvisited[columns] -= (usable & (visits == 0) & first[:, None]).sum(0)
        # duplicates write the same values, so that their order does not matter
        self.log_mean[rows, columns] = torch.where(usable, moved, stored)
        self.visits[rows, columns] = visits + usable.to(visits.dtype)
        self._tell_host()

    def statistics(self) -> NormalizerStatistics:
        """How fresh the memory is; reads it from the device."""
        mean, square, largest, ratio, ratio_square, weight = self.running.double().cpu().T
        mean, square, ratio, ratio_square = (v / weight for v in (mean, square, ratio, ratio_square))
        spread = (square - mean.square()).clamp_min(0).sqrt()
        unvisited = int(self.unvisited.max())
        largest = torch.where(weight > 0, largest, torch.nan)
        return NormalizerStatistics(
            samples=self.num_samples,
            visited=self.num_samples - unvisited,
            mean_visits=float(self.visits.sum(dtype=torch.int64)) / max(self.visits.numel(), 1),
            log_ratio=tuple(mean.tolist()),
            log_ratio_std=tuple(spread.tolist()),
            largest=tuple(largest.tolist()),
            effective=tuple((ratio.square() / ratio_square).tolist()),
        )

    @torch.no_grad()
    def rescale(self, ratio: float | Tensor) -> None:
        """Multiplies all logarithms by (new scale / old scale), where the temperature moved far between two visits.

        The logarithm of a mean of exp(scale * s) is convex in the scale and 0 at scale 0. So where it is positive, this
        ends nearer to the truth than leaving it alone does, on the same side: too low after a rise, too high after a
        fall. In training it made no measurable difference: docs/decomposable.md. O(num_samples), in place.
        """
        self.log_mean.mul_(ratio)

    @torch.no_grad()
    def grow(self, num_samples: int) -> None:
        """Makes room for samples that the data set gained; they have not been met. What is stored stays.

        Raises
        ------
        ValueError
            For fewer samples than there are.
        """
        before = self.num_samples
        _check_samples(num_samples, before)
        shape, device = (num_samples, self.directions), self.visits.device
        for name in ("log_mean", "visits"):
            old: Tensor = getattr(self, name)
            new = self._allocate(name, shape, old.dtype, device)
            if self.storage is None:
                new[:before] = old
            setattr(self, name, new)
        self.unvisited += num_samples - before
        self._cold = self._cold or num_samples > before
        self._arriving = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._cold, self._arriving = True, None
        self._tell_host()

    def _allocate(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """Zeros [samples, directions]; with a storage, what its file holds, extended by zeros."""
        if self.storage is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        self.storage.mkdir(parents=True, exist_ok=True)
        path, size = self.storage / f"{name}.bin", shape[0] * shape[1]
        held = path.stat().st_size // dtype.itemsize if path.exists() else 0
        if held > size:
            raise ValueError(f"storage: expected {name}.bin with at most {size} numbers; got {held} in {self.storage}")
        path.touch()
        # torch 2.13's from_file zeroes the first byte of a file that it extends
        os.truncate(path, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def _check_index(self, index: Any) -> Tensor:
        """The index on the memory's device, within the data set."""
        if not isinstance(index, Tensor):
            raise TypeError(f"index: expected an int64 tensor [N]; got {type(index).__name__}")
        if index.dtype != torch.int64:
            raise TypeError(f"index: expected int64; got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"index: expected shape [N]; got {list(index.shape)}")
        outside = ((index < 0) | (index >= self.num_samples)).any()
        if index.device.type != "cpu":
            torch._assert_async(~outside, "index: a sample lies outside the memory")
        elif bool(outside):
            raise ValueError(
                f"index: expected samples in [0, {self.num_samples}); got values in [{int(index.min())}, "
                f"{int(index.max())}]. NormalizerMemory.grow makes room for a data set that grew."
            )
        return index.to(self.visits.device)

    def _columns(self, direction: int | None) -> slice:
        if direction is None:
            return slice(0, self.directions)
        if direction not in range(self.directions):
            raise ValueError(f"direction: expected None or one of 0 ... {self.directions - 1}; got {direction!r}")
        return slice(direction, direction + 1)

    def _check_found(self, found: Any, name: str, rows: int, columns: slice) -> Tensor:
        shape = (rows, columns.stop - columns.start)
        if not isinstance(found, Tensor):
            raise TypeError(f"{name}: expected a tensor of shape {list(shape)}; got {type(found).__name__}")
        if found.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}; got {list(found.shape)}")
        return found.detach().to(self.log_mean)

    def _observe(self, columns: slice, log_ratio: Tensor, counted: Tensor) -> None:
        """Folds the log ratios [N, d] of the rows that count into the running statistics."""
        number = counted.sum(0)
        values = torch.where(counted, log_ratio, 0.0)
        ratio = torch.where(counted, log_ratio.clamp_max(40.0).exp(), 0.0)
        sums = torch.stack([values, values.square(), ratio, ratio.square()]).sum(1)  # [4, d]
        share = _STATISTICS_STEP * (number > 0)
        means = torch.cat([sums / number.clamp_min(1), torch.ones_like(sums[:1])])
        running = self.running[columns].T
        largest = torch.where(counted, log_ratio, -torch.inf).amax(0)
        largest = torch.where(running[5] > 0, torch.maximum(running[2], largest), largest)
        averages = torch.lerp(running[[0, 1, 3, 4, 5]], means, share.to(means.dtype))
        updated = torch.stack([*averages[:2], largest, *averages[2:]])
        self.running[columns] = torch.where(number > 0, updated, running).T

    def _tell_host(self) -> None:
        """Sends the number of samples that were never met on its way to the host, if it still wants to know."""
        if not self._cold or self._arriving is not None or self.unvisited.is_meta:
            return
        if self.unvisited.device.type == "cuda":
            value = torch.empty_like(self.unvisited, device="cpu", pin_memory=True)
            value.copy_(self.unvisited, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.unvisited.device))
            self._arriving = (value, event)
        else:
            self._arriving = (self.unvisited.clone(), None)


def _check_samples(num_samples: Any, least: int) -> int:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"num_samples: expected an int; got {type(num_samples).__name__}")
    if num_samples < least:
        raise ValueError(f"num_samples: expected at least {least}; got {num_samples}")
    return num_samples


def _last_of_each(index: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's sample occurs last [N], and whether the row is that one [N]; the same in every run."""
    ordered, order = torch.sort(index, stable=True)
    last = order[torch.searchsorted(ordered, index, right=True) - 1]
    return last, last == torch.arange(len(index), device=index.device)
