"""Global contrastive losses: every sample's mean over negatives is averaged over its visits and weighs its row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import break_in_graphs
from ..arguments.checks import check_features, check_number, scale_tensor
from ..arguments.hints import readable
from ..arguments.temperature import scale_of
from ..distributed.group import Ranks, Sizes, told
from ..losses.decomposable import decomposable
from ..panels.size import score_dtype
from .expectation import wide
from .global_base import GlobalLoss, nothing
from .normalizers import Batch, found_by_batch
from .sides import Samples, Side

__all__ = ["SogCLRLoss"]

#: What `_weighed` gives: the value over all ranks' rows, what this rank adds to it, and log u [N, 2].
_Weighed = tuple[Tensor, Tensor, Tensor]


class SogCLRLoss(GlobalLoss):
    """The global contrastive loss of two towers or of one (SogCLR; FastCLIP v1 and v3): small batches, all negatives.

    With h_ij = logit_scale * (<x_i, y_j> - <x_i, y_i>), row i's mean g_i of exp(h_ij) over the batch's negatives moves
    the stored u_i by ``gamma`` of the way, and the row's gradient is that of g_i / u_i; the same for columns. The value
    is the mean of log u_i + g_i / u_i - 1 over both directions, which is log g_i where nothing was stored.

    Of one tower, x and y are two views of every sample, all of them look for their other view, and the negatives are
    the views of other samples. As published, g_i is a mean of exp(logit_scale * <x_i, z>), and the memory has one for
    both views of a sample: each view's row is weighed by it after it has moved to the view's own mean, and the mean of
    the two is what is stored.

    Parameters
    ----------
    num_samples : int
        Samples of the data set.
    towers : int
        2, as of images and texts, or 1, as in SimCLR.
    gamma : float
        The part that a visit replaces, above 0 and at most 1. A first visit stores what it found.
    gamma_schedule : {"constant", "cosine"}
        "cosine": from 1 in epoch 0 to ``gamma`` in epoch ``gamma_decay_epochs``, along half a cosine. The epoch is what
        :meth:`set_epoch` was told.
    gamma_decay_epochs : int, optional
        Of the cosine.
    rho : float, optional
        With it, the temperature 1 / logit_scale multiplies the loss, and is learnt: ``rho`` times the temperature is
        added (FastCLIP v3); a scale of 0 has none. Without it the loss is SogCLR's, of a given temperature.
    normalize, backend, workspace_bytes
        As in :func:`contrastive_kernels.clip_loss`.
    device : torch.device or str, optional
        Where the memory lies.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`; by default all ranks of the default process group, if there is one.
        All hold the same memory.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Notes
    -----
    4 products of 2 N^2 D flop (of one tower 16, for there are 2N views), O(N D) memory and 24 bytes (12) of state a
    sample, all of which is in the ``state_dict``. Everything is kept in logarithms: no temperature overflows, and
    nothing is added to a denominator.

    References
    ----------
    Z. Yuan et al., "Provable stochastic optimization for global contrastive learning: small batch does not harm
    performance", ICML 2022. X. Wei et al., "FastCLIP: a suite of optimization techniques to accelerate CLIP training
    with limited resources", 2024.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.SogCLRLoss(num_samples=1000, gamma=0.2, gamma_schedule="cosine", gamma_decay_epochs=18)
    >>> loss.set_epoch(18)
    >>> x = torch.eye(4).requires_grad_()
    >>> loss(x, torch.eye(4), torch.arange(4), 5.0)
    tensor(-5., grad_fn=<...>)
    >>> loss.memory.visits[:5, 0].tolist()
    [1, 1, 1, 1, 0]
    >>> views = ck.SogCLRLoss(num_samples=1000, towers=1)
    >>> views(x, torch.eye(4), torch.arange(4), 5.0)
    tensor(-5., grad_fn=<...>)
    """

    def __init__(self, num_samples: int, *, rho: float | None = None, **options: Any) -> None:
        super().__init__(num_samples, **options)
        self.rho = None if rho is None else check_number(rho, "rho", positive=False)

    def extra_repr(self) -> str:
        """The options, as they print."""
        return f"{super().extra_repr()}, rho={self.rho!r}"

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; in training mode it moves the memory.

        Parameters
        ----------
        x, y : Tensor
            Matching rows [N, D] of one dtype and device.
        index : Tensor
            Which samples they are, int64 [N].
        logit_scale : float or Tensor
            The inverse temperature.
        temperature : float or Tensor, optional
            1 / logit_scale, in its place: above 0.

        Returns
        -------
        Tensor
            A scalar; float32 (float64 for float64 inputs).

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit.
        RuntimeError
            In training within the recomputation of activation checkpointing: the memory would move twice.
        """
        ranks = self._ranks()
        call_it = _over_ranks if ranks is not None else SogCLRLoss._forward
        loss: Tensor = call_it(self, ranks, x, y, index, logit_scale, temperature)
        return loss

    def _forward(
        self,
        ranks: Ranks | None,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        logit_scale: float | Tensor | None,
        temperature: float | Tensor | None,
    ) -> Tensor:
        with told(ranks, x):
            logit_scale = scale_of(x, logit_scale, temperature)
            x, y = check_features(x, y, ("x", "y"), self.normalize, matching=True)
            scale = scale_tensor(x, logit_scale)
            if self.rho is not None:
                _require_temperature(logit_scale)
            stored = self._stored(index, len(x))
        sizes = self._agreed(ranks, x, ("rho", self.rho))
        total = sum(sizes.rows)
        if total < 2:
            return nothing(x, y, scale)
        weigh = self._weighed if self.towers == 2 else self._weighed_views
        loss, own, log_u = weigh(x, y, index, scale, stored, ranks, sizes)
        if self.rho is None:
            return loss + self._total(own, ranks, sizes) if self.towers == 1 else loss
        tau = 1.0 / scale
        fixed = tau.detach()
        # the temperature's gradient has log u where the value has log u + g / u - 1
        rest = (tau - fixed) * log_u.mean(1).sum() + self.rho * len(x) * tau
        return fixed * loss + self._total(fixed * own + rest / total, ranks, sizes)

    def _weighed(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        scale: Tensor,
        stored: tuple[Tensor, Tensor],
        ranks: Ranks | None,
        sizes: Sizes,
    ) -> _Weighed:
        """Of two towers."""
        total, name = sum(sizes.rows), type(self).__name__
        z_pos = (scale.detach() * _dots(x, y)).to(wide(x.device))
        batch = Batch(x, y, scale.detach(), None, None, True, ranks, total, name)
        log_u = self._visited(index, stored, found_by_batch(batch, self.engine) - z_pos[:, None]).to(scale.dtype)
        options: dict[str, Any] = {"positive_constant": 0.0, "negative_scale": 1.0 / (total - 1)}
        value: Any = decomposable(x, y, scale, (log_u[:, 0], log_u[:, 1]), **options, **self._options(ranks))
        return value, value.new_zeros(()), log_u

    def _weighed_views(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        scale: Tensor,
        stored: tuple[Tensor, Tensor],
        ranks: Ranks | None,
        sizes: Sizes,
    ) -> _Weighed:
        """Of one tower's views."""
        n, total = len(x), sum(sizes.rows)
        samples = Samples.of(index, x.device, ranks, sizes, type(self).__name__)
        views = torch.cat([x, y])
        side = Side(views, views, scale, False, 2 * total - 2, samples, self._options(ranks))
        z_pos = side.positive_logits().detach().to(wide(x.device))
        of_views = (side.log_means() + z_pos).view(2, n).T
        log_u = self._visited(index, stored, of_views) - z_pos.view(2, n).T
        log_u = torch.where(samples.several, log_u, 0.0).to(scale.dtype)
        weight = samples.several.to(scale.dtype).expand(2 * n) / (2 * total)
        return *side.value(log_u.T.reshape(-1), weight), log_u


_over_ranks = break_in_graphs(SogCLRLoss._forward)


def _require_temperature(logit_scale: Any) -> None:
    """A scale with an inverse; nobody waits for a GPU to read it."""
    if isinstance(logit_scale, Tensor):
        if not logit_scale.is_cpu or not readable(logit_scale):
            return
        logit_scale = logit_scale.item()
    if logit_scale == 0:
        raise ValueError("logit_scale: expected a number other than 0 with rho, for the loss has its inverse; got 0")


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> [N] in the dtype of the scores, not differentiable."""
    dtype = score_dtype(x.dtype)
    return (x.detach().to(dtype) * y.detach().to(dtype)).sum(1)
