"""The registry of backends: who can compute a panel, who is chosen, and why the others are not."""

from __future__ import annotations

import functools
import warnings

import torch

from .._library import constant_in_graphs
from ..panels.terms import EXPONENTIAL, SEARCHES, PairTerm
from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .torch import TorchBackend
from .triton import TritonBackend

__all__ = ["ORDER", "choose", "chosen_name", "get", "names", "table"]

#: From the most to the least preferred; the last one serves everything.
ORDER: tuple[Backend, ...] = (TritonBackend(), CudaBackend(), CpuBackend(), TorchBackend())


def names() -> tuple[str, ...]:
    """Names of all backends, the preferred ones first."""
    return tuple(backend.name for backend in ORDER)


def get(name: str) -> Backend:
    """The backend of this name, or a ValueError that lists the names."""
    for backend in ORDER:
        if backend.name == name:
            return backend
    raise ValueError(f"backend: expected None or one of {', '.join(names())}; got {name!r}")


def choose(name: str | None, device: torch.device, dtype: torch.dtype, term: PairTerm = EXPONENTIAL) -> Backend:
    """The named backend, or the first that can serve. A named one that cannot serve is a ValueError with the reason."""
    if device.type == "cpu":  # small batches have no time for the reasons
        return _on_cpu(ORDER, name, dtype, term)
    return _choose(ORDER, name, device, dtype, term)


@constant_in_graphs
def chosen_name(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of who is chosen for the exponential term, which a compiler takes as a constant."""
    return choose(name, device, dtype).name


def _choose(
    order: tuple[Backend, ...], name: str | None, device: torch.device, dtype: torch.dtype, term: PairTerm
) -> Backend:
    if name is not None:
        backend = get(name)
        reason = backend.refusal(device, dtype, term)
        if reason is not None:
            raise ValueError(f"backend: {name!r} cannot serve {dtype} on {device}: {reason}")
        return backend
    # the last one serves everything
    chosen = next(backend for backend in order if backend.refusal(device, dtype, term) is None)
    if chosen.name == "torch" and term not in SEARCHES:
        _warn_once(device, dtype)
    return chosen


@functools.cache
def _on_cpu(order: tuple[Backend, ...], name: str | None, dtype: torch.dtype, term: PairTerm) -> Backend:
    """The same for tensors on the CPU, of which nothing changes while a process runs."""
    return _choose(order, name, torch.device("cpu"), dtype, term)


def table(device: torch.device, dtype: torch.dtype, term: PairTerm = EXPONENTIAL) -> list[tuple[str, str | None]]:
    """Each backend's name with the reason why it cannot serve (None: it can)."""
    return [(backend.name, backend.refusal(device, dtype, term)) for backend in ORDER]


_warned: set[str] = set()


def _warn_once(device: torch.device, dtype: torch.dtype) -> None:
    """Says once per device type that a device with kernels of its own runs on the portable backend."""
    if device.type in _warned or dtype == torch.float64 or device.type not in ("cpu", "cuda"):
        return
    _warned.add(device.type)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in table(device, dtype) if reason is not None)
    warnings.warn(
        f"contrastive_kernels runs on its portable torch backend on {device.type} ({reasons})",
        RuntimeWarning,
        stacklevel=2,
    )
