"""Gradient caching: the exact gradient of a batch whose activations do not fit, for one more forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments.checks import check_count
from .chunks import RandomState, chunks_of, kept_random_state, rows_of
from .wrappers import no_syncs, parameters_searched_for, reducing

__all__ = ["cached_loss", "cached_step"]

Encoder = Callable[[Any], Tensor]
Encoders = Encoder | Sequence[Encoder]


def cached_step(
    encoders: Encoders,
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int],
    scaler: Any | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """Forward and backward pass of a batch that is encoded in chunks: every gradient is that of the whole batch.

    All chunks are encoded without a graph. The loss is computed once, of all features, and gives their gradients. Then
    each chunk is encoded again, with its graph, and takes its features' gradients back to the parameters.

    Parameters
    ----------
    encoders : callable or sequence of callable
        What makes features [n, ...] of a chunk of an input, one for each input or one for all: modules, or functions
        that call them. A row of features may depend on its own sample alone.
    inputs : sequence
        The batch's inputs: images and texts, say, or two views. An input is a tensor whose first dimension counts
        samples, a list of samples, or a mapping or tuple of those, which is handed on as a dict or tuple of parts.
    loss : callable
        ``loss(*features)``, one [N, ...] for each input, gives a scalar. What else it needs it brings along, a scale
        with its gradient too: ``lambda x, y: ck.clip_loss(x, y, log_scale.exp())``.
    chunk_size : int or sequence of int
        Samples that are encoded at a time, for all inputs or for each.
    scaler : torch.amp.GradScaler, optional
        Its factor multiplies the loss before the backward pass; ``scaler.step`` and ``scaler.update`` stay with the
        caller.
    no_sync : callable, optional
        Gives the context in which a wrapper leaves gradients unreduced: ``model.no_sync`` of a DistributedDataParallel
        that ``encoders`` call within functions. Encoders that have a ``no_sync`` of their own are found without it.

    Returns
    -------
    Tensor
        The loss, detached. Gradients are added to the ``grad`` of all parameters that have a part in it.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, and for encoders that return anything but one tensor with a row for each sample.
    RuntimeError
        Where gradients are disabled.

    Notes
    -----
    Activations of one chunk at a time, and features of the whole batch. One more forward pass, less the last chunk:
    about 4/3 of the time of a plain step.

    Both passes draw the same random numbers from torch's default generators, on the CPU and the accelerator, so that
    dropout is the same; numbers from elsewhere (NumPy, Python's ``random``, generators of one's own) are not drawn
    again. Autocast is that of the caller. Batch normalisation takes the statistics of a chunk, twice, and is warned of.

    On several ranks the loss sees to the others' features (``group=``), and gradients are reduced once, with the
    backward pass of each input's first chunk. Those chunks are held together then, except with
    ``find_unused_parameters``: the last input's takes the others' gradients along. A parameter that only the loss uses,
    such as a scale, is reduced with them if the wrapped module has it. Under ``fully_shard`` all ranks need the same
    number of chunks.

    References
    ----------
    L. Gao, Y. Zhang, J. Han, J. Callan, "Scaling deep contrastive learning batch size under memory limited setup",
    RepL4NLP 2021.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> image, text = torch.nn.Linear(16, 8), torch.nn.Linear(12, 8)
    >>> x, y = torch.randn(64, 16), torch.randn(64, 12)
    >>> value = ck.cached_step(
    ...     (image, text), (x, y), lambda x, y: ck.clip_loss(x, y, 10.0, normalize=True), chunk_size=24
    ... )
    >>> tuple(image.weight.grad.shape)
    (8, 16)
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("cached_step: expected gradients to be enabled; cached_loss gives the value without them")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler or None; got {type(scaler).__name__}")
    batch = _Batch(encoders, inputs, chunk_size, no_sync)
    value = batch.value(loss)
    batch.backward(value if scaler is None else scaler.scale(value), None)
    return value.detach()


def cached_loss(
    encoders: Encoders,
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int],
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """The same for trainers that call ``backward`` by themselves: a loss whose backward pass encodes the chunks again.

    Parameters
    ----------
    encoders, inputs, loss, chunk_size, no_sync
        As in :func:`cached_step`.

    Returns
    -------
    Tensor
        The loss. Its backward pass, once, adds to the ``grad`` of the parameters; ``torch.autograd.grad`` of it with
        respect to them finds nothing. Where gradients are disabled it is the value alone.

    Raises
    ------
    TypeError, ValueError
        As in :func:`cached_step`.

    Notes
    -----
    A factor on the loss, of a GradScaler or of accumulation, reaches the features' gradients before they are rounded.
    Prefer :func:`cached_step` where the loop is your own: its backward pass is not one within another.

    Examples
    --------
    >>> import torch, contrastive_kernels as ck
    >>> encoder, views = torch.nn.Linear(16, 8), (torch.randn(64, 16), torch.randn(64, 16))
    >>> loss = ck.cached_loss(encoder, views, lambda a, b: ck.nt_xent(a, b, 10.0, normalize=True), chunk_size=24)
    >>> (0.5 * loss).backward()
    >>> tuple(encoder.weight.grad.shape)
    (8, 16)
    """
    batch = _Batch(encoders, inputs, chunk_size, no_sync)
    value = batch.value(loss)
    if not value.requires_grad:
        return value.detach()
    trigger = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
    deferred: Tensor = _Deferred.apply(trigger, batch, [value])
    return deferred


class _Deferred(torch.autograd.Function):
    """The loss; its backward pass is the batch's."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, batch: _Batch, held: list[Tensor]) -> Tensor:
        ctx.batch, ctx.held = batch, held
        return held[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("cached_loss: expected a backward pass without create_graph=True; it has no second one")
        if not ctx.held:
            raise RuntimeError("cached_loss: expected one backward pass; the graph of the features is gone after it")
        with torch.enable_grad():
            ctx.batch.backward(ctx.held.pop(), upstream)
        return None, None, None


@dataclass
class _Part:
    """One input of a batch."""

    encoder: Encoder
    name: str
    chunks: list[Any]
    sizes: list[int]
    #: before each chunk was encoded
    states: list[RandomState] = field(default_factory=list)
    #: of all chunks, a leaf
    features: Tensor = field(init=False)

    def encode(self, k: int) -> Tensor:
        """Features [n, ...] of a chunk."""
        out: Any = self.encoder(self.chunks[k])
        if not isinstance(out, Tensor):
            several = f" of length {len(out)}; give each output an encoder" if isinstance(out, (tuple, list)) else ""
            raise TypeError(f"{self.name}: expected it to return one tensor; got {type(out).__name__}{several}")
        if not out.dim() or out.shape[0] != self.sizes[k]:
            raise ValueError(
                f"{self.name}: expected a row of features for each of {self.sizes[k]} samples; "
                f"got shape {list(out.shape)}"
            )
        return out


class _Batch:
    """A batch in chunks, from its features to its parameters' gradients."""

    def __init__(self, encoders: Any, inputs: Any, chunk_size: Any, no_sync: Any) -> None:
        self.parts = _parts(encoders, inputs, chunk_size)
        self.contexts, self.no_sync = no_syncs([part.encoder for part in self.parts], no_sync), no_sync
        self.kept: Tensor | None = None

    def value(self, loss: Callable[..., Tensor]) -> Tensor:
        """The loss of all features, with the graph from there on."""
        if not callable(loss):
            raise TypeError(f"loss: expected a function of the features; got {type(loss).__name__}")
        with self._unsynced():
            for part in self.parts:
                self._encode(part)
        value = loss(*[part.features for part in self.parts])
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss: expected it to return a tensor of one element; got {got}")
        return value

    def _encode(self, part: _Part) -> None:
        """All features of an input; the last chunk has a graph, which tells whether there is anything to learn."""
        grad, rows, last = torch.is_grad_enabled(), [], len(part.chunks) - 1
        learns = False
        for k in range(len(part.chunks)):
            part.states.append(RandomState())
            with torch.set_grad_enabled(grad and k == last), _weights_cast_anew(k < last):
                out = part.encode(k)
            learns = out.requires_grad
            rows.append(out.detach())
            if part is self.parts[-1] and k == last and learns and not self.contexts:
                self.kept = out  # the first to go backward
        part.features = torch.cat(rows).requires_grad_(learns)

    def backward(self, root: Tensor, upstream: Tensor | None) -> None:
        """From the loss to the features, and from there, chunk by chunk, to the parameters."""
        leaves = [part.features for part in self.parts if part.features.requires_grad]
        # a wrapper reduces parameters of its own with the chunks' gradients, so those of the loss wait for them
        others = [leaf for leaf in _leaves(root) if all(leaf is not own for own in leaves)] if self.contexts else []
        found: Sequence[Tensor | None]
        with _no_autocast():
            if self.contexts:
                found = torch.autograd.grad(root, [*leaves, *others], upstream, allow_unused=True)
            else:
                root.backward(upstream)
                found = [leaf.grad for leaf in leaves]
        gradients = dict(zip(map(id, leaves), found))
        work = [(part, gradients.get(id(part.features))) for part in self.parts]
        rest = [(leaf, g) for leaf, g in zip(others, found[len(leaves) :]) if g is not None]
        with kept_random_state():
            self._replay([(part, g) for part, g in work if g is not None], rest)

    def _replay(self, work: list[tuple[_Part, Tensor]], rest: list[tuple[Tensor, Tensor]]) -> None:
        """Encodes chunks again, the last one first; with wrappers the first ones of their inputs go together."""
        kept, self.kept = self.kept, None
        encoders = [part.encoder for part, _ in work]
        held = reducing(encoders, self.no_sync) if self.contexts else [False] * len(work)
        early = parameters_searched_for(encoders, self.no_sync) if self.contexts else set()
        with self._unsynced():
            _go_back([(leaf, g) for leaf, g in rest if id(leaf) in early])
            for (part, gradient), first in zip(reversed(work), reversed(held)):
                pieces = gradient.split(part.sizes)
                for k in reversed(range(first, len(part.chunks))):
                    if kept is not None and part is self.parts[-1]:
                        out, kept = kept, None
                    else:
                        out = self._again(part, k)
                    _go_back([(out, pieces[k])])
                    del out
        last = [(self._again(part, 0), g.split(part.sizes)[0]) for (part, g), first in zip(work, held) if first]
        _go_back(last + [(leaf, g) for leaf, g in rest if id(leaf) not in early])

    @staticmethod
    def _again(part: _Part, k: int) -> Tensor:
        part.states[k].restore()
        return part.encode(k)

    @contextmanager
    def _unsynced(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            yield


def _go_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """One backward pass from tensors with their gradients."""
    pairs = [(out, g) for out, g in pairs if out.requires_grad]
    if pairs:
        with _no_autocast():
            torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])


def _leaves(root: Tensor) -> list[Tensor]:
    """The leaves of a graph that want gradients."""
    found, seen, ahead = [], set(), [root.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        ahead += [before for before, _ in node.next_functions]
    return found


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Backward passes run as their forward pass did, whatever is on around them."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _weights_cast_anew(wanted: bool) -> Iterator[None]:
    """Autocast would keep weights that were cast without a graph, and the second pass would learn nothing of them.

    That is pytorch#65766, which pytorch#165068 ended (torch 2.13 has it).
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(before and not wanted)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# ---- arguments ----


def _parts(encoders: Any, inputs: Any, chunk_size: Any) -> list[_Part]:
    if not isinstance(inputs, (tuple, list)) or not inputs:
        got = "none" if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise TypeError(f"inputs: expected a tuple of inputs, such as (images, texts); got {got}")
    each = _for_each(encoders, "encoders", len(inputs), callable(encoders))
    sizes = _for_each(chunk_size, "chunk_size", len(inputs), not isinstance(chunk_size, (tuple, list)))
    parts = []
    for k, (encoder, value, size) in enumerate(zip(each, inputs, sizes)):
        if not callable(encoder):
            raise TypeError(f"encoders: expected functions or modules; got {type(encoder).__name__}")
        rows, size = rows_of(value, f"inputs[{k}]"), check_count(size, "chunk_size")
        name = "encoders" if callable(encoders) else f"encoders[{k}]"
        lengths = [min(size, rows - start) for start in range(0, max(rows, 1), size)]
        parts.append(_Part(encoder, name, chunks_of(value, rows, size), lengths))
        _warn_of_batch_norm(encoder, name)
    return parts


def _for_each(value: Any, name: str, count: int, alone: bool) -> list[Any]:
    """One for each input."""
    if alone:
        return [value] * count
    if not isinstance(value, (tuple, list)) or len(value) != count:
        got = f"{len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{name}: expected one, or one for each of {count} inputs; got {got}")
    return list(value)


def _warn_of_batch_norm(encoder: Any, name: str) -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if isinstance(encoder, nn.Module) and any(isinstance(m, kinds) and m.training for m in encoder.modules()):
        warnings.warn(
            f"{name}: batch normalisation in training takes the statistics of a chunk, and its running statistics move "
            "twice a step: the gradient is not that of the batch",
            stacklevel=5,
        )
