"""What a problem's arguments are made of: features, their layout in memory, weights and ids; and a few small leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["biases_of", "features_of", "few", "ids_of", "lay_out", "weights_of"]


def _unit(v: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v, dim=1)


def features_of(problem: Any, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [N, D], y [M, D] in float64."""
    n, m, d = problem.n, problem.n if problem.m is None else problem.m, problem.d
    x, y = torch.randn(n, d, generator=g).double(), torch.randn(m, d, generator=g).double()
    common = torch.randn(1, d, generator=g).double()
    match problem.features:
        case "random":  # positives somewhat closer than negatives
            k = min(n, m)
            y[:k] += 0.5 * x[:k]
            return _unit(x), _unit(y)
        case "solved":
            return _unit(x), _unit(x + 0.1 * y)
        case "identical":
            return _unit(common).repeat(n, 1), _unit(common).repeat(m, 1)
        case "opposed":
            return _unit(common + 0.1 * x), -_unit(common + 0.1 * y)
        case "common":  # contributions that add up
            return _unit(x), _unit(2 * common + y)
        case "normal":
            return x, y
        case "huge":
            return 3000 * _unit(x), 3000 * _unit(y)
        case "equal":  # every score is the same number exactly, in whatever order its products are added
            return tuple(torch.full((k, d), problem.length / 8, dtype=torch.float64) for k in (n, m))
        case "shifted":
            common = _unit(common)
            x, y = (_unit(v - v @ common.T * common) for v in (x, y))
            return problem.length * common + 2 * x, problem.length * common + 2 * y
        case "outliers":
            lengths = torch.linspace(-2, 2, n)[:, None]
            return 4 * 10**lengths * _unit(x), 4 * 10 ** lengths.flip(0) * _unit(y)
    raise ValueError(problem.features)


def lay_out(v: Tensor, layout: str) -> Tensor:
    """The same values in another layout; the padding is NaN, so that a read of it shows."""
    n, d = v.shape
    match layout:
        case "contiguous":
            return v
        case "transposed":
            return v.T.contiguous().T
        case "misaligned":
            wide = v.new_full((n, d + 5), torch.nan)
            wide[:, 3 : 3 + d] = v
            return wide[:, 3 : 3 + d]
        case "strided":
            tall = v.new_full((2 * n, d), torch.nan)
            tall[::2] = v
            return tall[::2]
        case "expanded":
            return v[:1].expand(n, d)
    raise ValueError(layout)


def weights_of(problem: Any, g: torch.Generator) -> Tensor | None:
    weight = 2 * torch.rand(problem.n, generator=g)
    match problem.weight:
        case None:
            return None
        case "sparse":
            return weight * (torch.rand(problem.n, generator=g) < 0.5)
        case "zero":
            return weight * 0
    raise ValueError(problem.weight)


def ids_of(problem: Any, n: int, m: int, g: torch.Generator) -> tuple[Tensor, Tensor] | None:
    match problem.ids:
        case None:
            return None
        case "shared":  # of both dtypes; where they differ by 2^32 they are not equal
            few = max(n // 3, 1)
            ids = [torch.randint(-few, few, (k,), generator=g) for k in (n, m)]
            ids[1] += 2**32 * (torch.rand(m, generator=g) < 0.2)
            return ids[0].to(torch.int32), ids[1]
        case "equal":
            return torch.full((n,), -7), torch.full((m,), -7)
        case "different":
            return torch.arange(n), torch.arange(n, n + m)
    raise ValueError(problem.ids)


def biases_of(problem: Any, m: int, g: torch.Generator) -> Tensor | None:
    """What is added to the candidates' logits [M]."""
    match problem.candidate_bias:
        case None:
            return None
        case "normal":
            return torch.randn(m, generator=g)
        case "padded":
            return torch.randn(m, generator=g).masked_fill(torch.rand(m, generator=g) < 0.2, -torch.inf)
    raise ValueError(problem.candidate_bias)


def few(
    loss: str, dtype: torch.dtype = torch.float64, n: int = 5, m: int | None = None, d: int = 3
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """x, y, scale (and bias): leaves; and the normaliser of a decomposable loss."""
    g = torch.Generator().manual_seed(2)
    leaves = [torch.randn(k, d, generator=g, dtype=torch.float64).mul(0.7).to(dtype) for k in (n, m or n)]
    leaves += [torch.tensor(v, dtype=dtype) for v in ((1.3, -0.5) if loss == "sigmoid" else (1.3,))]
    rows, cols = (2 + torch.rand(k, generator=g, dtype=torch.float64) for k in (n, m or n))
    rest = {"decomposable": (rows,), "decomposable_pair": ((rows, cols),)}.get(loss, ())
    return [leaf.requires_grad_() for leaf in leaves], tuple(_to(v, dtype) for v in rest)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return tuple(v.to(dtype) for v in value) if isinstance(value, tuple) else value.to(dtype)
