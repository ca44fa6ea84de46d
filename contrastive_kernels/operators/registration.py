"""A primitive's operators in torch.library, which stand for it under a compiler: opaque, with the same gradients."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._library import define
from .shared import (
    ABSENT_DIMS,
    OPERATORS,
    Call,
    Outputs,
    Primitive,
    SecondGradients,
    empty_like_scores,
    pack,
)

__all__ = ["register"]


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
        results, kept = output[: primitive.results], output[primitive.results :]
        ctx.mark_non_differentiable(*kept, *[t for t in results if _is_absent(t)])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[0], *kept)

    def backward(ctx: Any, *upstream: Any) -> Any:
        saved = list(ctx.saved_tensors)  # once: who keeps them elsewhere gives them once
        present, kept = saved[: ctx.present], saved[ctx.present :]
        results, came = pack(upstream[: primitive.results])
        if not results:
            return None, None, None
        needs = _unpacked_call(present, ctx.offset, ctx.statics).needs
        made = gradients(present, ctx.offset, ctx.statics, kept, results, list(came))
        _, mask = _parse(ctx.statics)
        return [g if need else None for g, need, there in zip(made, needs, mask) if there], None, None

    def setup_second(ctx: Any, inputs: Any, output: Any) -> None:
        present, ctx.offset, ctx.statics, kept, upstream, ctx.came = inputs
        ctx.present, ctx.kept = len(present), len(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*present, *upstream)

    def second(ctx: Any, cotangents: Sequence[Tensor | None]) -> Any:
        """Of the gradients: what runs outside a compiler, as under a mode that counts operations, has them too."""
        saved = list(ctx.saved_tensors)
        of_call, mask = _parse(ctx.statics)
        tensors, upstream = _unpack(saved[: ctx.present], mask), _unpack(saved[ctx.present :], ctx.came)
        found = SecondGradients.apply(primitive, ctx.offset, of_call, *tensors, *upstream, *cotangents)
        of_tensors = [g for g, there in zip(found, mask) if there]
        of_upstream = [g for g, there in zip(found[len(mask) :], ctx.came) if there]
        return of_tensors, None, None, [None] * ctx.kept, of_upstream, None

    name = f"contrastive_kernels::{primitive.name}"
    torch.library.register_autograd(name, backward, setup_context=setup)
    torch.library.register_autograd(f"{name}_gradients", second, setup_context=setup_second)
    OPERATORS[primitive.name] = forward, gradients
    return primitive


_parse = lru_cache(maxsize=1024)(ast.literal_eval)


def _unpack(present: Sequence[Tensor], mask: Sequence[int]) -> Outputs:
    """... and back."""
    found = iter(present)
    return tuple([next(found) if there else None for there in mask])


def _unpacked_call(present: Sequence[Tensor], offset: int | None, statics: str) -> Call:
    of_call, mask = _parse(statics)
    return Call.of(_unpack(present, mask), offset, of_call)


def _all_tensors(outputs: Outputs, like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors that share no memory: an empty one stands for what is not wanted."""
    found = [empty_like_scores(like) if t is None else t for t in outputs]
    return tuple([t if t.dim() else t.clone() for t in found])


def _absent(outputs: Sequence[Tensor]) -> Outputs:
    """... and back."""
    return tuple([None if _is_absent(t) else t for t in outputs])


def _is_absent(output: Tensor) -> bool:
    return output.dim() == ABSENT_DIMS


def _gradient_shapes(call: Call) -> tuple[Tensor, ...]:
    wanted = zip(call.tensors, call.needs)
    return tuple([t.new_empty(t.shape) if need else empty_like_scores(call.problem.x) for t, need in wanted])
