"""What moves between the ranks of a process group: torch.distributed's collectives, counted, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Arrival", "Traffic", "Transport", "count_entries", "count_traffic"]


@dataclass
class Traffic:
    """What this process has received from others while it was counted, padding included."""

    #: entries of matrices of features and of their gradients
    elements: int = 0
    #: bytes of everything, vectors and sizes too
    bytes: int = 0
    #: collective calls and received messages
    calls: int = 0


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what the losses receive from other ranks inside the block.

    Examples
    --------
    >>> from contrastive_kernels.distributed import count_traffic
    >>> with count_traffic() as traffic:
    ...     pass  # a step of the training
    >>> traffic.elements
    0
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(received: Tensor, share: float = 1.0) -> None:
    """Takes note of a tensor, of which this share came from other ranks."""
    for traffic in _counting:
        traffic.calls += 1
        traffic.bytes += round(received.numel() * received.element_size() * share)
        if received.dim() == 2:
            traffic.elements += round(received.numel() * share)


def count_entries(matrices: int) -> None:
    """Takes note of entries of matrices that came among other bytes."""
    for traffic in _counting:
        traffic.elements += matrices


# torch 2.13 renames it, and warns of the old name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


#: Bytes up to which a block goes straight to every rank of a CPU's group. Gloo's own gather passes blocks around a
#: ring, a wait after the other; large ones take as long either way.
AT_ONCE = 2**20


class Arrival:
    """A tensor that is under way from another rank."""

    def __init__(self, tensor: Tensor, works: list[Any], sent: Sequence[Tensor], wording: Callable[..., Any]) -> None:
        self._tensor, self._works, self._sent, self._wording = tensor, works, sent, wording

    def wait(self) -> Tensor:
        """The tensor, once it is there and what was sent may be overwritten."""
        for work in self._works:
            self._wording(work.wait)
        self._works, self._sent = [], ()
        return self._tensor


class Transport:
    """Moves tensors between the ranks of one group; `call`, the user's words for it, goes into errors."""

    def __init__(self, group: dist.ProcessGroup, call: str) -> None:
        self.group, self.call = group, call
        self.rank, self.size = group.rank(), group.size()

    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """The ranks' blocks one below the other [sum of sizes, ...], of this rank's [sizes[rank], ...]."""
        if self.size == 1:
            return own
        longest, width = max(sizes), own.shape[1:]
        if longest == 0:
            return own
        equal = min(sizes) == longest
        sent = own.contiguous() if equal else own.new_zeros(longest, *width)
        if not equal:
            sent[: len(own)] = own
        found = own.new_empty(self.size * longest, *width)
        if own.is_cpu and sent.nbytes <= AT_ONCE:
            self._worded(dist.all_to_all_single, _bytes(found), _bytes(torch.cat([sent] * self.size)), group=self.group)
        else:
            self._worded(_all_gather, _bytes(found), _bytes(sent), group=self.group)
        _count(found, (self.size - 1) / self.size)
        if equal:
            return found
        return torch.cat([found[i * longest : i * longest + n] for i, n in enumerate(sizes)])

    def to_owners(self, block: Tensor, sizes: Sequence[int]) -> Tensor:
        """What all ranks hold of this rank's rows [ranks, sizes[rank], ...], in their order, of [sum of sizes, ...]."""
        if self.size == 1:
            return block[None]
        own = sizes[self.rank]
        found = block.new_empty(self.size * own, *block.shape[1:])
        splits = [own] * self.size, list(sizes)
        self._worded(dist.all_to_all_single, found, block.contiguous(), *splits, group=self.group)
        _count(found, (self.size - 1) / self.size)
        return found.view(self.size, own, *block.shape[1:])

    def sum_to_owners(self, block: Tensor, sizes: Sequence[int]) -> Tensor:
        """The sum over ranks of this rank's rows, added in their order: two runs agree bitwise."""
        parts = self.to_owners(block, sizes)
        if self.size == 1:
            return parts[0]
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def sum(self, own: Tensor) -> Tensor:
        """The sum over ranks of a small tensor, added in their order."""
        parts = self.all_gather(own.reshape(1, 1, -1), [1] * self.size)
        return parts[:, 0].sum(0).reshape(own.shape)

    def sum_of_matrices(self, own: Tensor) -> Tensor:
        """The sum over ranks of matrices [k, l], added in their order: every rank adds some of the rows."""
        if self.size == 1:
            return own
        sizes = [len(own) * (r + 1) // self.size - len(own) * r // self.size for r in range(self.size)]
        return self.all_gather(self.sum_to_owners(own, sizes), sizes)

    def pass_on(self, own: Tensor, arriving: Sequence[int], tag: int = 0) -> Arrival:
        """Sends a tensor to the next rank while one of shape `arriving` comes from the previous one."""
        own, found = own.contiguous(), own.new_empty(arriving)
        peers = [dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1)]
        sending, receiving = (
            dist.P2POp(operation, _bytes(tensor), peer, self.group, tag)
            for operation, tensor, peer in ((dist.isend, own, peers[0]), (dist.irecv, found, peers[1]))
        )
        # (one of two ranks would otherwise wait for the other's sending)
        operations = [sending, receiving] if self.rank % 2 == 0 else [receiving, sending]
        operations = [o for o, tensor in zip(operations, _in_order(self.rank, own, found)) if tensor.numel()]
        works = self._worded(dist.batch_isend_irecv, operations) if operations else []
        _count(found)
        return Arrival(found, works, (own,), self._worded)

    def _worded(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls torch.distributed; its errors say which loss waited."""
        try:
            return operation(*arguments, **options)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.call}: rank {self.rank} of {self.size} could not exchange its rows with the others: has one of "
                f"them died, or left out this call? ({error})"
            ) from error


def _in_order(rank: int, sent: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    return (sent, found) if rank % 2 == 0 else (found, sent)


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes where the transport may not know the dtype."""
    return tensor.view(torch.uint8) if tensor.dim() and tensor.element_size() == 2 and tensor.is_cpu else tensor
