"""What would run: which backend, how the score matrix is cut, and what each pass costs; nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..arguments.checks import (
    check_backend,
    check_count,
    check_device,
    check_distribution,
    check_number,
    check_workspace,
    shown,
)
from ..arguments.options import DEFAULT_WORKSPACE_BYTES
from ..backends import Backend, registry
from ..distributed.group import memory_of
from ..engine.strategy import Place, choose, fits_one_call, one_walk_with_scales, panel_bytes, panel_shape
from ..panels.size import MULTIPROCESSORS, Size, blocks_of, multiprocessors, saved_dtype, score_dtype, workspace_for
from .costs import ALL_RANKS, LOSSES, ONE_WAY, LossSpec, checked_members
from .ranks import MEMORY, SUSTAINED, RanksPlan, plan_ranks

__all__ = ["Pass", "Plan", "plan"]


_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class Pass:
    """One walk over the panels of the score matrix.

    Parameters
    ----------
    name : str
        "reduce" (the state of rows and columns) or "weigh" (weights and gradients).
    panel : tuple of int
        Rows and columns of a panel; the last ones may be smaller.
    panels : int
        How many there are.
    products : float
        Products of 2 rows cols features flop, of all panels together.
    flop : int
        Those products' floating-point operations.
    bytes : int
        Memory traffic beyond the caches at most: operands, scores and weights of panels, float32 sums.
    launches : int or None
        Kernels that the panels start, the vendor's products included; None where the backend does not count them.
    workspace_bytes : int
        What a panel takes, and the scores of its band.
    """

    name: str
    panel: tuple[int, int]
    panels: int
    products: float
    flop: int
    bytes: int
    launches: int | None
    workspace_bytes: int

    def __str__(self) -> str:
        rows, cols = self.panel
        count = "" if self.launches is None else f", {self.launches} launches"
        return (
            f"{self.name}: {self.panels} panel{'s' * (self.panels != 1)} of {rows} x {cols}, {self.products:g} "
            f"product{'s' * (self.products != 1)}, {self.flop / 1e9:.3g} Gflop, {self.bytes / 2**20:.3g} MiB moved"
            f"{count}, workspace {self.workspace_bytes / 2**20:.3g} MiB"
        )


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; its string is what :func:`explain` prints.

    Parameters
    ----------
    loss, rows, cols, features, dtype, device
        What was asked. Rows and columns are those of the score matrix: both views' for ``nt_xent``.
    backend : str
        The backend that would run.
    route : str
        How it would: the backend's words for what makes the scores. For the features that torch allocates; some that
        start at odd addresses take another one.
    reasons : dict
        Every backend's reason not to, by name; None: it could.
    passes : tuple of Pass
        For value and all gradients, in their order.
    band : int or None
        Rows of a band, whose scores are made once: both passes visit it before the next one, and gradients come with
        the value. None otherwise.
    place : {"on chip", "tile", "band", "whole"}
        Where the scores lie: nowhere in memory; in one panel, made anew by each pass; in a band of rows (on a GPU, or
        their exponentials), or all of them, made once for gradients that come with the value.
    over_ranks : RanksPlan or None
        What is beside that of several ranks; rows, columns and passes are then those of one rank's block.
    """

    loss: str
    rows: int
    cols: int
    features: int
    dtype: torch.dtype
    device: str
    backend: str
    route: str
    reasons: dict[str, str | None]
    passes: tuple[Pass, ...]
    band: int | None = None
    place: str = Place.TILE.value
    over_ranks: RanksPlan | None = None

    @property
    def products(self) -> float:
        """Products of all passes."""
        return sum(each.products for each in self.passes)

    @property
    def workspace_bytes(self) -> int:
        """The most that a pass takes."""
        return max(each.workspace_bytes for each in self.passes)

    def __str__(self) -> str:
        lines = [
            f"{self.loss} of {self.rows} x {self.cols} scores, D = {self.features}, {self.dtype} on {self.device}, "
            f"value and gradients:"
        ]
        lines += [f"  {each}" for each in self.passes]
        if self.place == Place.WHOLE.value:
            lines.append("  all scores at once, in one call of the backend, in forward")
        if self.band is not None:
            lines.append(f"  both on bands of {self.band} rows in turn, whose scores are made once, in forward")
        if self.over_ranks is not None:
            lines.insert(1, f"  {self.over_ranks}")
        for name, reason in self.reasons.items():
            verdict = f"no: {reason}" if reason else (f"yes, chosen: {self.route}" if name == self.backend else "yes")
            lines.append(f"  {name:<6} {verdict}")
        return "\n".join(lines)


def plan(
    n: int,
    m: int | None = None,
    d: int = 512,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    loss: str = "clip_loss",
    *,
    members: Sequence[str] = (),
    backend: str | None = None,
    workspace_bytes: int | None = DEFAULT_WORKSPACE_BYTES,
    capability: int | None = None,
    world: int | None = None,
    strategy: str = "auto",
    links: float | None = None,
) -> Plan:
    """Says what would run for a loss of this size: backend, route, panels, launches and bytes. Computes nothing.

    Parameters
    ----------
    n, m, d : int
        Features are [N, D] and [M, D]; M is N if left out.
    dtype : torch.dtype
        Of the features.
    device : str or torch.device
        Where they would be. "cuda" may be asked for where there is none, with `capability`.
    loss : str
        The loss function's name.
    members : sequence of str
        Arguments that the loss is given beside: "ids", "candidate_bias", "margin", "guided", "label_smoothing",
        "include_positive", or "logit_scale" for scales by row. A guide's features are taken to be as wide as the
        others: its scores are a product more in each pass. With biases, and with scales in a GPU's kernels or in very
        small matrices, the directions of ``clip_loss`` are passes of their own; with either, ``nt_xent``'s matrix is
        not symmetric.
    backend : str, optional
        A backend's name; by default the first that can serve.
    workspace_bytes : int, optional
        As the losses take it. The default of a GPU that is not here is 512 MiB.
    capability : int, optional
        Plan for a GPU of this compute capability (90 for 9.0) instead of the one that is here.
    world : int, optional
        Ranks that share the n x m scores: a divisor of n and of m.
    strategy : {"auto", "grid", "ring"}
        How their rows meet, as the losses take it.
    links : float, optional
        GB/s that a rank receives, for the time of the communication.

    Returns
    -------
    Plan
        A dataclass; its string is a table.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for a named backend that cannot serve.

    Notes
    -----
    What is counted is the walk over the panels; around it are O((N + M) D) operations of torch. Passes are those for
    value and all gradients, of a mean: "none" takes one more product where the loss has a single pass, or bands.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> p = ck.plan(65536, 65536, 768, torch.bfloat16, "cpu", "clip_loss", backend="torch")
    >>> [each.name for each in p.passes], float(p.products)
    (['reduce', 'weigh'], 4.0)
    >>> many = ck.plan(2**20, None, 1024, torch.bfloat16, "cuda", capability=90, world=1024, links=50)
    >>> many.over_ranks.shape, round(many.over_ranks.communication_seconds, 4)
    ((32, 32), 0.0078)
    """
    device = check_device(device)
    rows, cols = _checked(n, m, d, dtype, loss, workspace_bytes)
    backend = check_backend(backend) or None
    spec, said = LOSSES[loss], checked_members(members, loss)
    symmetric = loss == "nt_xent"
    if symmetric:
        rows, cols = 2 * rows, 2 * cols
    if "logit_scale" in said:
        dtype = score_dtype(dtype)
    if capability is not None:
        check_count(capability, "capability", least=10, what="a compute capability times 10, such as 90 for 9.0")
        if device.type != "cuda":
            raise ValueError(f"capability: expected None for a device that is not CUDA's; got {capability} on {device}")
    reasons = {each.name: _reason(each, device, dtype, capability, spec) for each in registry.ORDER}
    name = next(name for name, reason in reasons.items() if reason is None) if backend is None else backend
    chosen = registry.get(name)
    if reasons[chosen.name] is not None:
        raise ValueError(f"backend: {chosen.name!r} cannot serve {dtype} on {device}: {reasons[chosen.name]}")
    one_way, one_call = bool(said & ONE_WAY) and loss in ("clip_loss", "nt_xent"), "label_smoothing" not in said
    if (
        one_way
        and loss == "clip_loss"
        and one_walk_with_scales(chosen, rows, cols, biased="candidate_bias" in said, one_call=one_call)
    ):
        one_way = one_call = False
    if one_way:
        spec, symmetric = LOSSES["info_nce"], False
    workspace = workspace_for(device, workspace_bytes, here=capability is None)
    count = multiprocessors(device) if capability is None else _multiprocessors(capability)
    over_ranks = None
    check_distribution("average", strategy, False)
    if world is not None and said - ALL_RANKS:
        raise ValueError(f"members: expected none but ids and include_positive with a world; got {shown(members)}")
    if world is not None:
        over_ranks = _over_ranks(loss, rows, cols, d, dtype, device, capability, world, strategy, links)
        by = (world, world) if over_ranks.strategy == "ring" else over_ranks.shape
        rows, cols = rows // by[0], cols // by[1]
        symmetric = False
    elif links is not None:
        raise ValueError(f"links: expected None without a world; got {shown(links)}")
    pieces = d * dtype.itemsize % 16 == 0
    limits = said & {"margin", "guided"}
    size = Size(
        rows, cols, d, dtype, device, symmetric, workspace, count, pieces, capped=bool(limits),
        guide=d if "guided" in said else 0, capability=capability,
    )  # fmt: skip
    where = str(device) if capability is None else f"{device} (compute capability {capability / 10:.1f})"
    kept = not limits and "label_smoothing" not in said and world is None
    route, (passes, band, place) = chosen.route(size).name, _passes(chosen, size, spec, one_call, kept)
    if one_way and loss == "clip_loss":
        passes = tuple(replace(_together([(each, 2)]), products=2 * each.products) for each in passes)
    found = Plan(loss, rows, cols, d, dtype, where, chosen.name, route, reasons, passes, band, place.value)
    return found if over_ranks is None else replace(found, over_ranks=over_ranks)


def _over_ranks(
    loss: str,
    rows: int,
    cols: int,
    d: int,
    dtype: torch.dtype,
    device: torch.device,
    capability: int | None,
    world: Any,
    strategy: str,
    links: Any,
) -> RanksPlan:
    """What every one of `world` ranks receives, holds and multiplies."""
    check_count(world, "world")
    for name, count in (("n", rows), ("m", cols)):
        if count % world:
            raise ValueError(f"world: expected a divisor of {name} = {count}, for even shards; got {world}")
    speed = None if links is None else check_number(links, "links", positive=True)
    rate, memory = None, memory_of(device) if capability is None else 0
    if capability is not None:
        known = max((each for each in SUSTAINED if each <= capability), default=min(SUSTAINED))
        rate, memory = SUSTAINED[known] if dtype.itemsize == 2 else None, MEMORY[known]
    return plan_ranks(
        loss, world, rows, cols, d, dtype.itemsize, score_dtype(dtype).itemsize, strategy=strategy, memory=memory,
        processes=world if device.type == "cpu" else 1, links=speed, rate=rate,
    )  # fmt: skip


def _checked(n: Any, m: Any, d: Any, dtype: Any, loss: Any, workspace_bytes: Any) -> tuple[int, int]:
    """N and M."""
    rows = check_count(n, "n", least=0)
    cols = rows if m is None else check_count(m, "m", least=0)
    check_count(d, "d")
    check_workspace(workspace_bytes)
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(_DTYPES.values())}; got {shown(dtype)}")
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}; got {shown(loss)}")
    if rows != cols and loss in ("clip_loss", "nt_xent", "sigmoid"):
        raise ValueError(f"m: expected as many as n for {loss}, whose rows match; got n = {rows}, m = {cols}")
    return rows, cols


def _reason(
    backend: Backend, device: torch.device, dtype: torch.dtype, capability: int | None, spec: LossSpec
) -> str | None:
    """Why a backend cannot serve, on this machine or on one with a GPU of this capability."""
    if capability is None or backend.why_not_capability is None:
        return backend.refusal(device, dtype, spec.term)
    return backend.why_not_capability(capability, dtype)


def _multiprocessors(capability: int) -> int:
    """Of the largest known GPU generation up to this one."""
    known = [each for each in MULTIPROCESSORS if each <= capability] or [min(MULTIPROCESSORS)]
    return MULTIPROCESSORS[max(known)]


def _passes(
    backend: Backend, size: Size, spec: LossSpec, one_call: bool, exponentials: bool
) -> tuple[tuple[Pass, ...], int | None, Place]:
    """The passes, the rows of a band if they take turns on bands, and where the scores lie."""
    if one_call and fits_one_call(backend, size.rows, size.cols, size.workspace_bytes, bool(size.guide)):
        return (_one_call(size, spec),), None, Place.WHOLE
    if spec.passes == 1:
        place = Place.TILE if backend.score_tile else Place.ON_CHIP
        return (_pass(backend, size, spec.products, weighs=True, scores=True),), None, place
    how = choose(
        backend, size, whole=not spec.by_rows, summed=True, gradients=True, one_call=one_call, exponentials=exponentials
    )
    first, rest = spec.forward_products, spec.products - spec.forward_products
    of_guide = first if size.guide else 0.0
    if how.place is not Place.BAND:
        reduce = _pass(backend, size, first + of_guide, weighs=False, scores=True)
        weigh = _pass(backend, size, rest + of_guide, weighs=True, scores=True)
        return (reduce, weigh), None, how.place
    # all bands but the last have as many rows
    last = size.rows - (max(blocks_of(size.rows, how.rows), 1) - 1) * how.rows
    counts = [(how.rows, (size.rows - last) // how.rows), (last, 1)]
    sizes = [(replace(size, rows=rows, band=True), count) for rows, count in counts if count]
    made = first + of_guide
    reduce = _together([(_pass(backend, each, made, weighs=False, scores=True), n) for each, n in sizes])
    weigh = _together([(_pass(backend, each, rest - first, weighs=True, scores=False), n) for each, n in sizes])
    return (reduce, weigh), how.rows, how.place


def _one_call(size: Size, spec: LossSpec) -> Pass:
    """A small matrix: all scores, then value and weights in one call, then the gradients' products."""
    products = spec.products - spec.forward_products * (spec.passes == 2)
    if size.symmetric:  # whole, without its symmetry: the scores, and one product of two-sided weights
        products = 2.0
    scores, d, score = size.rows * size.cols, size.features, score_dtype(size.dtype).itemsize
    moved = 4 * scores * score + (size.rows + size.cols) * d * (
        2 * size.dtype.itemsize + saved_dtype(size.dtype).itemsize
    )
    if size.guide:  # written once, read twice
        products += 1
        moved += 3 * scores * score + (size.rows + size.cols) * size.guide * size.dtype.itemsize
    flop = int(2 * scores * d * products)
    held = scores * score * (2 if size.guide else 1)
    return Pass("weigh", (size.rows, size.cols), 1, products, flop, moved, None, held)


def _together(passes: list[tuple[Pass, int]]) -> Pass:
    """One pass over all bands, each as often as it occurs."""
    return replace(
        passes[0][0],
        panels=sum(each.panels * n for each, n in passes),
        flop=sum(each.flop * n for each, n in passes),
        bytes=sum(each.bytes * n for each, n in passes),
        launches=sum(each.launches * n for each, n in passes if each.launches is not None) or None,
    )


def _pass(backend: Backend, size: Size, products: float, weighs: bool, scores: bool) -> Pass:
    """One pass of this many products (of the whole matrix), which does the scores' product or finds them kept."""
    shape = panel_shape(backend, size, weighs)
    rows, cols = min(shape[0], size.rows), min(shape[1], size.cols)
    blocks = blocks_of(size.rows, shape[0]), blocks_of(size.cols, shape[1])
    panels = blocks[0] * (blocks[0] + 1) // 2 if size.symmetric else blocks[0] * blocks[1]
    kept = size.band and backend.keeps(size.dtype, size.features)  # in the weights' place and the scratch
    held = (size.band and not kept) * size.rows * size.cols * score_dtype(size.dtype).itemsize
    held *= 2 if size.guide else 1
    launches = backend.launches(size, rows, cols)
    # a panel on the diagonal of a symmetric matrix has both products too: it adds wT x as any other does
    started = None if launches is None else panels * (launches[weighs] + (2 if weighs else 0))
    return Pass(
        "weigh" if weighs else "reduce",
        (rows, cols),
        panels,
        products,
        int(2 * size.rows * size.cols * size.features * products),
        panels * _panel_traffic(backend, size, rows, cols, weighs, scores),
        started,
        panel_bytes(backend, size, weighs or kept).of(rows, cols) + held,
    )


def _panel_traffic(backend: Backend, size: Size, rows: int, cols: int, weighs: bool, scores: bool) -> int:
    """Bytes that one panel reads and writes."""
    operand, score, d = size.dtype.itemsize, score_dtype(size.dtype).itemsize, size.features
    total = (rows + cols) * d * operand if scores else 0
    weights = backend.weights_dtype(size.device, size.dtype).itemsize
    if backend.score_tile or backend.route(size).scores_in_scratch:  # written by the product, read by the pass
        total += (2 if scores else 1) * rows * cols * score
    elif size.band and backend.keeps(size.dtype, size.features):  # exponentials, written once and read once
        total += rows * cols * weights
    if size.guide and scores:
        total += (rows + cols) * size.guide * operand
    if size.guide and backend.guide_tile:
        total += (2 if scores else 1) * rows * cols * score
    if weighs:
        total += 3 * rows * cols * weights  # written once, read by two products
        total += (rows + cols) * d * (operand + 2 * score)  # operands again; sums read and written
    return total
