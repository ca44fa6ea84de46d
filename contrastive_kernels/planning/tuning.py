"""Measuring the Triton kernels' tiles, on request."""

from __future__ import annotations

import torch

from ..arguments.checks import check_count, check_device, shown
from ..backends import get

__all__ = ["autotune"]


def autotune(
    features: int, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cuda", *, side: int = 4096
) -> dict[str, str]:
    """Measures which tiles of the Triton kernels are fastest on this GPU, and keeps them for this user.

    Nothing is ever tuned unless this is called. What it finds is written to ``contrastive_kernels/tiles.json`` in
    torch's cache folder (``torch.hub.get_dir()``) under the GPU's name, Triton's version, the precision and the number
    of features rounded up to a power of two; this process and later ones use it from then on. Removing the file undoes
    it. Where it cannot be written, a RuntimeWarning says so, and this process alone uses what was found.

    Parameters
    ----------
    features : int
        The number of features D.
    dtype : torch.dtype
        Of the features: float16, bfloat16 or float32 (by torch's present float32 precision).
    device : str or torch.device
        The GPU.
    side : int
        Rows and columns of the panel that is timed.

    Returns
    -------
    dict
        The chosen tile by kind of work: "reduce", "weights" (of one side), "both" and "fused"; and on Hopper those of
        large panels, "reduce, persistent" and so on.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and where the Triton backend cannot serve.

    Notes
    -----
    Some minutes: every candidate is compiled and timed. Results differ in the last digits between tiles. The persistent
    tiles of ``sigmoid``, and of rows and columns with margins, stay as they are.

    Examples
    --------
    >>> import contrastive_kernels as ck
    >>> ck.autotune(512, device="cpu")
    Traceback (most recent call last):
    ...
    ValueError: device: the triton backend cannot serve torch.bfloat16 on cpu: it serves CUDA tensors, not those on cpu
    """
    check_count(features, "features")
    check_count(side, "side")
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype: expected float16, bfloat16 or float32; got {shown(dtype)}")
    device = check_device(device)
    reason = get("triton").why_not(device, dtype)
    if reason is not None:
        raise ValueError(f"device: the triton backend cannot serve {dtype} on {device}: {reason}")
    import triton

    from .._triton import launch, tuning

    precision = launch.precision_of(dtype)
    with torch.cuda.device(device):
        found = launch.measure_all(device, precision, features, dtype, side)
        gpu = launch.gpu_name(device)
    tuning.tiles.put(
        {tuning.key(gpu, triton.__version__, precision, work, features): tile for work, tile in found.items()}
    )
    launch.forget_tiles()
    return {work: f"{tile.block_m} x {tile.block_n} x {tile.block_k}" for work, tile in found.items()}
