"""The tensors of a memory as a module's state: saved, loaded, moved and copied whole or not at all, never cast."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments.checks import is_shared
from ..distributed.group import Ranks, ranks_of, told
from .manifest import TABLES
from .ranks import changed_together
from .storage import Folder

__all__ = ["Tables", "survey", "survey_folder"]


#: Samples that are looked at a time.
_CHUNK = 2**22

#: All tensors of the state, and their dtypes whatever the model's is.
_DTYPES = {
    "log_mean": torch.float64,
    "visits": torch.int32,
    "unvisited": torch.int64,
    "running": torch.float64,
}


class Tables(nn.Module):
    """A module whose tensors are plain attributes instead of buffers.

    So ``half()`` and its like leave them alone, and DistributedDataParallel, which makes the buffers of all processes
    rank 0's, does not see them. Their keys in a ``state_dict`` are those that buffers would have.
    """

    #: [samples, directions]
    log_mean: Tensor
    visits: Tensor
    #: by direction [d]: samples that were never met
    unvisited: Tensor
    #: by direction [d, 6]: see statistics.observe
    running: Tensor
    #: as `check_group` takes it
    group: Any

    def __init__(self) -> None:
        super().__init__()
        self._folder: Folder | None = None
        self._guard = threading.RLock()

    def _settled(self) -> None:
        """Called after the tensors were replaced or loaded."""

    def _require(self, what: str, write: bool = False, beside: bool = False) -> None:
        """Whether the tables can be read, or written; `beside`: by this process or another rank."""
        folder = self._folder
        if folder is None:
            return
        if folder.closed:
            raise RuntimeError(f"{what}: expected an open memory; got one that was closed ({folder.path})")
        if write and folder.read_only and not (beside and folder.beside):
            raise RuntimeError(f"{what}: expected a memory that may be written; got read_only=True ({folder.path})")
        if write and folder.foreign:
            raise RuntimeError(
                f"{what}: expected the process that opened the memory ({folder.process}); got a fork of it, which "
                f"would write beside it ({folder.path})"
            )

    def _ranks(self) -> Ranks | None:
        """The ranks that share the memory."""
        shared = is_shared(self.group, "sum", "auto", True)
        return ranks_of(self.group, "sum", "auto", True) if shared else None

    def _folder_ranks(self) -> Ranks | None:
        """Those that share its folder, which one of them writes; None of tables in memory, which each has."""
        shared = self._folder is not None and (self._folder.beside or not self._folder.read_only)
        return self._ranks() if shared else None

    # ---- devices ----

    @torch.inference_mode(False)
    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        """What ``to``, ``half``, ``cuda``, ``share_memory`` do: only the device is followed."""
        super()._apply(fn, recurse)
        with self._guard:
            here = self.unvisited.device
            probe = fn(torch.zeros(1, dtype=torch.int64, device=here))
            if self._folder is not None:
                if probe.device != here:
                    raise RuntimeError(
                        f"storage: expected the mapped memory to stay on the CPU; got a move to {probe.device}. Keep "
                        "it out of the module that moves (it serves features on any device), or move a copy.deepcopy "
                        "of it, which lies in memory"
                    )
                return self
            moved = {name: _moved(getattr(self, name), probe) for name in _DTYPES}
            if here.type == "meta" and probe.device.type != "meta":  # nothing was stored: a new memory
                moved["unvisited"].fill_(len(self.log_mean))
            self._replace(moved)
        return self

    def _replace(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._settled()

    # ---- copies ----

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy of a mapped memory lies in memory."""
        with self._guard:
            self._require("copy")
            state = self.__dict__.copy()
            del state["_guard"]
            if self._folder is not None:
                state.update(_folder=None, **{name: getattr(self, name).clone() for name in _DTYPES})
        return state

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard = threading.RLock()
        self.__dict__.setdefault("_folder", None)
        self.__dict__.setdefault("group", "auto")
        for name, dtype in _DTYPES.items():
            value: Any = self._buffers.pop(name) if name in self._buffers else getattr(self, name)  # buffers in 0.1.0
            # a copy made in inference mode could not be updated outside of it
            setattr(self, name, value.clone() if value.is_inference() else value.to(dtype))
        self._settled()

    # ---- state_dict ----

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._require("state_dict")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _DTYPES:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Copies into the tensors that are there, with ``assign=True`` as well, or changes nothing."""
        own = {name: state_dict[prefix + name] for name in _DTYPES if prefix + name in state_dict}
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in own}}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing = [name for name in _DTYPES if name not in own]
        missing_keys.extend(prefix + name for name in missing)
        if missing:
            if own:
                error_msgs.append(f"{prefix or 'memory'}: expected all of {list(_DTYPES)}; got {list(own)} alone")
            return
        try:
            self._take(own, bool(local_metadata.get("assign_to_params_buffers", False)))
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix or 'memory'}: {error}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take(self, own: dict[str, Any], assign: bool) -> None:
        """Takes a state over; everything that can fail comes before anything is written."""
        with self._guard:
            with told(ranks := self._folder_ranks(), self.log_mean):
                self._require("load_state_dict", write=True, beside=ranks is not None)
                new = {name: self._fitting(name, value) for name, value in own.items()}
                new["unvisited"] = survey(new["log_mean"], new["visits"])
                if not new["running"].is_meta and not bool(new["running"].isfinite().all()):
                    raise ValueError(f"running: expected finite statistics; got {new['running'].tolist()}")
            if self.unvisited.is_meta and not new["visits"].is_meta:
                if not assign:
                    raise ValueError("expected assign=True, or to_empty() before, for a memory on the meta device")
                self._replace({name: value.clone() for name, value in new.items()})
                return
            about = ("samples never met", new["unvisited"].tolist() if ranks is not None else None)
            with changed_together(ranks, self._folder, "load_state_dict", about) as writes:
                if self._folder is not None and writes:
                    # a process that dies here loses visits, and leaves none without its mean
                    new["visits"] = new["visits"].clone()  # it may be mapped from the same file
                    self.visits.zero_()
                for name, value in new.items():
                    if writes or name not in TABLES:
                        getattr(self, name).copy_(value)
            self._settled()

    def _fitting(self, name: str, value: Any) -> Tensor:
        """A loaded tensor in the dtype and on the device of its place."""
        here = getattr(self, name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor; got {type(value).__name__}")
        if value.shape != here.shape:
            raise ValueError(f"size mismatch for {name}: expected {list(here.shape)}; got {list(value.shape)}")
        if value.is_floating_point() != here.is_floating_point() or value.is_complex():
            raise TypeError(f"{name}: expected {here.dtype} or what it holds; got {value.dtype}")
        device = value.device if here.is_meta else here.device
        return value.detach().to(device=device, dtype=_DTYPES[name])


def _moved(table: Tensor, probe: Tensor) -> Tensor:
    """A table where the probe is: on its device, in shared memory as it is; zeros where there was none."""
    if table.is_meta and not probe.is_meta:
        return torch.zeros(table.shape, dtype=table.dtype, device=probe.device)
    moved = table.to(probe.device)
    return moved.share_memory_() if probe.device.type == "cpu" and probe.is_shared() else moved


def survey(log_mean: Tensor, visits: Tensor) -> Tensor:
    """By direction, the samples that were never met [d]; a ValueError for values that no update leaves behind."""
    met = torch.zeros(visits.shape[1], dtype=torch.int64, device=visits.device)
    for start in range(0, len(visits), _CHUNK):
        means, counts = log_mean[start : start + _CHUNK], visits[start : start + _CHUNK]
        wrong = (~means.isfinite() | (counts < 0)).any(1)
        if not wrong.is_meta and bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"expected finite log means and no negative visits; got log_mean {means[row].tolist()} and visits "
                f"{counts[row].tolist()} of sample {start + row}. With both set to 0 a sample is met anew"
            )
        met += counts.count_nonzero(0)
    return len(visits) - met


def survey_folder(folder: Folder) -> Tensor:
    """Samples that a folder's tables have never met [d]; a folder with values that no update leaves is refused."""
    log_mean, visits = folder.tables["log_mean"], folder.tables["visits"]
    if folder.new:
        return torch.full(visits.shape[1:], len(visits), dtype=torch.int64, device=visits.device)
    try:
        return survey(log_mean, visits)
    except ValueError as error:
        folder.close()
        raise ValueError(f"storage: {error}; in {folder.path}") from None
