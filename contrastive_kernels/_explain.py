"""Which backend serves, and why the others do not."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends as _registry
from .specs import LOSSES

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


def why_not(name: str, x: Tensor, y: Tensor | None = None) -> str | None:
    """The reason why a backend cannot serve these features, or None: it can.

    Parameters
    ----------
    name : str
        A backend's name.
    x, y : Tensor
        The features [N, D], [M, D]; their device and dtype decide.

    Returns
    -------
    str or None
        The reason.

    Raises
    ------
    ValueError
        For a name that is not a backend's.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.why_not("cpu", torch.zeros(2, 3, dtype=torch.float64)) is None
    False
    """
    return _registry.get(name).why_not(x.device, x.dtype)


def explain(x: Tensor, y: Tensor | None = None, loss: str = "clip_loss") -> None:
    """Prints which backend would serve a loss on these features, and why the others would not.

    Parameters
    ----------
    x, y : Tensor
        The features [N, D], [M, D]; ``y`` is ``x`` if left out.
    loss : str
        The loss function's name.

    Raises
    ------
    ValueError
        For a name that is not a loss's.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> ck.explain(torch.zeros(8, 4, dtype=torch.float64))
    clip_loss of 8 x 8 scores, D = 4, torch.float64 on cpu: 2 passes, 4 products (1 for the value alone)
      triton no: it serves CUDA tensors, not those on cpu
      cpu    no: its scores are float32; float64 is the torch backend's
      torch  yes, chosen
    """
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}; got {loss!r}")
    spec, columns = LOSSES[loss], len(x if y is None else y)
    factor = 2 if loss == "nt_xent" else 1
    print(
        f"{loss} of {factor * len(x)} x {factor * columns} scores, D = {x.shape[1]}, {x.dtype} on {x.device}: "
        f"{spec.passes} pass{'es' if spec.passes > 1 else ''}, {spec.products:g} products "
        f"({spec.forward_products:g} for the value alone)"
    )
    rows = _registry.table(x.device, x.dtype)
    chosen = next(name for name, reason in rows if reason is None)
    for name, reason in rows:
        verdict = f"no: {reason}" if reason else ("yes, chosen" if name == chosen else "yes")
        print(f"  {name:<6} {verdict}")


def report() -> str:
    """Versions, devices, and every backend with the reason why it is missing; what ``python -m`` prints."""
    from . import __version__
    from .backends.cpu import instruction_set

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
