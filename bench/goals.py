"""The ratios that this package promises, each measured within one run: ``python -m bench --goals``.

On a 2-core CPU; and, with ``--device cuda``, what its GPU kernels are to reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from contrastive_kernels.panels.size import workspace_for

from .cases import DTYPES, Case
from .results import Row, cpu_flags

__all__ = ["BATCHES", "GOALS", "GPU_GOALS", "Goal", "Lookup", "memory_bound", "share_of_dense"]

#: (case, provider's name) -> its row
Lookup = Callable[[Case, str], Row]

OURS, DENSE, CHUNKED = "ours-cpu", "dense", "linear-cross-entropy"
EM_STEP = "em-step"
ON_GPU = "ours-triton"


@dataclass(frozen=True)
class Goal:
    """One promise.

    Parameters
    ----------
    text : str
        What is measured.
    target : float
        The bound.
    needs : tuple of (Case, str)
        Cases and providers' names that have to be measured.
    value : callable
        The figure, from the rows.
    at_most : bool
        The bound is an upper one.
    unit : str
        Behind the figure.
    memory : bool
        Peak memory is needed, not time.
    amx : bool
        Stated for a CPU with AMX.
    """

    text: str
    target: float
    needs: tuple[tuple[Case, str], ...]
    value: Callable[[Lookup], float]
    at_most: bool = False
    unit: str = "x"
    memory: bool = False
    amx: bool = False

    def met(self, figure: float) -> bool:
        """The figure keeps the promise."""
        return figure <= self.target if self.at_most else figure >= self.target

    def verdict(self, figure: float) -> str:
        """ "met", "not met", or why the goal does not apply here."""
        if self.amx and "amx_bf16" not in cpu_flags():
            return f"no AMX on this CPU ({'would be met' if self.met(figure) else 'not met'})"
        return "met" if self.met(figure) else "not met"


def _clip(n: int, d: int, dtype: str = "float32") -> Case:
    return Case("clip_loss", n, d, dtype=dtype)


def _of_floor(text: str, case: Case, target: float, ours: str = OURS) -> Goal:
    return Goal(text, target, ((case, ours),), lambda row: row(case, ours)["floor_ratio"], unit="of the floor")


def _faster(text: str, case: Case, than: Case, peer: str, target: float, amx: bool = False, ours: str = OURS) -> Goal:
    def ratio(row: Lookup) -> float:
        return row(than, peer)["best_s"] / row(case, ours)["best_s"]

    return Goal(text, target, ((case, ours), (than, peer)), ratio, amx=amx)


def _of_time(text: str, case: Case, than: Case, peer: str, target: float, ours: str) -> Goal:
    def ratio(row: Lookup) -> float:
        return row(case, ours)["best_s"] / row(than, peer)["best_s"]

    return Goal(text, target, ((case, ours), (than, peer)), ratio, at_most=True)


#: Batches from overhead alone to products alone.
BATCHES = (8, 64, 128, 256, 1024, 4096)


def share_of_dense(loss: str, n: int) -> float:
    """The most that a step may take of the dense formula's time."""
    if loss == "info_nce":  # one direction, of which the dense formula makes one matrix
        return 1.3 if n < 64 else 1.1 if n <= 128 else 1.0
    return 1.2 if n < 64 else 1.0


def _never_slower(loss: str, d: int, dtype: str) -> Goal:
    cases = [Case(loss, n, d, dtype=dtype) for n in BATCHES]

    def worst(row: Lookup) -> float:
        return max(row(c, OURS)["best_s"] / row(c, DENSE)["best_s"] / share_of_dense(loss, c.n) for c in cases)

    text = f"{loss} {dtype}, N = {BATCHES[0]} ... {BATCHES[-1]:,}, D = {d}: of the time it may take beside dense"
    needs = tuple((case, name) for case in cases for name in (OURS, DENSE))
    return Goal(text, 1.0, needs, worst, at_most=True)


def _goals() -> list[Goal]:
    goals: list[Goal] = []
    for d, floor, dense in ((512, 0.85, 2.0), (256, 0.80, 2.5)):
        case = _clip(8192, d)
        at = f"N = 8,192, D = {d}"
        goals.append(_of_floor(f"clip_loss, {at}: of its 4 products", case, floor))
        goals.append(_faster(f"clip_loss, {at}: faster than linear_cross_entropy x 2", case, case, CHUNKED, 1.6))
        goals.append(_faster(f"clip_loss, {at}: faster than dense", case, case, DENSE, dense))
        split = dataclasses.replace(case, loss="decomposable")
        goals.append(_of_floor(f"decomposable, {at}: of its 3 products", split, 0.80))
        goals.append(_faster(f"decomposable, {at}: faster than clip_loss", split, case, OURS, 1.2))
    one_way = Case("info_nce", 8192, 256)
    goals.append(
        _faster("info_nce, N = 8,192, D = 256: faster than linear_cross_entropy", one_way, one_way, CHUNKED, 1.0)
    )
    bare = Case("decomposable", 8192, 512)
    goals.append(
        Goal(
            "decomposable, N = 8,192, D = 512: the whole EM step against the loss alone",
            1.1,
            ((bare, OURS), (bare, EM_STEP)),
            lambda row: row(bare, EM_STEP)["best_s"] / row(bare, OURS)["best_s"],
            at_most=True,
        )
    )
    for d, target in ((512, 1.7), (256, 2.5)):
        case = _clip(8192, d, "bfloat16")
        goals.append(
            _faster(f"clip_loss bf16, N = 8,192, D = {d}: faster than dense", case, case, DENSE, target, amx=True)
        )
    goals += [
        _never_slower(loss, d, dtype)
        for loss in ("clip_loss", "info_nce", "nt_xent", "sigmoid", "decomposable")
        for d in (256, 768)
        for dtype in ("float32", "bfloat16")
    ]
    large = _clip(32768, 256)
    goals.append(
        Goal(
            "clip_loss, N = 32,768, D = 256: peak memory beyond inputs and gradients",
            96.0,
            ((large, OURS),),
            lambda row: row(large, OURS)["peak_bytes"] / 1e6,
            at_most=True,
            unit="MB",
            memory=True,
        )
    )
    return goals


def memory_bound(case: Case) -> float:
    """Bytes that a step may take on a GPU beyond its inputs and gradients: the default workspace and O(N D)."""
    sums = 4 * case.d * min(case.shape) if DTYPES[case.dtype].itemsize == 2 else 0
    return workspace_for(torch.device(case.device)) + sums + 64 * sum(case.shape)


def _within_memory(case: Case) -> Goal:
    return Goal(
        f"{case.loss}, N = {case.n:,}, D = {case.d}: peak memory beyond inputs and gradients",
        1.0,
        ((case, ON_GPU),),
        lambda row: row(case, ON_GPU)["peak_bytes"] / memory_bound(case),
        at_most=True,
        unit="of its bound",
        memory=True,
    )


def _gpu_goals() -> list[Goal]:
    def clip(n: int, d: int, loss: str = "clip_loss", learnable_scale: bool = True) -> Case:
        return Case(loss, n, d, dtype="bfloat16", device="cuda", learnable_scale=learnable_scale)

    goals: list[Goal] = []
    for d, floor in ((768, 0.85), (512, 0.80)):
        case, at = clip(65536, d), f"N = 65,536, D = {d}"
        goals.append(_of_floor(f"clip_loss, {at}: of its 4 products", case, floor, ON_GPU))
        # memeff has no gradient of the scale; ours makes it
        than = clip(65536, d, learnable_scale=False)
        goals.append(_faster(f"clip_loss, {at}: faster than memeff", case, than, "memeff", 2.0, ours=ON_GPU))
    case, at = clip(65536, 768), "N = 65,536, D = 768"
    for loss in ("decomposable", "sigmoid"):
        split = clip(65536, 768, loss)
        goals.append(_of_time(f"{loss}, {at}: of clip_loss's time", split, case, ON_GPU, 0.80, ON_GPU))
    pairs = clip(65536, 768, "sigmoid")
    goals.append(_faster(f"sigmoid, {at}: faster than siglip-kernel", pairs, pairs, "siglip-kernel", 1.5, ours=ON_GPU))
    frozen = dataclasses.replace(case, frozen_y=True)
    goals.append(_of_time(f"clip_loss, {at}: frozen y, of the two-sided time", frozen, case, ON_GPU, 0.80, ON_GPU))
    for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        case, text = clip(n, 768), f"clip_loss, N = {n:,}, D = 768: faster than"
        goals.append(_faster(f"{text} dense", case, case, "dense", 1.0, ours=ON_GPU))
        if n == 16384:  # a step of Inf-CL at 65,536 may take seconds
            goals.append(_faster(f"{text} Inf-CL", case, case, "inf-cl", 5.0, ours=ON_GPU))
    for n in (32, 128):
        small = clip(n, 768)
        goals.append(_of_time(f"clip_loss, N = {n}, D = 768: of dense's time", small, small, "dense", 1.2, ON_GPU))
    goals += [_within_memory(clip(65536, 768, loss)) for loss in ("clip_loss", "sigmoid", "decomposable")]
    goals += [_within_memory(clip(n, d)) for n, d in ((4096, 768), (262144, 768), (1048576, 512))]
    return goals


#: fp32, forward + backward and a learnable scale unless a goal says otherwise.
GOALS = _goals()
#: bf16, forward + backward and a learnable scale.
GPU_GOALS = _gpu_goals()
