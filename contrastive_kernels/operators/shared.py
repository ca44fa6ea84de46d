"""What all differentiable operators share: how a problem passes through torch.library, autograd and torch.func.

A primitive is a few functions of a :class:`Problem`, of further tensors and of settings (plain values that print):

    forward    the outputs; the first `results` of them are differentiable
    gradients  dL/d(tensors) from what comes from upstream; both run the engine, and see plain tensors
    fake       the outputs' shapes
    dense      the results of some rows in operations of torch, for second derivatives

In eager mode the engine runs directly in an autograd.Function: a torch.library operator costs as much as a small batch.
Under torch.compile and torch.export the operator stands for it, opaque, with the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..arguments.checks import autocasts
from ..backends.base import Prepared
from ..engine.matrix import Call, Outputs, Problem
from ..panels.size import score_dtype
from .second import second_gradients
from .tensors import is_named_only, looped, readable, settled, with_copies, with_others

__all__ = [
    "ABSENT_DIMS",
    "OPERATORS",
    "Call",
    "Outputs",
    "Primitive",
    "SecondGradients",
    "empty_like_scores",
    "like",
    "operator_arguments",
    "pack",
]


@dataclass(frozen=True)
class Primitive:
    """A differentiable operation on a problem; see the module's text."""

    name: str
    results: int
    outputs: int
    forward: Callable[[Call], Outputs]
    fake: Callable[[Call], Outputs]
    #: (call, kept outputs, upstream of the results) -> gradients of the call's tensors, where they do not come with the
    #: value
    gradients: Callable[[Call, Outputs, Outputs], Outputs]
    #: (call, rows, turned) -> the results of these rows, differentiable; `turned`: of these columns
    dense: Callable[[Call, slice, bool], Outputs]
    #: whether columns have results of their own
    two_sided: Callable[[Call], bool]
    #: call -> all of it, prepared, gradients up to the factor from upstream; or None
    prepared: Callable[[Call], Prepared | None] = lambda call: None
    #: the first kept outputs are gradients that come with the value, of these tensors
    made: tuple[int, ...] = ()
    #: so many of the last outputs are read by callers; they are not differentiable
    found: int = 0
    #: tensors whose memory may change before the backward pass
    copied: tuple[int, ...] = ()

    def __call__(self, problem: Problem, extras: tuple[Tensor | None, ...], settings: tuple[Any, ...]) -> Outputs:
        """The results and what callers read beside; what is not wanted is None, or an empty tensor under a compiler."""
        tensors, grad = (*problem.tensors(), *extras), torch.is_grad_enabled()
        if not torch.compiler.is_compiling() and not {type(t) for t in tensors} <= _PLAIN:
            tensors = tuple([t.as_subclass(Tensor) if is_named_only(type(t)) else t for t in tensors])
            named = Call.of(tensors, problem.offset, (problem.statics(), settings, ()))
            problem, extras = named.problem, named.extras
        if torch.compiler.is_compiling() or not _is_plain(problem.x):
            needs = tuple([grad and isinstance(t, Tensor) and t.requires_grad for t in tensors])
            if problem.symmetric:
                needs = (needs[0], False, *needs[2:])
            return self._read(self._by_operator(Call(problem.with_index(), extras, settings, needs)))
        needing, wanting, lazy = [], [], False
        for t in tensors:  # overhead dominates small batches: once
            need = False
            if t is not None and type(t) is not float:
                need, lazy = grad and t.requires_grad, lazy or t.is_neg()
                if need:
                    wanting.append(_unwrapped(t))
            needing.append(need)
        if problem.symmetric and needing[1]:  # y is x, whose gradient is the whole one
            needing[1] = False
            del wanting[1]
        call = Call(problem, extras, settings, tuple(needing))
        if forward_ad._current_level >= 0:
            _refuse_tangents(tensors)
        if lazy:  # the engine reads memory as it is
            tensors = tuple([t.resolve_neg() if isinstance(t, Tensor) else t for t in tensors])
            call = Call.of(tensors, problem.offset, call.statics)
        transformed = torch._C._are_functorch_transforms_active()
        on_cpu = problem.x.is_cpu and problem.engine.backend != "triton"  # whose backends prepare nothing
        if wanting and not on_cpu and not transformed:
            prepared = self.prepared(call)
            if prepared is not None:
                value = _apply_prepared(self, call, prepared, tensors, *wanting)
                return (value, *[None] * (self.results - 1 + self.found))
        if problem.lacks_index:
            return self(problem.with_index(), extras, settings)
        if transformed:
            return self._read(_Transformable.apply(self, problem.offset, call.statics, *tensors))
        if wanting:
            return _apply_eager(self, call, tensors, *wanting)
        with torch.no_grad():
            return self._read(_without_autocast(self.forward, call))

    def _read(self, outputs: Outputs) -> Outputs:
        """What callers read."""
        return (*outputs[: self.results], *outputs[len(outputs) - self.found :])

    def _by_operator(self, call: Call) -> Outputs:
        return tuple(OPERATORS[self.name][0](*operator_arguments(call)))

    def comes_with_value(self, kept: Outputs, needs: Sequence[bool]) -> bool:
        """Whether the forward pass has made the gradients: of the first tensor that wants one, and so of all."""
        for place, g in zip(self.made, kept):
            if needs[place]:
                return g is not None
        return False

    def scaled(self, needs: Sequence[bool], tensors: Sequence[Any], kept: Outputs, upstream: Tensor) -> Outputs:
        """Made gradients times what comes from upstream."""
        found: list[Tensor | None] = [None] * len(needs)
        for place, g in zip(self.made, kept):
            if needs[place]:
                found[place] = like(upstream * g, tensors[place])
        return tuple(found)

    def backward(self, call: Call, kept: Outputs, upstream: Outputs) -> Outputs:
        """The gradients of the call's tensors."""
        if self.comes_with_value(tuple(kept), call.needs):
            return self.scaled(call.needs, call.tensors, kept, upstream[0])
        return _without_autocast(self.gradients, call, kept, upstream)


#: Whether the backward pass that runs keeps its graph; before torch 2.1 nobody tells.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _may_give_away(upstream: Tensor) -> bool:
    """Whether what comes from upstream is 1, as it is of most losses, and nobody will ask for the gradients again."""
    if type(upstream) is not Tensor or not upstream.is_cpu or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and upstream.item() == 1.0 and not _keeps_graph()


#: What a tensor, or a number in its place, usually is.
_PLAIN = {Tensor, torch.nn.Parameter, float, type(None)}


def _is_plain(x: Tensor) -> bool:
    """Whether the engine may read a tensor's memory: no subclass, nothing that records or fakes operations."""
    kind = type(x)
    return (kind is Tensor or kind is torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0


def _without_autocast(function: Callable[..., Outputs], call: Call, *rest: Any) -> Outputs:
    """Calls what runs the engine: autocast would round the results of out=."""
    device = call.problem.x.device.type
    if not autocasts(device):  # entering it takes as long as a small operation
        return function(call, *rest)
    with torch.autocast(device, enabled=False):
        return function(call, *rest)


# ---- autograd ----


class _Eager(torch.autograd.Function):
    """The primitive in plain autograd, by the shortest way: overhead dominates small batches.

    Its inputs are the tensors that want gradients alone; its outputs the results, and what callers read beside.
    """

    @staticmethod
    def forward(ctx: Any, primitive: Primitive, call: Call, tensors: Outputs, *wanting: Tensor) -> Outputs:
        outputs, count = _without_autocast(primitive.forward, call), primitive.results
        ctx.numbers, tensors = _numbers_apart(tensors)
        if primitive.copied:
            tensors = with_copies(tensors, primitive.copied)
        ctx.save_for_backward(*outputs[count:], *tensors)
        ctx.constants = primitive, call.problem.offset, call.statics, len(outputs) - count
        places = _places(primitive.made, call.needs)
        ctx.made = places if places and outputs[count + places[0][0]] is not None else None
        ctx.set_materialize_grads(False)
        results = outputs[:count]
        if not primitive.found:
            return results
        found = outputs[-primitive.found :]
        ctx.mark_non_differentiable(*[t for t in found if t is not None])
        return (*results, *found)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Outputs:
        primitive, offset, statics, count = ctx.constants
        saved, asked = ctx.saved_tensors, ctx.needs_input_grad
        if ctx.made is not None and upstream[0] is not None and not torch.is_grad_enabled():
            factor, gradients = upstream[0], [None, None, None]
            away = _may_give_away(factor)
            for made, place in ctx.made:
                gradient, tensor = saved[made], saved[count + place]
                if not asked[len(gradients)]:  # perhaps fewer than requires_grad told
                    gradient = None
                elif not away or gradient.dtype is not tensor.dtype or gradient.shape != tensor.shape:
                    gradient = like(gradient if away else factor * gradient, tensor)
                gradients.append(gradient)
            return tuple(gradients)
        tensors, left = _with_numbers(ctx.numbers, saved[count:]), iter(asked[3:])
        needs = tuple([need and next(left) for need in statics[2]])
        found = _gradients(primitive, offset, (*statics[:2], needs), tensors, saved[:count], upstream)
        return (None, None, None, *[g for g, need in zip(found, statics[2]) if need])


def _numbers_apart(tensors: Outputs) -> tuple[tuple[float | None, ...], Outputs]:
    """The scale's and the bias's numbers, and the tensors, None in a number's place."""
    x, y, scale, bias, *rest = tensors
    numbers = scale if type(scale) is float else None, bias if type(bias) is float else None
    return numbers, (x, y, None if numbers[0] is scale else scale, None if numbers[1] is bias else bias, *rest)


def _with_numbers(numbers: tuple[float | None, ...], tensors: Sequence[Tensor | None]) -> Outputs:
    """... and back."""
    scale, bias = [t if number is None else number for number, t in zip(numbers, tensors[2:4])]
    return (*tensors[:2], scale, bias, *tensors[4:])


class _Prepared(torch.autograd.Function):
    """The same of what is prepared, which gives one result."""

    @staticmethod
    def forward(
        ctx: Any, primitive: Primitive, call: Call, prepared: Prepared, tensors: Outputs, *wanting: Tensor
    ) -> Tensor:
        value, *kept = _without_autocast(_run, call, prepared)
        ctx.numbers, tensors = _numbers_apart(tensors)
        if primitive.copied:  # by the kernels
            tensors = with_others(tensors, primitive.copied, [None] * len(primitive.copied))
        ctx.save_for_backward(*tensors, *kept)
        ctx.constants = primitive, prepared, call.problem.offset, call.statics, len(tensors)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Outputs:
        primitive, prepared, offset, statics, count = ctx.constants
        saved = ctx.saved_tensors
        tensors, kept = _with_numbers(ctx.numbers, saved[:count]), list(saved[count:])
        if torch.is_grad_enabled():  # create_graph=True: they have a graph of their own
            with torch.no_grad():
                if primitive.copied:
                    tensors = with_others(tensors, primitive.copied, prepared.copies(kept))
                call = Call.of(tensors, offset, statics)
                call.problem = call.problem.with_index()
                tensors, outputs = call.tensors, _without_autocast(primitive.forward, call)
            upstreams = (upstream, *[None] * (primitive.results - 1))
            found = _gradients(primitive, offset, statics, tensors, outputs[primitive.results :], upstreams)
        else:
            x, y = map(readable, tensors[:2])
            found = prepared.backward(x, y, *tensors[2:4], [readable(t) for t in kept], settled(upstream))
        return (None, None, None, None, *[g for g, need in zip(found, statics[2]) if need])


#: Function.apply without its search for functorch's wrappers, which takes as long as all checks of a loss's arguments:
#: none is active here, and those that outlive theirs are taken off before.
_apply_eager = super(torch.autograd.Function, _Eager).apply
_apply_prepared = super(torch.autograd.Function, _Prepared).apply
_unwrapped = torch._C._functorch.unwrap_if_dead


def _refuse_tangents(tensors: Sequence[Any]) -> None:
    """Forward mode is not there: a tangent would be lost in silence."""
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "contrastive_kernels: no forward-mode derivatives; torch.func.jacrev and backward() have them in reverse"
        )


def _run(call: Call, prepared: Prepared) -> Outputs:
    problem = call.problem
    return prepared.forward(problem.x, problem.y, problem.scale, problem.bias, call.extras)


@lru_cache(maxsize=256)
def _places(made: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[tuple[int, int], ...]:
    """Where the kept outputs hold the gradients of the tensors that want one, and which tensors these are."""
    wanted = [i for i, need in enumerate(needs) if need]
    return tuple([(made.index(i), i) for i in wanted]) if set(wanted) <= set(made) else ()


def _gradients(
    primitive: Primitive, offset: int | None, statics: Any, tensors: Sequence[Any], kept: Outputs, upstream: Outputs
) -> Outputs:
    """The gradients of the call's tensors, as far as they are needed."""
    results, needs = upstream[: primitive.results], statics[2]
    if results[0] is None and not any(g is not None for g in results):
        return (None,) * len(needs)
    if torch.is_grad_enabled():  # create_graph=True: they have a graph of their own
        return _Gradients.apply(primitive, offset, statics, len(kept), *tensors, *kept, *results)
    if primitive.comes_with_value(kept, needs):
        return primitive.scaled(needs, tensors, kept, results[0])
    results = tuple([None if g is None else settled(g) for g in results])
    return _without_autocast(primitive.gradients, Call.of(tensors, offset, statics), kept, results)


class _Transformable(torch.autograd.Function):
    """The primitive under torch.func: with setup_context, and a rule for vmap."""

    @staticmethod
    def forward(primitive: Primitive, offset: int | None, statics: Any, *tensors: Any) -> Outputs:
        return _without_autocast(primitive.forward, Call.of(tensors, offset, statics))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        primitive, offset, statics, *tensors = inputs
        kept = output[primitive.results :]
        ctx.mark_non_differentiable(*[t for t in kept if isinstance(t, Tensor)])
        ctx.set_materialize_grads(False)
        ctx.numbers = tuple([None if isinstance(t, Tensor) else t for t in tensors])
        ctx.save_for_backward(*[t if isinstance(t, Tensor) else None for t in tensors], *kept)
        ctx.constants = primitive, offset, statics

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Outputs:
        primitive, offset, statics = ctx.constants
        saved, count = ctx.saved_tensors, len(ctx.numbers)
        tensors = [number if t is None else t for t, number in zip(saved[:count], ctx.numbers)]
        needs = tuple([a and b for a, b in zip(statics[2], ctx.needs_input_grad[3:])])
        statics = (*statics[:2], needs)
        return (None, None, None, *_gradients(primitive, offset, statics, tensors, saved[count:], upstream))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return looped(_turn, info, in_dims, inputs)


def _turn(primitive: Primitive, offset: int | None, statics: Any, *tensors: Any) -> Outputs:
    """A turn of vmap, whose tensors require gradients of autograd outside: those of a batch do not tell."""
    (symmetric, *_), needs = statics[0], statics[2]
    grad = torch.is_grad_enabled()
    told = [grad and isinstance(t, Tensor) and t.requires_grad for t in tensors]
    needs = tuple([a or (b and not (symmetric and i == 1)) for i, (a, b) in enumerate(zip(needs, told))])
    found: Outputs = _Transformable.apply(primitive, offset, (*statics[:2], needs), *tensors)
    return found


class _Gradients(torch.autograd.Function):
    """The gradients as a function of the call's tensors, the kept outputs and what comes from upstream."""

    @staticmethod
    def forward(primitive: Primitive, offset: int | None, statics: Any, kept_count: int, *tensors: Any) -> Outputs:
        count = len(tensors) - kept_count - primitive.results
        kept, upstream = tensors[count : count + kept_count], tensors[count + kept_count :]
        return primitive.backward(Call.of(tensors[:count], offset, statics), kept, upstream)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        primitive, offset, statics, kept_count, *tensors = inputs
        ctx.numbers = tuple([None if isinstance(t, Tensor) else t for t in tensors])
        ctx.save_for_backward(*[t if isinstance(t, Tensor) else None for t in tensors])
        ctx.set_materialize_grads(False)
        ctx.constants = primitive, offset, statics, kept_count

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        primitive, offset, statics, kept_count = ctx.constants
        tensors = [n if t is None else t for t, n in zip(ctx.saved_tensors, ctx.numbers)]
        if all(v is None for v in cotangents):
            return (None,) * (4 + len(tensors))
        count = len(tensors) - kept_count - primitive.results
        given = (*tensors[:count], *tensors[count + kept_count :], *cotangents)
        found = SecondGradients.apply(primitive, offset, statics, *given)
        return (None, None, None, None, *found[:count], *(None,) * kept_count, *found[count:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return looped(_Gradients.apply, info, in_dims, inputs)


class SecondGradients(torch.autograd.Function):
    """The gradients of the gradients, block by block of rows; nothing beyond."""

    @staticmethod
    def forward(primitive: Primitive, offset: int | None, statics: Any, *tensors: Any) -> Outputs:
        count = (len(tensors) - primitive.results) // 2  # as many cotangents as tensors
        call = Call.of(tensors[:count], offset, statics)
        upstream, cotangents = tensors[count : count + primitive.results], tensors[count + primitive.results :]
        of_tensors, of_upstream = second_gradients(
            primitive.dense, primitive.two_sided(call), call, list(upstream), cotangents
        )
        return (*of_tensors, *of_upstream)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError("contrastive_kernels: third derivatives are not implemented")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return looped(SecondGradients.apply, info, in_dims, inputs)


# ---- torch.library ----
# Lists of tensors hold those that are there; which ones, a mask says: autograd does not look into lists with gaps.

#: A primitive's operators by its name, as :mod:`.registration` defines them: it, and its gradients.
OPERATORS: dict[str, tuple[Any, Any]] = {}

#: Dimensions of the empty tensor that stands for an output that is not wanted.
ABSENT_DIMS = 3


def operator_arguments(call: Call) -> tuple[list[Tensor], int | None, str]:
    """The call as its operator's arguments."""
    call = replace(call, problem=call.problem.with_numbers_as_tensors())
    present, mask = pack(call.tensors)
    return present, call.problem.offset, repr((call.statics, mask))


def pack(values: Sequence[Any]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors that are there, and which they are."""
    return [v for v in values if v is not None], tuple([int(v is not None) for v in values])


def empty_like_scores(like: Tensor) -> Tensor:
    """The empty tensor that stands for an output that is not wanted: no other has so many dimensions."""
    return torch.empty((0,) * ABSENT_DIMS, dtype=score_dtype(like.dtype), device=like.device)


# ---- gradients ----


def like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the dtype and shape of its tensor."""
    if gradient.dtype != tensor.dtype:
        gradient = gradient.to(tensor.dtype)
    return gradient if gradient.shape == tensor.shape else gradient.reshape(tensor.shape)
