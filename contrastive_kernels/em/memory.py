"""What every sample's negatives summed to when it was last met: the state of stochastic EM over a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._library import outside_graphs
from ..arguments.checks import check_dense, check_device, check_flag, check_folder, shown
from ..distributed.group import Ranks, check_group, told
from .expectation import ratio_of, wide
from .manifest import TABLES, Manifest, check_rule, check_samples
from .ranks import changed_together, gathered_visits, opened_together, written_by_one
from .statistics import NormalizerStatistics, averages, last_of_each, observe
from .storage import Folder, peek
from .tables import Tables, survey_folder

__all__ = ["NormalizerMemory", "NormalizerStatistics"]


class NormalizerMemory(Tables):
    """The logarithm of every sample's mean of exp(z) over its negatives, per direction, averaged over visits.

    Visit v moves the stored mean by ``g = max(v ** -step, floor)`` of the way to the one that a batch found:
    ``mean <- (1 - g) * mean + g * found``, in logarithms. A first visit stores what it found.

    Parameters
    ----------
    num_samples : int
        Samples of the data set.
    directions : int
        Kinds of anchors that a sample has: 2 for pairs (x finds y, y finds x), 1 where one side is queried alone.
    step : float
        The exponent: 1 averages all visits alike, smaller ones forget; 0.5 < step <= 1 converges while the encoder
        stands still.
    floor : float
        The least part that a visit replaces, in 0 ... 1: an encoder that learns makes old visits stale.
    device : torch.device or str, optional
        Where it is kept: the features' device, so that nothing waits for the host, or "cpu" for a data set that does
        not fit there.
    storage : str or Path, optional
        A folder whose files hold the state, mapped into memory; on the CPU alone. A memory of these sizes that lies
        there is taken up again. This process is its only writer until :meth:`close`, or until the memory is gone.
    read_only : bool
        Map the memory of another process, without the right to write. See :meth:`open`.
    group : ProcessGroup or str, optional
        The ranks whose batches' visits all of them enter: as in :func:`contrastive_kernels.info_nce`, by default all
        ranks of the default process group, if there is one. With a `storage` one rank of every machine writes it.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a folder whose files do not: they are damaged, or hold other sizes.
    OSError
        For a folder that another memory writes (BlockingIOError), files that are missing or links, and a full disk,
        whose space is taken here and not by the first update. A constructor that fails leaves no new files.
    RuntimeError
        From methods that write: for a memory that is closed, read-only, or the copy of a forked process.

    Notes
    -----
    12 bytes a sample and direction: a float64 and a count of visits. 10^8 samples in both directions take 2.4 GB, of
    which the logarithms are 1.6 GB. The raw scores' mean is stored, not the normaliser: a positive's own score is known
    exactly whenever its sample is met, so that neither its progress nor another view of the sample makes the state
    stale, and neither c nor K is part of it. At logits of 1e4 a float32 would have lost the digits that weigh a row.

    The updates run on the memory's device, in place, without synchronisation; threads take turns. Where a sample occurs
    more than once in a batch, its last row counts, and it is one visit. A found mean that is not finite (no negatives,
    or a batch that overflowed) leaves the sample as it was.

    The state is no buffer: casts of a model leave it float64, ``to(device)`` moves it (one that is mapped stays and
    says so), ``load_state_dict`` copies in place with ``assign=True`` as well, and a deepcopy or pickle of a mapped
    memory lies in memory. Each of these, and :meth:`grow`, is done whole or changes nothing.

    A folder holds ``log_mean.npy``, ``visits.npy`` and ``memory.json``: docs/decomposable.md.

    References
    ----------
    After C. Chen et al., "Why do we need large batch sizes in contrastive learning? A gradient-bias perspective",
    NeurIPS 2022; derivation in docs/decomposable.md.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> memory = ck.NormalizerMemory(1000, directions=1, step=1.0)
    >>> index = torch.tensor([3, 7])
    >>> memory.update(index, torch.tensor([[0.0], [1.0]]))
    >>> memory.update(index, torch.tensor([[0.0], [2.0]]))
    >>> memory.read(index)[0].exp().mean(1)  # (1 + 1) / 2 and (e + e^2) / 2
    tensor([1.0000, 5.0537], dtype=torch.float64)
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        num_samples: int,
        directions: int = 2,
        *,
        step: float = 1.0,
        floor: float = 0.0,
        device: torch.device | str | None = None,
        storage: str | Path | None = None,
        read_only: bool = False,
        group: Any | None = "auto",
    ) -> None:
        super().__init__()
        self.group = check_group(group)
        self.step, self.floor = check_rule(directions, step, floor)
        check_samples(num_samples, 1)
        device = None if device is None else check_device(device, here=storage is None)
        if storage is not None:
            storage = check_folder(storage, "storage")
            if device is not None and device.type != "cpu":
                raise ValueError(f"storage: expected a memory on the CPU; got device {device}")
        if check_flag(read_only, "read_only") and storage is None:
            raise ValueError("read_only: expected a storage to read; got None")
        if storage is None:
            shape = (num_samples, directions)
            tables = {name: torch.zeros(shape, dtype=dtype, device=device) for name, dtype in TABLES.items()}
            unvisited = torch.full((directions,), num_samples, dtype=torch.int64, device=tables["visits"].device)
        else:
            wanted = Manifest(num_samples, directions, self.step, self.floor)
            ranks = None if read_only else self._ranks()
            if ranks is None:
                self._folder = folder = Folder(storage.absolute(), wanted, read_only)
            else:
                self._folder = folder = opened_together(ranks, storage.absolute(), wanted)
            tables, unvisited = folder.tables, survey_folder(folder)
        self.log_mean, self.visits, self.unvisited = tables["log_mean"], tables["visits"], unvisited
        self.running = torch.zeros(directions, 6, dtype=torch.float64, device=unvisited.device)
        self._cold = True
        self._arriving: tuple[Tensor, Any] | None = None

    @classmethod
    def open(cls, folder: str | Path, *, read_only: bool = False, group: Any | None = "auto") -> NormalizerMemory:
        """The memory that a folder holds, with its own sizes, step and floor.

        Parameters
        ----------
        folder : str or Path
            A former ``storage``.
        read_only : bool
            Any number of processes may map the tables so while another one writes: they see what it writes to the
            samples that there were, and cannot change it.
        group
            As the constructor's.

        Raises
        ------
        ValueError, OSError
            As the constructor, and where there is none.
        """
        check_flag(read_only, "read_only")
        check_group(group)
        held = peek(check_folder(folder, "folder").absolute())
        rule: dict[str, Any] = {"step": held.step, "floor": held.floor, "storage": folder, "read_only": read_only}
        return cls(held.num_samples, held.directions, **rule, group=group)

    def close(self) -> None:
        """Ends the use of a folder: its lock is free, the tables are gone from here. In memory it does nothing."""
        with self._guard:
            if self._folder is not None:
                self._folder.close()
                self.log_mean, self.visits = (v.to("meta") for v in (self.log_mean, self.visits))

    def flush(self) -> None:
        """Returns once a folder's tables are on the disk.

        What is written survives the process in any case; only a machine that fails loses what was not flushed.
        """
        with self._guard:
            self._require("flush")
            if self._folder is not None:
                self._folder.flush()

    def __enter__(self) -> NormalizerMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return self.log_mean.shape[0]

    @property
    def directions(self) -> int:
        """1 or 2."""
        return self.log_mean.shape[1]

    @property
    def storage(self) -> Path | None:
        """The folder, if there is one."""
        return None if self._folder is None else self._folder.path

    @property
    def cold(self) -> bool:
        """Whether some sample may not have been met yet; the host learns of the last one with a delay."""
        if self._cold and self._arriving is not None:
            value, event = self._arriving
            if event is not None and self._ranks() is not None:
                event.synchronize()  # all ranks are to know the same
            if event is None or event.query():
                self._cold = bool((value > 0).any())
                self._arriving = None
        return self._cold

    def extra_repr(self) -> str:
        """Sizes and rule, as they print."""
        return f"{self.num_samples}, directions={self.directions}, step={self.step}, floor={self.floor}"

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The stored logarithms [N, directions] and the visits so far, on the index's device.

        Raises
        ------
        TypeError, ValueError
            For an index that is no int64 vector, or outside the data set (on a GPU: a device-side assertion).
        """
        with self._guard:
            self._require("read")
            rows = self._check_index(index)
            log_mean, visits = self.log_mean[rows], self.visits[rows]
        return log_mean.to(index.device, wide(index.device)), visits.to(index.device)

    def average(self, stored: Tensor, visits: Tensor, found: Tensor) -> Tensor:
        """What a visit makes of `stored` [N, d] after `visits` earlier ones; a pure function."""
        for name, value in (("stored", stored), ("visits", visits), ("found", found)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor [N, d]; got {type(value).__name__}")
            check_dense(value, name)
            if value.shape != stored.shape or value.device != stored.device:
                got = " and ".join(f"{list(v.shape)} on {v.device}" for v in (stored, value))
                raise ValueError(f"stored and {name}: expected one shape and device; got {got}")
            if value.is_floating_point() != (name != "visits") or value.is_complex():
                raise TypeError(f"{name}: expected {'int32' if name == 'visits' else 'float64'}; got {value.dtype}")
        gain = (visits + 1).to(stored.dtype).pow(-self.step).clamp_min(self.floor)
        # the first visit: gain 1, and log(1 - 1) = -inf leaves nothing of what was stored
        return torch.logaddexp(stored + torch.log1p(-gain), found + gain.log())

    @outside_graphs
    @torch.no_grad()
    def update(
        self, index: Tensor, found: Tensor, direction: int | None = None, lower_bound: Tensor | None = None
    ) -> None:
        """Moves the samples of a batch towards what it found.

        Parameters
        ----------
        index : Tensor
            Samples [N], int64.
        found : Tensor
            Logarithms of the batch's means of exp(z) over negatives: [N, directions], or [N, 1] for one direction.
        direction : int, optional
            The one that was queried; None for all.
        lower_bound : Tensor, optional
            Like ``found``: logarithms that the state is raised to where it lies below. Of a finite data set, the part
            of the sum that the batch has seen is such a bound; of infinitely many negatives there is none.

        Raises
        ------
        TypeError, ValueError
            As :meth:`read`, and for a ``found`` of another shape.
        RuntimeError
            As the constructor says.

        Notes
        -----
        With a `group` all ranks call it together, with as many samples as each has, and all of them enter all visits.
        """
        ranks = self._ranks()
        with self._guard:
            with told(ranks, index):
                self._require("update", write=True, beside=ranks is not None)
                rows, columns = self._check_index(index), self._columns(direction)
                found = self._check_found(found, "found", len(rows), columns)
                if (bound := lower_bound) is not None:
                    bound = self._check_found(bound, "lower_bound", len(rows), columns)
            if ranks is not None:
                rule = (self.num_samples, self.step, self.floor)
                rows, found, bound = gathered_visits(ranks, rows, found, bound, columns, rule)
            if len(rows):
                self._visit(rows, columns, found, bound, ranks)

    def _visit(
        self, rows: Tensor, columns: slice, found: Tensor, bound: Tensor | None, ranks: Ranks | None = None
    ) -> None:
        """Moves samples [N] to what was found [N, d]; whatever may fail comes before the first write."""
        last, first = last_of_each(rows)
        found = found[last]
        stored, visits = self.log_mean[rows, columns], self.visits[rows, columns]
        usable, known = found.isfinite(), (visits > 0) & stored.isfinite()
        # what is no number was written by others, and starts anew
        before = torch.where(known, stored, 0.0)
        moved = self.average(before, torch.where(known, visits, 0), found)
        if bound is not None:
            bound = bound[last]
            moved = torch.where(bound.isfinite(), torch.maximum(moved, bound), moved)
        running = observe(self.running[columns], found - before, usable & known & first[:, None])
        met = (usable & (visits == 0) & first[:, None]).sum(0)
        visited = torch.where(known | ~usable, visits, 0) + usable.to(visits.dtype)
        moved = torch.where(usable, moved, stored)
        # duplicates write the same values, so that their order does not matter. A process that dies in between leaves
        # a mean with one visit too few, never a visit without its mean
        with written_by_one(ranks, self._folder) as writes:
            if writes:
                self.log_mean[rows, columns] = moved
                self.visits[rows, columns] = visited
        self.unvisited[columns] -= met
        self.running[columns] = running
        self._tell_host()

    def statistics(self) -> NormalizerStatistics:
        """How fresh the memory is; reads it from the device. The averages begin with this object."""
        self._require("statistics")
        unvisited = int(self.unvisited.max())
        return NormalizerStatistics(
            samples=self.num_samples,
            visited=self.num_samples - unvisited,
            mean_visits=float(self.visits.sum(dtype=torch.int64)) / max(self.visits.numel(), 1),
            **averages(self.running),
        )

    @torch.no_grad()
    def rescale(self, ratio: float | Tensor) -> None:
        """Multiplies all logarithms by (new scale / old scale), where the temperature moved far between two visits.

        The logarithm of a mean of exp(scale * s) is convex in the scale and 0 at scale 0. So where it is positive, this
        ends nearer to the truth than leaving it alone does, on the same side: too low after a rise, too high after a
        fall. In training it made no measurable difference: docs/decomposable.md. O(num_samples), in place; a process
        that dies in between leaves some samples as they were.

        Raises
        ------
        ValueError
            For a ratio that is no finite number above 0 (on a GPU: a device-side assertion).
        """
        with self._guard:
            with told(ranks := self._folder_ranks(), self.log_mean):
                self._require("rescale", write=True, beside=ranks is not None)
                factor = ratio_of(ratio).to(self.log_mean.device, torch.float64)
                fits = ((factor > 0) & factor.isfinite()).all()
                if factor.device.type == "cuda":
                    torch._assert_async(fits, "ratio: expected a finite number above 0")
                elif not bool(fits):
                    raise ValueError(f"ratio: expected a finite number above 0; got {ratio}")
            about = "ratio", None if ranks is None else factor.tolist()
            with changed_together(ranks, self._folder, "rescale", about) as writes:
                if writes:
                    self.log_mean.mul_(factor)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, num_samples: int) -> None:
        """Makes room for samples that the data set gained; they have not been met. What is stored stays.

        Raises
        ------
        ValueError
            For fewer samples than there are.
        OSError, RuntimeError
            Where there is no room: the memory, and its folder, keep their size.
        """
        with self._guard:
            with told(ranks := self._folder_ranks(), self.log_mean):
                self._require("grow", write=True, beside=ranks is not None)
                more = check_samples(num_samples, self.num_samples) - self.num_samples
            if more == 0 and ranks is None:
                return
            unvisited = self.unvisited + more
            if self._folder is None:
                old = {name: getattr(self, name) for name in TABLES}
                tables = {name: torch.cat([v, v.new_zeros(more, self.directions)]) for name, v in old.items()}
            else:
                with changed_together(ranks, self._folder, "grow", ("samples", num_samples)) as writes:
                    if writes and more:
                        self._folder.grow(num_samples)
                if not writes:
                    self._folder.follow(num_samples)
                tables = self._folder.tables
            self._replace({**tables, "unvisited": unvisited})

    def _settled(self) -> None:
        self._cold, self._arriving = True, None
        self._tell_host()

    def _check_index(self, index: Any) -> Tensor:
        """The index on the memory's device, within the data set."""
        if not isinstance(index, Tensor):
            raise TypeError(f"index: expected an int64 tensor [N]; got {type(index).__name__}")
        check_dense(index, "index")
        if index.dtype != torch.int64:
            raise TypeError(f"index: expected int64; got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"index: expected shape [N]; got {list(index.shape)}")
        if index.is_meta and not self.visits.is_meta:
            raise ValueError("index: expected a tensor that holds values; got one on the meta device")
        outside = ((index < 0) | (index >= self.num_samples)).any()
        if index.device.type != "cpu":
            torch._assert_async(~outside, "index: a sample lies outside the memory")
        elif bool(outside):
            raise ValueError(
                f"index: expected samples in [0, {self.num_samples}); got values in [{int(index.min())}, "
                f"{int(index.max())}]. NormalizerMemory.grow makes room for a data set that grew."
            )
        return index.to(self.visits.device)

    def _columns(self, direction: int | None) -> slice:
        if direction is None:
            return slice(0, self.directions)
        if type(direction) is not int or direction not in range(self.directions):
            raise ValueError(f"direction: expected None or one of 0 ... {self.directions - 1}; got {shown(direction)}")
        return slice(direction, direction + 1)

    def _check_found(self, found: Any, name: str, rows: int, columns: slice) -> Tensor:
        shape = (rows, columns.stop - columns.start)
        if not isinstance(found, Tensor):
            raise TypeError(f"{name}: expected a tensor of shape {list(shape)}; got {type(found).__name__}")
        check_dense(found, name)
        if not found.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor; got {found.dtype}")
        if found.is_meta and not self.visits.is_meta:
            raise ValueError(f"{name}: expected a tensor that holds values; got one on the meta device")
        if found.dim() == 2 and found.shape[1] == shape[1] and found.shape[0] != rows:
            raise ValueError(f"{name} and index: expected as many rows; got {found.shape[0]} and {rows}")
        if found.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}; got {list(found.shape)}")
        return found.detach().to(self.log_mean.device).to(self.log_mean.dtype)

    def _tell_host(self) -> None:
        """Sends the number of samples that were never met on its way to the host, if it still wants to know."""
        if not self._cold or self._arriving is not None or self.unvisited.is_meta:
            return
        if self.unvisited.device.type == "cuda":
            value = torch.empty_like(self.unvisited, device="cpu", pin_memory=True)
            value.copy_(self.unvisited, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.unvisited.device))
            self._arriving = (value, event)
        else:
            self._arriving = (self.unvisited.clone(), None)
