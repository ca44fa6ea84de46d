"""What all losses share: the modules' base and the names of arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..arguments.checks import (
    check_backend,
    check_distribution,
    check_flag,
    check_reduction,
    check_workspace,
)
from ..arguments.margin import Margin, check_margin_of_loss
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..arguments.pairs import check_smoothing
from ..distributed.group import check_group, ranks_of, tell
from .guide import check_guided_margin

__all__ = ["PAIR_NAMES", "Loss", "SoftmaxLoss", "keeping_dtypes"]


PAIR_NAMES = ("image_features", "text_features")


#: Options of other libraries' losses, by the integration that takes them.
_OPTIONS_OF_OTHERS = {
    "open_clip": ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod", "dist_impl"),
    "lightly": ("memory_bank_size", "gather_distributed"),
    "sentence_transformers": ("model", "scale", "similarity_fct", "gather_across_devices", "mini_batch_size"),
    "metric_learning": ("distance", "reducer", "collect_stats", "embedding_regularizer"),
}


def _unknown(loss: str, option: str) -> str:
    """What is said of an option that no loss here has."""
    said = f"{option}: expected options of {loss}, which its documentation lists; got one that it does not have"
    for library, options in _OPTIONS_OF_OTHERS.items():
        if option in options:
            return f"{said}; the loss of contrastive_kernels.integrations.{library} takes it, as {library}'s own does"
    if option in ("temperature", "logit_scale"):
        return f"{said}; the scale, 1 / temperature, is an argument of the call: loss(x, y, logit_scale)"
    return said


def keeping_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``to``, ``half``, ``cuda`` do to a tensor, but for its dtype."""

    def keeping(t: Tensor) -> Tensor:
        moved = fn(t)
        return moved if moved.dtype == t.dtype else t.to(moved.device)

    return keeping


class Loss(nn.Module):
    """What every loss has: a reduction, normalisation on request, and the engine's two arguments."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
        group: Any | None = "auto",
        gradients: str = "average",
        strategy: str = "auto",
        uneven: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise TypeError(_unknown(type(self).__name__, name))
        self.options: dict[str, Any] = {
            "reduction": check_reduction(reduction),
            "normalize": check_flag(normalize, "normalize"),
            "backend": check_backend(backend) or None,
            "workspace_bytes": check_workspace(workspace_bytes),
            "group": check_group(group),
            "gradients": gradients,
            "strategy": strategy,
            "uneven": uneven,
        }
        check_distribution(gradients, strategy, uneven)

    def _tell(self, error: Exception, features: Any) -> None:
        """Tells the other ranks, if there are any, that this one is about to raise."""
        over = {name: self.options[name] for name in ("group", "gradients", "strategy", "uneven")}
        tell(ranks_of(**over), error, features)

    def extra_repr(self) -> str:
        """The options, as they print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SoftmaxLoss(Loss):
    """A loss whose denominator has the positive or not, whose target may be smoothed, and that may have a margin."""

    def __init__(
        self,
        *,
        include_positive: bool = True,
        label_smoothing: float = 0.0,
        margin: Margin | None = None,
        guided_margin: Margin = 0.0,
        return_metrics: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.options["return_metrics"] = check_flag(return_metrics, "return_metrics")
        self.options["include_positive"] = check_flag(include_positive, "include_positive")
        if type(label_smoothing) is not float or label_smoothing != 0.0:
            check_smoothing(label_smoothing, include_positive)
        check_margin_of_loss(margin, label_smoothing)
        check_guided_margin(guided_margin)
        self.options.update(label_smoothing=label_smoothing, margin=margin, guided_margin=guided_margin)
