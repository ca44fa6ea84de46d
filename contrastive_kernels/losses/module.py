"""What all losses share: the modules' base and the names of arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..arguments.checks import check_backend, check_flag, check_reduction, check_workspace
from ..arguments.options import DEFAULT_WORKSPACE_BYTES

__all__ = ["PAIR_NAMES", "Loss", "require_one_process"]


PAIR_NAMES = ("image_features", "text_features")


class Loss(nn.Module):
    """What every loss has: a reduction, normalisation on request, and the engine's two arguments."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "reduction": check_reduction(reduction),
            "normalize": check_flag(normalize, "normalize"),
            "backend": check_backend(backend) or None,
            "workspace_bytes": check_workspace(workspace_bytes),
        }

    def extra_repr(self) -> str:
        """The options, as they print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def require_one_process(name: str) -> None:
    """Negatives of other processes cannot be had yet, and leaving them out silently would train another loss."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"{name}: expected a single process; got a process group of {distributed.get_world_size()}: the rows of "
            "the other processes would be left out. Gather the features with their gradients and call the function, "
            "contrastive_kernels.info_nce with positives=rank * N."
        )
