"""What a rank brings along with its first message: its rows as one line of bytes, and how long those lines will be.

A collective call must have the same length on every rank, whatever each is about to compute. So lines travel behind the
headers of an agreement in a room whose length depends on nothing but what all ranks have received before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist

from .transport import Transport

__all__ = ["Expected", "Lines", "among_all", "expected_of"]

#: Bytes of the longest room: a call that was expected and does not come costs the others that much.
_MOST = 2**22


@dataclass
class Expected:
    """How long a group's next lines will be: as those that followed the same call before, or else as its own.

    Every rank changes it by what all have received alone, so that it is the same on each of them.
    """

    #: the call before and the bytes of its longest line, and by call those of the one after it
    last: str = ""
    length: int = 0
    rooms: dict[str, int] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Bytes behind the header of the next agreement."""
        return self.rooms.get(self.last, self.length)

    def learn(self, call: str, length: int) -> None:
        """After an agreement on a call whose longest line has so many bytes."""
        length = length if length <= _MOST else 0
        self.rooms[self.last] = length
        self.last, self.length = call, length

    def forget(self) -> None:
        """After one that failed."""
        self.last, self.length = "", 0
        self.rooms.clear()


_expected: weakref.WeakKeyDictionary[dist.ProcessGroup, Expected] = weakref.WeakKeyDictionary()


def expected_of(group: dist.ProcessGroup) -> Expected:
    """A group's; it ends with the group."""
    return _expected.setdefault(group, Expected())


class Lines:
    """Tensors of rows and of columns, of every rank in one line of bytes.

    Parameters
    ----------
    tensors : sequence
        (this rank's tensor, whether its rows are columns of the matrix). All ranks have as many, of the same kinds.
    rows, cols : int
        Of this rank.
    """

    def __init__(self, tensors: Sequence[tuple[Tensor, bool]], rows: int, cols: int) -> None:
        self._tensors = tensors
        #: by numbers of rows and columns, where each tensor lies in a line, and the line's bytes
        self._places: dict[tuple[int, int], tuple[list[slice], int]] = {}
        self._own, self.bytes = self._layout(rows, cols)

    def _layout(self, rows: int, cols: int) -> tuple[list[slice], int]:
        """Where tensors of so many rows and columns lie in a line, and its length: wider entries first, so aligned."""
        if (rows, cols) not in self._places:
            places, start = [slice(0)] * len(self._tensors), 0
            for i in sorted(range(len(self._tensors)), key=lambda i: -self._tensors[i][0].element_size()):
                tensor, of_cols = self._tensors[i]
                places[i] = slice(start, start + (cols if of_cols else rows) * _row_bytes(tensor))
                start = places[i].stop
            self._places[rows, cols] = places, max(-(-start // 8), 1) * 8  # (a view of nothing has odd offsets)
        return self._places[rows, cols]

    def parts(self, length: int) -> list[Tensor]:
        """This rank's line of at least as many bytes as it has, in parts."""
        order = sorted(range(len(self._tensors)), key=lambda i: self._own[i].start)
        parts = [self._tensors[i][0].reshape(-1).view(torch.uint8) for i in order]
        rest = length - sum([len(part) for part in parts])
        return [*parts, self._tensors[0][0].new_zeros(rest, dtype=torch.uint8)] if rest else parts

    def gather(self, transport: Transport, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
        """All ranks' lines [ranks, bytes] in a message of their own."""
        sent = torch.cat(self.parts(max(self._layout(*each)[1] for each in zip(rows, cols))))
        return transport.all_gather(sent[None, None], [1] * len(rows))[:, 0]

    def entries(self, rows: Sequence[int], cols: Sequence[int]) -> int:
        """Entries of matrices in the longest line."""
        return sum(max(cols if of_cols else rows) * t.shape[1] for t, of_cols in self._tensors if t.dim() == 2)

    def read(self, lines: Tensor, rows: Sequence[int], cols: Sequence[int]) -> list[Tensor]:
        """Each tensor of all ranks, one below the other, of their lines [ranks, at least as many bytes]."""
        layouts = [self._layout(*each)[0] for each in zip(rows, cols)]
        if min(rows) == max(rows) and min(cols) == max(cols):  # tensors lie one below the other
            found = [
                lines[:, place].view(tensor.dtype).reshape(sum(cols if of_cols else rows), *tensor.shape[1:])
                for place, (tensor, of_cols) in zip(layouts[0], self._tensors)
            ]
            return [tensor.contiguous() for tensor in found]  # (of one entry a rank they are views with gaps)
        parts = list(lines)
        return [
            torch.cat([part[places[i]].view(tensor.dtype) for part, places in zip(parts, layouts)]).view(
                -1, *tensor.shape[1:]
            )
            for i, (tensor, _) in enumerate(self._tensors)
        ]


def _row_bytes(tensor: Tensor) -> int:
    return tensor.element_size() * tensor.shape[1:].numel()


def among_all(index: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
    """Columns [N, ...] among those of all ranks, of each rank's among its own; -1 stays none."""
    firsts = torch.tensor([0, *cols[:-1]], dtype=torch.int64, device=index.device).cumsum(0)
    of_rows = torch.tensor(rows, dtype=torch.int64, device=index.device)
    firsts = firsts.repeat_interleave(of_rows, output_size=len(index)).view(-1, *[1] * (index.dim() - 1))
    return torch.where(index < 0, index, index + firsts)
