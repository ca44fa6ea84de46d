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

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._library import define
from ..engine.gradients import Gradients
from ..engine.problem import Problem
from ..panels.size import score_dtype
from .second import second_gradients

__all__ = [
    "Call",
    "Outputs",
    "Primitive",
    "empty_like_scores",
    "gradients_of",
    "like",
    "params_of",
    "register",
    "saved_dtype",
    "whole_gradients",
    "whole_scores",
]

#: Tensors that a problem itself has: x, y, scale, bias, index, col_bias.
PROBLEM_TENSORS = 6


@dataclass(slots=True)  # frozen ones take three times as long to make
class Call:
    """One call of a primitive: the problem, the tensors beside it, its settings, and which tensors want gradients."""

    problem: Problem
    extras: tuple[Tensor | None, ...]
    settings: tuple[Any, ...]
    needs: tuple[bool, ...]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All of them, the problem's first."""
        return (*self.problem.tensors(), *self.extras)

    @property
    def statics(self) -> tuple[Any, ...]:
        """All that is no tensor, but for the offset."""
        return self.problem.statics(), self.settings, self.needs

    @classmethod
    def of(cls, tensors: Sequence[Any], offset: int | None, statics: tuple[Any, ...]) -> Call:
        """The call of these tensors and statics."""
        of_problem, settings, needs = statics
        problem = Problem.of(tuple(tensors[:PROBLEM_TENSORS]), offset, of_problem)
        return cls(problem, tuple(tensors[PROBLEM_TENSORS:]), settings, needs)

    @property
    def wants(self) -> tuple[bool, bool, bool]:
        """Whether gradients of x, of y, and of scale or bias are wanted."""
        return self.needs[0], self.needs[1], self.needs[2] or self.needs[3]


Outputs = tuple[Any, ...]


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
    #: the first kept outputs are gradients that come with the value, of these tensors
    made: tuple[int, ...] = ()
    #: so many of the last outputs are read by callers; they are not differentiable
    found: int = 0

    def __call__(self, problem: Problem, extras: tuple[Tensor | None, ...], settings: tuple[Any, ...]) -> Outputs:
        """The results and what callers read beside; what is not wanted is None, or an empty tensor under a compiler."""
        tensors = (*problem.tensors(), *extras)
        grad = torch.is_grad_enabled()
        needs = tuple([grad and isinstance(t, Tensor) and t.requires_grad for t in tensors])
        if problem.symmetric:  # y is x, whose gradient is the whole one
            needs = (needs[0], False, *needs[2:])
        call = Call(problem, extras, settings, needs)
        if torch.compiler.is_compiling() or not _is_plain(problem.x):
            return self._read(self._by_operator(call))
        if torch._C._are_functorch_transforms_active():
            return self._read(_Transformable.apply(self, problem.offset, call.statics, *tensors))
        if True in needs:
            return _Eager.apply(self, call, *[t for t, need in zip(tensors, needs) if need])
        with torch.no_grad():
            return self._read(_without_autocast(self.forward, call))

    def _read(self, outputs: Outputs) -> Outputs:
        """What callers read."""
        return (*outputs[: self.results], *outputs[len(outputs) - self.found :])

    def _by_operator(self, call: Call) -> Outputs:
        call = replace(call, problem=call.problem.with_numbers_as_tensors())
        present, mask = _pack(call.tensors)
        return tuple(_OPERATORS[self.name][0](present, call.problem.offset, repr((call.statics, mask))))

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
        if self.comes_with_value(kept, call.needs):
            return self.scaled(call.needs, call.tensors, kept, upstream[0])
        return _without_autocast(self.gradients, call, kept, upstream)


#: Whether the backward pass that runs keeps its graph; before torch 2.1 nobody tells.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _may_give_away(upstream: Tensor) -> bool:
    """Whether what comes from upstream is 1, as it is of most losses, and nobody will ask for the gradients again."""
    if type(upstream) is not Tensor or not upstream.is_cpu or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and upstream.item() == 1.0 and not _keeps_graph()


def _is_plain(x: Tensor) -> bool:
    """Whether the engine may read a tensor's memory: no subclass, nothing that records or fakes operations."""
    kind = type(x)
    return (kind is Tensor or kind is torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0


def _without_autocast(function: Callable[..., Outputs], call: Call, *rest: Any) -> Outputs:
    """Calls what runs the engine: autocast would round the results of out=."""
    device = call.problem.x.device.type
    if not torch.is_autocast_enabled(device):  # entering it takes as long as a small operation
        return function(call, *rest)
    with torch.autocast(device, enabled=False):
        return function(call, *rest)


# ---- autograd ----


class _Eager(torch.autograd.Function):
    """The primitive in plain autograd, by the shortest way: overhead dominates small batches.

    Its inputs are the tensors that want gradients alone; its outputs the results, and what callers read beside.
    """

    @staticmethod
    def forward(ctx: Any, primitive: Primitive, call: Call, *wanting: Tensor) -> Outputs:
        outputs = _without_autocast(primitive.forward, call)
        results, kept = outputs[: primitive.results], outputs[primitive.results :]
        values = (*kept, *call.tensors)
        ctx.numbers = numbers = {i: v for i, v in enumerate(values) if type(v) is float}
        ctx.save_for_backward(*([None if type(v) is float else v for v in values] if numbers else values))
        ctx.constants = primitive, call.problem.offset, call.statics, len(kept)
        places = _places(primitive.made, call.needs)
        ctx.made = places if places and kept[places[0][0]] is not None else None
        ctx.set_materialize_grads(False)
        if not primitive.found:
            return results
        found = kept[-primitive.found :]
        ctx.mark_non_differentiable(*[t for t in found if t is not None])
        return (*results, *found)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Outputs:
        primitive, offset, statics, count = ctx.constants
        saved, numbers, asked = ctx.saved_tensors, ctx.numbers, ctx.needs_input_grad
        if ctx.made is not None and upstream[0] is not None and not torch.is_grad_enabled():
            gradients = [None, None]
            as_they_are = _may_give_away(upstream[0])
            for made, place in ctx.made:
                if asked[len(gradients)]:  # perhaps fewer than requires_grad told
                    tensor = saved[count + place]
                    gradients.append(_scaled(saved[made], numbers.get(made), upstream[0], as_they_are, tensor))
                else:
                    gradients.append(None)
            return tuple(gradients)
        values = [numbers.get(i, v) for i, v in enumerate(saved)]
        left = iter(asked[2:])
        needs = tuple([need and next(left) for need in statics[2]])
        found = _gradients(primitive, offset, (*statics[:2], needs), values[count:], values[:count], upstream)
        return (None, None, *[g for g, need in zip(found, statics[2]) if need])


@lru_cache(maxsize=256)
def _places(made: tuple[int, ...], needs: tuple[bool, ...]) -> tuple[tuple[int, int], ...]:
    """Where the kept outputs hold the gradients of the tensors that want one, and which tensors these are."""
    wanted = [i for i, need in enumerate(needs) if need]
    return tuple([(made.index(i), i) for i in wanted]) if set(wanted) <= set(made) else ()


def _scaled(made: Tensor | None, number: float | None, upstream: Tensor, as_it_is: bool, tensor: Tensor) -> Tensor:
    """A made gradient, perhaps a number, times what comes from upstream; out of place where the graph is retained."""
    if number is not None or made is None:
        if as_it_is:
            return tensor.new_full(tensor.shape, number)
        made = upstream * number
    elif not as_it_is:
        made = upstream * made
    return like(made, tensor)


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
    return _without_autocast(primitive.gradients, Call.of(tensors, offset, statics), kept, results)


class _Transformable(torch.autograd.Function):
    """The primitive under torch.func: with setup_context, and a rule for vmap."""

    @staticmethod
    def forward(primitive: Primitive, offset: int | None, statics: Any, *tensors: Any) -> Outputs:
        outputs = _without_autocast(primitive.forward, Call.of(tensors, offset, statics))
        return tuple([_tensor(v, tensors[0]) for v in outputs])

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
        return _loop(_Transformable.apply, info, in_dims, inputs)


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
        found = _SecondGradients.apply(primitive, offset, statics, *given)
        return (None, None, None, None, *found[:count], *(None,) * kept_count, *found[count:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _loop(_Gradients.apply, info, in_dims, inputs)


class _SecondGradients(torch.autograd.Function):
    """The gradients of the gradients, block by block of rows; nothing beyond."""

    @staticmethod
    def forward(primitive: Primitive, offset: int | None, statics: Any, *tensors: Any) -> Outputs:
        count = (len(tensors) - primitive.results) // 2  # as many cotangents as tensors
        call = Call.of(tensors[:count], offset, statics)
        upstream, cotangents = tensors[count : count + primitive.results], tensors[count + primitive.results :]
        of_tensors, of_upstream = second_gradients(primitive, call, list(upstream), cotangents)
        return (*of_tensors, *of_upstream)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError("contrastive_kernels: third derivatives are not implemented")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _loop(_SecondGradients.apply, info, in_dims, inputs)


def _loop(function: Callable[..., Any], info: Any, in_dims: Any, inputs: Any) -> Any:
    """vmap as a loop over the batch: what is not a tensor of the batch is the same in every turn."""
    turns = []
    for i in range(info.batch_size):
        one = [v.select(d, i) if isinstance(d, int) else v for v, d in zip(inputs, in_dims)]
        turns.append(function(*one))
    stacked = [None if parts[0] is None else torch.stack(parts) for parts in zip(*turns)]
    return tuple(stacked), tuple(None if v is None else 0 for v in stacked)


# ---- torch.library ----
# Lists of tensors hold those that are there; which ones, a mask says: autograd does not look into lists with gaps.


def register(primitive: Primitive) -> Primitive:
    """Defines the operators that stand for a primitive under a compiler: its forward pass and its gradients."""
    returns = ", ".join(["Tensor"] * primitive.outputs)
    forward = define(
        f"{primitive.name}(Tensor[] tensors, SymInt? offset, str statics) -> ({returns})",
        lambda *a: _all_tensors(primitive.fake(_unpacked_call(*a)), a[0][0]),
        lambda *a: _all_tensors(primitive.forward(_unpacked_call(*a)), a[0][0]),
    )
    gradients = define(
        f"{primitive.name}_gradients(Tensor[] tensors, SymInt? offset, str statics, Tensor[] kept, "
        "Tensor[] upstream, int[] came) -> Tensor[]",
        lambda *a: _gradient_shapes(_unpacked_call(*a[:3])),
        lambda *a: _all_tensors(
            primitive.backward(_unpacked_call(*a[:3]), _absent(a[3]), _unpack(a[4], a[5])), a[0][0]
        ),
    )

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.present, ctx.offset, ctx.statics = len(inputs[0]), inputs[1], inputs[2]
        kept = output[primitive.results :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[0], *kept)

    def backward(ctx: Any, *upstream: Any) -> Any:
        present, kept = list(ctx.saved_tensors[: ctx.present]), list(ctx.saved_tensors[ctx.present :])
        results, came = _pack(upstream[: primitive.results])
        if not results:
            return None, None, None
        needs = _unpacked_call(present, ctx.offset, ctx.statics).needs
        made = gradients(present, ctx.offset, ctx.statics, kept, results, list(came))
        _, mask = _parse(ctx.statics)
        return [g if need else None for g, need, there in zip(made, needs, mask) if there], None, None

    torch.library.register_autograd(f"contrastive_kernels::{primitive.name}", backward, setup_context=setup)
    _OPERATORS[primitive.name] = forward, gradients
    return primitive


_OPERATORS: dict[str, tuple[Any, Any]] = {}

_parse = lru_cache(maxsize=1024)(ast.literal_eval)


def _pack(values: Sequence[Any]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors that are there, and which they are."""
    return [v for v in values if v is not None], tuple([int(v is not None) for v in values])


def _unpack(present: Sequence[Tensor], mask: Sequence[int]) -> Outputs:
    """... and back."""
    found = iter(present)
    return tuple([next(found) if there else None for there in mask])


def _unpacked_call(present: Sequence[Tensor], offset: int | None, statics: str) -> Call:
    of_call, mask = _parse(statics)
    return Call.of(_unpack(present, mask), offset, of_call)


def _all_tensors(outputs: Outputs, like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors: an empty one stands for what is not wanted."""
    return tuple([empty_like_scores(like) if t is None else _tensor(t, like) for t in outputs])


def _tensor(value: Any, like: Tensor) -> Any:
    """A number as a tensor beside the others."""
    return torch.full((), value, dtype=torch.float64, device=like.device) if isinstance(value, float) else value


def _absent(outputs: Sequence[Tensor]) -> Outputs:
    """... and back."""
    return tuple([None if t.dim() == 1 and t.shape[0] == 0 else t for t in outputs])


def _gradient_shapes(call: Call) -> tuple[Tensor, ...]:
    wanted = zip(call.tensors, call.needs)
    return tuple([torch.empty_like(t) if need else empty_like_scores(call.problem.x) for t, need in wanted])


def empty_like_scores(like: Tensor) -> Tensor:
    """The empty tensor that stands for an output that is not wanted."""
    return torch.empty(0, dtype=score_dtype(like.dtype), device=like.device)


# ---- gradients ----


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that wait for the upstream factor: float16 would lose small ones to underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def gradients_of(call: Call, made: Gradients) -> Outputs:
    """What a gradient pass made, as gradients of the call's tensors."""
    dscale, dbias = (None, None) if made.dparams is None else made.dparams
    found = (made.dx, made.dy, dscale, dbias, *(None,) * (len(call.needs) - 4))
    wanted = zip(found, call.tensors, call.needs)
    return tuple([like(g, t) if need and g is not None else None for g, t, need in wanted])


def like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the dtype and shape of its tensor."""
    if gradient.dtype != tensor.dtype:
        gradient = gradient.to(tensor.dtype)
    return gradient if gradient.shape == tensor.shape else gradient.reshape(tensor.shape)


def params_of(call: Call, dparams: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """dL/dscale and dL/dbias, as far as they are wanted, of their sums [2]."""
    if dparams is None:
        return None, None
    dscale, dbias = dparams.unbind()
    return dscale if call.needs[2] else None, dbias if call.needs[3] else None


def whole_scores(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Both operands in the dtype of the scores, and all scores [N, M]."""
    x, y = problem.x, problem.y
    if x.dtype.itemsize == 2:
        x = x.float()
        y = x if problem.symmetric else y.float()
    return x, y, x.mm(y.t())


def whole_gradients(call: Call, weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dx and dy from the weights [N, M] of all pairs, positives included."""
    want_x, want_y, _ = call.wants
    return weights.mm(y) if want_x else None, weights.t().mm(x) if want_y else None
