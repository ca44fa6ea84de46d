"""Stochastic expectation-maximisation over a data set: the decomposable loss with a memory of its normalisers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._library import outside_graphs
from ..arguments.checks import (
    check_backend,
    check_count,
    check_distribution,
    check_features,
    check_flag,
    check_generator,
    check_number,
    check_reduction,
    check_workspace,
    recomputing,
    require_one_process,
    shown,
)
from ..arguments.reduction import DEFAULT_WORKSPACE_BYTES, reduce_losses, row_weights
from ..arguments.temperature import scale_of
from ..distributed.group import Ranks, check_group, ranks_of, told
from ..distributed.losses import reduce_over_ranks
from ..draws.gamma import draw_log_weights, expected_excess
from ..losses.decomposable import decomposable
from .accumulate import accumulate
from .expectation import Expectation, check_choice, check_expectation, check_negatives, wide
from .memory import NormalizerMemory
from .normalizers import Batch, check_scores, found_by_batch, positive_term, row_normalizers

__all__ = ["DatasetContrastiveLoss", "DecomposableContrastiveLoss"]


class DatasetContrastiveLoss(nn.Module):
    """InfoNCE over a whole data set from small batches: the decomposable loss, its auxiliary variables, its memory.

    Called once a step, it reads the batch's normalisers from the memory, draws the auxiliary variables u (E-step),
    gives the loss for given u in one pass over the scores (M-step), and moves the memory to what that pass found.

    Parameters
    ----------
    num_samples : int
        Samples n of the data set.
    shape : float, optional
        None: u is its mean 1 / Zbar. A number a: u is drawn from Gamma(a, rate = a Zbar); 1 is the exact conditional
        distribution. The expected gradient is the same, its variance is not.
    negatives : "dataset", "batch" or int
        The notional number of negatives K that a batch's ones stand for: n - 1, as many as the batch has, or a number.
    include_positive : bool
        Whether the denominator holds the positive (InfoNCE), or not (DCL).
    weights : {"stored", "updated", "batch"} or float
        Which normaliser weighs a row: the one stored before this batch (stochastic EM); its average with the batch's
        own (SogCLR: less noise, some of the minibatch's bias); the batch's own alone (InfoNCE, or FlatNCE without the
        positive); or a constant log Z for all rows.
    max_ratio : float or "partial sum", optional
        A bound of u Z for the batch's own Z. A number R takes E[(u Z - R)+] from the gradient's rows. "partial sum",
        with negatives="dataset", is (n - 1) / (negatives in the batch): that bound never binds where Zbar is right, for
        no part of a sum of positive terms exceeds the whole; it only tells that a stored Zbar cannot be right.
    first_visit : {"reduce", "skip"}
        A sample without a stored normaliser takes the batch's own, from a pass without gradients before the other one,
        as long as there may be such samples; or it only enters the memory and has no weight in the loss. Weights
        that need no stored normaliser ("batch", a constant) treat all visits alike.
    safeguard : float, optional
        With negatives="dataset": the stored normaliser is never left below exp(-safeguard) times the part of the sum
        that the batch has seen.
    directions, step, floor, device, storage
        The memory's, see :class:`NormalizerMemory`.
    reduction, normalize, backend, workspace_bytes
        As in :func:`contrastive_kernels.decomposable`.
    group, gradients, strategy, uneven
        As in :func:`contrastive_kernels.info_nce`; by default all ranks of the default process group, if there is one.
        Each draws u for its own rows, and all hold the same memory.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    Notes
    -----
    3 products of 2 N M D flop and O((N + M) D) memory, as the bare op, where ``weights`` is "stored" or a constant;
    4 where the batch's own normalisers are needed before the weights: other ``weights``, a ``max_ratio``, and first
    visits under "reduce".

    The value is an upper bound of log Z_i = log(c + K mean_j exp(h_ij)), InfoNCE over K negatives, with equality at
    u = 1 / Z; the excess that drawing u adds on average is subtracted.

    To put this loss under activation checkpointing, call the three steps by themselves and checkpoint
    :meth:`m_step` alone, a pure function. Called as a whole during a recomputation it raises.

    References
    ----------
    After C. Chen et al., "Why do we need large batch sizes in contrastive learning? A gradient-bias perspective",
    NeurIPS 2022; derivation in docs/decomposable.md. "updated": Z. Yuan et al., "Provable stochastic optimization for
    global contrastive learning: small batch does not harm performance", ICML 2022. The safeguard: F. Fagan,
    G. Iyengar, "Unbiased scalable softmax optimization", 2018.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> loss = ck.DatasetContrastiveLoss(num_samples=1000)
    >>> index = torch.arange(4)
    >>> x = torch.eye(4).requires_grad_()
    >>> value = loss(x, torch.eye(4), index, 5.0)
    >>> value.backward()
    >>> round(value.item(), 4), loss.memory.visits[:5, 0].tolist()  # log(1 + 999 exp(-5))
    (2.0453, [1, 1, 1, 1, 0])
    """

    def __init__(
        self,
        num_samples: int,
        *,
        shape: float | None = None,
        negatives: str | int = "dataset",
        include_positive: bool = True,
        weights: str | float = "stored",
        max_ratio: float | str | None = None,
        first_visit: str = "reduce",
        safeguard: float | None = None,
        directions: int = 2,
        step: float = 1.0,
        floor: float = 0.1,
        device: torch.device | str | None = None,
        storage: str | Path | None = None,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
        group: Any | None = "auto",
        gradients: str = "average",
        strategy: str = "auto",
        uneven: bool = False,
    ) -> None:
        super().__init__()
        check_distribution(gradients, strategy, uneven)
        self.over: dict[str, Any] = {
            "group": check_group(group), "gradients": gradients, "strategy": strategy, "uneven": uneven
        }  # fmt: skip
        self.shape = None if shape is None else check_number(shape, "shape", positive=True)
        self.negatives = check_negatives(negatives)
        self.include_positive = check_flag(include_positive, "include_positive")
        self.weights = check_choice(weights, "weights", ("stored", "updated", "batch"))
        self.max_ratio = None if max_ratio is None else check_choice(max_ratio, "max_ratio", ("partial sum",))
        if not isinstance(first_visit, str) or first_visit not in ("reduce", "skip"):
            raise ValueError(f"first_visit: expected 'reduce' or 'skip'; got {shown(first_visit)}")
        self.first_visit = first_visit
        self.safeguard = None if safeguard is None else check_number(safeguard, "safeguard", positive=False)
        for value, name in ((self.safeguard, "safeguard"), (isinstance(self.max_ratio, str) or None, "max_ratio")):
            if value is not None and self.negatives != "dataset":
                raise ValueError(
                    f"{name}: expected negatives='dataset', a finite sum that a batch holds a part of; "
                    f"got negatives={negatives!r}"
                )
        if isinstance(self.max_ratio, float) and self.max_ratio < 1:
            raise ValueError(f"max_ratio: expected at least 1, the ratio of a right normaliser; got {max_ratio}")
        self.reduction = check_reduction(reduction)
        self.normalize = check_flag(normalize, "normalize")
        self.engine: dict[str, Any] = {
            "backend": check_backend(backend) or None,
            "workspace_bytes": check_workspace(workspace_bytes),
        }
        # last: it makes files, and an option that does not fit shall leave none
        self.memory = NormalizerMemory(
            num_samples, directions, step=step, floor=floor, device=device, storage=storage, group=group
        )

    def extra_repr(self) -> str:
        """The options, as they print."""
        names = ("shape", "negatives", "include_positive", "weights", "max_ratio", "first_visit", "safeguard")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "reduction", "normalize"))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        direction: int | None = None,
        positives: int | Tensor | None = None,
        positive_logits: Tensor | None = None,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch; in training mode it moves the memory.

        Parameters
        ----------
        x : Tensor
            Anchors [N, D].
        y : Tensor
            Their partners [N, D] for both directions; candidates [M, D] for one.
        index : Tensor
            Which samples the rows of ``x`` are, int64 [N].
        logit_scale : float or Tensor
            Multiplies the dot products: the inverse temperature, not its logarithm. Where it moves, what the memory
            holds is left as it is; :meth:`NormalizerMemory.rescale` is the correction.
        temperature : float or Tensor, optional
            1 / logit_scale, in its place: above 0.
        direction : int, optional
            None: all that the memory has, from one pass. A number: x alone queries, with the normalisers of that
            direction, as with momentum keys or a queue, which need no gradient.
        positives : int or Tensor, optional
            For one direction: where row i's positive lies in y, as in :func:`contrastive_kernels.info_nce`.
        positive_logits : Tensor, optional
            For one direction: z_i,p(i) [N], differentiable, where y holds negatives alone.
        weight : Tensor, optional
            Weights of the rows [N], not differentiated; of either sign.
        generator : torch.Generator, optional
            Source of the draws of u.

        Returns
        -------
        Tensor
            A scalar, or [N]; float32 (float64 for float64 inputs).

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit.
        RuntimeError
            Within the recomputation of activation checkpointing, and in training with a memory that cannot be written.
        """
        if recomputing():
            raise RuntimeError(
                "DatasetContrastiveLoss: called again by activation checkpointing, which would draw u and move "
                "the memory twice; call e_step, a checkpointed m_step and update instead"
            )
        with told(self._ranks(), x):
            expectation = self.e_step(index, direction=direction, generator=generator)
        beside: dict[str, Any] = {"temperature": temperature, "positive_logits": positive_logits, "weight": weight}
        loss, found = self.m_step(x, y, logit_scale, expectation, positives=positives, **beside)
        if self.training:
            columns = None if self.safeguard is None else max(self._columns(x, y) - (positive_logits is None), 0)
            self.update(expectation, found, columns=columns)
        return loss

    def _ranks(self) -> Ranks | None:
        """The ranks whose rows make up a batch."""
        return ranks_of(**self.over)

    def _columns(self, x: Tensor, y: Tensor) -> int:
        """How many rows of y there are on all ranks."""
        ranks = self._ranks()
        if ranks is None:
            return len(y)
        names = ("training", "weights", "negatives", "max_ratio", "first_visit", "safeguard", "include_positive")
        about = (("features", x.shape[1]), ("normalize", self.normalize), *((n, getattr(self, n)) for n in names))
        return sum(ranks.agree(type(self).__name__, about, x, len(x), len(y)).cols)

    @outside_graphs
    @torch.no_grad()
    def e_step(
        self, index: Tensor, *, direction: int | None = None, generator: torch.Generator | None = None
    ) -> Expectation:
        """Reads the memory and draws u for the samples [N] of a batch, without having seen it."""
        columns = self.memory._columns(direction)
        log_mean, visits = self.memory.read(index)
        check_generator(generator, log_mean.device)
        log_mean, visits = log_mean[:, columns], visits[:, columns]
        draws = [draw_log_weights(column, self.shape, generator) for column in log_mean.T]
        return Expectation(index, log_mean, visits, torch.stack(draws, 1), direction, self.memory.cold)

    def m_step(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: float | Tensor | None,
        expectation: Expectation,
        *,
        temperature: float | Tensor | None = None,
        positives: int | Tensor | None = None,
        positive_logits: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss for given u, and the logarithms of the means that the batch found [N, directions].

        A pure function, which may be computed again. Arguments as in :meth:`forward`.
        """
        logit_scale = scale_of(x, logit_scale, temperature)
        ranks = self._ranks()
        with told(ranks, x):
            x, y = check_features(x, y, ("x", "y"), self.normalize)
            expectation = check_expectation(expectation).to(x.device)
            two = expectation.log_mean.shape[1] == 2
            if len(expectation.index) != len(x):
                raise ValueError(f"index: expected one sample per row of x [{len(x)}]; got {len(expectation.index)}")
            if two and not (positives is None and positive_logits is None and len(x) == len(y)):
                raise ValueError(
                    "direction: expected one of the memory's directions where x and y are not pairs of rows; got None, "
                    f"with {len(x)} and {len(y)} rows, positives {type(positives).__name__} and positive_logits "
                    f"{type(positive_logits).__name__}"
                )
            weight = row_weights(weight, len(x), x)
        batch = Batch(x, y, logit_scale, positives, positive_logits, two, ranks, self._columns(x, y))
        negatives = batch.negatives
        if negatives < 1:
            nothing = x.new_zeros(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            alone = reduce_losses(nothing, None, self.reduction)
            # a gradient of zero: data parallelism wants every parameter used
            for used in (x, y, logit_scale, positive_logits):
                alone = alone + used.reshape(-1)[:0].sum().to(alone.dtype) if isinstance(used, Tensor) else alone
            return alone, torch.full_like(expectation.log_mean, -torch.inf)
        with told(ranks, x):
            z_pos, notional = batch.positive_scores(), self._notional(negatives)
        log_z, counted = row_normalizers(self, batch, expectation, z_pos, notional)
        log_u = expectation.log_weight.to(log_z) - log_z
        if counted is not None:
            weight = counted if weight is None else weight * counted
        sides: Any = (-log_u[:, 0], -log_u[:, 1]) if two else -log_u[:, 0]
        streamed, own = decomposable(
            x, y, logit_scale, sides, positive_constant=0.0, negative_scale=notional / negatives,
            positive_logits=positive_logits, positives=positives, weight=weight, return_log_normalizer=True,
            reduction=self.reduction, **self.engine, **(self.over if ranks is not None else {}),
        )  # fmt: skip
        rest = positive_term(self.include_positive, log_u) - expected_excess(self.shape)
        if weight is not None:
            rest = rest.masked_fill((weight == 0)[:, None], 0.0)
        if ranks is None:
            loss = streamed + reduce_losses(rest.mean(1), weight, self.reduction)
        else:
            name = type(self).__name__
            loss = streamed + reduce_over_ranks(ranks, name, rest.mean(1), weight, self.reduction, x)
        found = torch.stack(list(own) if isinstance(own, Sequence) else [own], 1)
        dtype = wide(x.device)
        return loss, found.to(dtype) + (z_pos.to(dtype) - math.log(notional))[:, None]

    @outside_graphs
    @torch.no_grad()
    def update(self, expectation: Expectation, found: Tensor, *, columns: int | None = None) -> None:
        """Moves the memory to what the M-step found, from ``columns`` negatives (needed by the safeguard alone)."""
        bound = None
        check_expectation(expectation)
        if columns is not None:
            check_count(columns, "columns", least=0)
        if self.safeguard is not None:
            if columns is None:
                raise ValueError("columns: expected the number of negatives that the safeguard counts on; got None")
            bound = found + (math.log(max(columns, 1) / max(self.memory.num_samples - 1, 1)) - self.safeguard)
        self.memory.update(expectation.index, found, expectation.direction, bound)

    @torch.no_grad()
    def warm_up(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        direction: int | None = None,
        positives: int | Tensor | None = None,
        positive_logits: Tensor | None = None,
    ) -> None:
        """Visits the samples of a batch without a loss: one product. Arguments as in :meth:`forward`."""
        logit_scale = scale_of(x, logit_scale, temperature)
        ranks = self._ranks()
        with told(ranks, x):
            x, y = check_features(x, y, ("x", "y"), self.normalize)
            expectation = self.e_step(index, direction=direction)
            check_scores(x, y, logit_scale, positives, positive_logits)
            if len(expectation.index) != len(x):
                raise ValueError(f"index: expected one sample per row of x [{len(x)}]; got {len(expectation.index)}")
        two = expectation.log_mean.shape[1] == 2
        batch = Batch(x, y, logit_scale, positives, positive_logits, two, ranks, self._columns(x, y))
        self.update(expectation, found_by_batch(batch, self.engine), columns=max(batch.negatives, 0))

    def accumulate(
        self,
        encode: Callable[[Any], tuple[Tensor, Tensor]],
        batches: Sequence[Any],
        index: Sequence[Tensor],
        logit_scale: float | Tensor,
        *,
        across: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One large batch in micro-batches, each encoded once; adds to the gradients of all parameters.

        Parameters
        ----------
        encode : callable
            From one of ``batches`` to (x, y), [N, D] each.
        batches : sequence
            The micro-batches: a random partition of the large one, in random order.
        index : sequence of Tensor
            The samples of each, int64 [N].
        logit_scale : float or Tensor
            Its gradient is added once, after the last micro-batch.
        across : bool
            Whether negatives of other micro-batches count; otherwise each has its own alone.
        generator : torch.Generator, optional
            Source of the draws of u.

        Returns
        -------
        Tensor
            The loss of the large batch (of its micro-batches' own pairs with ``across=False``), detached.

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit, and where the weights need the whole batch's own normalisers.

        Notes
        -----
        Exact, given u: the value, the temperature's gradient, what the memory learns, and the gradients of pairs within
        a micro-batch. Not exact: a pair across micro-batches moves only the row that comes later, by twice its part,
        since the earlier one's activations are gone. Over random orders of the micro-batches the mean is the large
        batch's gradient. With columns that need no gradient (momentum keys) nothing is lost: call the loss itself for
        each chunk of rows. Encoders that couple rows (batch norm) see micro-batches.

        Time: one encoder pass forward and backward, where gradient caching takes a second one forward.
        """
        require_one_process(f"{type(self).__name__}.accumulate")
        if not (self.weights == "stored" or isinstance(self.weights, float)) or self.max_ratio is not None:
            raise ValueError(
                "accumulate: expected weights known before the batch ('stored' or a number) and no max_ratio; "
                f"got weights={self.weights!r}, max_ratio={self.max_ratio!r}"
            )
        if not callable(encode):
            raise TypeError(f"encode: expected a callable; got {type(encode).__name__}")
        check_flag(across, "across")
        for name, value in (("batches", batches), ("index", index)):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise TypeError(f"{name}: expected a sequence; got {type(value).__name__}")
        if len(batches) != len(index) or not len(index):
            got = f"{len(batches)} and {len(index)}"
            raise ValueError(f"batches and index: expected as many of both, and at least one; got {got}")
        return accumulate(self, encode, batches, index, logit_scale, across, generator)

    def _notional(self, negatives: int) -> float:
        """K, for a batch with so many negatives."""
        if self.negatives == "dataset":
            return float(max(self.memory.num_samples - 1, 1))
        return float(negatives if self.negatives == "batch" else self.negatives)


#: Its former name.
DecomposableContrastiveLoss = DatasetContrastiveLoss
