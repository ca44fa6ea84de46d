"""Every operator on tensors without memory: on a GPU that is not there, with sizes that are symbols."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import contrastive_kernels as ck
from contrastive_kernels import backends
from contrastive_kernels.arguments.options import Engine
from contrastive_kernels.engine.matrix import Call, Problem
from contrastive_kernels.operators.label_loss import label_losses
from contrastive_kernels.operators.logsumexp import log_sum_exps
from contrastive_kernels.operators.multi_positive import multi_positive_losses
from contrastive_kernels.operators.shared import ABSENT_DIMS, operator_arguments, pack
from contrastive_kernels.operators.sigmoid_loss import sigmoid_losses
from contrastive_kernels.operators.softmax_loss import softmax_losses
from contrastive_kernels.operators.softmax_scaled import scaled_softmax_losses
from contrastive_kernels.operators.weighted_sum import printed, weighted_sum
from contrastive_kernels.panels.pairs import Pairs

OPERATORS = torch.ops.contrastive_kernels
DEVICE = torch.device("cuda:0")
BACKENDS = [name for name in ck.list_backends() if name != "cpu"]
PRIMITIVES = (
    softmax_losses, scaled_softmax_losses, sigmoid_losses, weighted_sum, log_sum_exps, label_losses,
    multi_positive_losses,
)  # fmt: skip
#: Of a weighted sum: c, log k and the excess.
RULE = printed((0.5, 0.7, 1.0))
#: N, M and D as compilers first see them, and a workspace: for all scores at once, a band, panels.
SIZES = (((60, 90, 32), 2**26), ((1000, 1200, 128), 2**26), ((9000, 7000, 300), 2**22))


@pytest.fixture(autouse=True)
def poison():
    """Off here: there is nothing to fill."""


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """A backend that serves the absent GPU, as the others do."""
    if request.param == "triton":
        pytest.importorskip("triton")
    for name in BACKENDS:
        monkeypatch.setattr(type(backends.get(name)), "why_not", lambda self, device, dtype: None)
    return request.param


@pytest.fixture(autouse=True)
def strict_symbols(monkeypatch):
    """Symbols refuse arithmetic with bools, as those of torch 2.11 do with "BooleanAtom not allowed"."""

    def strict(method: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: SymInt, other: Any) -> Any:
            if isinstance(other, (bool, torch.SymBool)):
                raise TypeError(f"arithmetic of the size {self} with a bool")
            return method(self, other)

        return checked

    for operation in ("add", "sub", "mul", "floordiv", "truediv", "mod"):
        for name in (f"__{operation}__", f"__r{operation}__"):
            monkeypatch.setattr(SymInt, name, strict(getattr(SymInt, name)))


class Fakes:
    """Fake tensors on the absent GPU."""

    def __init__(self) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes)

    def sizes(self, *hints: int) -> torch.Size:
        """As many symbols, that stand for these sizes."""
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(hints))
        return self.mode.from_tensor(torch.empty(hints, device="meta"), symbolic_context=context).shape

    def tensor(self, *sizes: int | SymInt, dtype: torch.dtype = torch.float32) -> Tensor:
        """One of these sizes."""
        with self.mode:
            return torch.empty(sizes, dtype=dtype, device=DEVICE)


def calls(
    fakes: Fakes, sizes: torch.Size, dtype: torch.dtype, engine: Engine
) -> Iterator[tuple[Any, Problem, tuple[Tensor | None, ...], tuple[Any, ...]]]:
    """Primitive, problem, extras and settings of every kind of call."""
    n, m, d = sizes
    x, same, other = (fakes.tensor(length, d, dtype=dtype) for length in (n, n, m))
    scale, bias, index = fakes.tensor(), fakes.tensor(), fakes.tensor(n, dtype=torch.int64)
    a, b, c, z = (fakes.tensor(n) for _ in range(4))
    square = Problem(x, same, scale, bias, offset=0, engine=engine)
    indexed = Problem(x, other, scale, bias, index=index, engine=engine)
    biased = Problem(x, other, scale, bias, offset=0, pairs=Pairs(col_bias=fakes.tensor(m)), engine=engine)
    several = replace(biased, offset=None, index=fakes.tensor(n, 3, dtype=torch.int64))
    views = Problem(x, x, scale, bias, index=index, symmetric=True, engine=engine)
    for reduction, gain in (("mean", None), ("sum", c), ("none", c)):
        yield (
            softmax_losses,
            square,
            (gain, None),
            (reduction, True, reduction != "sum", (0.1).hex() if reduction == "mean" else ""),
        )
        if engine.backend == "torch":  # a GPU's kernels have no scales by row
            yield scaled_softmax_losses, square, (gain, a, b), (reduction, reduction == "mean", "")
        yield softmax_losses, indexed, (gain, None), (reduction, False, True, "")
        yield softmax_losses, views, (gain, None), (reduction, False, True, "")
        yield softmax_losses, several, (gain, a), (reduction, False, True, "")
        yield sigmoid_losses, square, (gain,), (reduction,)
        yield weighted_sum, square, (a, b, gain, gain, None, None), (True, reduction, False, RULE)
        yield weighted_sum, indexed, (a, None, gain, None, z, None), (False, reduction, False, RULE)
    for cols in (False, True):
        yield log_sum_exps, biased, (), (cols,)
    guide = Pairs().with_guide((fakes.tensor(n, 8), fakes.tensor(m, 8)), a)
    of_both = Pairs().with_guide((fakes.tensor(n, 8), fakes.tensor(n, 8)), a, b)
    yield log_sum_exps, replace(biased, pairs=guide), (), (False,)
    for reduction in ("mean", "none"):
        yield softmax_losses, replace(square, pairs=of_both), (c, None), (reduction, True, reduction == "sum", "")
        yield softmax_losses, replace(indexed, pairs=guide), (gain, None), (reduction, False, True, "")
    ids = Pairs(row_ids=fakes.tensor(n, dtype=torch.int64), col_ids=fakes.tensor(m, dtype=torch.int64))
    for reduction in ("mean", "none"):
        yield (
            softmax_losses,
            Problem(x, other, scale, bias, index=index, pairs=ids, engine=engine),
            (c, None),
            (reduction, False, True, (0.1).hex()),
        )
        yield sigmoid_losses, Problem(x, other, scale, bias, pairs=ids, engine=engine), (None,), (reduction,)
    own = Pairs(row_ids=ids.row_ids, col_ids=ids.row_ids)
    for reduction, inside in (("sum", False), ("none", False), ("sum", True)):
        for rows in (
            Problem(x, other, scale, bias, pairs=ids, engine=engine),
            Problem(x, x, scale, bias, symmetric=True, pairs=own, engine=engine),
        ):
            yield label_losses, rows, (a, b), (reduction, inside)
            yield multi_positive_losses, rows, (a,), (reduction,)


def is_fixed(fakes: Fakes, size: int | SymInt) -> bool:
    """Whether the compiled graph would serve this size alone."""
    symbol = size.node._expr
    equalities = (guard.expr for guard in fakes.shapes.guards if isinstance(guard.expr, sympy.Eq))
    return symbol in fakes.shapes.replacements or any(symbol in equality.free_symbols for equality in equalities)


@pytest.mark.parametrize("hints, workspace", SIZES, ids=["all", "band", "panels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_differentiable_operators(backend, dtype, hints, workspace):
    """Gradients have their tensors' symbolic shapes, and no batch size becomes a number."""
    fakes = Fakes()
    sizes = fakes.sizes(*hints)
    tried = set()
    for primitive, problem, extras, settings in calls(fakes, sizes, dtype, Engine(backend, workspace)):
        tried.add(primitive)
        tensors = (*problem.tensors(), *extras)
        for wanted in (True, False):
            needs = [wanted and t is not None and t.is_floating_point() for t in tensors]
            needs[1] &= not problem.symmetric
            arguments = operator_arguments(Call(problem, extras, settings, tuple(needs)))
            outputs = getattr(OPERATORS, primitive.name).default(*arguments)
            assert all(v.device == DEVICE for v in outputs)
            if not wanted:
                continue
            results, kept = outputs[: primitive.results], outputs[primitive.results :]
            present, mask = pack([None if v.dim() == ABSENT_DIMS else v for v in results])
            gradients = getattr(OPERATORS, f"{primitive.name}_gradients").default(
                *arguments, list(kept), present, list(mask)
            )
            made = [(g.shape, g.dtype) for g, need in zip(gradients, needs) if need]
            assert made == [(t.shape, t.dtype) for t, need in zip(tensors, needs) if need]
    assert tried == set(PRIMITIVES) - (set() if backend == "torch" else {scaled_softmax_losses})
    assert not any(is_fixed(fakes, size) for size in sizes[:2])
    assert backend == "torch" or not is_fixed(fakes, sizes[2])  # scores on a chip: D does not matter either


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_searches_and_checked_indices(dtype):
    fakes = Fakes()
    n, m, d = sizes = fakes.sizes(900, 700, 64)
    x, y, params = fakes.tensor(n, d, dtype=dtype), fakes.tensor(m, d, dtype=dtype), fakes.tensor(3)
    exclude, ids, seed = (fakes.tensor(*shape, dtype=torch.int64) for shape in ((n, 1), (n,), (1,)))
    low, high = fakes.tensor(n), fakes.tensor(n)
    found = (
        OPERATORS.best_column.default(x, y, params, exclude, None, None, None, "torch", 2**22),
        OPERATORS.best_column.default(x, y, params, exclude, ids, None, seed, "torch", 2**22),
        *OPERATORS.count_ranks.default(x, y, exclude, low, high, "torch", 2**22),
        OPERATORS.count_lower.default(x, y, params, low, exclude, [None, ids, None, None, None], False, "torch", 2**22),
        OPERATORS.checked_index.default(ids, m, True),
    )
    best = OPERATORS.best_alike.default(x, y, params, ids, ids, False, "torch", 2**22)
    assert best.shape == (n,) and best.dtype == params.dtype
    for columns in found:
        assert columns.shape == (n,) and columns.dtype == torch.int64 and columns.device == DEVICE
    assert not any(is_fixed(fakes, size) for size in sizes)


def test_these_are_all_operators():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "contrastive_kernels::" in name}
    differentiable = {primitive.name for primitive in PRIMITIVES}
    searches = {"best_alike", "best_column", "best_columns", "count_lower", "count_ranks", "checked_index"}
    assert names == differentiable | {f"{name}_gradients" for name in differentiable} | searches
