"""Which backend serves, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends as _registry
from ..arguments.checks import check_matrix, shown
from .costs import LOSSES, SEARCH_SPECS, LossSpec
from .plan import plan

__all__ = ["explain", "list_backends", "why_not"]


def list_backends() -> tuple[str, ...]:
    """Names of all backends, the preferred ones first.

    Returns
    -------
    tuple of str
        Installed or not; :func:`why_not` tells.

    Examples
    --------
    >>> import contrastive_kernels as ck
    >>> "torch" in ck.list_backends()
    True
    """
    return _registry.names()


def why_not(name: str, x: Tensor, y: Tensor | None = None, loss: str = "clip_loss") -> str | None:
    """The reason why a backend cannot serve these features, or None: it can.

    Parameters
    ----------
    name : str
        A backend's name.
    x, y : Tensor
        The features [N, D], [M, D]; their device and dtype decide.
    loss : str
        The name of a loss function, or of one that searches, such as ``"sample_negatives"``.

    Returns
    -------
    str or None
        The reason.

    Raises
    ------
    TypeError, ValueError
        For a name that is not a backend's, or not a function's, and for features that are no tensors.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.why_not("cpu", torch.zeros(2, 3, dtype=torch.float64)) is None
    False
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a backend's name; got {type(name).__name__}")
    if name not in list_backends():
        raise ValueError(f"name: expected one of {', '.join(list_backends())}; got {shown(name)}")
    _check_features(x, y)
    return _registry.get(name).refusal(x.device, x.dtype, _spec(loss).term)


def explain(x: Tensor, y: Tensor | None = None, loss: str = "clip_loss", *, members: Sequence[str] = ()) -> None:
    """Prints what :func:`plan` says of a loss on these features: its passes, the backend, and why not the others.

    Parameters
    ----------
    x, y : Tensor
        The features [N, D], [M, D]; ``y`` is ``x`` if left out.
    loss : str
        The name of a loss function, or of one that searches, such as ``"sample_negatives"``.
    members : sequence of str
        What a loss is given beside, as :func:`plan` takes it.

    Raises
    ------
    TypeError, ValueError
        For a name that is not a function's, and for features that are no matrices.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.explain(torch.zeros(8, 4, dtype=torch.float64))
    clip_loss of 8 x 8 scores, D = 4, torch.float64 on cpu, value and gradients:
      reduce: 1 panel of 8 x 8, 1 product, 5.12e-07 Gflop, 0.00146 MiB moved, workspace 0.00195 MiB
      weigh: 1 panel of 8 x 8, 2 products, 1.02e-06 Gflop, 0.00342 MiB moved, workspace 0.00195 MiB
      ...
      torch  yes, chosen: operations of torch
    """
    _check_features(x, y)
    spec, columns = _spec(loss), len(x if y is None else y)
    if loss in LOSSES:
        print(plan(len(x), columns, x.shape[1], x.dtype, x.device, loss, members=members))
        return
    if members:
        raise ValueError(f"members: expected none for {loss}, which searches; got {shown(members)}")
    print(
        f"{loss} of {len(x)} x {columns} scores, D = {x.shape[1]}, {x.dtype} on {x.device}: "
        "1 pass, 1 product without gradients"
    )
    rows = _registry.table(x.device, x.dtype, spec.term)
    chosen = next(name for name, reason in rows if reason is None)
    for name, reason in rows:
        verdict = f"no: {reason}" if reason else ("yes, chosen" if name == chosen else "yes")
        print(f"  {name:<6} {verdict}")


def _spec(loss: Any) -> LossSpec:
    """What a function asks of the stream, or a ValueError that lists the names."""
    specs = {**LOSSES, **SEARCH_SPECS}
    if not isinstance(loss, str) or loss not in specs:
        raise ValueError(f"loss: expected one of {', '.join(specs)}; got {shown(loss)}")
    return specs[loss]


def _check_features(x: Any, y: Any) -> None:
    """Dense matrices, of which shape, dtype and device are all that is asked: they may hold no values."""
    for name, value in (("x", x), ("y", y)):
        if value is not None or name == "x":
            check_matrix(value, name)
            if value.shape[1] == 0:
                raise ValueError(f"{name}: expected at least one feature; got shape {list(value.shape)}")
    if y is not None and (x.shape[1], x.dtype, x.device) != (y.shape[1], y.dtype, y.device):
        raise ValueError(
            f"x and y: expected the same number of features, dtype and device; got {x.shape[1]}, {x.dtype}, {x.device} "
            f"and {y.shape[1]}, {y.dtype}, {y.device}"
        )


def report() -> str:
    """Versions, devices, and every backend with the reason why it is missing; what ``python -m`` prints."""
    from .. import __version__
    from ..backends.cpu import instruction_set

    lines = [
        f"contrastive_kernels {__version__}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"CPU instruction set of the C++ pass: {instruction_set() or 'none, the extension is missing'}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        "backends (float32):",
    ]
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for name, reason in _registry.table(torch.device(device), torch.float32):
            lines.append(f"  {device:<5} {name:<6} {'no: ' + reason if reason else 'yes'}")
    return "\n".join(lines)
