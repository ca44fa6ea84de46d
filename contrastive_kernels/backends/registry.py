"""The registry of backends: who can compute a panel, who is chosen, and why the others are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..panels.panel import Panel, Route, SearchPanel
from ..panels.size import Size
from ..panels.terms import EXPONENTIAL, SEARCHES, SIGMOID, PairTerm
from . import cpu as cpu_backend
from . import cuda as cuda_backend
from . import torch as torch_backend
from . import triton as triton_backend
from .products import default_weights_dtype

__all__ = ["ORDER", "Backend", "choose", "get", "names", "table"]


def _no_scratch(rows: int, cols: int, size: Size) -> int:
    return 0


@dataclass(frozen=True)
class Backend:
    """Its panel operations, the terms they know, and why they cannot serve a device and dtype (None: they can)."""

    name: str
    reduce_panel: Callable[[PairTerm, Panel], None]
    weight_panel: Callable[[PairTerm, Panel], None]
    why_not: Callable[[torch.device, torch.dtype], str | None]
    #: how it would compute what it can serve
    route: Callable[[Size], Route]
    #: the same for a GPU that is not there, by its compute capability (90 for 9.0); None: it serves none
    why_not_capability: Callable[[int, torch.dtype], str | None] | None = None
    #: score-sized temporaries that its operations allocate beside the workspace's own
    temporaries: int = 0
    #: it wants room for a panel's scores [R, C]; without it no scores are kept between the passes
    score_tile: bool = True
    #: it takes operands in their own dtype, not in that of the scores
    native_operands: bool = False
    #: the dtype of its weights for a device and an operands' dtype; one with float16 weights honours panel.factor
    weights_dtype: Callable[[torch.device, torch.dtype], torch.dtype] = default_weights_dtype
    #: float32 that it wants beside for a panel of R rows and C columns; its route has a bound
    scratch: Callable[[int, int, Size], int] = _no_scratch
    #: the pair terms that it knows
    terms: tuple[PairTerm, ...] = (EXPONENTIAL, SIGMOID)
    #: the operation of the terms that search and count
    search_panel: Callable[[PairTerm, SearchPanel], None] | None = None
    #: score-sized temporaries of that one
    search_temporaries: int = 0

    def refusal(self, device: torch.device, dtype: torch.dtype, term: PairTerm = EXPONENTIAL) -> str | None:
        """Why it cannot serve a term on this device and in this dtype, or None: it can."""
        reason = self.why_not(device, dtype)
        if reason is None and term not in self.terms:
            return f"it has no {term.name} term"
        return reason


#: From the most to the least preferred; the last one serves everything.
ORDER: tuple[Backend, ...] = (
    Backend(
        "triton",
        triton_backend.reduce_panel,
        triton_backend.weight_panel,
        triton_backend.why_not,
        triton_backend.route,
        why_not_capability=triton_backend.why_not_capability,
        score_tile=False,
        native_operands=True,
        weights_dtype=triton_backend.weights_dtype,
        scratch=triton_backend.scratch,
    ),
    Backend(
        "cuda",
        cuda_backend.reduce_panel,
        cuda_backend.weight_panel,
        cuda_backend.why_not,
        cuda_backend.route,
        why_not_capability=cuda_backend.why_not_capability,
        score_tile=False,
        native_operands=True,
        weights_dtype=cuda_backend.weights_dtype,
        scratch=cuda_backend.scratch,
    ),
    Backend(
        "cpu",
        cpu_backend.reduce_panel,
        cpu_backend.weight_panel,
        cpu_backend.why_not,
        cpu_backend.route,
        terms=(EXPONENTIAL, SIGMOID, *SEARCHES),
        search_panel=cpu_backend.search_panel,
    ),
    Backend(
        "torch",
        torch_backend.reduce_panel,
        torch_backend.weight_panel,
        torch_backend.why_not,
        torch_backend.route,
        temporaries=3,
        terms=(EXPONENTIAL, SIGMOID, *SEARCHES),
        search_panel=torch_backend.search_panel,
        search_temporaries=8,
    ),
)


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
    if name is not None:
        backend = get(name)
        reason = backend.refusal(device, dtype, term)
        if reason is not None:
            raise ValueError(f"backend: {name!r} cannot serve {dtype} on {device}: {reason}")
        return backend
    for backend in ORDER:
        if backend.refusal(device, dtype, term) is None:
            if backend.name == "torch" and term not in SEARCHES:
                _warn_once(device, dtype)
            return backend
    raise AssertionError("the torch backend serves everything")


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
