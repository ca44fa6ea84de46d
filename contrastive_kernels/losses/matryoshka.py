"""A loss of the first features as well as of all: the function and its module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..arguments.checks import check_count, check_flag, check_number, normalized
from .queue import FeatureQueue

__all__ = ["MatryoshkaLoss", "matryoshka"]


def matryoshka(
    loss: Callable[..., Any],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = False,
) -> Callable[..., Tensor]:
    """The sum of a loss over prefixes of the features, as a function that takes the arguments of the loss.

    Parameters
    ----------
    loss : callable
        A loss of this package or another one: the matrices of features [N, D] among its arguments are cut to [N, d],
        all that have as many features as the first of them.
    dims : sequence of int
        The prefixes' lengths d, each at most D.
    weights : sequence of float, optional
        What each length's loss is multiplied by; 1 by default.
    normalize : bool
        Divide the cut rows by their Euclidean norm: those of unit length are none after cutting.

    Returns
    -------
    callable
        Gives the weighted sum, of the shape of the loss.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, here or when it is called.

    Notes
    -----
    A call of the loss for every length: sum of d over D times its products.

    References
    ----------
    A. Kusupati et al., "Matryoshka representation learning", NeurIPS 2022.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.matryoshka(ck.clip_loss, (2, 4), normalize=True)
    >>> loss(torch.eye(4) + 0.5, torch.eye(4) + 0.5, 10.0).shape
    torch.Size([])
    """
    lengths, factors = _lengths(dims), _factors(weights, dims)
    check_flag(normalize, "normalize")
    if not callable(loss):
        raise TypeError(f"loss: expected a callable; got {type(loss).__name__}")

    def of_prefixes(*arguments: Any, **options: Any) -> Tensor:
        """The weighted sum."""
        return _sum(loss, lengths, factors, normalize, arguments, options)

    return of_prefixes


class MatryoshkaLoss(nn.Module):
    """A loss of the first features as well as of all; see :func:`contrastive_kernels.matryoshka`.

    Parameters
    ----------
    loss : Module or callable
        Called for every length with the features cut, and the other arguments as they come.
    dims : sequence of int
        The lengths.
    weights : sequence of float, optional
        What each length's loss is multiplied by; 1 by default.
    normalize : bool
        Divide the cut rows by their Euclidean norm.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.MatryoshkaLoss(ck.InfoNCELoss(), (8, 16), (1.0, 0.5), normalize=True)
    >>> loss(torch.randn(4, 16), torch.randn(6, 16), 20.0).shape
    torch.Size([])
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss: expected a callable; got {type(loss).__name__}")
        self.loss, self.dims, self.weights = loss, _lengths(dims), _factors(weights, dims)
        self.normalize = check_flag(normalize, "normalize")

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """The arguments of the loss."""
        return _sum(self.loss, self.dims, self.weights, self.normalize, arguments, options)

    def extra_repr(self) -> str:
        """The options, as they print."""
        return f"dims={self.dims}, weights={self.weights}, normalize={self.normalize}"


def _sum(
    loss: Callable[..., Any],
    dims: tuple[int, ...],
    weights: tuple[float, ...],
    normalize: bool,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> Tensor:
    given = [*arguments, *options.values()]
    if any(isinstance(value, FeatureQueue) for value in given):
        raise ValueError("queue: expected None within a loss of prefixes, whose features it does not have; got a queue")
    width = next((v.shape[1] for v in given if _is_matrix(v)), 0)
    if not width:
        raise TypeError("loss: expected features [N, D] among its arguments; got none")
    if max(dims) > width:
        raise ValueError(f"dims: expected at most {width}, the number of features; got {max(dims)}")

    def cut(value: Any, d: int) -> Any:
        if not _is_matrix(value) or value.shape[1] != width:
            return value
        return normalized(value[:, :d]) if normalize else value[:, :d]

    total = None
    for d, weight in zip(dims, weights):
        part = loss(*(cut(v, d) for v in arguments), **{name: cut(v, d) for name, v in options.items()})
        if not isinstance(part, Tensor):
            raise TypeError(f"loss: expected one that returns a tensor; got {type(part).__name__}")
        part = weight * part
        total = part if total is None else total + part
    assert total is not None
    return total


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _lengths(dims: Any) -> tuple[int, ...]:
    if not isinstance(dims, (tuple, list)):
        raise TypeError(f"dims: expected a sequence of ints; got {type(dims).__name__}")
    if not dims:
        raise ValueError("dims: expected at least one length; got none")
    return tuple(check_count(d, "dims", what="lengths of at least 1") for d in dims)


def _factors(weights: Any, dims: Any) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(dims)
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"weights: expected None or a sequence of numbers; got {type(weights).__name__}")
    if len(weights) != len(dims):
        raise ValueError(f"weights: expected one for each of {len(dims)} dims; got {len(weights)}")
    return tuple(check_number(w, "weights", positive=False) for w in weights)
