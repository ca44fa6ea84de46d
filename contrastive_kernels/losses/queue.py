"""A queue of features of past batches: more negatives than a batch has, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments.checks import check_count, check_dense, check_device, check_flag, check_matrix
from ..arguments.pairs import check_ids
from ..distributed.group import check_group, ranks_of, told
from .module import keeping_dtypes

__all__ = ["FeatureQueue", "check_queue"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FeatureQueue(nn.Module):
    """The last features, and their ids if they have any, in a ring on the device; negatives of :func:`info_nce`.

    MoCo's queue of momentum keys, and the cross-batch memory of labelled features. It is a module, so that it moves and
    is saved with the model; its features keep their dtype when the model is cast.

    Parameters
    ----------
    size : int
        How many features it holds.
    features : int
        D.
    ids : bool
        Every feature has an id.
    dtype : torch.dtype, optional
        float16, bfloat16, float32 or float64; by default float32. Features take it when they come in, and that of the
        loss's features when they are used.
    device : torch.device or str, optional
        By default the CPU.
    group : ProcessGroup, DeviceMesh or "world", optional
        The ranks that all fill their queues with what all of them have, in the order of their ranks, so that the queues
        are the same. "auto" is the default group if there is one with more than one rank; None: this process alone.
    uneven : bool
        Ranks may come with different numbers of features.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    RuntimeError
        From ``load_state_dict``, for the state of a queue of another size, dtype or kind.

    Notes
    -----
    Once it is full the oldest features make room. Of a batch larger than the queue its last ones are kept. Enqueue
    after the loss: features that are in the queue already are negatives of themselves, and those of the same samples
    are false negatives that only ids leave out.

    References
    ----------
    K. He, H. Fan, Y. Wu, S. Xie, R. Girshick, "Momentum contrast for unsupervised visual representation learning", CVPR
    2020. X. Wang, H. Zhang, W. Huang, M. R. Scott, "Cross-batch memory for embedding learning", CVPR 2020.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> queue = ck.FeatureQueue(4, 2)
    >>> for step in range(3):
    ...     x, keys = torch.randn(2, 2), torch.full((2, 2), float(step))
    ...     loss = ck.info_nce(x, keys, 1.0, queue=queue)
    ...     queue.enqueue(keys)
    >>> len(queue), queue.features[:, 0].tolist()
    (4, [2.0, 2.0, 1.0, 1.0])
    """

    features: Tensor
    ids: Tensor | None

    def __init__(
        self,
        size: int,
        features: int,
        *,
        ids: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        group: Any | None = None,
        uneven: bool = False,
    ) -> None:
        super().__init__()
        check_count(size, "size")
        check_count(features, "features")
        check_flag(ids, "ids")
        check_flag(uneven, "uneven")
        dtype = torch.float32 if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
            raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64; got {dtype}")
        where = torch.device("cpu") if device is None else check_device(device, here=True)
        self.group, self.uneven = check_group(group), uneven
        self._count = self._next = 0
        self.register_buffer("features", torch.zeros(size, features, dtype=dtype, device=where))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64, device=where) if ids else None)

    def __len__(self) -> int:
        """How many features are in it."""
        return self._count

    def filled(self) -> tuple[Tensor, Tensor | None]:
        """Views of the features that are in it [n, D], in no particular order, and of their ids [n]."""
        return self.features[: self._count], None if self.ids is None else self.ids[: self._count]

    @torch.no_grad()
    def enqueue(self, features: Tensor, ids: Tensor | None = None) -> None:
        """Takes in a batch, in place of the oldest.

        Parameters
        ----------
        features : Tensor
            [n, D] of any floating dtype, on the queue's device. No gradient is kept.
        ids : Tensor, optional
            Integers [n], if the queue has ids.

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit.
        """
        ranks = ranks_of(self.group, "sum", "ring", self.uneven)
        with told(ranks, features):
            own = self._checked(features, ids)
        if ranks is not None:
            about = (("features", features.shape[1]), ("dtype", self.features.dtype), ("ids", ids is not None))
            sizes = ranks.agree("enqueue", about, features, len(features), len(features))
            transport = ranks.transport("enqueue")
            own = [transport.all_gather(v, sizes.rows) for v in own]
        size = len(self.features)
        own = [v[-size:] for v in own]
        count = len(own[0])
        head = min(count, size - self._next)
        for kept, new in zip((self.features, self.ids), own):
            assert kept is not None
            kept[self._next : self._next + head] = new[:head]
            kept[: count - head] = new[head:]
        self._next = (self._next + count) % size
        self._count = min(self._count + count, size)

    def clear(self) -> None:
        """Empties it."""
        self._count = self._next = 0

    def _checked(self, features: Any, ids: Any) -> list[Tensor]:
        """What comes in, in the queue's dtypes."""
        _, width = check_matrix(features, "features")
        if width != self.features.shape[1]:
            raise ValueError(f"features: expected {self.features.shape[1]} of every row; got {width}")
        if features.device != self.features.device:
            raise ValueError(f"features: expected device {self.features.device}; got {features.device}")
        own = [_apart(features.detach().to(self.features.dtype), self.features)]
        if (ids is None) != (self.ids is None):
            expected = "None of a queue without ids" if self.ids is None else "a tensor, for the queue has ids"
            raise ValueError(f"ids: expected {expected}; got {type(ids).__name__}")
        if ids is not None:
            if not isinstance(ids, Tensor):
                raise TypeError(f"ids: expected a tensor of integers [n]; got {type(ids).__name__}")
            check_dense(ids, "ids")
            checked, _ = check_ids(ids, "ids", features, features)
            assert checked is not None
            own.append(_apart(checked, self.ids))
        return own

    # ---- state ----

    def get_extra_state(self) -> dict[str, int]:
        """Where the next feature goes, and how many there are."""
        return {"next": self._next, "count": self._count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """... and back."""
        if not isinstance(state, dict) or not {"next", "count"} <= set(state):
            raise TypeError(f"state: expected what get_extra_state gives; got {type(state).__name__}")
        start, count, size = state["next"], state["count"], len(self.features)
        if not (isinstance(start, int) and 0 <= start < size and isinstance(count, int) and 0 <= count <= size):
            raise ValueError(f"state: expected places in a queue of {size}; got next {start!r}, count {count!r}")
        self._next, self._count = start, count

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:  # what another queue holds must not come in by halves
        errors: list[str] = arguments[-1]
        kept, there = self.state_dict(keep_vars=True), set(state_dict)
        for name, own in kept.items():
            other = state_dict.get(prefix + name)
            if isinstance(own, Tensor) and isinstance(other, Tensor):
                said = [f"{list(v.shape)} of {v.dtype}" for v in (own, other)]
                if said[0] != said[1]:
                    errors.append(f"{prefix}{name}: expected the state of a queue of {said[0]}; got {said[1]}")
        extra = prefix + "ids"
        if (extra in there) != (self.ids is not None):
            expected = "one with ids" if self.ids is not None else "one without ids"
            errors.append(f"{extra}: expected the state of a queue like this, {expected}; got another")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureQueue:
        """Moves, and keeps the features' dtype."""
        super()._apply(keeping_dtypes(fn), recurse)
        return self

    def extra_repr(self) -> str:
        """Its size, as it prints."""
        size, width = self.features.shape
        return f"size={size}, features={width}, ids={self.ids is not None}, dtype={self.features.dtype}"


def _apart(new: Tensor, kept: Tensor | None) -> Tensor:
    """What comes in, copied if it lies in the ring, whose places it would lose while they are written."""
    shares = kept is not None and new.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
    return new.clone() if shares else new


def check_queue(queue: Any, x: Tensor, with_ids: bool) -> FeatureQueue:
    """A queue whose features fit the rows of x [N, D], with ids where these have some."""
    if not isinstance(queue, FeatureQueue):
        raise TypeError(f"queue: expected a FeatureQueue; got {type(queue).__name__}")
    width = queue.features.shape[1]
    if width != x.shape[1]:
        raise ValueError(f"queue: expected one of {x.shape[1]} features; got one of {width}")
    if queue.features.device != x.device:
        raise ValueError(f"queue: expected one on device {x.device}; got one on {queue.features.device}")
    if with_ids and queue.ids is None:
        raise ValueError(
            "queue: expected one with ids, FeatureQueue(..., ids=True), where ids are given; got one without"
        )
    return queue
