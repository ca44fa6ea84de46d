"""What is measured: a loss on random paired features of one shape, and the products that it cannot do without."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.planning.costs import LOSSES

__all__ = [
    "DTYPES",
    "MODES",
    "Case",
    "Inputs",
    "make_inputs",
    "memory_cases",
    "precision",
    "quick_cases",
    "standard_cases",
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: "fwd" is an evaluation under ``no_grad``; "fwd+bwd" a training step of the loss alone.
MODES = ("fwd", "fwd+bwd")

#: CLIP's initial temperature 0.07; SigLIP's initial scale and bias.
SOFTMAX_SCALE = 1 / 0.07
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
#: Standard deviation of what a stored log-normaliser lags behind the batch's own.
STALENESS = 0.1


@dataclass(frozen=True)
class Case:
    """One thing to compute.

    Parameters
    ----------
    loss : str
        A name of ``contrastive_kernels.specs.LOSSES``.
    n, m, d : int
        x [n, d] and y [m, d]; ``m = 0`` stands for ``n``. For ``nt_xent``, n pairs give a matrix of 2n x 2n.
    dtype, mode, device : str
        See ``DTYPES`` and ``MODES``; "tf32" is float32 with TF32 products allowed.
    learnable_scale : bool
        The temperature gets a gradient.
    frozen_y : bool
        y gets no gradient: a locked tower, a queue, a corpus.
    """

    loss: str
    n: int
    d: int
    m: int = 0
    dtype: str = "float32"
    mode: str = "fwd+bwd"
    device: str = "cpu"
    learnable_scale: bool = True
    frozen_y: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", self.m or self.n)
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if self.m < self.n or (self.m != self.n and self.loss != "info_nce"):
            raise ValueError(
                f"m: only info_nce is rectangular, with m >= n; got {self.loss}, n = {self.n}, m = {self.m}"
            )
        if self.frozen_y and self.loss == "nt_xent":
            raise ValueError("frozen_y: nt_xent has one matrix of views and no frozen side")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix of scores."""
        return (2 * self.n, 2 * self.n) if self.loss == "nt_xent" else (self.n, self.m)

    @property
    def flop(self) -> float:
        """Operations of one product of the whole matrix."""
        rows, columns = self.shape
        return 2.0 * rows * columns * self.d

    @property
    def products(self) -> dict[str, float]:
        """The fewest products of the whole matrix that give the value, and in "fwd+bwd" every gradient, without scores
        that are kept: where a band's scores are made once, there is one less to make than this.

        By kind: ``score`` (x yT), ``w_y`` and ``wT_x`` (the gradients). nt_xent's matrix is symmetric: half of its
        scores serve both halves, and one product gives the gradient of the views.
        """
        spec = LOSSES[self.loss]
        if self.mode == "fwd":
            return {"score": spec.forward_products, "w_y": 0.0, "wT_x": 0.0}
        one_sided = self.frozen_y or self.loss == "nt_xent"
        total = spec.frozen_products if self.frozen_y else spec.products
        grads = 1.0 if one_sided else 2.0
        return {"score": total - grads, "w_y": 1.0, "wT_x": grads - 1.0}

    @property
    def scale(self) -> float:
        """The logit scale's value."""
        return SIGMOID_SCALE if self.loss == "sigmoid" else SOFTMAX_SCALE

    @property
    def title(self) -> str:
        """For people."""
        side = f"N = {self.n:,}" + (f", M = {self.m:,}" if self.m != self.n else "")
        notes = ["fixed scale"] * (not self.learnable_scale) + ["frozen y"] * self.frozen_y
        return ", ".join([f"{self.loss} {self.mode}", side, f"D = {self.d}", self.dtype, self.device, *notes])

    def smaller(self, limit: int) -> Case:
        """The same case with at most ``limit`` rows; m - n is kept up to ``limit``."""
        n = min(self.n, limit)
        return dataclasses.replace(self, n=n, m=n + min(self.m - self.n, limit))


@dataclass
class Inputs:
    """Tensors of one case; those that want a gradient require it."""

    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    scale: Tensor  # []
    bias: Tensor | None  # [], sigmoid only
    log_z: tuple[Tensor, Tensor] | None  # [n] and [m], decomposable only
    labels: Tensor  # [n] int64

    @property
    def extra(self) -> tuple[Any, ...]:
        """What our functions take behind x, y and the scale."""
        return tuple(argument for argument in (self.bias, self.log_z) if argument is not None)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        named = {"x": self.x, "y": self.y, "scale": self.scale, "bias": self.bias}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def double(self) -> Inputs:
        """The same numbers in float64, as new leaves."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(torch.float64, copy=True).requires_grad_(t.requires_grad)

        bias = None if self.bias is None else leaf(self.bias)
        log_z = None if self.log_z is None else (self.log_z[0].double(), self.log_z[1].double())
        return Inputs(leaf(self.x), leaf(self.y), leaf(self.scale), bias, log_z, self.labels)


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """Within it, float32 products are what the case's dtype says; afterwards what they were."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Unit-norm features whose matching rows have a cosine of about 0.5: a model in mid-training."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    x = torch.nn.functional.normalize(normal(case.n, case.d), dim=1)
    y = torch.nn.functional.normalize(normal(case.m, case.d), dim=1).mul_(3**0.5)
    y[: case.n] += x
    y = torch.nn.functional.normalize(y, dim=1)
    dtype = DTYPES[case.dtype]
    # a scale, like every parameter of a mixed-precision model, stays in fp32 unless everything is fp64
    wide = torch.promote_types(dtype, torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    scale = torch.full((), case.scale, dtype=wide, device=case.device)
    bias = torch.full((), SIGMOID_BIAS, dtype=wide, device=case.device) if case.loss == "sigmoid" else None
    log_z = None
    if case.loss == "decomposable":
        log_z = (
            _log_normalizer(x, y, scale) + STALENESS * normal(case.n).to(scale),
            _log_normalizer(y, x, scale) + STALENESS * normal(case.n).to(scale),
        )
    if case.mode == "fwd+bwd":
        x.requires_grad_()
        y.requires_grad_(not case.frozen_y)
        scale.requires_grad_(case.learnable_scale)
        if bias is not None:
            bias.requires_grad_(case.learnable_scale)
    return Inputs(x, y, scale, bias, log_z, torch.arange(case.n, device=case.device))


def _log_normalizer(x: Tensor, y: Tensor, scale: Tensor, block: int = 1024) -> Tensor:
    """log sum_j exp(z_ij - z_ii) [N], in row blocks."""
    parts = []
    for start in range(0, len(x), block):
        z = scale * (x[start : start + block] @ y.T).to(scale.dtype)
        parts.append(torch.logsumexp(z, 1) - z.diagonal(start))
    return torch.cat(parts)


def standard_cases() -> list[Case]:
    """The default set, some 5 minutes on 2 cores: how time grows with the batch, then every loss at one size."""
    cases = [Case("clip_loss", n, 256, mode=mode) for n in (256, 1024, 4096, 8192) for mode in MODES]
    cases.append(Case("clip_loss", 16384, 256))
    cases.append(Case("clip_loss", 8192, 512))
    cases += [Case(loss, 8192, 256) for loss in ("decomposable", "sigmoid", "info_nce")]
    cases.append(Case("info_nce", 4096, 256, m=16384, frozen_y=True))
    cases.append(Case("nt_xent", 2048, 256))
    cases.append(Case("nt_xent", 128, 256, learnable_scale=False))
    cases.append(Case("nt_xent", 2048, 256, learnable_scale=False))
    cases.append(Case("clip_loss", 8192, 256, dtype="bfloat16"))
    return cases


def memory_cases() -> list[Case]:
    """The default set of peak memory, one process each, some 3 minutes on 2 cores."""
    sizes = {"fwd": (1024, 4096, 16384), "fwd+bwd": (1024, 2048, 4096, 8192, 16384, 32768)}
    return [Case("clip_loss", n, 256, mode=mode) for mode in MODES for n in sizes[mode]]


def quick_cases() -> list[Case]:
    """A few seconds, for tests."""
    return [Case("clip_loss", n, 32, mode=mode) for n in (32, 64, 128) for mode in MODES] + [
        Case("decomposable", 128, 32)
    ]
