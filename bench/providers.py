"""Who computes the losses: ours by backend, plain torch in its several forms, and every peer that is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cases import DTYPES, Case, Inputs
from .formulas import BLOCKED, DENSE

__all__ = ["BLOCK_ROWS", "Provider", "get", "providers", "register"]

Forward = Callable[[], Tensor]

#: Rows of one checkpointed block.
BLOCK_ROWS = 1024
#: Visits behind a memory's averages: so many that a hundred more do not move the result.
EM_VISITS = 10**8
#: A provider whose estimated peak is above this part of the free memory is left out instead of tried.
MEMORY_SHARE = 0.8


#: (loss, D, dtype) that the default set measures at many batch sizes.
CURVE = ("clip_loss", 256, "float32")


def _always(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Provider:
    """Somebody who computes some of the losses.

    Parameters
    ----------
    name : str
        Its name on the command line and in the rows.
    build : callable
        (case, inputs) -> a function of no argument that returns the loss.
    losses : frozenset of str
        What it computes.
    backend : str, optional
        Ours only: the backend.
    package : str
        The distribution whose version belongs in the row.
    module : str, optional
        What has to be importable.
    devices : tuple of str
        Where it runs.
    learnable_scale : bool
        It gives the temperature a gradient.
    normalizes : bool
        It normalises x and y inside. On our unit-norm inputs the value is the same; its gradients are compared with
        those of the loss of the normalised features.
    rounds_logits : bool
        In 16 bits its logits have 16 bits too, and in small batches its gradients few right ones. It is right if it is
        so in float32.
    peak_bytes : callable
        (case) -> about what it allocates, for a refusal before the machine runs out of memory.
    refuses : callable
        (case) -> a further reason why it cannot compute a case, or None.
    by_default : callable
        (case) -> whether the default set has the time for it.
    """

    name: str
    build: Callable[[Case, Inputs], Forward]
    losses: frozenset[str]
    backend: str | None = None
    package: str = "torch"
    module: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    learnable_scale: bool = True
    normalizes: bool = False
    rounds_logits: bool = False
    peak_bytes: Callable[[Case], float] = lambda case: 0.0
    refuses: Callable[[Case], str | None] = lambda case: None
    by_default: Callable[[Case], bool] = _always

    @property
    def is_ours(self) -> bool:
        """One of this package's backends."""
        return self.backend is not None

    @property
    def version(self) -> str | None:
        """The version of its distribution; None where it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def why_absent(self) -> str | None:
        """Why it cannot run here at all, or None."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        return None

    def why_not(self, case: Case) -> str | None:
        """Why it cannot compute this case, or None: it can."""
        kind = torch.device(case.device).type
        if kind not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if kind == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        if case.loss not in self.losses:
            return f"has no {case.loss}"
        if case.mode == "fwd+bwd" and case.learnable_scale and not self.learnable_scale:
            return "its temperature is a number: no gradient"
        absent = self.why_absent() or self.refuses(case)
        if absent is not None:
            return absent
        needed, free = self.peak_bytes(case), _free_bytes(case.device)
        if needed > MEMORY_SHARE * free:
            return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return None


def _free_bytes(device: str) -> float:
    """Bytes that can still be allocated."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def _matrices(count: float) -> Callable[[Case], float]:
    """So many matrices of scores in the case's dtype."""

    def estimate(case: Case) -> float:
        rows, columns = case.shape
        return count * rows * columns * DTYPES[case.dtype].itemsize

    return estimate


def _up_to(rows: int) -> Callable[[Case], bool]:
    """The default set leaves larger batches out."""
    return lambda case: case.n <= rows


# ---- ours ----


def _ours(backend: str, case: Case, i: Inputs) -> Forward:
    import contrastive_kernels as ck

    function: Callable[..., Tensor] = getattr(ck, case.loss)
    return lambda: function(i.x, i.y, i.scale, *i.extra, backend=backend)


def _ours_refuses(backend: str, case: Case) -> str | None:
    import contrastive_kernels as ck

    row = torch.empty(1, case.d, dtype=DTYPES[case.dtype], device=case.device)
    return ck.why_not(backend, row, row)


def _our_providers() -> list[Provider]:
    import contrastive_kernels as ck

    return [
        Provider(
            f"ours-{backend}",
            partial(_ours, backend),
            frozenset(DENSE),
            backend=backend,
            package="contrastive-kernels",
            refuses=partial(_ours_refuses, backend),
            by_default=_up_to(8192) if backend == "torch" else _always,
        )
        for backend in ck.list_backends()
    ]


def _em_step(case: Case, i: Inputs) -> Forward:
    """The whole step of stochastic EM: normalisers read from a warm memory, the loss, the memory moved."""
    import contrastive_kernels as ck

    assert i.log_z is not None
    # c = 0, for the case's stale normalisers may lie below c = 1; what c adds to the value is a constant
    loss = ck.DecomposableContrastiveLoss(
        case.n, negatives="batch", include_positive=False, step=1.0, floor=0.0, device=case.device
    )
    constant = torch.stack(i.log_z).neg().exp().mean()
    z_pos = (i.scale * (i.x.to(i.scale.dtype) * i.y.to(i.scale.dtype)).sum(1)).detach()
    index = torch.arange(case.n, device=case.device)
    means = torch.stack(i.log_z, 1) + (z_pos - math.log(max(case.n - 1, 1)))[:, None]
    loss.memory.update(index, means)
    loss.memory.visits.fill_(EM_VISITS)
    return lambda: loss(i.x, i.y, index, i.scale) + constant


# ---- plain torch ----


def _dense(case: Case, i: Inputs) -> Forward:
    return partial(DENSE[case.loss], i)


def _compiled(case: Case, i: Inputs) -> Forward:
    # every shape is a graph of its own; beyond this limit (8 by default) torch.compile silently runs eagerly
    torch._dynamo.config.recompile_limit = 256
    formula = torch.compile(DENSE[case.loss], dynamic=False)
    return partial(formula, i)


def _compiled_refuses(case: Case) -> str | None:
    if torch.device(case.device).type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler on the CPU"
    return None


def _checkpointed_call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _checkpointed(case: Case, i: Inputs) -> Forward:
    return lambda: BLOCKED[case.loss](i, BLOCK_ROWS, _checkpointed_call)


def _linear_cross_entropy(case: Case, i: Inputs) -> Forward:
    function = torch.nn.functional.linear_cross_entropy
    chunked = torch.nn.LinearCrossEntropyOptions()

    def direction(x: Tensor, y: Tensor) -> Tensor:
        return function(i.scale * x, y, i.labels, options=chunked)

    if case.loss == "info_nce":
        return lambda: direction(i.x, i.y)
    return lambda: (direction(i.x, i.y) + direction(i.y, i.x)) / 2


def _linear_cross_entropy_refuses(case: Case) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy"
    return None


# ---- peers ----


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _lightly(case: Case, i: Inputs) -> Forward:
    loss = _module("lightly.loss").NTXentLoss(temperature=1 / case.scale)
    return lambda: loss(i.x, i.y)


def _metric_learning(case: Case, i: Inputs) -> Forward:
    loss = _module("pytorch_metric_learning.losses").NTXentLoss(temperature=1 / case.scale)
    if case.loss == "info_nce":
        candidates = torch.arange(case.m, device=case.device)
        return lambda: loss(i.x, i.labels, ref_emb=i.y, ref_labels=candidates)
    return lambda: loss(torch.cat([i.x, i.y]), i.labels.repeat(2))


def _metric_learning_bytes(case: Case) -> float:
    # measured: 2.2 GB at 256 pairs, 17.4 GB at 512: a row of all negative pairs for every positive pair
    rows, columns = case.shape
    return 16.0 * rows * rows * columns


def _memeff(case: Case, i: Inputs) -> Forward:
    # stable=True, the default, multiplies the gradients by sqrt(N * temperature)
    loss = _module("memeff").MemoryEfficientCLIPLoss(temperature=1 / case.scale, normalized_inputs=True, stable=False)
    return lambda: loss(i.x, i.y)


def _memeff_refuses(case: Case) -> str | None:
    return "only its LiT form has a frozen side, with other semantics" if case.frozen_y else None


def _siglip_kernel(case: Case, i: Inputs) -> Forward:
    loss = _module("siglip_kernel").fused_siglip_loss
    return lambda: loss(i.x, i.y, i.scale.log(), i.bias)


def _inf_cl(case: Case, i: Inputs) -> Forward:
    # The function below the public one: that one gathers the scale's gradient, which needs a process group.
    loss = _module("inf_cl.flash").cal_flash_loss
    head = min(256, case.d & -case.d)

    def direction(x: Tensor, y: Tensor) -> Tensor:
        return loss(x, y, scale=i.scale, head_dim=head).mean()

    return lambda: (direction(i.x, i.y) + direction(i.y, i.x)) / 2


def _inf_cl_refuses(case: Case) -> str | None:
    return None if case.d % 16 == 0 else "its heads are powers of two of at least 16: D is not a multiple of 16"


_ALL = frozenset(DENSE)
_CLIP = frozenset({"clip_loss"})
_PEERS = (
    Provider(
        "em-step",
        _em_step,
        frozenset({"decomposable"}),
        package="contrastive-kernels",
        by_default=lambda case: case.d == 512,
    ),
    # two matrices of logits, their log-softmax and its gradient; 4.1 GB measured at N = 16,384 in fp32
    Provider("dense", _dense, _ALL, rounds_logits=True, peak_bytes=_matrices(4), by_default=_up_to(16384)),
    Provider(
        "dense-compiled",
        _compiled,
        _ALL,
        rounds_logits=True,
        peak_bytes=_matrices(4),
        refuses=_compiled_refuses,
        by_default=lambda case: (case.loss, case.d, case.dtype) == CURVE and 1024 <= case.n <= 8192,
    ),
    Provider(
        "linear-cross-entropy",
        _linear_cross_entropy,
        frozenset({"clip_loss", "info_nce"}),
        refuses=_linear_cross_entropy_refuses,
    ),
    Provider("checkpointed", _checkpointed, _ALL, by_default=_up_to(8192)),
    Provider(
        "lightly",
        _lightly,
        frozenset({"nt_xent"}),
        package="lightly",
        module="lightly",
        learnable_scale=False,
        normalizes=True,
        peak_bytes=_matrices(4),
    ),
    Provider(
        "metric-learning",
        _metric_learning,
        frozenset({"nt_xent", "info_nce"}),
        package="pytorch-metric-learning",
        module="pytorch_metric_learning",
        learnable_scale=False,
        normalizes=True,
        peak_bytes=_metric_learning_bytes,
    ),
    Provider(
        "memeff",
        _memeff,
        _CLIP,
        package="memeff",
        module="memeff",
        devices=("cuda",),
        learnable_scale=False,
        refuses=_memeff_refuses,
    ),
    Provider(
        "siglip-kernel",
        _siglip_kernel,
        frozenset({"sigmoid"}),
        package="siglip-kernel",
        module="siglip_kernel",
        devices=("cuda",),
    ),
    Provider("inf-cl", _inf_cl, _CLIP, package="inf-cl", module="inf_cl", devices=("cuda",), refuses=_inf_cl_refuses),
)

_registry: dict[str, Provider] = {}


def register(provider: Provider) -> None:
    """Adds a provider, or replaces the one of its name."""
    providers()
    _registry[provider.name] = provider


def providers() -> dict[str, Provider]:
    """Everybody by name, ours first."""
    if not _registry:
        _registry.update({p.name: p for p in (*_our_providers(), *_PEERS)})
    return _registry


def get(name: str) -> Provider:
    """The provider of this name, or a ValueError that lists the names."""
    if name not in providers():
        raise ValueError(f"provider: expected one of {', '.join(providers())}; got {name!r}")
    return providers()[name]
