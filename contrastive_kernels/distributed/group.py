"""Which ranks share a loss, and their agreement on what they are about to compute."""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..arguments.checks import check_distribution, is_shared, shown
from .lines import Lines, expected_of
from .transport import Transport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "Sizes", "check_group", "ranks_of", "tell", "told"]

#: Bytes of a message that says what went wrong on a rank.
_MESSAGE = 1024
#: Bytes of what every rank says of itself first.
_HEADER = 64


@dataclass(frozen=True)
class Sizes:
    """What the ranks have agreed on."""

    #: rows and columns of every rank
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    #: of the device with the least, in bytes
    memory: int
    #: all ranks' lines [ranks, bytes], where they came with the agreement
    lines: Tensor | None = None


class Ranks:
    """The ranks that share a loss.

    Parameters
    ----------
    group : ProcessGroup
        All of them.
    gradients : {"average", "sum"}
        What they hold of the features' gradients; as :func:`contrastive_kernels.info_nce` has it.
    strategy : {"auto", "grid", "ring"}
        How their rows meet.
    uneven : bool
        They may have different numbers of rows.
    mesh : tuple, optional
        The number of rows of a grid, and the groups of the row and the column that this rank is in; by default they
        are chosen and made on demand.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        gradients: str,
        strategy: str,
        uneven: bool,
        mesh: tuple[int, dist.ProcessGroup, dist.ProcessGroup] | None = None,
    ) -> None:
        self.group, self.gradients, self.strategy, self.uneven, self.mesh = group, gradients, strategy, uneven, mesh
        self.rank, self.size = group.rank(), group.size()

    def serves(self, device: torch.device) -> bool:
        """Whether the group sends tensors of a device."""
        kinds = [kind.type for kind in self.group._device_types]
        return device.type in kinds or not kinds

    def device(self, wanted: torch.device | None = None) -> torch.device:
        """Where tensors are to be sent from: the wanted device if the group serves it."""
        wanted = torch.device("cpu") if wanted is None else wanted
        kinds = {kind.type for kind in self.group._device_types}
        if self.serves(wanted):
            return wanted
        return torch.device("cuda", torch.cuda.current_device()) if "cuda" in kinds else torch.device(kinds.pop())

    def transport(self, call: str) -> Transport:
        """Between all of them."""
        return Transport(self.group, call)

    def grid(self, rows: int, call: str) -> tuple[Transport, Transport]:
        """Between this rank's row of a grid of so many rows, and between its column.

        Ranks are laid out row by row. Every rank makes the group of its row first, so that nobody waits for one that
        makes another.
        """
        if self.mesh is not None:
            return Transport(self.mesh[1], call), Transport(self.mesh[2], call)
        made = _grids.setdefault(self.group, {})
        if rows not in made:
            made[rows] = _grid_groups(self.group, rows)
        row, col = (self.group if part is None else part for part in made[rows])
        return Transport(row, call), Transport(col, call)

    # ---- agreement ----

    def agree(
        self,
        call: str,
        about: Sequence[Any],
        x: Tensor,
        rows: int,
        cols: int,
        lines: Lines | None = None,
        wanted: Callable[[Sizes], bool] | None = None,
    ) -> Sizes:
        """All ranks' sizes, once they are about to compute the same.

        Parameters
        ----------
        call : str
            The name of the loss.
        about : sequence
            What must be the same everywhere: (name, value) pairs that print.
        x : Tensor
            Of the device and dtype.
        rows, cols : int
            Of this rank.
        lines : Lines, optional
            What this rank brings along, if there is room for it.
        wanted : callable, optional
            Whether such calls want lines, given the sizes: the same on every rank.

        Raises
        ------
        ValueError
            On every rank, if one of them is about to compute something else, or has failed before. On CUDA without
            `uneven` nothing is exchanged, for the host would wait.
        """
        if not x.is_cpu and not self.serves(x.device):
            error = ValueError(f"group: expected features on a device that it serves; got some on {x.device}")
            self.fail(error, x)
            raise error
        if not x.is_cpu and not self.uneven:
            return Sizes((rows,) * self.size, (cols,) * self.size, memory_of(x.device))
        text = "; ".join(f"{name}={value}" for name, value in (("loss", call), *about, ("uneven", self.uneven)))
        expected, memory, length = expected_of(self.group), memory_of(x.device), 0 if lines is None else lines.bytes
        own = (zlib.crc32(text.encode()), rows, cols, memory, 0, length)
        found, brought = self._headers(own, expected.room, x.device, lines)
        failed = any(h[4] for h in found)
        if failed or len({h[0] for h in found}) > 1:
            expected.forget()
            self._raise_together("" if failed else text, x.device, failed=failed)
        _, rows_of, cols_of, memories, _, lengths = zip(*found)
        sizes = Sizes(rows_of, cols_of, min(memories))
        longest = max(lengths) if wanted is not None and wanted(sizes) else 0
        if 0 < longest <= expected.room:
            sizes = Sizes(rows_of, cols_of, min(memories), brought)
        expected.learn(call, longest)
        uneven = len(set(sizes.rows)) > 1 or len(set(sizes.cols)) > 1
        if uneven and not self.uneven:
            raise ValueError(
                f"uneven: expected True where ranks have different numbers of rows; got False with {list(sizes.rows)}"
                + (f" rows and {list(sizes.cols)} candidates" if sizes.cols != sizes.rows else " rows")
            )
        return sizes

    def agree_on_rows(self, call: str, x: Tensor, *about: tuple[str, Any]) -> Sizes:
        """The same of matching rows x [n, D]."""
        shared = [("features", x.shape[1]), ("dtype", x.dtype), ("gradients", self.gradients)]
        shared.append(("differentiated", torch.is_grad_enabled() and x.requires_grad))
        return self.agree(call, (*shared, *about), x, len(x), len(x))

    def fail(self, error: Exception, features: Any) -> None:
        """Tells the others that this rank raises, and why: they raise the same."""
        known = isinstance(features, Tensor) and self.serves(features.device)
        if not known and torch.cuda.is_available():  # nobody knows where the others' features are
            return
        device = features.device if known else torch.device("cpu")
        if device.type != "cpu" and not self.uneven:
            return
        expected = expected_of(self.group)
        self._headers((0, 0, 0, 0, 1, 0), expected.room, device)
        expected.forget()
        self._raise_together(f"{type(error).__name__}: {error}", device, failed=True)

    def _headers(
        self, own: tuple[int, ...], room: int, device: torch.device, lines: Lines | None = None
    ) -> tuple[list[list[int]], Tensor]:
        """(what, rows, cols, memory, failed, bytes of its line) of every rank; their lines [ranks, room]."""
        header = torch.tensor((*own, 0, 0), dtype=torch.int64, device=device).view(torch.uint8)
        line = [] if lines is None or lines.bytes > room else lines.parts(room)
        sent = torch.cat([header, *(line or [header.new_zeros(room)])])
        found = self.transport("the agreement of ranks").all_gather(sent[None, None], [1] * self.size)[:, 0]
        headers: list[list[int]] = found[:, :_HEADER].view(torch.int64)[:, : len(own)].tolist()
        return headers, found[:, _HEADER:]

    def _raise_together(self, text: str, device: torch.device, *, failed: bool) -> None:
        """The same error on every rank."""
        texts = self._texts(text, device)
        if failed:
            said = [f"rank {rank} raised {t}" for rank, t in enumerate(texts) if t]
            kinds = (TypeError, NotImplementedError, RuntimeError)
            kind = next((each for each in kinds if f" raised {each.__name__}: " in said[0]), ValueError)
            raise kind(f"group: expected every rank to reach the loss; {'; '.join(said)}")
        first = next((t for t in texts if t != texts[0]), None)
        if first is None:  # (they are cut off)
            raise ValueError(f"group: expected the same loss of all ranks; got others than {shown(texts[0])}")
        raise ValueError(
            "group: expected the same loss of all ranks; got "
            f"{_difference(texts[0], first)} on rank 0 and {_difference(first, texts[0])} on rank {texts.index(first)}"
        )

    def _texts(self, text: str, device: torch.device) -> list[str]:
        """What every rank has to say."""
        coded = text.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0")
        own = torch.tensor(struct.unpack(f"{_MESSAGE}B", coded), dtype=torch.uint8, device=device)
        found = self.transport("the agreement of ranks").all_gather(own[None, None], [1] * self.size)
        return [bytes(line).rstrip(b"\0").decode(errors="replace") for line in found[:, 0].tolist()]


def _difference(one: str, other: str) -> str:
    """What one text says that the other does not."""
    others = other.split("; ")
    return "; ".join(part for part in one.split("; ") if part not in others) or one


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of this machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- groups ----

_Pair = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]

#: The groups of a grid's rows and columns, by its number of rows; None is all ranks. They end with the group that they
#: divide, which they do not hold.
_grids: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, _Pair]] = weakref.WeakKeyDictionary()


def _grid_groups(group: dist.ProcessGroup, rows: int) -> _Pair:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    cols = size // rows
    a, b = divmod(rank, cols)
    everyone = dist.get_process_group_ranks(group)
    row = [everyone[a * cols + c] for c in range(cols)]
    col = [everyone[r * cols + b] for r in range(rows)]
    one, other = (
        None if len(part) == size else dist.new_group(part, use_local_synchronization=True) for part in (row, col)
    )
    return one, other


def ranks_of(group: Any, gradients: str, strategy: str, uneven: bool) -> Ranks | None:
    """The ranks that share a loss; None where this process computes alone."""
    check_group(group)
    if not is_shared(group, gradients, strategy, uneven):
        return None
    if isinstance(group, str):
        found = _default(group)
    else:
        found = group if isinstance(group, dist.ProcessGroup) else _group_of(group)
    try:
        check_distribution(gradients, strategy, uneven)
    except (TypeError, ValueError) as error:
        if found is not None and found.size() > 1:
            Ranks(found, "average", "auto", False).fail(error, None)
        raise
    if found is None or found.size() == 1:
        return None
    grid = None
    if not isinstance(group, (str, dist.ProcessGroup)) and group.ndim == 2:  # whose dimensions are the grid's
        grid = (group.size(0), group.get_group(1), group.get_group(0))  # along a row the second coordinate changes
    return Ranks(found, gradients, strategy, uneven, grid)


def check_group(group: Any) -> Any:
    """What may be a group, as it is; whether there is a default one is known where it is used."""
    if group is None or group is False:
        return group
    if isinstance(group, str):
        if group not in ("auto", "world"):
            raise ValueError(f"group: expected 'auto' or 'world', or a process group; got {shown(group)}")
        return group
    if dist.is_available():
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: expected a group that this process belongs to; got one of others")
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, (dist.ProcessGroup, DeviceMesh)):
            return group
    raise TypeError(
        f"group: expected None, False, 'auto', 'world', a ProcessGroup or a DeviceMesh; got {type(group).__name__}"
    )


def tell(ranks: Ranks | None, error: Exception, features: Any) -> None:
    """Tells the other ranks, if there are any, that this one is about to raise."""
    if ranks is not None:
        ranks.fail(error, features)


class told:
    """Where this rank may refuse an argument: the others raise too. (Losses, in a hurry, catch and `tell`.)"""

    def __init__(self, ranks: Ranks | None, features: Any) -> None:
        self._ranks, self._features = ranks, features

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (TypeError, ValueError, RuntimeError)):
            tell(self._ranks, error, self._features)


def _default(name: str) -> dist.ProcessGroup | None:
    """The default group: of "auto", if there is one."""
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if name == "world":
        raise ValueError(
            "group: expected a default process group, as torch.distributed.init_process_group makes it; got 'world' "
            "without one"
        )
    return None


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks of a mesh of one dimension, or of two, which are all of them."""
    if mesh.ndim == 1:
        return mesh.get_group(0)
    everyone, world = list(range(dist.get_world_size())), dist.group.WORLD
    if mesh.ndim != 2 or mesh.mesh.flatten().tolist() != everyone or world is None:
        raise ValueError(
            "group: expected a mesh of one dimension, or one of two that holds all ranks in their order; got a mesh "
            f"of shape {list(mesh.mesh.shape)} with {len(everyone)} ranks"
        )
    return world
